"""When an edition is complete: it is noted, and the dead man's switch is called. Beside the relay, never in its way.

An edition is complete when `generate` has seen all its recipients, each has a report, and the email of each report was
sent, or it was decided that it will not be: by a person (`outbox cancel`, `outbox resolve --discard`, `outbox waive`)
or because the address is on the suppression list. A recipient with a waiver needs no report either. An edition without
recipients is complete only if its report allows that (`may_be_empty`). An undecided dead
letter, an email in doubt and an expired email keep the edition incomplete, so that the switch stays silent. A report
that goes into a digest is done when the digest that took it up is.

`edition.completed_at` is written after the call has succeeded: at least once, and sometimes by two relays.
"""

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urlsplit

import asyncpg

from outbox import __version__
from outbox.database.connection import LOST_SESSION, Connection
from outbox.database.opening import connect
from outbox.errors import OutboxError
from outbox.log import Events
from outbox.relay.supervisor import Relays
from outbox.settings.urls import DatabaseUrl

log = Events("outbox.relay")

CHECK_S: Final = 0.5
PAUSE_S: Final = 3.0  # between two looks while emails go out; each relay of a fleet takes its share
PAUSE_MAX_S: Final = 60.0
COST_MAX: Final = 100  # between two looks passes so many times as long as one took
IDLE_S: Final = 300.0
STATEMENT_MAX_S: Final = 30.0
CLOSE_TIMEOUT_S: Final = 2.0
CALL_TIMEOUT_S: Final = 10.0
CALL_PAUSES_S: Final = (1.0,)  # between the tries of one call
CALL_AGAIN_S: Final = 30.0
LAST_LOOK_S: Final = 20.0

CANDIDATES: Final = """
SELECT id, report, period, expected FROM outbox.edition
 WHERE completed_at IS NULL AND done_elsewhere_at IS NULL AND created_at > now() - interval '40 days'
   AND (expected IS NOT NULL OR created_at > now() - interval '1 hour')
   AND (expected IS DISTINCT FROM 0 OR may_be_empty)
 ORDER BY id DESC LIMIT 100
"""

# Recipients who have a report, or to whom nothing is owed. A waiver counts only for a recipient whom the latest look of
# `generate` has counted in `expected` and found without a report.
MADE: Final = """
SELECT (SELECT count(*) FROM outbox.report WHERE edition = $1)
     + (SELECT count(*) FROM outbox.waiver w
         WHERE w.edition = $1
           AND EXISTS (SELECT FROM outbox.unreached u
                        WHERE u.edition = w.edition AND u.recipient_key = w.recipient_key OFFSET 0)
           AND NOT EXISTS (SELECT FROM outbox.report r
                            WHERE r.edition = w.edition AND r.recipient_key = w.recipient_key OFFSET 0))
"""

# A recipient whom the latest look found without a report, and who has neither a report nor a waiver since. Numbers
# alone do not tell: a recipient who has left keeps a report, and counts for one who has come and has none.
UNREACHED: Final = """
EXISTS (SELECT FROM outbox.unreached u
         WHERE u.edition = $1
           AND (SELECT r.id FROM outbox.report r
                 WHERE r.edition = u.edition AND r.recipient_key = u.recipient_key) IS NULL
           AND (SELECT w.edition FROM outbox.waiver w
                 WHERE w.edition = u.edition AND w.recipient_key = u.recipient_key) IS NULL)
"""

# From what is open, by its index: while much is, the first that is found answers.
OPEN: Final = """
SELECT EXISTS (SELECT FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email
                 JOIN outbox.report r ON r.id = m.report
                WHERE d.settled_at IS NULL AND r.edition = $1)
"""

# Reads every report of the edition, so it comes last, and mostly once in an edition's life. The email of a report is
# its own or that of the digest that took it up. Each `OFFSET 0` keeps its subquery from being joined as a whole: the
# planner can then only look up row by row, by the index of its WHERE. Without statistics it may join all emails to all
# reports in a nested loop over a materialized scan, which is quadratic.
UNDONE: Final = """
SELECT EXISTS (
    SELECT FROM outbox.report r
      JOIN outbox.edition e ON e.id = r.edition
      LEFT JOIN LATERAL (SELECT digest, address FROM outbox.digest_item WHERE report = r.id OFFSET 0) i ON true
      LEFT JOIN LATERAL (SELECT id FROM outbox.email WHERE report = coalesce(i.digest, r.id) OFFSET 0) m ON true
      LEFT JOIN LATERAL (SELECT state, attempt FROM outbox.delivery WHERE email = m.id OFFSET 0) d ON true
     WHERE r.edition = $1
       AND NOT EXISTS (SELECT FROM outbox.waiver w
                        WHERE w.edition = r.edition AND w.recipient_key = r.recipient_key OFFSET 0)
       AND CASE WHEN m.id IS NULL
                THEN i.digest IS NOT NULL
                     OR coalesce(outbox.suppressed(i.address, e.report), outbox.suppressed(i.address, 'digest')) IS NULL
                WHEN d.state IN ('sent', 'cancelled') THEN false
                WHEN d.state = 'dead' THEN EXISTS (SELECT FROM outbox.failure f WHERE f.email = m.id OFFSET 0)
                ELSE true
           END)
"""

# Not where a generate has found other recipients since it was looked at.
COMPLETE: Final = f"""
UPDATE outbox.edition SET completed_at = now()
 WHERE id = $1 AND completed_at IS NULL AND expected = $2 AND NOT {UNREACHED}
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An edition that is not known to be complete; `expected` is None while `generate` has not seen everybody."""

    id: int
    report: str
    period: str
    expected: int | None

    def put_into(self, url: str) -> str:
        """The URL with this edition in the places of `{edition}`, `{report}` and `{period}`, percent-encoded."""
        names = {"edition": f"{self.report} {self.period}", "report": self.report, "period": self.period}
        for name, value in names.items():
            url = url.replace(f"{{{name}}}", quote(value, safe=""))
        return url


async def is_complete(connection: Connection, edition: Candidate) -> bool:
    """Return True if the edition is complete; cheap while it is far from it."""
    if edition.expected is None or await connection.fetchval(MADE, edition.id) < edition.expected:
        return False
    undone = (f"SELECT {UNREACHED}", OPEN, UNDONE)
    for statement in undone:
        if await connection.fetchval(statement, edition.id):
            return False
    return True


class Completion:
    """Looks for editions that have become complete, beside the relays and over a connection of its own.

    It looks when emails were settled, every few seconds at most, once more after the last of them, and every five
    minutes in any case: what others settled or a person decided counts, too.
    """

    def __init__(self, relays: Relays) -> None:
        self.database_url: DatabaseUrl = relays.database_url
        self.dead_man_url = relays.settings.dead_man_url
        self.relays = relays
        self._settled = 0
        self._looks_left = 1
        self._look_at = 0.0
        self._idle_at = 0.0

    async def watch(self) -> None:
        """For ever: look when there may be news."""
        while True:
            await asyncio.sleep(CHECK_S)
            now = time.monotonic()
            settled = self.relays.counts.total()
            if settled != self._settled:
                self._settled, self._looks_left = settled, 2
            if self.relays.holds_session and now >= (self._look_at if self._looks_left else self._idle_at):
                await self._look_safely()

    async def last_look(self) -> None:
        """One look at the end of a relay that was to empty the outbox, since nobody may be there to look later."""
        try:
            async with asyncio.timeout(LAST_LOOK_S):
                await self._look_safely()
        except TimeoutError:
            log.warning("completion_late", "there was no time to see whether an edition is complete")

    async def _look_safely(self) -> None:
        """Look, and outlive what Postgres or a fault of ours makes of it."""
        began_at = time.monotonic()
        self._looks_left = max(self._looks_left - 1, 0)
        try:
            unfinished, uncalled = await self._look()
            self._looks_left = max(self._looks_left, int(unfinished or uncalled))
            pause_s = CALL_AGAIN_S if uncalled else PAUSE_S
        except (OutboxError, *LOST_SESSION, asyncpg.PostgresError, TimeoutError) as error:
            log.warning("completion_unknown", "nobody could see whether an edition is complete: {reason}", reason=error)
            self._looks_left, pause_s = 1, CALL_AGAIN_S
        now = time.monotonic()
        shared_s = min(pause_s * max(self.relays.alive / (2 * len(self.relays.each)), 1.0), PAUSE_MAX_S)
        jitter = 0.8 + 0.4 * random.random()  # noqa: S311 - not a secret
        self._look_at = now + max(shared_s, COST_MAX * (now - began_at)) * jitter
        self._idle_at = now + max(IDLE_S, COST_MAX * (now - began_at)) * jitter

    async def _look(self) -> tuple[bool, bool]:
        """Whether an edition is being made at this moment, and whether a call failed."""
        ways = {"statement_timeout": str(int(STATEMENT_MAX_S * 1000)), "jit": "off"}
        connection = await connect(self.database_url, application="outbox completion", settings=ways)
        try:
            editions = [Candidate(*row) for row in await connection.fetch(CANDIDATES)]
            failed = False
            for edition in editions:
                try:
                    done = await is_complete(connection, edition)
                except asyncpg.QueryCanceledError:  # it is too large for a look; the others are looked at all the same
                    continue
                if done:
                    failed = not await self._complete(connection, edition) or failed
            return any(edition.expected is None for edition in editions), failed
        finally:
            await connection.close(timeout=CLOSE_TIMEOUT_S)

    async def _complete(self, connection: Connection, edition: Candidate) -> bool:
        """Call, then note it; False if the call failed."""
        fields = {"edition": f"{edition.report} {edition.period}", "emails": edition.expected}
        if self.dead_man_url is not None:
            place = urlsplit(self.dead_man_url).hostname  # the rest of it may be a secret
            fault = await call(edition.put_into(self.dead_man_url))
            if fault is not None:
                log.warning(
                    "dead_man_failed",
                    "{edition} is complete, but dead_man_url at {place} cannot be called ({reason}); trying again",
                    **fields,
                    place=place,
                    reason=fault,
                )
                return False
            log.info("dead_man_called", "{edition} is complete, and dead_man_url was called", **fields, place=place)
        if str(await connection.execute(COMPLETE, edition.id, edition.expected)).endswith(" 1"):
            log.info("edition_complete", "{edition} is complete: {emails} recipients", **fields)
        return True


async def call(url: str, pauses_s: Sequence[float] = CALL_PAUSES_S) -> str | None:
    """GET it, a few times if need be; None if the answer was 2xx, else what was wrong at last."""
    fault: str | None = None
    for pause_s in (*pauses_s, None):
        fault = await _in_thread(url)
        if fault is None or pause_s is None:
            break
        await asyncio.sleep(pause_s)
    return fault


async def _in_thread(url: str) -> str | None:
    """One GET, in a thread that nobody waits for at the end: a server may keep it for `CALL_TIMEOUT_S` and longer."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str | None] = loop.create_future()

    def tell(fault: str | None) -> None:
        if not answer.done():
            answer.set_result(fault)

    def get() -> None:
        fault = _get(url)
        try:
            loop.call_soon_threadsafe(tell, fault)
        except RuntimeError:
            return  # the loop is closed: the relay has ended

    threading.Thread(target=get, name="dead man", daemon=True).start()
    try:
        async with asyncio.timeout(2 * CALL_TIMEOUT_S):
            return await answer
    except TimeoutError:
        return "no answer"


def _get(url: str) -> str | None:
    import urllib.request

    request = urllib.request.Request(url, headers={"User-Agent": f"outbox-mail/{__version__}"})  # noqa: S310 - checked
    try:
        with urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S) as answer:  # noqa: S310 - http or https: settings
            answer.read(1024)
    except Exception as error:  # noqa: BLE001 - urllib lets through whatever sockets, TLS and its parsers raise
        return str(error) or type(error).__name__
    return None
