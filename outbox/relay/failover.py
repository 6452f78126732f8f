"""What outlives a database that forgot: a relay's recent verdicts, told again on another server before anybody claims.

A standby that replicates asynchronously lacks the last commits of the primary that it replaces: mail that was sent
looks unsent there, or was never written. An old primary that is in charge again lacks all that was sent meanwhile. So
each relay asserts what it remembers on each server that is not the one of its last session, under the email's key,
since ids may be given again there. `barrier` makes the others wait for it.

With synchronous replication nothing is lost and all of this finds everything as it was.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Final

from outbox.database.connection import Connection
from outbox.database.values import storable
from outbox.log import Events
from outbox.relay.ledger import Settlement
from outbox.relay.quarantine import is_of_a_row
from outbox.smtp.outgoing import Claim
from outbox.smtp.verdict import Outcome

REMEMBERED_S: Final = 60.0
REMEMBERED_MAX: Final = 100_000
REMEMBERED_BYTES_MAX: Final = 48 * 1024 * 1024  # of all remembered verdicts; above, the oldest are forgotten
MESSAGES_BYTES_MAX: Final = 16 * 1024 * 1024  # of messages in doubt; above, only envelopes are remembered
NEWS_BYTES: Final = 700  # of a verdict besides its text
RETURN_S: Final = 3600.0  # for so long after a change of servers the old one may come back, which lacks all since then
ASSERTED_AT_ONCE: Final = 1000
PASSED_BY_MAX: Final = 100
REMAINS: Final = b"The database lost this message in a failover after it was settled; only its envelope is known.\r\n"

log = Events("outbox.relay")


@dataclass(frozen=True, slots=True)
class News:
    """What a relay knows of a try. The bytes are kept of what is in doubt only: a dead letter that a failover loses
    cannot be sent again.
    """

    key: str
    sender: str
    recipient: str
    message_id: str
    message: bytes
    relay: int
    attempt: int
    outcome: Outcome

    @property
    def message_bytes(self) -> int:
        """Return the size of the message that is kept with it."""
        return 0 if self.message is REMAINS else len(self.message)

    @property
    def bytes(self) -> int:
        """Return about how many bytes of memory it takes without its message."""
        text = len(self.key) + len(self.sender) + len(self.recipient) + len(self.message_id) + len(self.outcome.reply)
        return NEWS_BYTES + text


@dataclass(slots=True)
class Memory:
    """Verdicts of a relay in the last `REMEMBERED_S` before its session was lost, within `REMEMBERED_BYTES_MAX`.

    For `RETURN_S` after a change of servers no verdict grows old: the former server has none of those since then.
    """

    lost_at: float | None = None
    """Since when there is no session that knows them: until it is back nothing grows old, however long that takes."""
    keep_until: float = 0.0
    """Until when nothing grows old."""
    _news: deque[tuple[float, News]] = field(default_factory=deque)
    _bytes: int = 0
    _message_bytes: int = 0

    def note(self, claim: Claim, attempt: int, outcome: Outcome, now: float) -> None:
        """Remember a verdict that must not be forgotten: sent, dead or in doubt.

        Others only lead to a next try, except that another server may have the mark of a try that was withdrawn.
        """
        while self.lost_at is None and now >= self.keep_until and self._news and now - self._news[0][0] > REMEMBERED_S:
            self._forget_oldest()
        if outcome.state == "pending" and not (claim.marked and outcome.verdict == "withdrawn"):
            return
        news = news_of(claim, attempt, outcome)
        if self._message_bytes + news.message_bytes > MESSAGES_BYTES_MAX:  # a person decides if it is lost
            news = replace(news, message=REMAINS, outcome=replace(outcome, delay_s=None))
        self._news.append((now, news))
        self._bytes += news.bytes
        self._message_bytes += news.message_bytes
        while self._bytes > REMEMBERED_BYTES_MAX or len(self._news) > REMEMBERED_MAX:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, news = self._news.popleft()
        self._bytes -= news.bytes
        self._message_bytes -= news.message_bytes

    def note_move(self, moved_s: float, now: float) -> None:
        """Note that the fleet came from another server so many seconds ago."""
        if moved_s < RETURN_S:
            self.keep_until = max(self.keep_until, now + RETURN_S - moved_s)

    def recall(
        self, unsettled: Iterable[Settlement], handed_over: Iterable[Claim], *, doubt_s: float | None
    ) -> list[News]:
        """All that the database may not know: one piece of news for each email, the latest, or that it was sent.

        `unsettled` are verdicts that no commit has confirmed, `handed_over` the claims whose dot is written and not
        answered: whatever the database says of those, they are in doubt until the answer comes. An acceptance comes
        before all else: attempts of two servers are counted apart, so that a later number need not be a later try.
        """
        lost_at = time.monotonic() if self.lost_at is None else self.lost_at
        keeps = lost_at < self.keep_until
        told = [news for at, news in self._news if keeps or lost_at - at <= REMEMBERED_S]
        told += [
            News(s.key, "", "", "", b"", s.relay, s.attempt, s.outcome)
            for s in unsettled
            if s.outcome.state == "pending"
        ]
        doubt = Outcome("in_doubt", "in_doubt", "its answer was waited for when Postgres was lost", doubt_s)
        told += [news_of(claim, claim.attempt, doubt) for claim in handed_over]
        latest: dict[str, News] = {}
        for news in told:
            if news.key not in latest or latest[news.key].outcome.state != "sent" or news.outcome.state == "sent":
                latest[news.key] = news
        return list(latest.values())


def news_of(claim: Claim, attempt: int, outcome: Outcome) -> News:
    """What to remember of a claim's verdict."""
    message = claim.message if outcome.state == "in_doubt" else REMAINS
    return News(
        claim.key, claim.sender, claim.recipient, claim.message_id, message, claim.relay, attempt, outcome
    )  # fmt: skip


# A row that is settled stays as it is, unless it expired or was cancelled while nobody knew of the try. An acceptance
# counts whatever else is known: the row's attempt may be another server's, so that a later number says nothing. Doubt
# counts as well, unless the row's own trail has that doubt: then a person or the policy has decided since. What else
# has a later attempt stays as it is, and an equal attempt of another relay is that relay's: $13 is the instance that
# tells this. An email that is gone is put back under its key, so that `generate` cannot make it again.
REASSERT: Final = """
WITH news AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::integer[], $7::integer[],
                         $8::text[], $9::text[], $10::text[], $11::float8[])
        AS n (key, sender, recipient, message_id, message, relay, attempt, state, verdict, reply, delay_s)
), kept AS (
    SELECT e.id AS email, n.* FROM news n JOIN outbox.email e ON e.key = n.key
), restored AS (
    INSERT INTO outbox.email (key, sender, recipient, message_id, message)
    SELECT key, sender, recipient, message_id, message FROM news n
     WHERE n.state <> 'pending' AND NOT EXISTS (SELECT FROM kept k WHERE k.key = n.key)
     ORDER BY key
    ON CONFLICT (key) DO NOTHING
    RETURNING id, key
), delivered AS (
    INSERT INTO outbox.delivery (email, due_at, marked_at, settled_at, doubted_at, relay, attempt, state, route)
    SELECT r.id, CASE WHEN n.state = 'in_doubt' THEN coalesce(now() + n.delay_s * interval '1 second', 'infinity')
                      ELSE now() END,
           now(), CASE WHEN n.state <> 'in_doubt' THEN now() END, CASE WHEN n.state = 'in_doubt' THEN now() END,
           n.relay, n.attempt, n.state, $12
      FROM restored r JOIN news n ON n.key = r.key
    RETURNING email, attempt, marked_at
), asserted AS (
    UPDATE outbox.delivery d
       SET state = k.state,
           attempt = greatest(d.attempt, k.attempt),
           withdrawn = CASE WHEN k.verdict = 'withdrawn' THEN least(d.withdrawn + 1, greatest(d.attempt, k.attempt))
                            ELSE least(d.withdrawn, greatest(d.attempt, k.attempt) - 1) END,
           due_at = CASE WHEN k.state IN ('pending', 'in_doubt')
                         THEN coalesce(now() + k.delay_s * interval '1 second', 'infinity') ELSE d.due_at END,
           relay = CASE WHEN k.state = 'pending' THEN NULL ELSE k.relay END,
           marked_at = coalesce(d.marked_at, now()),
           settled_at = CASE WHEN k.state IN ('sent', 'dead') THEN now() END,
           doubted_at = CASE WHEN k.state = 'in_doubt' THEN now() END,
           paused = NULL
      FROM kept k
     WHERE d.email = k.email
       AND d.state IN ('pending', 'sending', 'in_doubt', 'expired', 'cancelled')  -- by the primary key: see TICK
       AND (k.state = 'sent'
            OR (k.state IN ('dead', 'in_doubt') AND d.attempt < k.attempt)
            OR (k.state = 'in_doubt' AND d.state = 'pending'
                AND (SELECT 1 FROM outbox.attempt a WHERE a.email = d.email AND a.attempt = k.attempt
                        AND a.relay = k.relay AND a.verdict = 'in_doubt' LIMIT 1) IS NULL)
            OR (d.attempt = k.attempt AND d.relay = k.relay
                AND (k.state IN ('dead', 'pending') AND d.state IN ('sending', 'in_doubt')
                     OR k.state = 'in_doubt' AND d.state = 'sending')
                AND (SELECT 1 FROM outbox.relay r WHERE r.id = d.relay AND r.instance <> $13 LIMIT 1) IS NULL))
    RETURNING d.email, d.attempt, d.marked_at
), trail AS (
    INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
    SELECT f.email, f.attempt, n.relay, n.verdict, n.reply || ' (told again after a failover)', f.marked_at
      FROM (SELECT * FROM delivered UNION ALL SELECT * FROM asserted) f
      JOIN (SELECT email, key FROM kept UNION ALL SELECT id, key FROM restored) e ON e.email = f.email
      JOIN news n ON n.key = e.key
)
SELECT key, email, email IN (SELECT email FROM asserted) AS changed, NULL::integer AS attempt FROM kept
UNION ALL
SELECT key, id, true, NULL FROM restored
UNION ALL
SELECT NULL, email, false, attempt FROM asserted
"""


@dataclass(frozen=True, slots=True)
class Found:
    """An email as another server has it: its id there, and the attempt if what was told became that of its row."""

    email: int
    attempt: int | None = None


async def reassert(
    connection: Connection, news: Sequence[News], *, route: str = "", instance: str | None = None
) -> tuple[dict[str, Found], int]:
    """Tell the database what this relay knows; gives the emails as they are there, by key, and how many changed.

    At most `ASSERTED_AT_ONCE` at a time. What has to be put back takes the relay's `route`. Whoever has settled an
    email meanwhile is believed; telling it twice changes nothing.
    """
    rows = await connection.fetch(
        REASSERT,
        [n.key for n in news],
        [n.sender for n in news],
        [n.recipient for n in news],
        [n.message_id for n in news],
        [n.message for n in news],
        [n.relay for n in news],
        [n.attempt for n in news],
        [n.outcome.state for n in news],
        [n.outcome.verdict for n in news],
        [storable(n.outcome.reply) for n in news],
        [n.outcome.delay_s for n in news],
        route,
        instance,
    )
    attempts = {row["email"]: row["attempt"] for row in rows if row["key"] is None}
    emails = {row["key"]: Found(row["email"], attempts.get(row["email"])) for row in rows if row["key"] is not None}
    return emails, sum(row["changed"] for row in rows)


async def tell_again(
    connection: Connection,
    news: Sequence[News],
    patience: Callable[[], AbstractContextManager[None]],
    *,
    route: str = "",
    instance: str | None = None,
) -> tuple[dict[str, Found], int]:
    """Run `reassert` for any number of news, in portions, each within a `patience()` of its own.

    If a row of a portion cannot be written, each verdict is written separately, and one that fails again is logged.
    A verdict on an email that another session was writing at that moment is told again: it was not there to be read,
    and once it is committed it cannot be put back.
    """
    emails: dict[str, Found] = {}
    changed = 0
    retries_left = PASSED_BY_MAX
    portions = [news[begin : begin + ASSERTED_AT_ONCE] for begin in range(0, len(news), ASSERTED_AT_ONCE)]
    for portion in portions:  # the list grows while it runs
        try:
            with patience():
                there, new = await reassert(connection, portion, route=route, instance=instance)
        except Exception as error:
            if not is_of_a_row(error):
                raise
            if len(portion) > 1:
                portions += [[one] for one in portion]
            else:
                log.error(  # noqa: TRY400 - it names a row; a traceback says no more
                    "verdict_untold",
                    "{key}, attempt {attempt}: the verdict {verdict!r} cannot be written again: {reason}",
                    key=portion[0].key,
                    attempt=portion[0].attempt,
                    verdict=portion[0].outcome.verdict,
                    reason=error,
                )
        else:
            emails.update(there)
            changed += new
            passed_by = [one for one in portion if one.key not in there and one.outcome.state != "pending"]
            if passed_by and retries_left > 0:
                retries_left -= 1
                portions.append(passed_by)
    return emails, changed


STATEMENTS: Final = (REASSERT,)
