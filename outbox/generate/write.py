"""Transaction that writes reports: report, email and delivery are committed together or not at all."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ARRAY, BigInteger, LargeBinary, Text, bindparam, text

from outbox.database.connection import CHANNEL
from outbox.database.plans import BATCH_BY_INDEX
from outbox.database.values import storable
from outbox.errors import OutboxError
from outbox.generate import digest
from outbox.generate.report_builder import CollectedReport, MadeReport, NewReport
from outbox.tracing import made_by

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

BATCH_MAX: Final = 100  # rows per transaction: short enough that a failover loses little work


# A row that is there already comes back from no RETURNING, so its email is not inserted either.
# A recipient on the suppression list has a report like every other, and an email that is cancelled from the start.
# Keys are inserted in their order, so that two batches with common keys wait for each other instead of deadlocking.
ENQUEUE: Final = text("""
WITH made AS (
    SELECT * FROM unnest(:recipient_keys, :tokens, :titles, :htmls, :emails, :keys, :senders, :recipients,
                         :message_ids, :messages)
        AS m (recipient_key, token, title, html, email, key, sender, recipient, message_id, message)
), report AS (
    INSERT INTO outbox.report (edition, recipient_key, token, title, html)
    SELECT CAST(:edition AS integer), recipient_key, token, title, html FROM made ORDER BY recipient_key
    ON CONFLICT (edition, recipient_key) DO NOTHING
    RETURNING id, recipient_key
), email AS (
    INSERT INTO outbox.email (id, key, report, sender, recipient, message_id, message, traceparent, made_by)
    SELECT m.email, m.key, r.id, m.sender, m.recipient, m.message_id, m.message, CAST(:traceparent AS text),
           CAST(:made_by AS text)
      FROM report r JOIN made m USING (recipient_key) ORDER BY m.email
    ON CONFLICT (key) DO NOTHING
    RETURNING id
), fresh AS MATERIALIZED (
    SELECT e.id, outbox.suppressed(m.recipient, n.report) AS suppressed,
           outbox.route_of(n.report, m.recipient) AS route
      FROM email e JOIN made m ON m.email = e.id
      JOIN outbox.edition n ON n.id = CAST(:edition AS integer)
), delivery AS (
    INSERT INTO outbox.delivery (email, send_before, state, settled_at, priority, route)
    SELECT f.id, now() + CAST(:send_before_s AS float8) * interval '1 second',
           CASE WHEN f.suppressed IS NULL THEN 'pending' ELSE 'cancelled' END,
           CASE WHEN f.suppressed IS NOT NULL THEN now() END,
           CAST(:priority AS smallint), f.route
      FROM fresh f ORDER BY f.id
), trail AS (
    INSERT INTO outbox.attempt (email, attempt, verdict, reply)
    SELECT id, 0, 'suppressed', suppressed FROM fresh WHERE suppressed IS NOT NULL
)
SELECT r.id, r.recipient_key, e.id IS NOT NULL AS has_email
  FROM report r JOIN made m USING (recipient_key) LEFT JOIN email e ON e.id = m.email
""").bindparams(
    *(
        bindparam(name, type_=ARRAY(Text))
        for name in (
            "recipient_keys",
            "tokens",
            "titles",
            "htmls",
            "keys",
            "senders",
            "recipients",
            "message_ids",
        )
    ),
    bindparam("emails", type_=ARRAY(BigInteger)),
    bindparam("messages", type_=ARRAY(LargeBinary)),
)

# An email may exist without its report, if a failover lost both and a relay restored the email that it had sent: the
# new report adopts it. One with another envelope is a different email: this recipient has not received any.
ADOPT: Final = text("""
SELECT n.key, outbox.adopt_email(n.key, n.report, n.sender, n.recipient) AS is_adopted
  FROM unnest(:keys, :reports, :senders, :recipients) AS n (key, report, sender, recipient) ORDER BY n.key
""").bindparams(
    bindparam("reports", type_=ARRAY(BigInteger)),
    *(bindparam(name, type_=ARRAY(Text)) for name in ("keys", "senders", "recipients")),
)


class KeysTakenError(OutboxError):
    """Keys of these reports belong to other emails; nothing of the transaction was written."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = frozenset(keys)
        super().__init__(f"{', '.join(sorted(keys))}: {len(keys)} keys belong to other emails")


async def _adopt(connection: "AsyncConnection", made: Mapping[str, int], reports: Sequence[MadeReport]) -> None:
    """Assign the existing emails under their keys to the new reports `made`, which are given by recipient key.

    Raises:
        KeysTakenError: an email has another sender or recipient, or belongs to another report.

    """
    theirs = [report for report in reports if report.recipient_key in made]
    rows = await connection.execute(
        ADOPT,
        {
            "keys": [r.key for r in theirs],
            "reports": [made[r.recipient_key] for r in theirs],
            "senders": [r.sender for r in theirs],
            "recipients": [r.address for r in theirs],
        },
    )
    if taken := [row.key for row in rows if not row.is_adopted]:
        raise KeysTakenError(taken)


# One notification per transaction, never per row: a NOTIFY holds a cluster-wide lock over the commit.
NOTIFY: Final = text(f"SELECT pg_notify('{CHANNEL}', '')")


async def enqueue_reports(
    connection: "AsyncConnection",
    edition: int,
    reports: Sequence[NewReport],
    *,
    send_before_s: float | None = None,
    is_urgent: bool = False,
    traceparent: str | None = None,
) -> int:
    """Write the reports with their emails, at most `BATCH_MAX`, in one transaction; return how many were new.

    An email that is not sent within `send_before_s` from then expires. The rules choose its route, by report and
    recipient. `traceparent` is the W3C trace context of the caller, in which the emails will be sent.

    In a race for one recipient the unique key has the last word: the later transaction waits for the earlier one and
    then writes nothing for it. Of digests only those are written whose items are all open still; the others name
    items that another digest takes up, or took up, and have to be made again.
    """
    assert len(reports) <= BATCH_MAX
    items = {report.recipient_key: report.items for report in reports if report.items}
    async with connection.begin():
        await connection.execute(text(BATCH_BY_INDEX))
        if items:
            held = await digest.hold(connection, [item for some in items.values() for item in some])
            reports = [report for report in reports if held.issuperset(report.items)]
        result = await connection.execute(
            ENQUEUE,
            {
                "edition": edition,
                "send_before_s": send_before_s,
                "priority": int(is_urgent),
                "traceparent": traceparent,
                "made_by": storable(made_by()),
                **_columns_of(reports),
            },
        )
        made = result.all()
        if without := {row.recipient_key: row.id for row in made if not row.has_email}:
            await _adopt(connection, without, reports)
        if made and items:
            await digest.take_up(connection, [(item, row.id) for row in made for item in items[row.recipient_key]])
        if made:
            await connection.execute(NOTIFY)
    return len(made)


def _columns_of(reports: Sequence[NewReport]) -> Mapping[str, Sequence[Any]]:
    """Return the reports as the arrays of `ENQUEUE`."""
    return {
        "recipient_keys": [r.recipient_key for r in reports],
        "tokens": [r.token for r in reports],
        "titles": [r.title for r in reports],
        "htmls": [r.html for r in reports],
        "emails": [r.email_id for r in reports],
        "keys": [r.key for r in reports],
        "senders": [r.sender for r in reports],
        "recipients": [r.address for r in reports],
        "message_ids": [r.message_id for r in reports],
        "messages": [r.message for r in reports],
    }


async def collect_reports(connection: "AsyncConnection", edition: int, reports: Sequence[CollectedReport]) -> int:
    """Write the reports and their items, at most `BATCH_MAX`, in one transaction; return how many were new.

    In a race for one recipient as `enqueue_reports`, and it raises the same.
    """
    assert len(reports) <= BATCH_MAX
    async with connection.begin():
        await connection.execute(text(BATCH_BY_INDEX))
        made = await digest.collect(connection, edition, reports)
        if without := {row.recipient_key: row.id for row in made if not row.has_item}:
            await _adopt(connection, without, reports)
        return len(made)
