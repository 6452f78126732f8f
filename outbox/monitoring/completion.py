"""Completion of editions: it is recorded, and the dead man's switch is called. It runs beside the relay.

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
import time
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urlsplit

import asyncpg

from outbox.database.connection import LOST_SESSION, Connection, SilenceTimer
from outbox.database.opening import connect
from outbox.errors import OutboxError
from outbox.log import Events
from outbox.monitoring.dead_man import call
from outbox.operations.snapshot import EDITIONS_FOR
from outbox.relay.supervisor import Relays
from outbox.settings.urls import DatabaseUrl

log = Events("outbox.relay")

CHECK_S: Final = 0.5
PAUSE_S: Final = 3.0  # between two looks while emails go out; each relay of a fleet takes its share
PAUSE_MAX_S: Final = 60.0
COST_MAX: Final = 100  # between two looks passes so many times as long as one took
IDLE_S: Final = 300.0
STATEMENT_MAX_S: Final = 30.0
SILENCE_MAX_S: Final = 6 * STATEMENT_MAX_S  # an edition has five statements, each with its limit, and a call
CLOSE_TIMEOUT_S: Final = 2.0
CALL_AGAIN_S: Final = 30.0
LAST_LOOK_S: Final = 20.0

CANDIDATES: Final = f"""
SELECT id, report, period, expected FROM outbox.edition
 WHERE completed_at IS NULL AND done_elsewhere_at IS NULL AND created_at > now() - {EDITIONS_FOR}
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
# alone are not enough: a recipient who has left keeps a report, and counts for one who has come and has none.
MISSING: Final = "EXISTS (SELECT FROM outbox.missing_report WHERE edition = $1)"

# From what is open, by its index: while much is, the first that is found answers.
OPEN: Final = """
SELECT EXISTS (SELECT FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email
                 JOIN outbox.report r ON r.id = m.report
                WHERE d.settled_at IS NULL AND r.edition = $1)
"""

# Reads every report of the edition, so it comes last, and mostly once in an edition's life. A report that waits for a
# digest is done if its address gets no more email.
UNDONE: Final = """
SELECT EXISTS (
    SELECT FROM outbox.report_outcome o
     WHERE o.edition = $1 AND NOT o.is_waived
       AND (o.outcome IN ('waiting', 'in_doubt', 'failed')
            OR o.outcome = 'collected' AND (
               SELECT coalesce(outbox.suppressed(i.address, e.report), outbox.suppressed(i.address, 'digest'))
                 FROM outbox.digest_item i, outbox.edition e
                WHERE i.report = o.report AND e.id = o.edition OFFSET 0) IS NULL))
"""

# Not where a generate has found other recipients since it was looked at.
COMPLETE: Final = f"""
UPDATE outbox.edition SET completed_at = now()
 WHERE id = $1 AND completed_at IS NULL AND expected = $2 AND NOT {MISSING}
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Edition that is not known to be complete; `expected` is None until `generate` has seen all recipients."""

    id: int
    report: str
    period: str
    expected: int | None

    def put_into(self, url: str) -> str:
        """Return the URL with this edition in the places of `{edition}`, `{report}` and `{period}`, percent-encoded."""
        names = {"edition": f"{self.report} {self.period}", "report": self.report, "period": self.period}
        for name, value in names.items():
            url = url.replace(f"{{{name}}}", quote(value, safe=""))
        return url


async def is_complete(connection: Connection, edition: Candidate) -> bool:
    """Return True if the edition is complete; cheap while it is far from it."""
    if edition.expected is None or await connection.fetchval(MADE, edition.id) < edition.expected:
        return False
    undone = (f"SELECT {MISSING}", OPEN, UNDONE)
    for statement in undone:
        if await connection.fetchval(statement, edition.id):
            return False
    return True


class Completion:
    """Search for editions that have become complete, beside the relays and over a connection of its own.

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
        """Look, for ever, whenever something may have changed."""
        while True:
            await asyncio.sleep(CHECK_S)
            now = time.monotonic()
            settled = self.relays.counts.total()
            if settled != self._settled:
                self._settled, self._looks_left = settled, 2
            if self.relays.holds_session and now >= (self._look_at if self._looks_left else self._idle_at):
                await self._look_safely()

    async def last_look(self) -> None:
        """Look once at the end of a relay that was to empty the outbox: there may be no relay to look later."""
        try:
            async with asyncio.timeout(LAST_LOOK_S):
                await self._look_safely()
        except TimeoutError:
            log.warning("completion_late", "there was no time to see whether an edition is complete")

    async def _look_safely(self) -> None:
        """Look, and survive errors of Postgres and of the network."""
        began_at = time.monotonic()
        self._looks_left = max(self._looks_left - 1, 0)
        try:
            unfinished, uncalled = await self._look()
            self._looks_left = max(self._looks_left, int(unfinished or uncalled))
            pause_s = CALL_AGAIN_S if uncalled else PAUSE_S
        except (OutboxError, *LOST_SESSION, asyncpg.PostgresError) as error:
            reason = str(error) or type(error).__name__
            log.warning(
                "completion_unknown", "nobody could see whether an edition is complete: {reason}", reason=reason
            )
            self._looks_left, pause_s = 1, CALL_AGAIN_S
        now = time.monotonic()
        shared_s = min(pause_s * max(self.relays.alive / (2 * len(self.relays.each)), 1.0), PAUSE_MAX_S)
        jitter = 0.8 + 0.4 * random.random()  # noqa: S311 - not a secret
        self._look_at = now + max(shared_s, COST_MAX * (now - began_at)) * jitter
        self._idle_at = now + max(IDLE_S, COST_MAX * (now - began_at)) * jitter

    async def _look(self) -> tuple[bool, bool]:
        """Return if an edition is being made at this moment, and if a call failed."""
        server_settings = {"statement_timeout": str(int(STATEMENT_MAX_S * 1000))}
        connection = await connect(self.database_url, application="outbox completion", settings=server_settings)
        # Terminated where it is cancelled: a close would wait for an answer, and its timeout hide the cancellation.
        with connection.terminated_on_error(), connection.end_if_silent(SILENCE_MAX_S) as silence:
            found = await self._look_at_each(connection, silence)
            await connection.close(timeout=CLOSE_TIMEOUT_S)
        return found

    async def _look_at_each(self, connection: Connection, silence: SilenceTimer) -> tuple[bool, bool]:
        editions = [Candidate(*row) for row in await connection.fetch(CANDIDATES)]
        failed = False
        for edition in editions:
            silence.restart()
            try:
                done = await is_complete(connection, edition)
            except asyncpg.QueryCanceledError:  # it is too large for a look; the others are looked at all the same
                continue
            if done:
                silence.restart()  # a call takes up to 41 s
                failed = not await self._complete(connection, edition) or failed
        return any(edition.expected is None for edition in editions), failed

    async def _complete(self, connection: Connection, edition: Candidate) -> bool:
        """Call, then record the completion; return False if the call failed."""
        fields = {"edition": f"{edition.report} {edition.period}", "emails": edition.expected}
        if self.dead_man_url is not None:
            place = urlsplit(self.dead_man_url).hostname  # the rest of it may be a secret
            problem = await call(edition.put_into(self.dead_man_url))
            if problem is not None:
                log.warning(
                    "dead_man_failed",
                    "{edition} is complete, but dead_man_url at {place} cannot be called ({reason}); trying again",
                    **fields,
                    place=place,
                    reason=problem,
                )
                return False
            log.info("dead_man_called", "{edition} is complete, and dead_man_url was called", **fields, place=place)
        if str(await connection.execute(COMPLETE, edition.id, edition.expected)).endswith(" 1"):
            log.info("edition_complete", "{edition} is complete: {emails} recipients", **fields)
        return True
