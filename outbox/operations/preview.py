"""Preview: one recipient's report and email from real rows, as generate would make them now. It writes nothing.

All reads are of one snapshot in which Postgres refuses every write. The database needs no outbox schema for it. Of a
Python class `recipients` and `build` are called, which may do anything on connections of their own.
"""

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import asyncpg
from sqlalchemy import text

from outbox.errors import ConfigurationError, OutboxError, SourceError
from outbox.generate.edition import find_edition, period_for, too_early
from outbox.generate.no_recipients import explain_no_recipients
from outbox.generate.query_errors import UnreadableError, is_caused_by
from outbox.generate.recipients import Recipient, checked
from outbox.generate.report_builder import MadeReport, NewReport, ReportBuilder, warn_of_ignored_templates
from outbox.generate.session import GenerateSession
from outbox.generate.source import Content, PythonSource, Source, source_of
from outbox.operations.route_rules import route_for
from outbox.reports.period import Period, in_words
from outbox.reports.render import explain
from outbox.settings import DIGEST, EditionSettings, Settings

TOKEN: Final = "PREVIEW"  # noqa: S105 - in the place of a link's secret: it opens nothing
NAMED_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class Mail:
    """An email, and the parts that a mail reader shows."""

    message_id: str
    message: bytes
    subject: str
    text: str
    html: str


@dataclass(frozen=True, slots=True)
class Preview:
    """Report and email of one recipient, as generate would make them. `mail` is None where a digest would name it."""

    report: str
    period: Period
    words: str
    """The period in civil time and in UTC."""
    recipient: Recipient
    sender: str
    title: str
    page: str
    mail: Mail | None
    route: str
    """Route that the settings' rules give the email; '' is the usual one."""
    locale: str
    """Language, as BCP 47 names it."""
    early: str | None = None
    """Why generate would not make this period yet; None if it would."""

    def the_mail(self) -> Mail:
        """Return the email.

        Raises:
            ConfigurationError: the report has none of its own.

        """
        if self.mail is None:
            raise ConfigurationError(
                f'reports.{self.report}: with deliver = "digest" it has no email of its own; '
                "see its page, and `outbox preview digest`."
            )
        return self.mail

    @property
    def files(self) -> dict[str, bytes]:
        """Return page and email as files, by name."""
        page = {"report.html": self.page.encode()}
        if self.mail is None:
            return page
        html, text = self.mail.html.encode(), self.mail.text.encode()
        return {**page, "email.html": html, "email.txt": text, "email.eml": self.mail.message}

    def as_json(self) -> dict[str, Any]:
        """Return all of it but the email's bytes; times as ISO 8601 in UTC."""
        period, recipient, mail = self.period, self.recipient, self.mail
        return {
            "report": self.report,
            "period": {"key": period.key, "starts_at": period.starts_at, "ends_at": period.ends_at},
            "recipient": {"key": recipient.key, "email": recipient.email, "name": recipient.name},
            "sender": self.sender,
            "locale": self.locale,
            "route": self.route,
            "title": self.title,
            "subject": mail and mail.subject,
            "text": mail and mail.text,
            "html": mail and mail.html,
            "page": self.page,
            "early": self.early,
        }

    def write(self, directory: Path) -> list[Path]:
        """Write the files to a directory, which is made if it is missing; those of an earlier preview are replaced.

        Raises:
            ConfigurationError: it cannot be written to.

        """
        written = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, content in self.files.items():
                (directory / name).write_bytes(content)
                written.append(directory / name)
        except OSError as error:
            raise ConfigurationError(
                f"--out: {directory} cannot be written to ({error.strerror}); name another directory."
            ) from error
        return written


async def preview(
    settings: Settings,
    name: str,
    *,
    key: str | None = None,
    period_key: str | None = None,
    address: str | None = None,
) -> Preview:
    """Return the report of the recipient of that key, or of the first with an address; for `address` if it is given.

    Raises:
        ConfigurationError: the settings are wrong, or there is no such report, period or key.
        OutboxError: source, templates or database make it impossible; the sentence says which.

    """
    settings.require("database_url", "sender")
    sender = settings.sender_mailbox
    report = settings.report(name)
    warn_of_ignored_templates(settings)
    try:
        period, recipient, content, now = await _ask(settings, name, key, period_key)
    except OutboxError as error:
        if is_caused_by(error, asyncpg.ReadOnlySQLTransactionError):
            where = str(error).partition(":")[0]
            raise SourceError(f"{where}: the query writes, and a preview only reads; try it with a select.") from error
        raise
    builder = ReportBuilder.of(settings, name, period, now)
    person = Recipient(recipient.key, address or recipient.email, recipient.name, recipient.columns)
    made = _made(builder, f"{name} {period.key}", person, _harmless(content, settings) if name == DIGEST else content)
    mail = _read(made) if isinstance(made, NewReport) else None
    return Preview(
        report=name,
        period=period,
        words=in_words(period, report.zone),
        recipient=recipient,
        sender=f"{sender.name} <{sender.address}>" if sender.name else sender.address,
        title=made.title,
        page=made.html,
        mail=mail,
        route=route_for(settings, name, recipient.email) if mail is not None else "",
        locale=builder.language_of(recipient).tag,
        early=too_early(report, period, now),
    )


async def _ask(
    settings: Settings, name: str, key: str | None, period_key: str | None
) -> tuple[Period, Recipient, Content, datetime]:
    """Return period, recipient, content and the time of the database, all of one snapshot."""
    report = settings.report(name)
    async with GenerateSession.open(settings, application="outbox preview", fits=False) as session:
        source = await source_of(settings, name, session.queries)
        await session.use_timezone(report.timezone)
        async with session.snapshot():
            period = await _period(session, name, report, period_key)
            recipient = await _find(source, name, period, key)
            if recipient is None:
                what, fix = await explain_no_recipients(session, name, report)
                raise SourceError(f"{name} {period.key}: {what}; {fix}.")
            content = await _content(source, name, period, recipient)
            (now,) = (await session.fetch(text("SELECT now()")))[0]
    return period, recipient, content, now


async def _period(session: GenerateSession, name: str, report: EditionSettings, period_key: str | None) -> Period:
    """Return the period of a generate now, by the database's clock and, if there is one, the fleet's definition."""
    now, is_ours = (await session.fetch(text("SELECT now(), to_regclass('outbox.definition') IS NOT NULL")))[0]
    if not is_ours:
        return period_for(name, report, period_key, now)
    async with session.ours() as connection:
        _, period = await find_edition(connection, name, report, period_key, asker="--period")
    return period


async def _find(source: Source, name: str, period: Period, key: str | None) -> Recipient | None:
    """Return the recipient of that key, without a key the first who can have a report; None if there are none."""
    seen: list[str] = []
    problem = ""
    async with aclosing(source.recipients(period)) as recipients:  # type: ignore[type-var]
        async for recipient in recipients:
            if key is None or recipient.key == key:
                try:
                    return checked(recipient)
                except ValueError as error:
                    problem = problem or f"recipient {recipient.key or '(no key)'}: {error}"
                    if key is not None:
                        break
            if len(seen) < NAMED_MAX:
                seen.append(recipient.key)
    where = f"{name} {period.key}"
    if problem:
        raise SourceError(f"{where}, {problem}")
    if not seen:
        return None
    raise ConfigurationError(
        f"--for: {key!r} is no recipient of {where}; the first keys there are {', '.join(map(repr, seen))}."
    )


async def _content(source: Source, name: str, period: Period, recipient: Recipient) -> Content:
    content = (await source.build([recipient], period))[recipient.key]
    if isinstance(content, Exception):
        part = "source" if isinstance(source, PythonSource) else "data"
        fix = "" if isinstance(content, UnreadableError) else "; correct it there"
        raise SourceError(f"reports.{name}.{part}: for {recipient.key}, {content}{fix}.") from content
    return content


def _harmless(items: Content, settings: Settings) -> Content:
    """Return the items of a digest with links that open nothing: only the real links give access to their pages."""
    if isinstance(items, Mapping):
        return items
    links = {name: report.link.replace("{token}", TOKEN) for name, report in settings.reports.items()}
    return [{**row, "link": links.get(row["report"], TOKEN)} for row in items]


def _made(builder: ReportBuilder, edition: str, recipient: Recipient, content: Content) -> MadeReport:
    try:
        return builder.build(recipient, content, TOKEN, 0)
    except OutboxError:
        raise
    except Exception as error:
        raise SourceError(f"{edition}, recipient {recipient.key}: {explain(error)}") from error


def _read(made: NewReport) -> Mail:
    """Return the email as a mail reader would show it."""
    from email import message_from_bytes, policy

    mail = message_from_bytes(made.message, policy=policy.default)
    bodies = [mail.get_body((kind,)) for kind in ("plain", "html")]
    plain, html = ("" if body is None else body.get_content().replace("\r\n", "\n") for body in bodies)
    return Mail(made.message_id, made.message, str(mail["Subject"]), plain, html)
