"""What the commands need to be allowed to do, held against what this role may.

The rights are `roles`': a role that is in some of its groups needs what those do, any other what all of them do.
"""

from typing import Any, Final

from outbox.finding import Finding, fault, ok
from outbox.roles import ROLES, Right, together

# Through the catalogs: by name, has_table_privilege itself fails where the schema's USAGE is missing.
WANTED: Final = """
SELECT c.relname, w.privilege, coalesce(string_agg(a.attname, ' ' ORDER BY place), '')
  FROM unnest($1::text[], $2::text[], $3::text[]) AS w (relation, privilege, columns)
  JOIN pg_namespace n ON n.nspname = 'outbox'
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.relation
  LEFT JOIN LATERAL unnest(string_to_array(nullif(w.columns, ''), ' ')) WITH ORDINALITY AS u (name, place) ON true
  LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = u.name
 WHERE NOT CASE WHEN c.relkind = 'S' THEN has_sequence_privilege(c.oid, w.privilege)
                WHEN w.columns = '' THEN has_table_privilege(c.oid, w.privilege)
                ELSE coalesce(has_column_privilege(c.oid, a.attnum, w.privilege), true) END
 GROUP BY c.relname, w.privilege, w.columns ORDER BY c.relname, w.privilege
"""

UNCALLABLE: Final = """
SELECT w.name FROM unnest($1::text[]) AS w (name)
  JOIN pg_namespace n ON n.nspname = 'outbox'
  JOIN pg_proc p ON p.pronamespace = n.oid AND p.proname = w.name
 WHERE NOT has_function_privilege(p.oid, 'EXECUTE')
"""

GROUPS: Final = """
SELECT rolname FROM pg_roles WHERE rolname = ANY ($1::text[]) AND pg_has_role(oid, 'USAGE')
   AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
   AND NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'outbox' AND pg_has_role(nspowner, 'USAGE'))
"""


async def look_at_rights(connection: Any) -> Finding:
    """Which right is missing, and the GRANT; before there is a schema, whether this role may make it."""
    role, database, read_only, usage, create = await connection.fetchrow(
        "SELECT quote_ident(current_user), quote_ident(current_database()),"
        " current_setting('default_transaction_read_only') = 'on',"
        " (SELECT has_schema_privilege(oid, 'USAGE') FROM pg_namespace WHERE nspname = 'outbox'),"
        " has_database_privilege(current_database(), 'CREATE')"
    )
    if read_only:
        mend = f"ALTER DATABASE {database} RESET default_transaction_read_only, or the same of the role"
        return fault("database.rights", "sessions are read-only (default_transaction_read_only is on)", mend)
    if usage is None:  # no schema yet
        if create:
            return ok("database.rights", f"role {role} may create the schema")
        return fault(
            "database.rights",
            f"role {role} may not create the schema",
            f"GRANT CREATE ON DATABASE {database} TO {role}, or run `outbox init` as its owner",
        )
    return await _look_at_groups(connection, role, usage=usage)


async def _look_at_groups(connection: Any, role: str, *, usage: bool) -> Finding:
    groups = {row[0] for row in await connection.fetch(GROUPS, list(ROLES))}
    found = [name for name in ROLES if name in groups]
    rights = together(found or ROLES)
    wanted = [right for right in rights if right.privilege != "EXECUTE"]
    lacking = [] if usage else ["USAGE ON SCHEMA outbox"]
    functions = {right.relation: right for right in rights if right.privilege == "EXECUTE"}
    lacking += [functions[row[0]].clause for row in await connection.fetch(UNCALLABLE, list(functions))]
    lacking += [Right(*row).clause for row in await connection.fetch(WANTED, *map(list, zip(*wanted, strict=True)))]
    if lacking:
        grants = "; ".join(f"GRANT {right} TO {role}" for right in lacking)
        mend = "run `outbox init --roles` as the schema's owner" if found else grants
        return fault("database.rights", f"role {role} lacks {', '.join(lacking)}", mend)
    does = f"{', '.join(found)} may" if found else "all commands do"
    return ok("database.rights", f"role {role} may do what {does}")
