"""Decisions that nothing is owed to a recipient for an edition, and the reasons why a recipient has no report.

A person who decides that a recipient without a report is owed nothing writes a waiver, which `generate` obeys
(`generate.waiver`). A waiver also settles a recipient whose email is dead or expired.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from outbox import suggestions
from outbox.database.connection import Connection
from outbox.database.plans import EMAIL_OF_REPORT
from outbox.database.values import storable
from outbox.operations.wording import state_label
from outbox.settings import command_of

# What may be waived: no report was made, or its email can no longer be sent by itself. A complete look (`expected`) has
# recorded all recipients without a report, so that another key is a typing error, or that of a new recipient.
# $1 report, $2 period, $3 keys of recipients, $4 the person, $5 the reason, $6 the target of the operation.
WAIVE: Final = f"""
WITH named AS MATERIALIZED (
    SELECT e.id AS edition, e.expected, n.key FROM outbox.edition e, unnest($3::text[]) AS n (key)
     WHERE e.report = $1 AND e.period = $2
), waived AS (
    INSERT INTO outbox.waiver (edition, recipient_key, who, why)
    SELECT n.edition, n.key, $4, $5
      FROM named n
      LEFT JOIN LATERAL (SELECT id FROM outbox.report
                          WHERE edition = n.edition AND recipient_key = n.key OFFSET 0) r ON true
      {EMAIL_OF_REPORT}
     WHERE d.state IN ('dead', 'expired')
        OR r.id IS NULL AND (n.expected IS NULL OR EXISTS (
               SELECT FROM outbox.unreached u WHERE u.edition = n.edition AND u.recipient_key = n.key OFFSET 0))
     ORDER BY n.key
    ON CONFLICT (edition, recipient_key) DO NOTHING
    RETURNING recipient_key
), operation AS (
    INSERT INTO outbox.operation (who, what, target, why, emails)
    SELECT $4, 'waive', $6, $5, count(*) FROM waived HAVING count(*) > 0
)
SELECT recipient_key FROM waived
"""

UNDO: Final = """
WITH undone AS (
    DELETE FROM outbox.waiver w USING outbox.edition e
     WHERE e.report = $1 AND e.period = $2 AND w.edition = e.id AND w.recipient_key = ANY ($3::text[])
    RETURNING w.recipient_key
), reopened AS (
    UPDATE outbox.edition SET completed_at = NULL
     WHERE report = $1 AND period = $2 AND completed_at IS NOT NULL AND done_elsewhere_at IS NULL
       AND EXISTS (SELECT FROM undone)
), operation AS (
    INSERT INTO outbox.operation (who, what, target, why, emails)
    SELECT $4, 'waive --undo', $6, $5, count(*) FROM undone HAVING count(*) > 0
)
SELECT recipient_key FROM undone
"""

# Facts that explain why a waiver was not written, or (undo) not taken back.
STANDING: Final = f"""
SELECT n.key, e.id IS NOT NULL AS has_edition, r.id IS NOT NULL AS has_report, d.state,
       EXISTS (SELECT FROM outbox.unreached u
                WHERE u.edition = e.id AND u.recipient_key = n.key OFFSET 0) AS is_unreached,
       i.report IS NOT NULL AND i.digest IS NULL AS is_collected, w.who
  FROM unnest($3::text[]) AS n (key)
  LEFT JOIN outbox.edition e ON e.report = $1 AND e.period = $2
  LEFT JOIN LATERAL (SELECT id FROM outbox.report WHERE edition = e.id AND recipient_key = n.key OFFSET 0) r ON true
  {EMAIL_OF_REPORT}
  LEFT JOIN outbox.waiver w ON w.edition = e.id AND w.recipient_key = n.key
"""


@dataclass(frozen=True, slots=True)
class Owed:
    """Recipient of an edition, named by the key of the email that they would get: `progress/2026-W48/42`."""

    report: str
    period: str
    recipient: str

    @classmethod
    def parse(cls, key: str) -> "Owed | None":
        """Return the recipient that a key names; None if it is not the key of a report's email."""
        report, _, rest = key.partition("/")
        period, _, recipient = rest.partition("/")
        return cls(report, period, recipient) if report and period and recipient and storable(key) == key else None

    @property
    def key(self) -> str:
        """Return the key of the email."""
        return f"{self.report}/{self.period}/{self.recipient}"


async def waive(
    connection: Connection, recipients: Sequence[Owed], *, who: str, why: str, undo: bool = False
) -> tuple[list[Owed], dict[str, str]]:
    """Decide that nothing is owed to these recipients, or `undo` that decision.

    Return the recipients for whom that changed something, and a sentence for each other one, by key. All of it is one
    commit, with an operation for each edition.
    """
    done: list[Owed] = []
    left: dict[str, str] = {}
    async with connection.transaction(isolation="read_committed"):
        for report, period in sorted({(one.report, one.period) for one in recipients}):
            keys = [one.recipient for one in dict.fromkeys(recipients) if (one.report, one.period) == (report, period)]
            words = (storable(who), storable(why), _target(report, period, keys))
            rows = await connection.fetch(UNDO if undo else WAIVE, report, period, keys, *words)
            changed = {row["recipient_key"] for row in rows}
            done += [Owed(report, period, key) for key in keys if key in changed]
            rest = [key for key in keys if key not in changed]
            for row in await connection.fetch(STANDING, report, period, rest):
                one = Owed(report, period, row["key"])
                left[one.key] = _why_not(one, row, undo=undo)
    return done, left


def _target(report: str, period: str, keys: Sequence[str]) -> str:
    return " ".join(Owed(report, period, key).key for key in keys[:100]) + (" …" if len(keys) > 100 else "")  # noqa: PLR2004


def _why_not(one: Owed, row: Any, *, undo: bool) -> str:
    if not row["has_edition"]:
        return f"{one.key}: there is no edition {one.report} {one.period}; `outbox status` shows the latest."
    if undo:
        return f"{one.key}: there is no waiver to undo."
    if row["who"] is not None:
        return f"{one.key}: {row['who']} has decided already that nothing is owed."
    if not row["has_report"] and not row["is_unreached"]:
        again = suggestions.command(*command_of(one.report), suggestions.option("--period", one.period))
        unknown = "the latest run of generate did not name this recipient"
        return f"{one.key}: {unknown}; check the key, or run `{again}` first."
    return _why_not_its_email(one, row)


def _why_not_its_email(one: Owed, row: Any) -> str:
    if row["is_collected"]:
        return f"{one.key} has a report that waits for the next digest; nothing was changed."
    match row["state"]:
        case "pending" | "sending":
            hint = "use `outbox cancel` to stop it"
        case "in_doubt":
            hint = "use `outbox resolve`"
        case None | "dead" | "expired":
            return f"{one.key} changed at this moment; run this again."
        case _:
            hint = "nothing is owed already"
    return f"{one.key} has an email, which is {state_label(row['state'])}; {hint}."


# Recipients of an edition who have no report and no waiver, by the latest look.
UNREACHED: Final = """
SELECT recipient_key FROM outbox.missing_report
 WHERE edition = (SELECT id FROM outbox.edition WHERE report = $1 AND period = $2) ORDER BY recipient_key
"""


async def unreached_of(connection: Connection, report: str, period: str) -> list[Owed]:
    """Return the recipients of an edition who have no report and no waiver."""
    rows = await connection.fetch(UNREACHED, storable(report), storable(period))
    return [Owed(report, period, row["recipient_key"]) for row in rows]


ABSENCE: Final = """
SELECT e.id AS edition, left(u.reason, 2000) AS reason, w.who, w.why, w.at,
       (SELECT r.id FROM outbox.report r WHERE r.edition = e.id AND r.recipient_key = $3) AS report
  FROM outbox.edition e
  LEFT JOIN outbox.unreached u ON u.edition = e.id AND u.recipient_key = $3
  LEFT JOIN outbox.waiver w ON w.edition = e.id AND w.recipient_key = $3
 WHERE e.report = $1 AND e.period = $2
"""


async def read_absence(connection: Connection, key: str) -> str | None:
    """Return why there is no email of this key, with what can be done; None if nothing is known of it."""
    one = Owed.parse(key)
    row = None if one is None else await connection.fetchrow(ABSENCE, one.report, one.period, one.recipient)
    if one is None or row is None or row["report"] is not None or (row["reason"] is None and row["who"] is None):
        return None
    if row["who"] is not None:
        because = f", because {row['why']}" if row["why"] else ""
        undo = suggestions.command("waive", "--undo", keys=[key])
        return f"{key} has no email: {row['who']} decided that nothing is owed{because}; `{undo}` takes that back."
    again = suggestions.command(*command_of(one.report), suggestions.option("--period", one.period))
    waive = suggestions.command("waive", keys=[key])
    return (
        f"{key} has no report: {row['reason'].rstrip('.')}; correct that and run `{again}`, "
        f"or decide with `{waive}` that nothing is owed."
    )
