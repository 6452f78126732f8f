"""Commits batches of reports on generate's session. A recipient whose rows cannot be written does not stop the others.

Two things can stand in the way of one recipient: another session's open transaction that holds one of its keys, and an
email that is there under its key and is not its own. Either one is named, and the rest of the batch is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from outbox import suggested, tracing
from outbox.digest import Collected
from outbox.edition import Edition
from outbox.generate_session import GenerateSession
from outbox.lock_wait import LockWaitError
from outbox.record import KeysTakenError, NewReport, collect_reports, enqueue_reports
from outbox.settings import EditionSettings

# After a batch has waited for a lock once, its recipients are tried one by one. Each of them that is blocked costs a
# wait of ALONE_S, or of HURRIED_S once such waits have cost PATIENCE_S: somebody may hold a key of each of 100,000.
ALONE_S: Final = 0.25
HURRIED_S: Final = 0.02
PATIENCE_S: Final = 60.0


@dataclass(slots=True)
class Written:
    """How many reports are new, and why others could not be written, by recipient key."""

    made: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, other: "Written") -> None:
        """Count another batch in."""
        self.made += other.made
        self.failed |= other.failed


class BatchWriter:
    """Writes the reports of one edition."""

    def __init__(self, session: GenerateSession, edition: Edition, report: EditionSettings) -> None:
        self._session = session
        self._edition = edition
        self._report = report
        self._waited_s = 0.0

    async def write(self, reports: Sequence[NewReport | Collected]) -> Written:
        """Write at most `record.BATCH_MAX` reports, all of one kind."""
        with tracing.span("outbox enqueue", edition=self._edition.name, reports=len(reports)) as context:
            if self._waited_s:  # the run has met a blocked key: it waits for the whole batch no more than for one
                return await self._write_hurried(reports, context)
            try:
                return await self._commit(reports, context)
            except LockWaitError:
                self._waited_s = ALONE_S
                return await self._write_apart(reports, context)

    async def _write_hurried(self, reports: Sequence[NewReport | Collected], context: str | None) -> Written:
        async with self._session.waiting_at_most(ALONE_S):
            try:
                return await self._commit(reports, context)
            except LockWaitError:
                pass  # some of them are blocked
        return await self._write_apart(reports, context)

    async def _write_apart(self, reports: Sequence[NewReport | Collected], context: str | None) -> Written:
        """Write one by one."""
        written = Written()
        wait_s = ALONE_S if self._waited_s < PATIENCE_S else HURRIED_S
        async with self._session.waiting_at_most(wait_s):
            for report in reports:
                try:
                    written.add(await self._commit([report], context))
                except LockWaitError as error:
                    self._waited_s += wait_s
                    written.failed[report.recipient_key] = f"its email's key {report.key} is blocked: {error}."
        return written

    async def _commit(self, reports: Sequence[NewReport | Collected], context: str | None) -> Written:
        """Write them in one transaction, without those whose keys belong to other emails."""
        written = Written()
        while reports:
            try:
                written.made += await self._transaction(reports, context)
                break
            except KeysTakenError as error:
                for report in reports:
                    if report.key in error.keys:
                        written.failed[report.recipient_key] = _taken(report.key)
                reports = [report for report in reports if report.key not in error.keys]
        return written

    async def _transaction(self, reports: Sequence[NewReport | Collected], context: str | None) -> int:
        emails = [report for report in reports if isinstance(report, NewReport)]
        collected = [report for report in reports if isinstance(report, Collected)]
        made = 0
        async with self._session.ours() as connection:
            if emails:
                made += await enqueue_reports(
                    connection,
                    self._edition.id,
                    emails,
                    send_before_s=self._report.send_before_s,
                    is_urgent=self._report.is_urgent,
                    traceparent=context,
                )
            if collected:
                made += await collect_reports(connection, self._edition.id, collected)
        return made


def _taken(key: str) -> str:
    quoted = key.replace("'", "''")
    show = suggested.command("show", keys=[key])
    return (
        f"its email's key {key} belongs to an email that has another recipient or sender, or another report, so no "
        f"email was made; see `{show}`. If it is not wanted, cancel it, let the schema's owner free the key "
        f"(UPDATE outbox.email SET key = 'freed/{quoted}' WHERE key = '{quoted}'), and run this again."
    )
