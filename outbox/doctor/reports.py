"""Checks of the reports: what generate would do now, done with its own functions up to the writing.

The session is read-only and its statements are bounded, so the user's queries change nothing here. Of a Python class
only `recipients` is called: `build` may write.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final
from urllib.parse import urlsplit

import asyncpg
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from outbox.database.connection import LOST_SESSION
from outbox.doctor.database import Database
from outbox.doctor.finding import Finding, not_checked, note, ok, problem, problem_of
from outbox.doctor.recipients import RecipientTally
from outbox.errors import OutboxError
from outbox.generate.edition import find_edition
from outbox.generate.no_recipients import explain_no_recipients
from outbox.generate.query_errors import UnreadableError, is_caused_by, message_of
from outbox.generate.recipients import Recipient
from outbox.generate.report_builder import ReportBuilder
from outbox.generate.session import GenerateSession
from outbox.generate.source import (
    Content,
    PythonSource,
    Source,
    source_of,
)
from outbox.reports.period import Period, in_words, period_at
from outbox.reports.render import Templates, explain
from outbox.reports.template_files import ignored
from outbox.reports.timezones import current
from outbox.settings import DIGEST, EditionSettings, ReportSettings, Settings, table_of

TROUBLE = (OutboxError, SQLAlchemyError, *LOST_SESSION)
STATEMENT_MAX_S: Final = 30
RECIPIENTS_MAX: Final = 100_000  # looked at; their keys are in memory
QUERIES: Final = ("period", "recipients", "addresses", "data", "templates")
# Of the digest: its queries are ours, and mostly it has no recipients.
OURS: Final = ("period", "templates")

BOUNDED: Final = {"statement_timeout": str(STATEMENT_MAX_S * 1000)}


@dataclass(slots=True)
class Reports:
    """Findings about the reports, an address that a mail could go to, and the size of the largest mail made."""

    findings: list[Finding] = field(default_factory=list)
    recipient: str | None = None
    largest_bytes: int = 0


async def examine_reports(settings: Settings, database: Database) -> Reports:
    """Return all findings about each report; never raises for what is wrong with it."""
    found = Reports()
    for name, report in settings.editions.items():
        found.findings.append(judge_link(name, report.link))
        if database.trouble:
            found.findings += _look_without_database(settings, name, database.trouble)
            continue
        try:
            async with _reading(settings) as session:
                await Look(settings, name, report, session, database.is_ours, found).look()
        except TROUBLE as error:  # the database went away meanwhile
            found.findings.append(_refused(table_of(name), error))
    found.findings += look_at_template_files(settings)
    return found


def look_at_template_files(settings: Settings) -> list[Finding]:
    """Return a finding for each template that is not used because of its name."""
    found = []
    for sentence in ignored(settings.directory, {*settings.editions, DIGEST}):
        what, _, fix = sentence.rstrip(".").partition("; ")
        found.append(note("templates", what, fix))
    return found


@asynccontextmanager
async def _reading(settings: Settings) -> AsyncIterator[GenerateSession]:
    """Open a session that can only read, for one report as in generate: its cursors and statements end with it."""
    async with GenerateSession.open(settings, application="outbox doctor", fits=False, bounds=BOUNDED) as session:
        await session.keep("default_transaction_read_only", "on")
        yield session


def _look_without_database(settings: Settings, name: str, why: str) -> list[Finding]:
    left = [f"{table_of(name)}.{look}" for look in _looks(name)[:-1]]
    return [*not_checked(left, why), _compiled(settings, name)]


def _looks(name: str) -> tuple[str, ...]:
    return OURS if name == DIGEST else QUERIES


def _compiled(settings: Settings, name: str) -> Finding:
    """Check that the templates can be read."""
    check = f"{table_of(name)}.templates"
    try:
        Templates(settings.directory / "templates", name)
    except OutboxError as error:
        return problem_of(check, error)
    return ok(check, "all four can be read (not rendered)")


def judge_link(name: str, link: str) -> Finding:
    """Judge the link: a mail reader has to open it, and no one on the way should read the token in it."""
    check = f"{table_of(name)}.link"
    shown = link.replace("{token}", "…")
    parts = urlsplit(shown)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return problem(check, f"{shown} is no link that a mail reader opens", "begin it with https:// and a host")
    if parts.scheme == "http":
        return note(check, f"{shown} shows its token to everybody on the way", "serve it over https")
    return ok(check, shown)


@dataclass(slots=True)
class Look:
    """Check of one report."""

    settings: Settings
    name: str
    report: EditionSettings
    session: GenerateSession
    is_ours: bool
    found: Reports

    async def look(self) -> None:
        """Make the checks in order; those that depend on one that failed are not made."""
        if (current_name := current(self.report.timezone)) != self.report.timezone:
            found = f"{self.report.timezone} is a former name of {current_name}"
            fix = f"write {current_name}; the periods stay the same"
            self.found.findings.append(note(self._check("timezone"), found, fix))
        try:
            await self.session.use_timezone(self.report.timezone)
            period, now = await self._look_at_period()
        except TROUBLE as error:
            self.found.findings.append(_refused(self._check("period"), error))
            self._leave("the period is not known")
            return
        if not isinstance(self.report, ReportSettings):
            self.found.findings.append(_compiled(self.settings, self.name))
            return
        try:
            source = await source_of(self.settings, self.name, self.session.queries)
        except OutboxError as error:
            self.found.findings.append(problem_of(self._check("source"), error))
            self._leave("the source cannot be used")
            return
        if isinstance(source, PythonSource):
            self.found.findings.append(ok(self._check("source"), f"{self.report.source} can be made"))
        sample = await self._look_at_recipients(source, period)
        builder = ReportBuilder.of(self.settings, self.name, period, now)
        await self._look_at_content(builder, source, period, sample)

    def _check(self, look: str) -> str:
        return f"{table_of(self.name)}.{look}"

    def _leave(self, why: str) -> None:
        seen = {finding.check for finding in self.found.findings}
        self.found.findings += [
            *not_checked([c for look in _looks(self.name)[:-1] if (c := self._check(look)) not in seen], why),
            _compiled(self.settings, self.name),
        ]

    async def _look_at_period(self) -> tuple[Period, datetime]:
        """Return the period that generate would make now, by the database's clock."""
        (now,) = (await self.session.fetch(text("SELECT now()")))[0]
        if self.is_ours:
            async with self.session.ours() as connection, connection.begin():
                _, period = await find_edition(connection, self.name, self.report, None)
        else:
            report = self.report
            period = period_at(now, cadence=report.cadence, timezone=report.zone, covers=report.covers)
        found = f"would make {period.key}: {in_words(period, self.report.zone)}"
        self.found.findings.append(ok(self._check("period"), found))
        return period, now

    async def _look_at_recipients(self, source: Source, period: Period) -> list[Recipient]:
        """Count the recipients, and those who would be refused; return the first few who would not."""
        tally = RecipientTally()
        try:
            tally.waived = await self._waived(period)
            async for recipient in source.recipients(period):
                if tally.count == RECIPIENTS_MAX:
                    tally.is_cut = True
                    break
                tally.take(recipient)
        except TROUBLE as error:
            self.found.findings.append(_refused(self._check("recipients"), error))
            self.found.findings += not_checked([self._check("addresses")], "the recipients are not known")
            return []
        if not (tally.count or self.report.is_empty_allowed):
            what, fix = await explain_no_recipients(self.session, self.name, self.report)
            self.found.findings.append(problem(self._check("recipients"), what, fix))
        else:
            note_of_bounds = await self._judge_bounds("recipients")
            self.found.findings.append(note_of_bounds or tally.judge(self._check("recipients")))
        self.found.findings.append(self._judged(tally))
        if tally.sample and self.found.recipient is None:
            self.found.recipient = tally.sample[0].email
        return tally.sample

    async def _waived(self, period: Period) -> frozenset[str]:
        """Return the keys of the recipients to whom nothing is owed for the edition of this period."""
        if not self.is_ours:
            return frozenset()
        found = await self.session.fetch(WAIVED, {"report": self.name, "period": period.key})
        return frozenset(row.recipient_key for row in found)

    def _judged(self, tally: RecipientTally) -> Finding:
        return tally.judge_addresses(self._check("addresses"), is_collected=self.report.is_collected)

    async def _look_at_content(
        self, builder: ReportBuilder, source: Source, period: Period, sample: list[Recipient]
    ) -> None:
        """Fetch the content for a few recipients and render it."""
        data, templates = self._check("data"), self._check("templates")
        if isinstance(source, PythonSource):
            self.found.findings += not_checked([data], "build() may write, so it is not called")
        elif not sample:
            self.found.findings += not_checked([data], "there is no recipient to ask it for")
        else:
            contents = await self._look_at_data(source, period, sample)
            if contents:
                by_key = {recipient.key: recipient for recipient in sample}
                pairs = [(by_key[key], content) for key, content in contents.items()]
                self.found.findings.append(await self._look_at_templates(templates, builder, pairs))
                return
        self.found.findings.append(_compiled(self.settings, self.name))

    async def _look_at_data(self, source: Source, period: Period, sample: list[Recipient]) -> dict[str, Content]:
        check = self._check("data")
        try:
            given = await source.build(sample, period)
        except TROUBLE as error:
            self.found.findings.append(_refused(check, error))
            return {}
        contents: dict[str, Content] = {}
        finding = None
        for key, content in given.items():
            if not isinstance(content, Exception):
                contents[key] = content
            elif finding is None:
                finding = _refused(check, content, f"recipient {key}: ")
        finding = finding or await self._judge_bounds("data")
        if finding is None:
            rows = max(len(content) for content in contents.values())
            finding = ok(check, f"asked for {len(contents)} of them, gives up to {rows} rows")
        self.found.findings.append(finding)
        return contents

    async def _judge_bounds(self, look: str) -> Finding | None:
        """Return a note if a query's rows depend on the time zone in which a column without one is read."""
        query: str | None = getattr(self.report, look)
        if query is None or self.report.timezone in ("UTC", "Etc/UTC"):
            return None
        names = await self.session.queries.plain_timestamps(query)
        if not names:
            return None
        bounds = " and ".join(f":{name}" for name in names)
        return note(
            self._check(look),
            f"{bounds} is compared with a timestamp without time zone, which Postgres reads in {self.report.timezone}",
            f"write (col at time zone 'UTC') >= :{names[0]} if the column is written in UTC, and "
            f"(col at time zone '{self.report.timezone}') if it is not",
        )

    async def _look_at_templates(
        self, check: str, builder: ReportBuilder, pairs: list[tuple[Recipient, Content]]
    ) -> Finding:
        try:
            made = await asyncio.to_thread(
                lambda: [builder.with_email(recipient, content, "doctor", 1) for recipient, content in pairs]
            )
        except OutboxError as error:
            return problem_of(check, error)
        except Exception as error:  # noqa: BLE001 - templates run the user's code on any data
            return problem(check, explain(error).rstrip("."), "correct it there")
        largest = max(made, key=lambda report: len(report.message))
        self.found.largest_bytes = max(self.found.largest_bytes, len(largest.message))
        return ok(
            check, f"render; mails of up to {len(largest.message)} bytes, pages of {len(largest.html)} characters"
        )


def _refused(check: str, error: Exception, whose: str = "") -> Finding:
    """Return the finding for a query that failed: it is wrong, or does what the doctor does not allow."""
    if is_caused_by(error, asyncpg.ReadOnlySQLTransactionError):
        return note(check, f"{whose}the query writes, which a doctor does not: what it gives is not checked")
    if is_caused_by(error, asyncpg.QueryCanceledError):
        fix = "make it faster if generate is to be done in time"
        return note(check, f"{whose}the query did not end within {STATEMENT_MAX_S} s, so it is not checked", fix)
    if isinstance(error, OutboxError):
        return problem_of(check, error)
    if isinstance(error, UnreadableError):
        found, _, fix = str(error).partition("; ")
        return problem(check, f"{whose}{found}", fix)
    return problem(check, f"{whose}{message_of(error)}", "correct it there")


WAIVED: Final = text("""
SELECT w.recipient_key FROM outbox.waiver w JOIN outbox.edition e ON e.id = w.edition
 WHERE e.report = :report AND e.period = :period
""")
