"""Sources of a report: its recipients and their rows come from two queries, or from a Python class of the user's."""

import inspect
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, tzinfo
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from outbox.errors import ConfigurationError, SourceError
from outbox.generate.digest import ITEMS, RECIPIENTS
from outbox.generate.query_errors import QueryError, RowError, UnreadableError
from outbox.generate.recipients import Recipient, recipient_of
from outbox.reports.period import Period
from outbox.reports.query_parameters import parse
from outbox.settings import ReportSettings, Settings
from outbox.user_code import UntrustedCodeError, UserCodeRunner, load, said

FETCH_ROWS: Final = 1000

Rows = Sequence[Mapping[str, Any]]
Content = Rows | Mapping[str, Any]


@runtime_checkable
class ReportSource(Protocol):
    """A report as a Python class, for `source = "myapp.reports:Progress"`; made without arguments once per run.

    Both methods may be plain or async, and may block: they run in threads of their own, one call at a time, the async
    ones all on one event loop.

    Several servers call this at once for the same period; each recipient's `build` is called on one of them, and
    again elsewhere only if that server dies or the call raises.
    """

    def recipients(self, period: Period) -> Any:
        """Return all who are owed a report: an iterable, async iterable, or awaitable of one, of `Recipient`."""

    def build(self, recipient: Recipient, period: Period) -> Any:
        """Return the content of the report: rows (a sequence of mappings), or a mapping of names for the templates.

        An exception skips this recipient, who is named; the others go on.
        """


class Source(Protocol):
    """Source of either kind, as generate uses it."""

    def recipients(self, period: Period) -> AsyncIterator[Recipient]:
        """Yield all who are owed a report.

        Raises:
            SourceError: the source cannot name them.

        """

    async def build(self, recipients: Sequence[Recipient], period: Period) -> Mapping[str, Content | Exception]:
        """Return the content of each one's report, by key, or the error because of which there is none."""


class Reader(Protocol):
    """Reader of a SQL source: all rows of a statement, or a stream of them that keeps no transaction open."""

    async def rows(self, statement: str, parameters: Mapping[str, Any]) -> Rows:
        """Return all rows."""

    def stream(self, statement: str, parameters: Mapping[str, Any], portion: int) -> AsyncIterator[Rows]:
        """Yield the rows, at most `portion` at a time."""

    @property
    def trusted(self) -> "Reader":
        """Return a reader for outbox's own queries, which no schema on the user's search path can change."""


@dataclass(slots=True)
class SqlSource:
    """Source of the two queries of a report's settings, read through generate's own session."""

    name: str
    recipients_sql: str
    data_sql: str
    batched: bool
    reader: Reader
    zone: tzinfo = UTC

    async def recipients(self, period: Period) -> AsyncIterator[Recipient]:
        """Yield the rows of the recipients query."""
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
        """Return the rows of the data query: for all at once with :keys, one by one with :key."""
        if not self.batched:
            return {r.key: await self._attempt({"key": r.key}, period) for r in recipients}
        rows = await self._attempt({"keys": [r.key for r in recipients]}, period)
        if isinstance(rows, Exception) and len(recipients) > 1:  # one recipient's row spoils the batch: find out whose
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


def _parameters(period: Period, zone: tzinfo) -> dict[str, Any]:
    """Return the period and its bounds in civil time: compared with a `date` column they are the local dates."""
    starts_at, ends_at = period.starts_at.astimezone(zone), period.ends_at.astimezone(zone)
    return {"period": period.key, "starts_at": starts_at, "ends_at": ends_at}


@dataclass(slots=True)
class PythonSource:
    """Source of a `ReportSource`, which is run beside the event loop."""

    name: str
    source: ReportSource
    runner: UserCodeRunner = field(default_factory=UserCodeRunner)

    async def recipients(self, period: Period) -> AsyncIterator[Recipient]:
        """Yield the recipients that the class returns, as `Recipient` or as mappings."""
        where = f"reports.{self.name}.source"
        try:
            async for one in _each(self.runner, await _called(self.runner, self.source.recipients, period), where):
                yield recipient_of(one, where)
        except SourceError:
            raise
        except Exception as error:
            raise SourceError(f"{where}: recipients() raised {said(error)}; correct it there.") from error

    async def build(self, recipients: Sequence[Recipient], period: Period) -> Mapping[str, Content | Exception]:
        """Return each one's content, or the error that `build` raised for it."""
        return {recipient.key: await self._build(recipient, period) for recipient in recipients}

    async def _build(self, recipient: Recipient, period: Period) -> Content | Exception:
        try:
            content = await _called(self.runner, self.source.build, recipient, period)
            if not isinstance(content, (Mapping, list)):
                content = await self.runner.call(list, content)  # a generator of the user's: it may block
            return content if isinstance(content, Mapping) else [dict(row) for row in content]
        except Exception as error:  # noqa: BLE001 - the user's code: this recipient alone is passed over
            return RowError(f"build() raised {said(error)}")


async def _called(runner: UserCodeRunner, method: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a method of the user's returns, awaited if need be."""
    given = method(*arguments) if inspect.iscoroutinefunction(method) else await runner.call(method, *arguments)
    return await runner.wait_for(given) if inspect.isawaitable(given) else given


async def _each(runner: UserCodeRunner, found: Any, where: str) -> AsyncIterator[Any]:
    if isinstance(found, AsyncIterable):
        stream = aiter(found)
        while portion := await runner.wait_for(_portion(stream)):
            for one in portion:
                yield one
    elif isinstance(found, Iterable):
        rows = iter(found)
        while portion := await runner.call(lambda: list(islice(rows, FETCH_ROWS))):
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
    """Return the source of a report: its queries, read through `reader`, or its class; for a digest outbox's queries.

    Raises:
        ConfigurationError: there is no report of that name.
        SourceError: its class cannot be used.

    """
    report = settings.report(name)
    if not isinstance(report, ReportSettings):
        return SqlSource(name, RECIPIENTS, ITEMS, batched=True, reader=reader.trusted, zone=report.zone)
    if report.source is not None:
        loaded: PythonSource = await UserCodeRunner().call(
            load_source, name, report.source, settings.directory
        )  # it may block
        return loaded
    assert report.recipients is not None
    assert report.data is not None
    return SqlSource(name, report.recipients, report.data, "keys" in parse(report.data).names, reader, report.zone)


def load_source(name: str, reference: str, directory: Path) -> PythonSource:
    """Return an object of the class that `module:Class` names; modules beside the settings are found, too.

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
