"""What generate, relay, status, resolve and prune need to be allowed to do, held against what this role may."""

from typing import Any, Final

from outbox.finding import Finding, fault, ok

# Through the catalogs: by name, has_table_privilege itself fails where the schema's USAGE is missing.
WANTED: Final = """
SELECT format('%s ON %s outbox.%I', w.privilege, CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.relname)
  FROM unnest($1::text[], $2::text[]) AS w (relation, privilege)
  JOIN pg_namespace n ON n.nspname = 'outbox'
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.relation
 WHERE NOT CASE c.relkind WHEN 'S' THEN has_sequence_privilege(c.oid, w.privilege)
                          ELSE has_table_privilege(c.oid, w.privilege) END
"""

# What generate, relay, status, resolve and prune do; `init` alone needs more.
RIGHTS: Final = (
    ("schema_version", "SELECT"),
    ("definition", "SELECT"), ("definition", "INSERT"),
    ("edition", "SELECT"), ("edition", "INSERT"), ("edition", "UPDATE"),
    ("report", "SELECT"), ("report", "INSERT"), ("report", "UPDATE"),
    ("email", "SELECT"), ("email", "INSERT"), ("email", "UPDATE"), ("email_id_seq", "USAGE"),
    ("delivery", "SELECT"), ("delivery", "INSERT"), ("delivery", "UPDATE"),
    ("attempt", "SELECT"), ("attempt", "INSERT"), ("attempt", "DELETE"),
    ("relay", "SELECT"), ("relay", "INSERT"), ("relay", "UPDATE"),
    ("route", "SELECT"), ("route", "INSERT"), ("route", "UPDATE"), ("route", "DELETE"),
    ("pace", "SELECT"), ("pace", "INSERT"), ("pace", "UPDATE"),
    ("allowance", "SELECT"), ("allowance", "INSERT"), ("allowance", "UPDATE"), ("allowance", "DELETE"),
    ("pruned", "SELECT"), ("pruned", "INSERT"), ("pruned", "UPDATE"),
    ("schedule", "SELECT"), ("schedule", "INSERT"), ("schedule", "UPDATE"),
    ("operation", "SELECT"), ("operation", "INSERT"),
)  # fmt: skip


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
    lacking = [] if usage else ["USAGE ON SCHEMA outbox"]
    lacking += [row[0] for row in await connection.fetch(WANTED, *map(list, zip(*RIGHTS, strict=True)))]
    if lacking:
        grants = "; ".join(f"GRANT {right} TO {role}" for right in lacking)
        return fault("database.rights", f"role {role} lacks {', '.join(lacking)}", grants)
    return ok("database.rights", f"role {role} may do what generate, relay, status, resolve and prune do")
