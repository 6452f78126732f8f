"""`outbox generate`: one process, one session, one edition at a time; any number of servers do it at once.

Recipients are hashed into buckets, and a bucket is worked on under its advisory lock (`buckets`), so the fleet shares
the work and computes no report twice. What is missing is asked after the lock is held; the unique key has the last word
(`batch_writer`). The buckets of a dead server are free at once, and the other servers take them over. A server that
holds a bucket and makes no report is waited for no longer than `generate_wait_s`.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Final

from sqlalchemy import text

from outbox.database.lock_wait import LockWaitError
from outbox.database.refusal import DatabaseRefusedError
from outbox.errors import DatabaseUnavailableError, OutboxError
from outbox.generate.digest import WAITING
from outbox.generate.edition import EMPTY, EXPECT, plan_edition
from outbox.generate.edition_lock import declared, open_shared, remove_unused
from outbox.generate.edition_reports import SuppressionList
from outbox.generate.no_recipients import NoRecipientsError, explain_no_recipients
from outbox.generate.recipients import WINDOW_MAX, Recipient, RepeatedKeys, SharedAddresses, Window, windows
from outbox.generate.report_builder import ReportBuilder, warn_of_ignored_templates
from outbox.generate.report_maker import OpenEdition
from outbox.generate.result import Progress, Result
from outbox.generate.session import GenerateSession
from outbox.generate.shared_work import SharedWork
from outbox.generate.source import Source, source_of
from outbox.generate.waiver import read_waived, write_unreached
from outbox.log import Events
from outbox.settings import DIGEST, Settings

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

log = Events("outbox.generate")

PATIENCE_S: Final = 60.0  # how long a run outlives a database that went away
RECONNECT_S: Final = 0.5
TURN_S: Final = 0.0001


async def generate(
    settings: Settings,
    name: str,
    *,
    period_key: str | None = None,
    early: bool = False,
    progress: Progress = lambda _: None,
) -> Result:
    """Make what is missing of one edition, and wait until nothing is: made here, elsewhere, or failed by name.

    A database that goes away in mid-run is waited for, at most `PATIENCE_S`; one that does not answer at the start
    only as long as a lease. What was committed stays, so beginning again repeats nothing. `early` allows a period that
    has not ended.

    Raises:
        NoRecipientsError: the source names no recipient, and the report does not allow that.
        OutboxError: the settings, the source or the database make it impossible; the sentence says which.

    """
    settings.require("database_url", "sender")
    warn_of_ignored_templates(settings)
    earlier: Result | None = None
    is_first, patience_until = True, time.monotonic() + settings.lease_s
    problem = ""
    while True:
        try:
            async with GenerateSession.open(settings) as session:
                run = await Run.begin(settings, name, period_key, session, progress, early=early, earlier=earlier)
                try:
                    with _quick_turns():
                        return await run.finish()
                finally:
                    # Only progress renews patience; a database that cannot commit the first row makes none.
                    made_before = 0 if earlier is None else earlier.made
                    if (is_first and run.result.edition.id) or run.result.made > made_before:
                        is_first, patience_until, problem = False, time.monotonic() + PATIENCE_S, ""
                    earlier = run.result
        except DatabaseRefusedError:
            raise
        except LockWaitError as error:
            raise LockWaitError(f"{name}: {error}.") from error
        except DatabaseUnavailableError as error:
            if time.monotonic() > patience_until:
                raise
            if str(error) != problem:  # cron mails each line to a person
                problem = str(error)
                left_s = max(patience_until - time.monotonic(), 0.0)
                log.warning(
                    "database_unavailable",
                    "{reason} Trying again for up to {left_s:.0f} s.",
                    reason=error,
                    left_s=left_s,
                )
            await asyncio.sleep(RECONNECT_S)


@contextmanager
def _quick_turns() -> Iterator[None]:
    """Let the loop's thread take the interpreter from the rendering thread soon when Postgres has answered.

    Each of a portion's twenty-odd answers would wait for 5 ms else, together longer than the portion takes to render.
    """
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(usual_s)


class Run:
    """One pass over an edition on one session."""

    def __init__(
        self,
        settings: Settings,
        session: GenerateSession,
        source: Source,
        builder: ReportBuilder,
        result: Result,
        *,
        progress: Progress,
        now: datetime,
    ) -> None:
        self.result = result
        self._settings = settings
        self._report = settings.report(result.edition.report)
        self._session = session
        self._source = source
        self._builder = builder
        self._progress = progress
        self._now = now
        self._repeated = RepeatedKeys()
        self._addresses = SharedAddresses()

    @classmethod
    async def begin(
        cls,
        settings: Settings,
        name: str,
        period_key: str | None,
        session: GenerateSession,
        progress: Progress,
        *,
        early: bool,
        earlier: Result | None,
    ) -> "Run":
        """Find what is wrong for all recipients, except in templates and queries. Nothing is written yet.

        `earlier` is the result of the pass whose session was lost.
        """
        report = settings.report(name)
        source = await source_of(settings, name, session.queries)
        await session.use_timezone(report.timezone)
        edition = await session.retried(
            lambda connection: plan_edition(connection, name, report, period_key, early=early)
        )
        (now,) = (await session.fetch(text("SELECT now()")))[0]
        builder = ReportBuilder.of(settings, name, edition.period, now)
        result = Result(edition) if earlier is None else earlier.resumed(edition)
        return cls(settings, session, source, builder, result, progress=progress, now=now)

    async def finish(self) -> Result:
        """Work through all recipients, a window at a time.

        The edition is opened when the first recipients are read, and removed if nothing could be made of it.
        """
        planned = self.result.edition
        if planned.id and (declaration := await declared(self._session, planned.id)) is not None:
            self.result.open(planned, declaration)
            return self.result
        recipients = windows(self._source.recipients(planned.period), WINDOW_MAX, self._repeated.note)
        first = await anext(recipients)
        self.result.open(*await open_shared(self._session, planned.report, self._report, planned.period))
        if self.result.declared is not None:
            return self.result
        try:
            suppressed = await self._work_through(first, recipients)
            await self._record()
        except OutboxError:
            if not self.result.made:
                await remove_unused(self._session, self.result.edition.id)
            raise
        waiting = (await self._session.fetch(WAITING))[0][0] if self._is_digest else 0
        self.result.note_end(suppressed=suppressed, waiting=waiting)
        return self.result

    @property
    def _is_digest(self) -> bool:
        return self.result.edition.report == DIGEST

    async def _work_through(self, first: list[Recipient], others: AsyncIterator[list[Recipient]]) -> int:
        """Make the reports of all recipients, of the window that was read first and of the others.

        Return how many of the recipients are on the suppression list.
        """
        edition, wait_s = self.result.edition, self._settings.generate_wait_s
        opened = OpenEdition(edition, self._report, self._source, self._builder, self._settings.message_bytes_max)
        work = SharedWork(self._session, opened, self.result, self._progress, wait_s=wait_s)
        digest = [DIGEST] if self._report.is_collected else []
        suppression = SuppressionList(self._session, ["", edition.report, *digest])
        waived = await read_waived(self._session, edition.id)
        suppressed = 0
        async for recipients in _chained(first, others):
            window = Window.of(recipients, waived, self._addresses)
            await work.complete(window)
            suppressed += await suppression.count([one.email for one in window.wanted.values()])
        self._repeated.log_rest()
        if not (self._report.is_collected or self._is_digest):
            self._addresses.log()
        await work.forgive()
        return suppressed

    async def _record(self) -> None:
        """Record the result of a complete look at the recipients, unless a look that began later has ended before.

        Raises:
            NoRecipientsError: there are none, and the report does not allow that.

        """
        found, edition = self.result, self.result.edition
        if not (found.expected or self._report.is_empty_allowed):
            await self._session.fetch(EMPTY, {"id": edition.id})
            what, fix = await explain_no_recipients(self._session, edition.report, self._report)
            raise NoRecipientsError(f"{edition.name}: {what}, so nobody gets an email; {fix}.")
        look = {
            "id": edition.id,
            "expected": found.expected,
            "looked_at": self._now,
            "may_be_empty": self._report.is_empty_allowed,
            "failed": len(found.failed),
            "made": found.made,
        }

        async def record(connection: "AsyncConnection") -> None:
            async with connection.begin():
                if (await connection.execute(EXPECT, look)).rowcount:
                    await write_unreached(connection, edition.id, found.failed, found.waived)

        await self._session.retried(record)


async def _chained(first: list[Recipient], others: AsyncIterator[list[Recipient]]) -> AsyncIterator[list[Recipient]]:
    yield first
    async for window in others:
        yield window
