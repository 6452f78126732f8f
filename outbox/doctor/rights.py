"""Rights that the commands need, compared with what this role may do.

The rights are those of `roles`: a role that is in some of its groups needs theirs, any other those of all groups.
"""

from typing import Final

from outbox.database.connection import Connection
from outbox.database.roles import ROLES, lacking, together
from outbox.doctor.finding import Finding, ok, problem

GROUPS: Final = """
SELECT rolname FROM pg_roles WHERE rolname = ANY ($1::text[]) AND pg_has_role(oid, 'USAGE')
   AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
   AND NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'outbox' AND pg_has_role(nspowner, 'USAGE'))
"""


async def look_at_rights(connection: Connection) -> Finding:
    """Name the rights that are missing, with the GRANT; before there is a schema, say whether this role may make it."""
    role, database, read_only, usage, create = await connection.fetchrow(
        "SELECT quote_ident(current_user), quote_ident(current_database()),"
        " current_setting('default_transaction_read_only') = 'on',"
        " (SELECT has_schema_privilege(oid, 'USAGE') FROM pg_namespace WHERE nspname = 'outbox'),"
        " has_database_privilege(current_database(), 'CREATE')"
    )
    if read_only:
        fix = f"ALTER DATABASE {database} RESET default_transaction_read_only, or the same of the role"
        return problem("database.rights", "sessions are read-only (default_transaction_read_only is on)", fix)
    if usage is None:  # no schema yet
        if create:
            return ok("database.rights", f"role {role} may create the schema")
        return problem(
            "database.rights",
            f"role {role} may not create the schema",
            f"GRANT CREATE ON DATABASE {database} TO {role}, or run `outbox init` as its owner",
        )
    return await _look_at_groups(connection, role, usage=usage)


async def _look_at_groups(connection: Connection, role: str, *, usage: bool) -> Finding:
    groups = {row[0] for row in await connection.fetch(GROUPS, list(ROLES))}
    found = [name for name in ROLES if name in groups]
    wanted = together(found or ROLES)
    missing = [] if usage else ["USAGE ON SCHEMA outbox"]
    me = await connection.fetchval("SELECT current_user")
    missing += [right.clause for right in await lacking(connection, me, wanted)]
    if missing:
        grants = "; ".join(f"GRANT {right} TO {role}" for right in missing)
        fix = "run `outbox init --roles` as the schema's owner" if found else grants
        return problem("database.rights", f"role {role} lacks {', '.join(missing)}", fix)
    does = f"{', '.join(found)} may" if found else "all commands do"
    return ok("database.rights", f"role {role} may do what {does}")
