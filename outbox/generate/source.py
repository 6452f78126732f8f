"""Who is owed a report and what it says: two queries from the settings, or a Python class of the user's."""

import inspect
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, tzinfo
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from outbox.database.values import storable
from outbox.errors import ConfigurationError, SourceError
from outbox.generate.digest import ITEMS, RECIPIENTS
from outbox.mail import message
from outbox.reports.period import Period
from outbox.reports.query_parameters import parse
from outbox.settings import ReportSettings, Settings
from outbox.user_code import Aside, UntrustedCodeError, load, said

FETCH_ROWS: Final = 1000
WINDOW_MAX: Final = 10_000  # recipients in memory at once

Rows = Sequence[Mapping[str, Any]]
Content = Rows | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Recipient:
    """Who is owed a report. `key` is permanent and unique within a report; `columns` reach the templates."""

    key: str
    email: str
    name: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class ReportSource(Protocol):
    """A report as a Python class, for `source = "myapp.reports:Progress"`; made without arguments once per run.

    Both methods may be plain or async, and may block: they run in threads of their own, one call at a time, the async
    ones all on one event loop.

    Several servers call this at once for the same period; each recipient's `build` is called on one of them, and
    again elsewhere only if that server dies or the call raises.
    """

    def recipients(self, period: Period) -> Any:
        """Everybody who is owed a report: an iterable, async iterable, or awaitable of one, of `Recipient`."""

    def build(self, recipient: Recipient, period: Period) -> Any:
        """What the report says: rows (a sequence of mappings), or a mapping of names that the templates use.

        An exception skips this recipient, who is named; the others go on.
        """


class Source(Protocol):
    """What generate asks of either kind of source."""

    def recipients(self, period: Period) -> AsyncIterator[Recipient]:
        """Everybody who is owed a report, as a stream; SourceError if there is none to be had."""

    async def build(self, recipients: Sequence[Recipient], period: Period) -> Mapping[str, Content | Exception]:
        """What each one's report says, by key, or why it cannot be said."""


def recipient_of(row: Mapping[str, Any], where: str) -> Recipient:
    """A row of the recipients query as a `Recipient`; a null name is none.

    Raises:
        SourceError: the row lacks the columns key and email.

    """
    missing = [column for column in ("key", "email") if column not in row]
    if missing:
        raise SourceError(
            f"{where}: the query returns no column {' and no column '.join(missing)}; "
            "name them, as in: select id::text as key, email, name from people."
        )
    rest = {column: value for column, value in row.items() if column not in ("key", "email", "name")}
    return Recipient(_text(row["key"]), _text(row["email"]), _text(row.get("name")), rest)


def checked(recipient: Recipient) -> Recipient:
    """Return the recipient with its address in the form that SMTP takes.

    Raises:
        ValueError: one sentence that says what is wrong with key or address.

    """
    if not recipient.key or storable(recipient.key) != recipient.key:
        raise ValueError("the key is empty or no text that Postgres can hold; give every recipient a key of its own.")
    if not recipient.email.strip():
        raise ValueError(
            "there is no email address (it is NULL or empty); enter one, or leave such rows out of the recipients."
        )
    address = message.check_address(recipient.email)
    return Recipient(recipient.key, address, recipient.name, recipient.columns)


def label_of(recipient: Recipient) -> str:
    """Return the name under which a recipient is reported: the key.

    It is the address of one without a key, and the escaped form of a key that Postgres cannot hold, so that no two
    recipients share a name.
    """
    if not recipient.key:
        return f"(no key, {storable(recipient.email).strip() or 'no email address'})"
    return recipient.key if storable(recipient.key) == recipient.key else ascii(recipient.key)


@dataclass(slots=True)
class SharedAddresses:
    """Recipients whose address an earlier one has, under another key. Memory holds a number for each address."""

    count: int = 0
    first: str = ""
    _seen: set[int] = field(default_factory=set)

    def note(self, recipient: Recipient) -> None:
        """Count a recipient, whose address is checked and whose key has not come before."""
        seen_before = len(self._seen)
        self._seen.add(hash(recipient.email.lower()))
        if len(self._seen) == seen_before:
            self.count += 1
            self.first = self.first or recipient.email


async def windows(
    recipients: AsyncIterator[Recipient], size: int, on_repeat: Callable[[Recipient], None] = lambda _: None
) -> AsyncIterator[list[Recipient]]:
    """Yield the distinct recipients of the stream in windows of at most `size`; the last may be empty.

    Of rows with the same key the first counts, however far apart they are; the others go to `on_repeat`. So memory
    holds a window, and every key.
    """
    seen: set[str] = set()
    window: list[Recipient] = []
    async for recipient in recipients:
        seen_before = len(seen)
        seen.add(label_of(recipient))
        if len(seen) == seen_before:
            on_repeat(recipient)
            continue
        window.append(recipient)
        if len(window) == size:
            yield window
            window = []
    yield window


def _text(value: object) -> str:
    return "" if value is None else str(value)


class Reader(Protocol):
    """How a SQL source reads: rows of one statement, or of one statement as a stream that keeps no transaction open."""

    async def rows(self, statement: str, parameters: Mapping[str, Any]) -> Rows:
        """All rows."""

    def stream(self, statement: str, parameters: Mapping[str, Any], portion: int) -> AsyncIterator[Rows]:
        """The rows, at most `portion` at a time."""

    @property
    def trusted(self) -> "Reader":
        """Return a reader for outbox's own queries, which no schema on the user's search path can change."""


@dataclass(slots=True)
class SqlSource:
    """The two queries of a report's settings, read through generate's own session."""

    name: str
    recipients_sql: str
    data_sql: str
    batched: bool
    reader: Reader
    zone: tzinfo = UTC

    async def recipients(self, period: Period) -> AsyncIterator[Recipient]:
        """The rows of the recipients query."""
        where = f"reports.{self.name}.recipients"
        try:
            async for rows in self.reader.stream(self.recipients_sql, _parameters(period, self.zone), FETCH_ROWS):
                for row in rows:
                    yield recipient_of(row, where)
        except UnreadableError as error:
            raise SourceError(f"{where}: {error}.") from error
        except (QueryError, RowError) as error:
            raise SourceError(f"{where}: Postgres refuses the query ({error}); correct it there.") from error

    async def build(self, recipients: Sequence[Recipient], period: Period) -> Mapping[str, Content | Exception]:
        """The rows of the data query: for all at once with :keys, one by one with :key."""
        if not self.batched:
            return {r.key: await self._attempt({"key": r.key}, period) for r in recipients}
        rows = await self._attempt({"keys": [r.key for r in recipients]}, period)
        if (
            isinstance(rows, Exception) and len(recipients) > 1
        ):  # one row of one recipient spoils the batch: find out whose
            return {r.key: (await self.build([r], period))[r.key] for r in recipients}
        if isinstance(rows, Exception):
            return {recipients[0].key: rows}
        return self._by_key(rows, recipients)

    async def _attempt(self, keys: Mapping[str, Any], period: Period) -> Rows | Exception:
        try:
            return await self.reader.rows(self.data_sql, {**_parameters(period, self.zone), **keys})
        except RowError as error:
            return error
        except QueryError as error:
            where = f"reports.{self.name}.data"
            raise SourceError(f"{where}: Postgres refuses the query ({error}); correct it there.") from error

    def _by_key(self, rows: Rows, recipients: Sequence[Recipient]) -> Mapping[str, Content]:
        if rows and "key" not in rows[0]:
            raise SourceError(
                f"reports.{self.name}.data: the query uses :keys but returns no column key; "
                "return whose row each one is, as in: select person_id::text as key, day, done from progress."
            )
        found: dict[str, list[Mapping[str, Any]]] = {r.key: [] for r in recipients}
        for row in rows:
            theirs = found.get(str(row["key"]))
            if theirs is not None:
                theirs.append({column: value for column, value in row.items() if column != "key"})
        return found


class QueryError(Exception):
    """A query is wrong as such: it would fail for every recipient."""


class RowError(Exception):
    """A source failed on the values of one call: other recipients may do better."""


class UnreadableError(RowError):
    """A row has a value that Python cannot represent; the message names column and value."""


def _parameters(period: Period, zone: tzinfo) -> dict[str, Any]:
    """The bounds in civil time: compared with a `date` column they are the dates that they show there."""
    starts_at, ends_at = period.starts_at.astimezone(zone), period.ends_at.astimezone(zone)
    return {"period": period.key, "starts_at": starts_at, "ends_at": ends_at}


@dataclass(slots=True)
class PythonSource:
    """A `ReportSource` behind the interface of generate."""

    name: str
    source: ReportSource
    aside: Aside = field(default_factory=Aside)

    async def recipients(self, period: Period) -> AsyncIterator[Recipient]:
        """Whatever the class gives, one by one."""
        where = f"reports.{self.name}.source"
        try:
            async for one in _each(self.aside, await _called(self.aside, self.source.recipients, period), where):
                if isinstance(one, Recipient):
                    yield Recipient(_text(one.key), _text(one.email), _text(one.name), one.columns)
                else:
                    yield recipient_of(one, where)
        except SourceError:
            raise
        except Exception as error:
            raise SourceError(f"{where}: recipients() raised {said(error)}; correct it there.") from error

    async def build(self, recipients: Sequence[Recipient], period: Period) -> Mapping[str, Content | Exception]:
        """Each one's content, or what `build` raised for it."""
        return {recipient.key: await self._build(recipient, period) for recipient in recipients}

    async def _build(self, recipient: Recipient, period: Period) -> Content | Exception:
        try:
            content = await _called(self.aside, self.source.build, recipient, period)
            if not isinstance(content, (Mapping, list)):
                content = await self.aside.call(list, content)  # a generator of the user's: it may block
            return content if isinstance(content, Mapping) else [dict(row) for row in content]
        except Exception as error:  # noqa: BLE001 - the user's code: this recipient alone is passed over
            return RowError(f"build() raised {said(error)}")


async def _called(aside: Aside, method: Callable[..., Any], *arguments: Any) -> Any:
    """What a method of the user's gives."""
    given = method(*arguments) if inspect.iscoroutinefunction(method) else await aside.call(method, *arguments)
    return await aside.wait_for(given) if inspect.isawaitable(given) else given


async def _each(aside: Aside, found: Any, where: str) -> AsyncIterator[Any]:
    if isinstance(found, AsyncIterable):
        stream = aiter(found)
        while portion := await aside.wait_for(_portion(stream)):
            for one in portion:
                yield one
    elif isinstance(found, Iterable):
        rows = iter(found)
        while portion := await aside.call(lambda: list(islice(rows, FETCH_ROWS))):
            for one in portion:
                yield one
    else:
        raise SourceError(f"{where}: recipients() gave {type(found).__name__}; return an iterable of Recipient.")


async def _portion(stream: AsyncIterator[Any]) -> list[Any]:
    portion = []
    async for one in stream:
        portion.append(one)
        if len(portion) == FETCH_ROWS:
            break
    return portion


async def source_of(settings: Settings, name: str, reader: Reader) -> Source:
    """Where a report of the settings comes from: its queries, read through `reader`, or its class; a digest, from ours.

    Raises:
        ConfigurationError: there is no report of that name.
        SourceError: its class cannot be used.

    """
    report = settings.report(name)
    if not isinstance(report, ReportSettings):
        return SqlSource(name, RECIPIENTS, ITEMS, batched=True, reader=reader.trusted, zone=report.zone)
    if report.source is not None:
        loaded: PythonSource = await Aside().call(load_source, name, report.source, settings.directory)  # it may block
        return loaded
    assert report.recipients is not None
    assert report.data is not None
    return SqlSource(name, report.recipients, report.data, "keys" in parse(report.data).names, reader, report.zone)


def load_source(name: str, reference: str, directory: Path) -> PythonSource:
    """The class that `module:Class` names, made; modules beside the settings are found too.

    Raises:
        SourceError: no such module or class, or it cannot be made.

    """
    where = f"reports.{name}.source"
    try:
        source = load(reference, directory)()
    except UntrustedCodeError as error:
        raise ConfigurationError(f"{where}: {error}") from error
    except (Exception, SystemExit) as error:
        raise SourceError(
            f"{where}: {reference} cannot be used ({said(error)}); mend the name or the class."
        ) from error
    if not isinstance(source, ReportSource):
        raise SourceError(f"{where}: {reference} lacks recipients(period) or build(recipient, period); add them.")
    return PythonSource(name, source)
