"""Work on an edition that several servers share: what is missing is made here, or waited for while others make it."""

import asyncio
import random
from collections.abc import Sequence

from outbox.generate.batch_writer import Written
from outbox.generate.buckets import BUCKETS
from outbox.generate.edition_reports import EditionReports
from outbox.generate.recipients import Window
from outbox.generate.report_maker import OpenEdition, ReportMaker
from outbox.generate.result import Progress, Result
from outbox.generate.session import GenerateSession
from outbox.generate.waiting import IdleHolders, Patience, Pauses


class SharedWork:
    """Work of one run on an open edition. Other servers are waited for while they make reports within `wait_s`."""

    def __init__(
        self, session: GenerateSession, opened: OpenEdition, result: Result, progress: Progress, *, wait_s: float
    ) -> None:
        self._reports = EditionReports(session, opened.edition.id)
        self._maker = ReportMaker(session, opened, self._note_written)
        self._result = result
        self._progress = progress
        self._wait_s = wait_s
        self._idle_holders = IdleHolders(wait_s)

    async def complete(self, window: Window) -> None:
        """Return when every wanted recipient of the window has a report or has failed here."""
        self._result.begin_window(window)
        self._progress(self._result)
        patience, pauses = Patience(self._wait_s), Pauses()
        order = random.sample(range(BUCKETS), BUCKETS)  # another order on each server, so that they seldom meet
        while missing := await self._look(window, patience):
            before = len(window.wanted)
            has_worked = await self._maker.make(window, missing, order, ignore_outsiders=pauses.is_idle)
            self._result.note_withdrawn(before - len(window.wanted))
            if has_worked:
                pauses.end()
                continue
            # Other servers make all that is missing: wait, and check if one of them has died.
            if patience.is_over or not pauses.is_idle:  # check if they make any reports
                patience.note(await self._reports.count())
            if patience.is_over or self._idle_holders.hold_all(missing, self._maker.holders):
                self._result.note_failed(self._idle_holders.give_up(missing, self._maker.holders))
                continue
            await asyncio.sleep(pauses.next_s())

    async def _look(self, window: Window, patience: Patience) -> Sequence[str]:
        """Return the keys of the window's recipients who have neither a report nor failed here."""
        missing = await self._reports.missing([key for key in window.wanted if key not in self._result.failed])
        failed = self._result.note_look(window.wanted, missing)
        self._progress(self._result)
        if missing:
            patience.note((len(missing), failed))
        return missing

    async def forgive(self) -> None:
        """Count recipients who failed here as present if another server has made their reports meanwhile."""
        failed = list(self._result.failed)
        missing = set(await self._reports.missing(failed))
        self._result.note_made_elsewhere([key for key in failed if key not in missing])

    def _note_written(self, written: Written) -> None:
        self._result.note_written(written)
        self._progress(self._result)
