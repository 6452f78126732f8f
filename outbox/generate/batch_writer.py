"""Batches of reports, committed on generate's session. A recipient whose rows cannot be written does not stop the rest.

Two things can block one recipient: an open transaction of another session that holds one of its keys, and a foreign
email under its key. The failure names the session or the key, and the rest of the batch is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from outbox import suggestions, tracing
from outbox.database.lock_wait import LockWaitError
from outbox.generate.edition import Edition
from outbox.generate.report_builder import CollectedReport, MadeReport, NewReport
from outbox.generate.session import GenerateSession
from outbox.generate.write import KeysTakenError, collect_reports, enqueue_reports
from outbox.settings import EditionSettings

# After a batch has waited for a lock once, its recipients are tried one by one. Each blocked one costs a wait of
# ALONE_S, or of HURRIED_S once such waits have cost PATIENCE_S: the keys of all of 100,000 recipients may be held.
ALONE_S: Final = 0.25
HURRIED_S: Final = 0.02
PATIENCE_S: Final = 60.0


@dataclass(slots=True)
class Written:
    """Number of new reports, and the reasons why others could not be written, by recipient key."""

    made: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, other: "Written") -> None:
        """Add the result of another batch."""
        self.made += other.made
        self.failed |= other.failed


class BatchWriter:
    """Writer of the reports of one edition."""

    def __init__(self, session: GenerateSession, edition: Edition, report: EditionSettings) -> None:
        self._session = session
        self._edition = edition
        self._report = report
        self._waited_s = 0.0

    async def write(self, reports: Sequence[MadeReport]) -> Written:
        """Write at most `write.BATCH_MAX` reports, all of one kind."""
        with tracing.span("outbox enqueue", edition=self._edition.name, reports=len(reports)) as context:
            if self._waited_s:  # the run has met a blocked key: the whole batch waits no longer than one recipient
                return await self._write_hurried(reports, context)
            try:
                return await self._write_free(reports, context)
            except LockWaitError:
                self._waited_s = ALONE_S
                return await self._write_apart(reports, context)

    async def _write_hurried(self, reports: Sequence[MadeReport], context: str | None) -> Written:
        async with self._session.waiting_at_most(ALONE_S):
            try:
                return await self._write_free(reports, context)
            except LockWaitError:
                pass  # some of them are blocked
        return await self._write_apart(reports, context)

    async def _write_apart(self, reports: Sequence[MadeReport], context: str | None) -> Written:
        """Write one report at a time, and record which are blocked."""
        written = Written()
        wait_s = ALONE_S if self._waited_s < PATIENCE_S else HURRIED_S
        async with self._session.waiting_at_most(wait_s):
            for report in reports:
                try:
                    written.add(await self._write_free([report], context))
                except LockWaitError as error:
                    self._waited_s += wait_s
                    written.failed[report.recipient_key] = f"its email's key {report.key} is blocked: {error}."
        return written

    async def _write_free(self, reports: Sequence[MadeReport], context: str | None) -> Written:
        """Write the reports, all in one transaction, but for those whose keys belong to other emails."""
        written = Written()
        while reports:
            try:
                written.made += await self._write_all(reports, context)
                break
            except KeysTakenError as error:
                for report in reports:
                    if report.key in error.keys:
                        written.failed[report.recipient_key] = _taken(report.key)
                reports = [report for report in reports if report.key not in error.keys]
        return written

    async def _write_all(self, reports: Sequence[MadeReport], context: str | None) -> int:
        emails = [report for report in reports if isinstance(report, NewReport)]
        collected = [report for report in reports if isinstance(report, CollectedReport)]
        made = 0
        if emails:
            enqueue = partial(
                enqueue_reports,
                edition=self._edition.id,
                reports=emails,
                send_before_s=self._report.send_before_s,
                is_urgent=self._report.is_urgent,
                traceparent=context,
            )
            made += await self._session.retried(enqueue)
        if collected:
            made += await self._session.retried(partial(collect_reports, edition=self._edition.id, reports=collected))
        return made


def _taken(key: str) -> str:
    quoted = key.replace("'", "''")
    show = suggestions.command("show", keys=[key])
    return (
        f"its email's key {key} belongs to an email that has another recipient or sender, or another report, so no "
        f"email was made; see `{show}`. If it is not wanted, cancel it, let the schema's owner free the key "
        f"(UPDATE outbox.email SET key = 'freed/{quoted}' WHERE key = '{quoted}'), and run this again."
    )
