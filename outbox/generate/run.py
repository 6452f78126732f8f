"""`outbox generate`: one process, one session, one edition at a time; any number of servers do it at once.

Recipients are hashed into buckets, and a bucket is worked on under its advisory lock (`buckets`), so the fleet shares
the work and computes no report twice. What is missing is asked after the lock is held; the unique key has the last word
(`batch_writer`). The buckets of a dead server are free at once, and the other servers take them over. A server that
holds a bucket and makes no report is waited for no longer than `generate_wait_s`.
"""

import asyncio
import random
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy import ARRAY, Text, bindparam, text

from outbox.database.lock_wait import UNKNOWN, LockWaitError
from outbox.database.refusal import DatabaseRefusedError
from outbox.database.values import storable
from outbox.errors import ConfigurationError, DatabaseUnavailableError, OutboxError
from outbox.generate.batch_writer import BatchWriter
from outbox.generate.buckets import BUCKETS, BucketLocks, bucket_of
from outbox.generate.digest import WAITING, Collected
from outbox.generate.edition import EMPTY, EXPECT, Declared, Edition, plan_edition
from outbox.generate.edition_lock import declared, open_shared, remove_unused
from outbox.generate.no_recipients import NoRecipientsError, explain_no_recipients
from outbox.generate.session import GenerateSession
from outbox.generate.source import (
    WINDOW_MAX,
    Content,
    Recipient,
    SharedAddresses,
    Source,
    checked,
    label_of,
    source_of,
    windows,
)
from outbox.generate.waiver import read_waived, write_unreached
from outbox.generate.write import BATCH_MAX, NewReport
from outbox.log import Events
from outbox.mail import message
from outbox.reports.language import ENGLISH, Language, find
from outbox.reports.render import Templates, explain
from outbox.reports.template_files import ignored
from outbox.settings import DIGEST, EditionSettings, Settings

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

log = Events("outbox.generate")

BUCKETS_AT_ONCE: Final = 4
KEY_COLUMN_MAX: Final = 1000  # octets
REPEATED_MAX: Final = 10  # recipients that come twice are named
WAIT_FIRST_S: Final = 0.02
WAIT_MAX_S: Final = 0.5
PATIENCE_S: Final = 60.0  # how long a run outlives a database that went away
RECONNECT_S: Final = 0.5
TURN_S: Final = 0.0001


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class CivilPeriod:
    """The period as templates see it: in words, and in the report's own time. As text it is its label."""

    key: str
    label: str
    starts_at: datetime
    ends_at: datetime

    def __str__(self) -> str:
        return self.label


@dataclass(slots=True)
class Result:
    """What one run did for one edition. `failed` says why, by key; `present` counts reports that are there.

    `waiting` are reports that wait for the next digest when one is closed. `suppressed` are recipients whose address is
    on the suppression list: they have a report, and no email goes to them. `waived` are recipients to whom nothing is
    owed for this edition, as a person has decided: no report is made for them. `found` counts reports that were there
    when this run looked for the first time. `declared` says that another system made the edition, so that nothing is
    made here.
    """

    edition: Edition
    expected: int = 0
    made: int = 0
    found: int = 0
    present: int = 0
    waiting: int = 0
    suppressed: int = 0
    waived: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    declared: Declared | None = None

    @property
    def elsewhere(self) -> int:
        """Number of recipients whose report is there and was not made by this run."""
        return max(self.present - self.made, 0)

    @property
    def already(self) -> int:
        """Number of reports that earlier runs, or other servers, had made when this run looked for the first time."""
        return min(self.found, self.elsewhere)


Progress = Callable[[Result], None]


@dataclass(frozen=True, slots=True)
class Draft:
    """What one recipient's report is to be made of; `content` is an exception where the source could not say.

    `email` is the id of its email to be, or 0 if it is collected for a digest.
    """

    recipient: Recipient
    content: Content | Exception
    email: int


@dataclass(frozen=True, slots=True)
class Portion:
    """What is rendered and written at a time, and the buckets that are done with it."""

    drafts: Sequence[Draft]
    last_of: Collection[int]


class Patience:
    """Time limit that restarts whenever something changes."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._seen: set[object] = set()
        self._since = time.monotonic()

    def note(self, fact: object) -> None:
        """Restart the time if `seen` differs from the last value."""
        if fact not in self._seen:
            self._seen.add(fact)
            self._since = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Return True if nothing changed within the limit."""
        return time.monotonic() - self._since > self._limit_s


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
    sender_of(settings)
    warn_of_ignored_templates(settings)
    made, found, first = 0, None, True
    patience_until = time.monotonic() + settings.lease_s
    while True:
        try:
            async with GenerateSession.open(settings) as session:
                run = await Run.begin(settings, name, period_key, session, progress, early=early)
                run.result.made = made
                if found is not None:  # what was made since then is not what the run found
                    run.result.found, run.has_looked = found, True
                try:
                    with _quick_turns():
                        return await run.finish()
                finally:
                    # Only progress renews patience; a database that cannot commit the first row makes none.
                    if (first and run.result.edition.id) or run.result.made > made:
                        first, patience_until = False, time.monotonic() + PATIENCE_S
                    made = run.result.made
                    if found is None and run.result.expected:
                        found = run.result.found
        except DatabaseRefusedError:
            raise
        except LockWaitError as error:
            raise LockWaitError(f"{name}: {error}.") from error
        except DatabaseUnavailableError as error:
            if time.monotonic() > patience_until:
                raise
            log.warning("database_unavailable", "{reason}", reason=error)
            await asyncio.sleep(RECONNECT_S)


def warn_of_ignored_templates(settings: Settings) -> None:
    """Log each template that is not used because of its name, once per process."""
    _warn_of_ignored(settings.directory, frozenset({*settings.editions, DIGEST}))


@cache
def _warn_of_ignored(directory: Path, reports: frozenset[str]) -> None:
    for sentence in ignored(directory, reports):
        log.warning("template_ignored", "{sentence}", sentence=sentence.rstrip("."))


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


# One look at the unique index for each key: as NOT EXISTS it would be a join, which the planner does by walking over
# the whole edition while the statistics say that it is small.
MISSING: Final = text("""
SELECT n.key FROM unnest(:keys) AS n (key)
 WHERE (SELECT r.id FROM outbox.report r WHERE r.edition = :edition AND r.recipient_key = n.key) IS NULL
""").bindparams(bindparam("keys", type_=ARRAY(Text)))

# For most fleets the first says that nobody is on the list, and the second is never asked.
LISTED: Final = text("SELECT EXISTS (SELECT FROM outbox.suppression WHERE report = ANY (:reports))").bindparams(
    bindparam("reports", type_=ARRAY(Text))
)
SUPPRESSED: Final = text("""
SELECT count(*) FROM unnest(:addresses) AS n (address)
 WHERE (SELECT s.address FROM outbox.suppression s
         WHERE s.address = lower(n.address COLLATE "C") AND s.report = ANY (:reports) LIMIT 1) IS NOT NULL
""").bindparams(bindparam("addresses", type_=ARRAY(Text)), bindparam("reports", type_=ARRAY(Text)))

# Asked after the bucket's lock is held: in the same statement the snapshot could be older than the lock, and what
# its last holder committed would look missing. Ids are reserved here because a message's bytes carry its id.
RESERVE: Final = text("""
SELECT n.key, nextval(pg_get_serial_sequence('outbox.email', 'id')) AS email FROM unnest(:keys) AS n (key)
 WHERE (SELECT r.id FROM outbox.report r WHERE r.edition = :edition AND r.recipient_key = n.key) IS NULL
""").bindparams(bindparam("keys", type_=ARRAY(Text)))

# Shows if any server makes reports of an edition.
COUNT: Final = text("SELECT count(*) FROM outbox.report WHERE edition = :edition")


def sender_of(settings: Settings) -> message.Mailbox:
    """The sender with its address in the form that SMTP takes.

    Raises:
        ConfigurationError: it is no address, which only a close look tells.

    """
    assert settings.sender is not None
    try:
        return message.parse_sender(settings.sender)
    except ValueError as error:
        raise ConfigurationError(f"sender: {str(error).rstrip('.')}; correct it.") from error


@dataclass(slots=True)
class Run:
    """One pass over an edition on one session."""

    report: EditionSettings
    session: GenerateSession
    source: Source
    templates: Callable[[], Templates]
    sender: message.Mailbox
    result: Result
    period_in: Callable[[Language], CivilPeriod]
    now: datetime
    message_bytes_max: int
    progress: Progress
    locks: BucketLocks
    writer: BatchWriter
    wait_s: float
    """Longest wait for buckets of other servers that make no report."""
    addresses: SharedAddresses = field(default_factory=SharedAddresses)
    given_up: set[str] = field(default_factory=set)
    """Sessions that held buckets until the wait ended."""
    unknown_locale: str | None = None
    """The first of a recipient that names no language: only that is told of."""
    waived: frozenset[str] = frozenset()
    """Keys of the recipients to whom nothing is owed, as of the beginning."""

    repeated: int = 0
    """Rows whose key came before."""
    has_looked: bool = False
    """Another pass of the same run has counted what it found."""

    @classmethod
    async def begin(
        cls,
        settings: Settings,
        name: str,
        period_key: str | None,
        session: GenerateSession,
        progress: Progress,
        *,
        early: bool = False,
    ) -> "Run":
        """Find what is wrong for all recipients, except in templates and queries. Nothing is written yet."""
        report = settings.report(name)
        source = await source_of(settings, name, session)
        await session.use_timezone(report.timezone)
        async with session.ours() as connection:
            edition = await plan_edition(connection, name, report, period_key, early=early)
        (now,) = (await session.fetch(text("SELECT now()")))[0]
        return cls.of(settings, edition, session, source, now, progress)

    @classmethod
    def of(
        cls,
        settings: Settings,
        edition: Edition,
        session: GenerateSession,
        source: Source,
        now: datetime,
        progress: Progress = lambda _: None,
    ) -> "Run":
        """A pass over an edition that is known. Nothing is read or written yet."""
        report = settings.report(edition.report)
        starts_at, ends_at = (at.astimezone(report.zone) for at in (edition.period.starts_at, edition.period.ends_at))
        return cls(
            report=report,
            session=session,
            source=source,
            templates=cache(lambda: Templates(settings.directory / "templates", edition.report)),
            sender=sender_of(settings),
            result=Result(edition),
            period_in=cache(
                lambda language: CivilPeriod(
                    edition.period.key, language.label(starts_at, ends_at, report.cadence), starts_at, ends_at
                )
            ),
            now=now.astimezone(report.zone),
            message_bytes_max=settings.message_bytes_max,
            progress=progress,
            locks=BucketLocks(session, edition.id),
            writer=BatchWriter(session, edition, report),
            wait_s=settings.generate_wait_s,
        )

    async def finish(self) -> Result:
        """Work through all recipients, a window at a time.

        The edition is opened when the first recipients are read, and removed if nothing could be made of it.
        """
        planned = self.result.edition
        if planned.id and (declaration := await declared(self.session, planned.id)) is not None:
            self.result.declared = declaration
            return self.result
        looked_at = self.now
        rows = windows(self.source.recipients(planned.period), WINDOW_MAX, self._note_repeated)
        first = await anext(rows)
        edition, self.result.declared = await open_shared(self.session, planned.report, self.report, planned.period)
        if self.result.declared is not None:
            return self.result
        self.result.edition = edition
        self.locks = BucketLocks(self.session, edition.id)
        self.writer = BatchWriter(self.session, edition, self.report)
        try:
            await self._work_through(first, rows)
            await self._record(looked_at)
        except OutboxError:
            if not self.result.made:
                await remove_unused(self.session, edition.id)
            raise
        if self._is_digest:
            self.result.waiting = (await self.session.fetch(WAITING))[0][0]
        return self.result

    async def _work_through(self, first: list[Recipient], rows: AsyncIterator[list[Recipient]]) -> None:
        """Make the reports of all recipients: of the window that was read first, and of the others."""
        has_suppressed = (await self.session.fetch(LISTED, {"reports": self._suppressing}))[0][0]
        self.waived = await read_waived(self.session, self.result.edition.id)
        async for window in _chained(first, rows):
            self.result.expected += len(window)
            wanted = self._wanted(window)
            self.progress(self.result)
            await self._complete(wanted)
            if has_suppressed:
                said = {"addresses": [one.email for one in wanted.values()], "reports": self._suppressing}
                self.result.suppressed += (await self.session.fetch(SUPPRESSED, said, by_index=True))[0][0]
        if self.repeated > REPEATED_MAX:
            log.warning("recipient_twice", "{count} further rows repeat a key", count=self.repeated - REPEATED_MAX)
        if self.addresses.count and not self.report.is_collected and not self._is_digest:
            log.warning(
                "address_shared",
                "{count} recipients have an address that another key has, too, such as {address}: "
                "it gets an email for each key; return one row per person if that is not meant",
                count=self.addresses.count,
                address=self.addresses.first,
            )
        await self._forgive()

    async def _record(self, looked_at: datetime) -> None:
        """Record the result of a complete look at the recipients, unless a look that began later has ended before.

        Raises:
            NoRecipientsError: there are none, and the report does not allow that.

        """
        found, edition = self.result, self.result.edition
        if not (found.expected or self.report.is_empty_allowed):
            await self.session.fetch(EMPTY, {"id": edition.id})
            what, fix = await explain_no_recipients(self.session, edition.report, self.report)
            raise NoRecipientsError(f"{edition.name}: {what}, so nobody gets an email; {fix}.")
        look = {
            "id": edition.id,
            "expected": found.expected,
            "looked_at": looked_at,
            "may_be_empty": self.report.is_empty_allowed,
            "failed": len(found.failed),
            "made": found.made,
        }

        async def record(connection: "AsyncConnection") -> None:
            async with connection.begin():
                if (await connection.execute(EXPECT, look)).rowcount:
                    await write_unreached(connection, edition.id, found.failed, found.waived)

        await self.session.retried(record)

    def _note_repeated(self, recipient: Recipient) -> None:
        """Log a row whose key came before; only the first few."""
        self.repeated += 1
        if self.repeated <= REPEATED_MAX:
            label = label_of(recipient)
            log.warning("recipient_twice", "recipient {key} comes twice; the first row counts", key=label)

    @property
    def _suppressing(self) -> list[str]:
        """Which suppressions hold for this report's email."""
        return ["", self.result.edition.report, *([DIGEST] if self.report.is_collected else [])]

    async def _forgive(self) -> None:
        """A recipient who failed here but was made elsewhere meanwhile has a report: that is what counts."""
        missing = set(await self._missing(list(self.result.failed)))
        made_elsewhere = [key for key in self.result.failed if key not in missing]
        for key in made_elsewhere:
            del self.result.failed[key]
        self.result.present += len(made_elsewhere)

    def _wanted(self, window: Iterable[Recipient]) -> dict[str, Recipient]:
        """Return the recipients who can have a report, by key, with their addresses checked.

        The others are named in the result: as failed, or as waived.
        """
        wanted: dict[str, Recipient] = {}
        for recipient in window:
            label = label_of(recipient)
            if label in self.waived:
                self.result.waived.add(label)
                continue
            try:
                owed = checked(recipient)
            except ValueError as error:
                self.result.failed[label] = str(error)
            else:
                wanted[owed.key] = owed
                self.addresses.note(owed)
        return wanted

    async def _complete(self, wanted: dict[str, Recipient]) -> None:
        """Return when every one of `wanted` has a report or has failed here."""
        present_before, pause_s, is_idle = self.result.present, WAIT_FIRST_S, False
        patience = Patience(self.wait_s)
        order = random.sample(range(BUCKETS), BUCKETS)  # another order on each server, so that they seldom meet
        is_first = not self.has_looked
        while True:
            missing = await self._missing([key for key in wanted if key not in self.result.failed])
            failed = sum(key in self.result.failed for key in wanted)
            self.result.present = present_before + len(wanted) - failed - len(missing)
            if is_first:
                self.result.found += len(wanted) - failed - len(missing)
                is_first = False
            self.progress(self.result)
            if not missing:
                return
            patience.note((len(missing), failed))
            if await self._work(order, missing, wanted, ignore_outsiders=is_idle):
                pause_s, is_idle = WAIT_FIRST_S, False
                continue
            # Other servers make all that is missing: wait, and check if one of them has died.
            if patience.is_over or not is_idle:  # check if they make any reports
                patience.note((await self.session.fetch(COUNT, {"edition": self.result.edition.id}))[0][0])
            if patience.is_over or self._is_given_up(missing):
                self._give_up(missing)
                continue
            is_idle = True
            await asyncio.sleep(pause_s * (0.5 + random.random()))  # noqa: S311 - jitter, not a secret
            pause_s = min(2 * pause_s, WAIT_MAX_S)

    def _is_given_up(self, missing: Sequence[str]) -> bool:
        """Return True if the wait for all sessions that hold the missing reports has ended before."""
        return all(self.locks.holders.get(bucket_of(key)) in self.given_up for key in missing)

    def _give_up(self, missing: Sequence[str]) -> None:
        """Record the recipients without a report because the session that holds their bucket makes none."""
        for key in missing:
            holder = self.locks.holders.get(bucket_of(key)) or UNKNOWN
            self.given_up.add(holder)
            self.result.failed[key] = (
                f"its report is reserved by {holder}, and no report was made for {self.wait_s:g} s (generate_wait_s); "
                "let that session end, or end it with pg_terminate_backend, and run this again."
            )

    async def _missing(self, keys: Sequence[str]) -> list[str]:
        rows = await self.session.fetch(MISSING, {"edition": self.result.edition.id, "keys": keys}, by_index=True)
        return [row.key for row in rows]

    async def _work(
        self, order: Sequence[int], missing: Sequence[str], wanted: dict[str, Recipient], *, ignore_outsiders: bool
    ) -> bool:
        """Make what is missing in all buckets that no other server holds; False if all are held.

        While one portion is rendered, the one before it is written and the one after it is read.
        """
        portions = self._read_all(order, missing, wanted, ignore_outsiders=ignore_outsiders)
        portion = await anext(portions, None)
        worked = portion is not None
        reports: list[NewReport | Collected] = []
        done: Collection[int] = ()
        while portion is not None:
            last_of = portion.last_of
            # In a thread, since pages may take long and the session's pulse must not wait for them.
            rendering = asyncio.ensure_future(asyncio.to_thread(self._rendered_all, portion.drafts))
            try:
                await self._write(reports, done)
                following = await anext(portions, None)
            finally:
                reports = await rendering
            portion, done = following, last_of
        await self._write(reports, done)
        return worked

    async def _read_all(
        self, order: Sequence[int], missing: Sequence[str], wanted: dict[str, Recipient], *, ignore_outsiders: bool
    ) -> AsyncIterator[Portion]:
        """Take a few buckets at a time, and read those of them who are still missing now that their locks are held."""
        places: dict[int, list[int]] = {}
        for place, key in enumerate(missing):
            places.setdefault(bucket_of(key), []).append(place)
        for few in _portions([bucket for bucket in order if bucket in places], BUCKETS_AT_ONCE):
            taken = await self.locks.take(few, ignore_outsiders=ignore_outsiders)
            left = sorted(place for bucket in taken for place in places[bucket])
            while left:
                some, left = left[:BATCH_MAX], left[BATCH_MAX:]
                drafts = await self._read([wanted[missing[place]] for place in some])
                if self._is_digest:
                    drafts = self._told(drafts, wanted)
                yield Portion(drafts, () if left else taken)

    @property
    def _is_digest(self) -> bool:
        return self.result.edition.report == DIGEST

    def _told(self, drafts: Iterable[Draft], wanted: dict[str, Recipient]) -> list[Draft]:
        """Without those for whom nothing waits any more, since another period's digest took it up meanwhile."""
        left = [draft for draft in drafts if isinstance(draft.content, Exception) or draft.content]
        for key in {draft.recipient.key for draft in drafts} - {draft.recipient.key for draft in left}:
            del wanted[key]
            self.result.expected -= 1
        return left

    async def _read(self, recipients: Sequence[Recipient]) -> list[Draft]:
        """What the source says of those who are still missing, each with the id of its email to be."""
        by_key = {recipient.key: recipient for recipient in recipients}
        if self.report.is_collected:
            emails = dict.fromkeys(await self._missing(list(by_key)), 0)
        else:
            keys = {"edition": self.result.edition.id, "keys": list(by_key)}
            emails = {row.key: row.email for row in await self.session.fetch(RESERVE, keys, by_index=True)}
        if not emails:
            return []
        self.templates()  # only now are they needed: most crons of a fleet find everything made
        contents = await self.source.build([by_key[key] for key in emails], self.result.edition.period)
        return [Draft(by_key[key], contents[key], email) for key, email in emails.items()]

    def _rendered_all(self, drafts: Iterable[Draft]) -> list[NewReport | Collected]:
        made = (self._report(draft.recipient, draft.content, draft.email) for draft in drafts)
        return [report for report in made if report is not None]

    async def _write(self, reports: Sequence[NewReport | Collected], done: Collection[int]) -> None:
        """Write them, at most `BATCH_MAX`, all of one kind, and let go of the buckets that are done with them."""
        if reports:
            written = await self.writer.write(reports)
            self.result.made += written.made
            self.result.failed |= written.failed
            self.progress(self.result)
        if done:
            await self.locks.give(done)

    def _report(self, recipient: Recipient, content: Content | Exception, email: int) -> NewReport | Collected | None:
        """The report, with its mail if it has one; None, with the recipient named, if they cannot be made."""
        if isinstance(content, Exception):
            self.result.failed[recipient.key] = str(content)
            return None
        token = secrets.token_urlsafe(16)
        try:
            if self.report.is_collected:
                return self.collected(recipient, content, token)
            return self._sized(self.rendered(recipient, content, email, token))
        except Exception as error:  # noqa: BLE001 - templates run the user's code on any data: one recipient's fault
            self.result.failed[recipient.key] = explain(error)
            return None

    def _sized(self, made: NewReport) -> NewReport:
        """Return the report; raise ValueError if the database would refuse it, and with it the whole batch."""
        if len(made.message) > self.message_bytes_max:
            raise ValueError(
                f"the email has {len(made.message):,} octets, more than message_bytes_max "
                f"({self.message_bytes_max:,}); shorten it, and leave the rest to the page"
            )
        if len(made.key.encode()) > KEY_COLUMN_MAX:
            raise ValueError(f"the recipient's key makes an email key of more than {KEY_COLUMN_MAX} octets; shorten it")
        return made

    def rendered(self, recipient: Recipient, content: Content, email: int, token: str) -> NewReport:
        """The report and its mail; what the templates raise comes through (`report.explain`)."""
        edition, language = self.result.edition, self.language_of(recipient)
        rendered = self.templates().render(self._context(recipient, content, token), language)
        domain = self.sender.address.rpartition("@")[2]
        leave = self.report.unsubscribe_link(token)
        message_id = f"<{email}.{secrets.token_hex(8)}@{domain}>"
        return NewReport(
            recipient_key=recipient.key,
            token=token,
            title=self._title(language),
            html=storable(rendered.page),
            email=email,
            key=self._key(recipient),
            sender=self.sender.address,
            recipient=recipient.email,
            message_id=message_id,
            message=message.build(
                sender=self.sender,
                recipient=message.Mailbox(recipient.name, recipient.email),
                subject=rendered.subject,
                text=rendered.text,
                html=rendered.html,
                date=self.now,
                message_id=message_id,
                list_id=f"<{edition.report}.{domain}>",
                headers={} if leave is None else one_click(leave),
            ),
            items=[row["id"] for row in content] if self._is_digest and not isinstance(content, Mapping) else (),
        )

    def collected(self, recipient: Recipient, content: Content, token: str) -> Collected:
        """The report and what the digest needs to tell of it."""
        language = self.language_of(recipient)
        return Collected(
            recipient_key=recipient.key,
            token=token,
            title=self._title(language),
            html=storable(self.templates().page(self._context(recipient, content, token), language)),
            key=self._key(recipient),
            sender=self.sender.address,
            address=recipient.email,
            name=storable(recipient.name),
            link=self.report.link.replace("{token}", token),
        )

    def language_of(self, recipient: Recipient) -> Language:
        """What the recipient's column `locale` names, else the report's language; the first that names none is told."""
        wish = recipient.columns.get("locale")
        if not wish:
            return self._usual
        found = find(wish) if isinstance(wish, str) else None
        if found is None and self.unknown_locale is None:
            self.unknown_locale = str(wish)
            log.warning(
                "locale_unknown",
                "recipient {key}: the locale {locale!r} names no language, so the report is in {language}; "
                "further ones are not named",
                key=recipient.key,
                locale=self.unknown_locale[:40],
                language=self._usual.tag,
            )
        return found or self._usual

    @property
    def _usual(self) -> Language:
        return find(self.report.locale) or ENGLISH

    def _title(self, language: Language) -> str:
        return f"{self.report.title}, {self.period_in(language).label}"

    def _key(self, recipient: Recipient) -> str:
        """What makes an email one email."""
        return f"{self.result.edition.report}/{self.result.edition.period.key}/{recipient.key}"

    def _context(self, recipient: Recipient, content: Content, token: str) -> dict[str, Any]:
        given = content if isinstance(content, Mapping) else {"rows": content}
        rows = given.get("rows", [])
        return {
            "report": self.result.edition.report,
            "title": self.report.title,
            "period": self.period_in(self.language_of(recipient)),
            "recipient": {
                **recipient.columns,
                "key": recipient.key,
                "email": recipient.email,
                "name": recipient.name,
            },
            "rows": rows,
            "columns": list(rows[0]) if rows else [],
            "link": self.report.link.replace("{token}", token),
            "unsubscribe": self.report.unsubscribe_link(token),
            "sender": self.sender.name,
            **given,
        }


async def _chained(first: list[Recipient], others: AsyncIterator[list[Recipient]]) -> AsyncIterator[list[Recipient]]:
    yield first
    async for window in others:
        yield window


def one_click(link: str) -> dict[str, str]:
    """The header fields with which a mail reader shows a button that ends the emails (RFC 2369 §3.2, RFC 8058 §3.1)."""
    return {"List-Unsubscribe": f"<{link}>", "List-Unsubscribe-Post": "List-Unsubscribe=One-Click"}


def _portions(values: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
