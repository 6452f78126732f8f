"""Checks of other roles: which may create objects on the search path, connect, or hold outbox's locks.

None of them can change what outbox's own statements do. They can delay them, or make the user's queries run foreign
code with the rights of this role.
"""

import re
from typing import Final

from outbox.database.connection import TRUSTED_PATH, Connection
from outbox.database.locks import BUCKET_LOCKS, INIT_LOCK, PRUNE_LOCK, RELAY_LOCKS, SELFTEST_LOCKS, describe_session
from outbox.database.roles import ROLES, are_used
from outbox.doctor.finding import Finding, note, ok, problem

SHOWN_MAX: Final = 10

# Roles that may create objects in a schema of the path, or create a schema that the path names and that does not exist
# ($2). The owner of a schema can do anything in it, so a role that has the schema on its path trusts the owner.
CREATORS: Final = """
WITH given AS (
    SELECT 'SCHEMA ' || quote_ident(n.nspname) AS place, n.nspowner AS owner, a.grantee
      FROM pg_namespace n, aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) AS a
     WHERE n.nspname = ANY ($1::text[]) AND a.privilege_type = 'CREATE'
    UNION ALL
    SELECT 'DATABASE ' || quote_ident(d.datname), d.datdba, a.grantee
      FROM pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) AS a
     WHERE d.datname = current_database() AND $2 AND a.privilege_type = 'CREATE'
)
SELECT g.place, string_agg(CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE g.grantee::regrole::text END, ', '
                           ORDER BY g.grantee) AS grantees
  FROM given g LEFT JOIN pg_roles r ON r.oid = g.grantee
 WHERE g.grantee <> g.owner AND NOT coalesce(r.rolsuper, false)
   AND r.rolname IS DISTINCT FROM current_user AND r.rolname IS DISTINCT FROM 'pg_database_owner'
 GROUP BY g.place ORDER BY g.place DESC
"""

SCHEMAS: Final = "SELECT array_agg(nspname::text) FROM pg_namespace WHERE nspname = ANY ($1::text[])"

_NAME: Final = re.compile(r'"((?:[^"]|"")*)"|([^\s,]+)')


def names_of(path: str, role: str) -> list[str]:
    """Return the schemas that a search path names, in its order, with `$user` as the role's own."""
    names = [quoted.replace('""', '"') if quoted else plain.lower() for quoted, plain in _NAME.findall(path)]
    return [role if name == "$user" else name for name in names if name and not name.startswith("pg_")]


async def look_at_path(connection: Connection) -> Finding:
    """Report schemas on this role's own path in which others may create objects (CVE-2018-1058)."""
    check = "database.path"
    role, path = await connection.fetchval("SELECT current_user::text"), connection.user_search_path
    names = names_of(path, role)
    there = await connection.fetchval(SCHEMAS, names) or []
    found = [
        (row["place"], row["grantees"]) for row in await connection.fetch(CREATORS, names, len(there) < len(names))
    ]
    if not found:
        return ok(check, f"no other role may create objects on the path of role {role} ({path})")
    listed = "; ".join(f"{grantees} may create in {_lower(place)}" for place, grantees in found)
    return note(
        check,
        f"on the search path of role {role} ({path}) {listed}, so the queries in the settings may call functions and "
        f"operators of others; outbox's own statements use only {TRUSTED_PATH}",
        "; ".join(f"REVOKE CREATE ON {place} FROM {grantees}" for place, grantees in found),
    )


def _lower(place: str) -> str:
    kind, _, name = place.partition(" ")
    return f"{kind.lower()} {name}"


PUBLIC_CONNECTS: Final = """
SELECT quote_ident(d.datname) FROM pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) AS a
 WHERE d.datname = current_database() AND a.grantee = 0 AND a.privilege_type = 'CONNECT'
"""


async def look_at_connect(connection: Connection) -> Finding:
    """Report if every role of the server may connect although outbox has roles of its own."""
    check = "database.connect"
    if not await are_used(connection):
        return ok(check, "outbox's roles are not in use here (`outbox init --roles` makes them)")
    database = await connection.fetchval(PUBLIC_CONNECTS)
    if database is None:
        return ok(check, "only roles that were granted CONNECT may connect")
    return note(
        check,
        "every role of the server may connect to the database; even a role without any other right can use up "
        "connections, take advisory locks and send notifications, and so delay the fleet",
        f"GRANT CONNECT ON DATABASE {database} TO {', '.join(ROLES)} and all other roles that need it, then "
        f"REVOKE CONNECT ON DATABASE {database} FROM PUBLIC",
    )


# A lock is legitimate for roles that may do what it protects: register a relay, make a report, prune one, change the
# schema. Every role that uses outbox may run the self-test.
SQUATTERS: Final = """
WITH kind (name, number, relation, privilege) AS (
    VALUES ('relay', $1::bigint, 'relay', 'INSERT'), ('generate', $2, 'report', 'INSERT'),
           ('prune', $3, 'report', 'UPDATE'), ('init', $4, NULL, NULL), ('self-test', $5, NULL, NULL)
)
SELECT k.name AS kind, l.pid, a.usesysid::regrole::text AS role, a.application_name AS application,
       count(*) AS locks
  FROM pg_locks l JOIN kind k ON k.number = l.classid::bigint
  CROSS JOIN LATERAL pg_stat_get_activity(l.pid) AS a
  JOIN pg_namespace n ON n.nspname = 'outbox'
  LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = k.relation
 WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND NOT CASE k.name
           WHEN 'init' THEN has_database_privilege(a.usesysid, l.database, 'CREATE')
                            OR pg_has_role(a.usesysid, n.nspowner, 'USAGE')
           WHEN 'self-test' THEN has_schema_privilege(a.usesysid, n.oid, 'USAGE')
           ELSE has_any_column_privilege(a.usesysid, c.oid, k.privilege) END
 GROUP BY k.name, l.pid, a.usesysid, a.application_name ORDER BY l.pid, k.name
"""


async def look_at_locks(connection: Connection) -> Finding:
    """Report sessions that hold advisory locks of outbox without the right to do what these protect."""
    check = "database.locks"
    numbers = (RELAY_LOCKS, BUCKET_LOCKS, PRUNE_LOCK, INIT_LOCK, SELFTEST_LOCKS)
    rows = await connection.fetch(SQUATTERS, *numbers)
    if not rows:
        return ok(check, "only roles of outbox hold its advisory locks")
    listed = ", ".join(f"{describe_session(row)} holds {row['locks']:,} of {row['kind']}" for row in rows[:SHOWN_MAX])
    more = f", and {len(rows) - SHOWN_MAX} more" if len(rows) > SHOWN_MAX else ""
    return problem(
        check,
        f"sessions of roles without rights in outbox hold its advisory locks: {listed}{more}",
        "end them with pg_terminate_backend(pid), and REVOKE CONNECT on the database from their roles",
    )
