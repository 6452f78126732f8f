"""Least privilege: which role may do what in the schema, and the grants that make it so.

ROLES is the one table of rights: `outbox init --roles` grants it, and `outbox doctor` compares a role with it. EXECUTE
on outbox's functions is revoked from PUBLIC, so that only these roles may call them. The user grants what the queries
in the settings read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import asyncpg

from outbox.database.connection import Connection
from outbox.database.locks import take_init_lock
from outbox.database.schema import PIN_PATH, require_current
from outbox.errors import OutboxError


class Right(NamedTuple):
    """Privilege on a table, on some of its columns, on a sequence, or (EXECUTE) on a function of the schema."""

    relation: str
    privilege: str
    columns: str = ""

    @property
    def clause(self) -> str:
        """Return the part of a GRANT between that word and TO."""
        kind = "SEQUENCE" if self.relation.endswith("_seq") else "TABLE"
        kind = "FUNCTION" if self.privilege == "EXECUTE" else kind
        columns = f" ({', '.join(self.columns.split())})" if self.columns else ""
        return f"{self.privilege}{columns} ON {kind} outbox.{self.relation}"


@dataclass(frozen=True, slots=True)
class Role:
    """Group of rights: its purpose, and all rights that it needs."""

    does: str
    rights: tuple[Right, ...]


def _role(does: str, *rights: tuple[str, ...]) -> Role:
    return Role(does, tuple(Right(*right) for right in rights))


_LOOKS: Final = (
    *((table, "SELECT") for table in (
        "schema_version", "definition", "edition", "delivery", "attempt", "relay", "route", "pace", "allowance",
        "pruned", "operation", "pause", "schedule", "suppression", "bounce", "rule", "failover", "unreached", "waiver",
        "failure", "undecided_failure", "delivery_outcome", "report_outcome", "missing_report", "edition_outcome",
        "needs_attention",
    )),
    ("report", "SELECT", "id edition recipient_key title created_at"),
    ("digest_item", "SELECT", "report address name digest"),
    ("suppressed", "EXECUTE"),
)  # fmt: skip

_UNSUBSCRIBES: Final = (("unsubscribe", "EXECUTE"), ("resubscribe", "EXECUTE"))

# To lock a row FOR UPDATE or FOR SHARE takes the right to update some column of it: those who only lock have a column
# that decides nothing (`email.traceparent`, `delivery.doubted_at`).
ROLES: Final[Mapping[str, Role]] = {
    # An application that enqueues its own mail. `put` runs as the owner and checks all arguments; `enqueue` runs as its
    # caller, which needs EXECUTE on the functions that it calls. These neither read nor write a table.
    "outbox_enqueue": _role(
        "puts emails into the outbox",
        *((function, "EXECUTE") for function in (
            "put", "enqueue", "mailbox", "address_of", "mailboxes_header", "header_field", "header_items", "text_field",
            "phrase", "encoded_words", "folded", "listed", "one_line", "check_one_line", "body_part",
            "quoted_lines", "default_fields",
        )),
    ),
    # Writes reports and cannot read them again; finds by key what is made.
    "outbox_generate": _role(
        "makes reports: generate, digest, preview",
        ("schema_version", "SELECT"),
        ("definition", "SELECT"),
        ("definition", "INSERT", "report cadence covers timezone"),
        ("edition", "SELECT"),
        ("edition", "INSERT", "report period starts_at ends_at"),
        ("edition", "UPDATE", "expected completed_at looked_at may_be_empty"),
        ("unreached", "SELECT"),
        ("unreached", "INSERT", "edition recipient_key reason"),
        ("unreached", "UPDATE", "reason"),
        ("unreached", "DELETE"),
        ("waiver", "SELECT"),
        ("report", "SELECT", "id edition recipient_key title created_at"),
        ("report", "INSERT", "edition recipient_key token title html"),
        ("email", "SELECT", "id key report"),
        ("email", "INSERT", "id key report sender recipient message_id message traceparent made_by"),
        ("email_id_seq", "USAGE"),
        ("delivery", "INSERT", "email due_at send_before priority route state settled_at"),
        ("attempt", "INSERT", "email attempt verdict reply"),  # why an email is cancelled from the start
        ("suppression", "SELECT"),
        ("rule", "SELECT"),
        ("digest_item", "SELECT"),
        ("digest_item", "INSERT", "report address name link"),
        ("digest_item", "UPDATE", "digest"),
        ("pause", "SELECT"),  # what is held back is in no digest
        ("relay", "SELECT"),  # after a failover it waits until they have reported what they sent
        ("failover", "SELECT"),
        ("adopt_email", "EXECUTE"),  # one that a failover left without its report
        ("remove_unused_edition", "EXECUTE"),
        ("route_of", "EXECUTE"),
        ("suppressed", "EXECUTE"),
    ),
    # Carries messages, and cannot change one. It inserts emails only after a failover that lost them.
    "outbox_relay": _role(
        "sends: relay, and records its progress in its own rows",
        ("schema_version", "SELECT"),
        ("email", "SELECT"),
        ("email", "INSERT", "key sender recipient message_id message"),
        ("delivery", "SELECT"),
        ("delivery", "INSERT", "email due_at marked_at settled_at doubted_at relay attempt state route"),
        ("delivery", "UPDATE", "due_at marked_at settled_at doubted_at relay attempt withdrawn orphaned state paused"),
        ("delivery", "UPDATE", "send_before"),  # puts it back into its bounds, where a row is quarantined
        ("attempt", "SELECT"),
        ("attempt", "INSERT"),
        ("relay", "SELECT"),
        ("relay", "INSERT", "host pid backend_pid version timeline route instance"),
        ("relay", "UPDATE", "ended_at stale trouble sent last_reply instance told_epoch"),
        ("failover", "SELECT"),
        ("failover", "INSERT", "one"),
        ("failover", "UPDATE"),
        ("route", "SELECT"),
        ("route", "INSERT"),
        ("route", "UPDATE"),
        ("route", "DELETE"),
        ("pace", "SELECT"),
        ("pace", "INSERT", "route"),
        ("pace", "UPDATE", "next_at found_rate found_at resumes_at silence_s said"),
        ("allowance", "SELECT"),
        ("allowance", "INSERT"),
        ("allowance", "UPDATE", "emails"),
        ("allowance", "DELETE"),
        ("pause", "SELECT"),
        ("rule", "SELECT"),
        ("suppression", "SELECT"),
        ("edition", "SELECT"),
        ("edition", "UPDATE", "completed_at"),
        ("report", "SELECT", "id edition recipient_key"),
        ("unreached", "SELECT"),
        ("waiver", "SELECT"),
        ("failure", "SELECT"),
        ("report_outcome", "SELECT"),
        ("missing_report", "SELECT"),
        ("needs_attention", "SELECT"),
        ("digest_item", "SELECT", "report address digest"),
        ("schedule", "SELECT"),
        ("schedule", "INSERT"),
        ("schedule", "UPDATE"),
        ("bounce_tokens", "EXECUTE"),
        ("message_bytes_max", "EXECUTE"),
        ("suppressed", "EXECUTE"),
    ),
    # Sees recipients, times and outcomes, never content: no pages, no messages, no tokens.
    "outbox_read": _role(
        "looks: status, watch, list, audit, schedule",
        *_LOOKS,
        ("email", "SELECT", "id key report sender recipient message_id traceparent made_by created_at"),
    ),
    # Looks, and decides under its own name about what was made; reads the messages that it decides about.
    "outbox_operate": _role(
        "decides: show, retry, cancel, resolve, waive, pause, resume, suppress, mark-done",
        *_LOOKS,
        ("email", "SELECT"),
        ("email", "UPDATE", "traceparent"),
        ("delivery", "UPDATE", "due_at settled_at doubted_at relay withdrawn orphaned state send_before paused"),
        ("definition", "INSERT", "report cadence covers timezone"),
        ("edition", "INSERT", "report period starts_at ends_at"),
        ("edition", "UPDATE", "expected completed_at done_elsewhere_at done_elsewhere_by done_elsewhere_why"),
        ("attempt", "INSERT"),
        ("operation", "INSERT", "who what target why emails"),
        ("remove_unused_edition", "EXECUTE"),
        ("operation", "UPDATE", "emails"),  # counted as a decision about many goes on
        ("pause", "INSERT", "report who why"),
        ("pause", "DELETE"),
        ("suppression", "INSERT", "address report reason who why"),
        ("suppression", "DELETE"),
        ("waiver", "INSERT", "edition recipient_key who why"),
        ("waiver", "DELETE"),
        ("bounce", "UPDATE", "counts"),  # bounces before an address was taken off the list count no more
    ),
    # Reads what anybody may write, so it can do little: add to trails and to the suppression list, take nothing off.
    "outbox_bounce": _role(
        "reads what came back: bounce",
        ("schema_version", "SELECT"),
        ("email", "SELECT", "id key recipient message_id"),
        ("delivery", "SELECT", "email attempt"),
        ("attempt", "INSERT", "email attempt verdict reply"),
        ("bounce", "SELECT"),
        ("bounce", "INSERT", "email message kind status proves counts"),
        ("suppression", "SELECT"),
        ("suppression", "INSERT", "address reason who why email"),
        ("bounce_email", "EXECUTE"),
        ("settle_bounced", "EXECUTE"),
    ),
    # Opens a page by its token, finds earlier editions of its recipient, and keeps the board's sessions.
    "outbox_web": _role(
        "shows report pages: web",
        ("schema_version", "SELECT"),
        ("report", "SELECT", "id edition recipient_key token title html created_at"),
        ("edition", "SELECT", "id report starts_at"),
        ("email", "SELECT", "report recipient"),  # whose page it is, for a proxy that says who the visitor is
        ("digest_item", "SELECT", "report address"),
        ("board_session", "SELECT", "id name expires_at"),
        ("board_session", "INSERT", "id name expires_at"),
        ("board_session", "DELETE"),
        *_UNSUBSCRIBES,
    ),
    # A web application that answers unsubscribe links: it calls these with the token of a link, and reads nothing.
    "outbox_unsubscribe": _role("answers unsubscribe links in your own application", *_UNSUBSCRIBES),
    "outbox_prune": _role(
        "removes bodies by age: prune",
        ("schema_version", "SELECT"),
        ("email", "SELECT"),
        ("email", "UPDATE", "message"),
        ("report", "SELECT", "id created_at html"),
        ("report", "UPDATE", "html"),
        ("delivery", "SELECT"),
        ("delivery", "UPDATE", "doubted_at"),
        ("attempt", "SELECT"),
        ("attempt", "DELETE"),
        ("digest_item", "SELECT", "report digest"),
        ("pruned", "SELECT"),
        ("pruned", "INSERT", "what up_to"),
        ("pruned", "UPDATE", "up_to at"),
    ),
}  # fmt: skip


def together(roles: Iterable[str]) -> list[Right]:
    """Return the rights of all these roles, each once."""
    found: dict[tuple[str, str], list[str] | None] = {}
    for role in roles:
        for relation, privilege, columns in ROLES[role].rights:
            known = found.setdefault((relation, privilege), [])
            if not columns or known is None:
                found[relation, privilege] = None
            else:
                found[relation, privilege] = list(dict.fromkeys([*known, *columns.split()]))
    return [Right(*right, " ".join(columns or ())) for right, columns in found.items()]


# Roles belong to the whole server: two databases may be set up at once, and the advisory lock is one database's.
CREATE: Final = """
DO $$ BEGIN CREATE ROLE {role} NOLOGIN; EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$
"""

# A role of that name with another use: as a user, with powers of its own, or as the owner of the schema,
# whose rights a REVOKE would take.
TAKEN: Final = """
SELECT rolname FROM pg_roles r
 WHERE rolname = ANY ($1::text[])
   AND (rolcanlogin OR rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls
        OR EXISTS (SELECT FROM pg_namespace WHERE nspname = 'outbox' AND nspowner = r.oid)
        OR EXISTS (SELECT FROM pg_class c WHERE c.relnamespace = to_regnamespace('outbox') AND c.relowner = r.oid)
        OR EXISTS (SELECT FROM pg_proc p WHERE p.pronamespace = to_regnamespace('outbox') AND p.proowner = r.oid))
 ORDER BY 1
"""

# A role that grants a right on another owner's object only gets a warning, and nothing is granted.
OWNER: Final = """
SELECT pg_get_userbyid(owner) FROM (
    SELECT nspowner AS owner FROM pg_namespace WHERE nspname = 'outbox'
    UNION SELECT relowner FROM pg_class WHERE relnamespace = to_regnamespace('outbox') AND relkind IN ('r', 'S', 'v')
    UNION SELECT proowner FROM pg_proc WHERE pronamespace = to_regnamespace('outbox')
) AS owners WHERE NOT pg_has_role(owner, 'USAGE') LIMIT 1
"""


async def grant_roles(connection: Connection) -> None:
    """Make the roles that are missing, and give each its rights and no others.

    Idempotent, safe on all servers at once, and one commit: the rights of running relays never lapse. Rights that an
    older version or a person granted before are revoked.

    Raises:
        OutboxError: this role may not, or a role of such a name has another use. The sentence says the fix.
        SchemaError: there is no schema, or it is another version's.

    """
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(PIN_PATH)
        await take_init_lock(connection)
        await require_current(connection)
        await _refuse_what_is_taken(connection)
        me = await connection.fetchval("SELECT current_user")
        new = await missing_roles(connection)
        try:
            for name in new:
                await connection.execute(CREATE.format(role=name))
        except asyncpg.InsufficientPrivilegeError as error:
            made = "; ".join(f"CREATE ROLE {name} NOLOGIN" for name in new)
            raise OutboxError(
                f"Role {me} may not create roles; let one that may say: {made}; then run `outbox init --roles` again."
            ) from error
        await connection.execute(";\n".join(statements()))


async def renew_grants(connection: Connection) -> None:
    """Renew the rights of existing roles, if they had rights in this database before.

    Called at the end of an upgrade, in its transaction, so that the rights of running relays never lapse. If this role
    may not grant, nothing changes; see `are_renewed`.
    """
    if not await are_used(connection):
        return
    try:
        async with connection.transaction():
            await _refuse_what_is_taken(connection)
            missing = await missing_roles(connection)
            await connection.execute(";\n".join(statements([name for name in ROLES if name not in missing])))
    except (OutboxError, asyncpg.InsufficientPrivilegeError):
        return


async def missing_roles(connection: Connection) -> list[str]:
    """Return the names of ROLES that do not exist on this server."""
    present = {row["rolname"] for row in await connection.fetch("SELECT rolname FROM pg_roles")}
    return [name for name in ROLES if name not in present]


async def _refuse_what_is_taken(connection: Connection) -> None:
    taken = await connection.fetchval(TAKEN, list(ROLES))
    if taken is not None:
        raise OutboxError(
            f"Role {taken} is there already and is not just a group of rights (it logs in, owns or administers "
            f"something); `outbox init --roles` needs the name: ALTER ROLE {taken} RENAME TO another."
        )
    owner = await connection.fetchval(OWNER)
    if owner is not None:
        me = await connection.fetchval("SELECT current_user")
        raise OutboxError(f"Role {me} does not own the outbox schema; run `outbox init --roles` as its owner, {owner}.")


def statements(names: Iterable[str] = ROLES) -> list[str]:
    """Return the SQL that revokes all rights of each role in the schema and grants those that it needs."""
    found = ["REVOKE ALL ON ALL FUNCTIONS IN SCHEMA outbox FROM PUBLIC"]
    for name in names:
        found += [
            f"REVOKE ALL ON ALL TABLES IN SCHEMA outbox FROM {name}",  # columns too (PostgreSQL docs, REVOKE)
            f"REVOKE ALL ON ALL SEQUENCES IN SCHEMA outbox FROM {name}",
            f"REVOKE ALL ON ALL FUNCTIONS IN SCHEMA outbox FROM {name}",
            f"REVOKE ALL ON SCHEMA outbox FROM {name}",
            f"GRANT USAGE ON SCHEMA outbox TO {name}",
            *(f"GRANT {right.clause} TO {name}" for right in ROLES[name].rights),
        ]
    return found


USED: Final = """
SELECT EXISTS (SELECT FROM pg_roles r JOIN pg_namespace n ON n.nspname = 'outbox'
                WHERE r.rolname = ANY ($1::text[]) AND has_schema_privilege(r.oid, n.oid, 'USAGE'))
"""


async def are_used(connection: Connection) -> bool:
    """Return True if the roles have rights in this database, so that an upgrade has to renew them."""
    return bool(await connection.fetchval(USED, list(ROLES)))


async def are_renewed(connection: Connection) -> bool:
    """Return True if each of the roles has the rights of this version."""
    if await missing_roles(connection):
        return False
    for name, role in ROLES.items():
        if await lacking(connection, name, role.rights):
            return False
    return True


# Through the catalogs: by name, has_table_privilege fails if USAGE on the schema is missing.
LACKING: Final = """
SELECT c.relname, w.privilege, coalesce(string_agg(a.attname, ' ' ORDER BY place), '')
  FROM unnest($1::text[], $2::text[], $3::text[]) AS w (relation, privilege, columns)
  JOIN pg_namespace n ON n.nspname = 'outbox'
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.relation AND w.privilege <> 'EXECUTE'
  LEFT JOIN LATERAL unnest(string_to_array(nullif(w.columns, ''), ' ')) WITH ORDINALITY AS u (name, place) ON true
  LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = u.name
 WHERE NOT CASE WHEN c.relkind = 'S' THEN has_sequence_privilege($4, c.oid, w.privilege)
                WHEN w.columns = '' THEN has_table_privilege($4, c.oid, w.privilege)
                ELSE coalesce(has_column_privilege($4, c.oid, a.attnum, w.privilege), true) END
 GROUP BY c.relname, w.privilege, w.columns
 UNION ALL
SELECT p.proname, w.privilege, ''
  FROM unnest($1::text[], $2::text[]) AS w (relation, privilege)
  JOIN pg_namespace n ON n.nspname = 'outbox'
  JOIN pg_proc p ON p.pronamespace = n.oid AND p.proname = w.relation
 WHERE w.privilege = 'EXECUTE' AND NOT has_function_privilege($4, p.oid, 'EXECUTE')
 ORDER BY 1, 2
"""


async def lacking(connection: Connection, role: str, rights: Iterable[Right]) -> list[Right]:
    """Return which of the rights that role lacks."""
    columns = map(list, zip(*rights, strict=True))
    return [Right(*row) for row in await connection.fetch(LACKING, *columns, role)]
