"""Making of missing reports, bucket by bucket: rows are read, reports are built, and batches are written.

A few buckets are locked at a time. What is missing in them is asked after their locks are held; the unique key has the
last word (`batch_writer`). While one portion of the recipients is built in a thread, the portion before it is written
and the one after it is read.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from outbox.generate.batch_writer import BatchWriter, Written
from outbox.generate.buckets import BucketLocks, bucket_of
from outbox.generate.edition import Edition
from outbox.generate.edition_reports import EditionReports
from outbox.generate.recipients import Recipient, Window
from outbox.generate.report_builder import MadeReport, ReportBuilder, check_size
from outbox.generate.session import GenerateSession
from outbox.generate.source import Content, Source
from outbox.generate.write import BATCH_MAX
from outbox.reports.render import explain
from outbox.settings import DIGEST, EditionSettings

BUCKETS_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True)
class Draft:
    """A recipient and the content of the report, or the error with which the source refused it.

    `email_id` is that of its email to be, or 0 if a digest collects the report.
    """

    recipient: Recipient
    content: Content | Exception
    email_id: int


@dataclass(frozen=True, slots=True)
class Portion:
    """Drafts that are built and written together, and the buckets that are done with them."""

    drafts: Sequence[Draft]
    last_of: Collection[int]


@dataclass(frozen=True, slots=True)
class Built:
    """The reports of a portion, the reasons why others could not be built, and the buckets that are done with them."""

    reports: Sequence[MadeReport] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    last_of: Collection[int] = ()


@dataclass(frozen=True, slots=True)
class OpenEdition:
    """An edition that is in the database, with all that its reports are made from."""

    edition: Edition
    report: EditionSettings
    source: Source
    builder: ReportBuilder
    message_bytes_max: int


class ReportMaker:
    """Maker of the missing reports of one edition. `on_written` is called for each portion."""

    def __init__(self, session: GenerateSession, opened: OpenEdition, on_written: Callable[[Written], None]) -> None:
        self._opened = opened
        self._locks = BucketLocks(session, opened.edition.id)
        self._reports = EditionReports(session, opened.edition.id)
        self._writer = BatchWriter(session, opened.edition, opened.report)
        self._on_written = on_written

    @property
    def holders(self) -> Mapping[int, str]:
        """Return the session that was last seen to hold each bucket."""
        return self._locks.holders

    async def make(
        self, window: Window, missing: Sequence[str], order: Sequence[int], *, ignore_outsiders: bool
    ) -> bool:
        """Make the missing reports in all buckets that no other server holds, in this order; False if all are held.

        Recipients of a digest that no longer has anything for them are withdrawn from the window.
        """
        portions = self._read_all(window, missing, order, ignore_outsiders=ignore_outsiders)
        portion = await anext(portions, None)
        has_worked = portion is not None
        built = Built()
        while portion is not None:
            # In a thread, since pages may take long and the session's pulse must not wait for them.
            building = asyncio.ensure_future(asyncio.to_thread(self._build_all, portion))
            try:
                await self._write(built)
                portion = await anext(portions, None)
            finally:
                built = await building
        await self._write(built)
        return has_worked

    async def _read_all(
        self, window: Window, missing: Sequence[str], order: Sequence[int], *, ignore_outsiders: bool
    ) -> AsyncIterator[Portion]:
        """Lock a few buckets at a time, and read for those of their recipients who are still missing then."""
        places: dict[int, list[int]] = {}
        for place, key in enumerate(missing):
            places.setdefault(bucket_of(key), []).append(place)
        buckets = [bucket for bucket in order if bucket in places]
        for start in range(0, len(buckets), BUCKETS_AT_ONCE):
            few = buckets[start : start + BUCKETS_AT_ONCE]
            taken = await self._locks.take(few, ignore_outsiders=ignore_outsiders)
            left = sorted(place for bucket in taken for place in places[bucket])
            while left:
                some, left = left[:BATCH_MAX], left[BATCH_MAX:]
                drafts = await self._read([window.wanted[missing[place]] for place in some])
                if self._opened.edition.report == DIGEST:
                    drafts = _with_items(drafts, window)
                yield Portion(drafts, () if left else taken)

    async def _read(self, recipients: Sequence[Recipient]) -> list[Draft]:
        """Return the drafts of the recipients who are still missing."""
        by_key = {recipient.key: recipient for recipient in recipients}
        if self._opened.report.is_collected:
            emails = dict.fromkeys(await self._reports.missing(list(by_key)), 0)
        else:
            emails = await self._reports.reserve(list(by_key))
        if not emails:
            return []
        self._opened.builder.read_templates()  # not before: most crons of a fleet find everything made
        contents = await self._opened.source.build([by_key[key] for key in emails], self._opened.edition.period)
        return [Draft(by_key[key], contents[key], email_id) for key, email_id in emails.items()]

    def _build_all(self, portion: Portion) -> Built:
        reports: list[MadeReport] = []
        failed: dict[str, str] = {}
        for draft in portion.drafts:
            made = self._build(draft)
            if isinstance(made, str):
                failed[draft.recipient.key] = made
            else:
                reports.append(made)
        return Built(reports, failed, portion.last_of)

    def _build(self, draft: Draft) -> MadeReport | str:
        """Return the report, or a sentence that says why it cannot be made."""
        if isinstance(draft.content, Exception):
            return str(draft.content)
        token = secrets.token_urlsafe(16)
        try:
            made = self._opened.builder.build(draft.recipient, draft.content, token, draft.email_id)
            check_size(made, self._opened.message_bytes_max)
        except Exception as error:  # noqa: BLE001 - templates run the user's code on any data: one recipient's problem
            return explain(error)
        return made

    async def _write(self, built: Built) -> None:
        """Write the reports, at most `BATCH_MAX`, all of one kind, and release the buckets that are done with them."""
        written = Written(failed=dict(built.failed))
        if built.reports:
            written.add(await self._writer.write(built.reports))
        if written.made or written.failed or built.reports:
            self._on_written(written)
        if built.last_of:
            await self._locks.give(built.last_of)


def _with_items(drafts: Sequence[Draft], window: Window) -> list[Draft]:
    """Return the drafts of a digest that have something to tell, and withdraw the other recipients.

    The digest of another period has taken up their items meanwhile.
    """
    left = [draft for draft in drafts if isinstance(draft.content, Exception) or draft.content]
    window.withdraw({draft.recipient.key for draft in drafts} - {draft.recipient.key for draft in left})
    return left
