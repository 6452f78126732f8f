"""Building of one recipient's report: recipient and content become a page, and the email that links to it.

Nothing here reads or writes the database. The templates are read when they are first needed.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

from outbox.database.values import storable
from outbox.generate.recipients import Recipient
from outbox.generate.source import Content
from outbox.log import Events
from outbox.mail import message
from outbox.mail.mailbox import Mailbox
from outbox.reports.language import ENGLISH, Language, find
from outbox.reports.period import Period
from outbox.reports.render import Templates
from outbox.reports.template_files import ignored
from outbox.settings import DIGEST, EditionSettings, Settings

log = Events("outbox.generate")

KEY_COLUMN_MAX: Final = 1000  # octets
LOCALE_SHOWN_MAX: Final = 40  # characters


@dataclass(frozen=True, slots=True)
class CivilPeriod:
    """The period as templates see it: in words, and in the report's own time. As text it is its label."""

    key: str
    label: str
    starts_at: datetime
    ends_at: datetime

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, slots=True)
class NewReport:
    """A report and the email that links to it; `email_id` is reserved from the email sequence.

    `items` are the reports that the email names, if it is a digest.
    """

    recipient_key: str
    token: str
    title: str
    html: str
    email_id: int
    key: str
    """The key of the email."""
    sender: str
    address: str
    message_id: str
    message: bytes
    items: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class CollectedReport:
    """A report without an email of its own, which a digest will name; `key` is that which its email would have."""

    recipient_key: str
    token: str
    title: str
    html: str
    key: str
    sender: str
    address: str
    name: str
    link: str


MadeReport = NewReport | CollectedReport


class ReportBuilder:
    """Builder of the reports of one edition. `now` is the date of the emails."""

    def __init__(
        self,
        name: str,
        report: EditionSettings,
        period: Period,
        *,
        sender: Mailbox,
        templates: Path,
        now: datetime,
    ) -> None:
        starts_at, ends_at = (at.astimezone(report.zone) for at in (period.starts_at, period.ends_at))
        self._name = name
        self._report = report
        self._period = period
        self._sender = sender
        self._now = now.astimezone(report.zone)
        self._usual = find(report.locale) or ENGLISH
        self._has_unknown_locale = False
        self._templates = cache(lambda: Templates(templates, name))
        self._period_in = cache(
            lambda language: CivilPeriod(
                period.key, language.label(starts_at, ends_at, report.cadence), starts_at, ends_at
            )
        )

    @classmethod
    def of(cls, settings: Settings, name: str, period: Period, now: datetime) -> "ReportBuilder":
        """Return the builder of a report of the settings."""
        report, templates = settings.report(name), settings.directory / "templates"
        return cls(name, report, period, sender=settings.sender_mailbox, templates=templates, now=now)

    def read_templates(self) -> None:
        """Read the templates, if they are not read yet.

        Raises:
            SourceError: one cannot be read or compiled.

        """
        self._templates()

    def build(self, recipient: Recipient, content: Content, token: str, email_id: int) -> MadeReport:
        """Return the report, with its email unless a digest collects it. `email_id` is 0 if there is no email.

        Raises whatever a template raises; `render.explain` describes it.
        """
        if self._report.is_collected:
            return self._collected(recipient, content, token)
        return self.with_email(recipient, content, token, email_id)

    def with_email(self, recipient: Recipient, content: Content, token: str, email_id: int) -> NewReport:
        """Return the report with an email, also where a digest would collect it; raises as `build`."""
        language = self.language_of(recipient)
        rendered = self._templates().render(self._context(recipient, content, token), language)
        domain = self._sender.address.rpartition("@")[2]
        unsubscribe = self._report.unsubscribe_link(token)
        message_id = f"<{email_id}.{secrets.token_hex(8)}@{domain}>"
        return NewReport(
            recipient_key=recipient.key,
            token=token,
            title=self._title(language),
            html=storable(rendered.page),
            email_id=email_id,
            key=self._key(recipient),
            sender=self._sender.address,
            address=recipient.email,
            message_id=message_id,
            message=message.build(
                sender=self._sender,
                recipient=Mailbox(recipient.name, recipient.email),
                subject=rendered.subject,
                text=rendered.text,
                html=rendered.html,
                date=self._now,
                message_id=message_id,
                list_id=f"<{self._name}.{domain}>",
                headers={} if unsubscribe is None else one_click(unsubscribe),
            ),
            items=self._items(content),
        )

    def _collected(self, recipient: Recipient, content: Content, token: str) -> CollectedReport:
        language = self.language_of(recipient)
        return CollectedReport(
            recipient_key=recipient.key,
            token=token,
            title=self._title(language),
            html=storable(self._templates().page(self._context(recipient, content, token), language)),
            key=self._key(recipient),
            sender=self._sender.address,
            address=recipient.email,
            name=storable(recipient.name),
            link=self._report.link.replace("{token}", token),
        )

    def language_of(self, recipient: Recipient) -> Language:
        """Return the language of the recipient's column `locale`, else that of the report.

        The first locale that names no language is logged.
        """
        locale = recipient.columns.get("locale")
        if not locale:
            return self._usual
        found = find(locale) if isinstance(locale, str) else None
        if found is None and not self._has_unknown_locale:
            self._has_unknown_locale = True
            log.warning(
                "locale_unknown",
                "recipient {key}: the locale {locale!r} names no language, so the report is in {language}; "
                "further ones are not named",
                key=recipient.key,
                locale=str(locale)[:LOCALE_SHOWN_MAX],
                language=self._usual.tag,
            )
        return found or self._usual

    def _title(self, language: Language) -> str:
        return f"{self._report.title}, {self._period_in(language).label}"

    def _key(self, recipient: Recipient) -> str:
        """Return the key of the recipient's email, which is sent once under it."""
        return f"{self._name}/{self._period.key}/{recipient.key}"

    def _items(self, content: Content) -> Sequence[int]:
        return [row["id"] for row in content] if self._name == DIGEST and not isinstance(content, Mapping) else ()

    def _context(self, recipient: Recipient, content: Content, token: str) -> dict[str, Any]:
        """Return the names that templates can use (`render.Templates`); those of the content come first."""
        given = content if isinstance(content, Mapping) else {"rows": content}
        rows = given.get("rows", [])
        return {
            "report": self._name,
            "title": self._report.title,
            "period": self._period_in(self.language_of(recipient)),
            "recipient": {
                **recipient.columns,
                "key": recipient.key,
                "email": recipient.email,
                "name": recipient.name,
            },
            "rows": rows,
            "columns": list(rows[0]) if rows else [],
            "link": self._report.link.replace("{token}", token),
            "unsubscribe": self._report.unsubscribe_link(token),
            "sender": self._sender.name,
            **given,
        }


def check_size(made: MadeReport, message_bytes_max: int) -> None:
    """Raise ValueError if the database would refuse the report's email, and with it the whole batch."""
    if not isinstance(made, NewReport):
        return
    if len(made.message) > message_bytes_max:
        raise ValueError(
            f"the email has {len(made.message):,} octets, more than message_bytes_max "
            f"({message_bytes_max:,}); shorten it, and leave the rest to the page"
        )
    if len(made.key.encode()) > KEY_COLUMN_MAX:
        raise ValueError(f"the recipient's key makes an email key of more than {KEY_COLUMN_MAX} octets; shorten it")


def one_click(link: str) -> dict[str, str]:
    """Return the header fields with which a mail reader shows a button that ends the emails.

    RFC 2369 §3.2, RFC 8058 §3.1.
    """
    return {"List-Unsubscribe": f"<{link}>", "List-Unsubscribe-Post": "List-Unsubscribe=One-Click"}


def warn_of_ignored_templates(settings: Settings) -> None:
    """Log each template that is not used because of its name, once per process."""
    _warn_of_ignored(settings.directory, frozenset({*settings.editions, DIGEST}))


@cache
def _warn_of_ignored(directory: Path, reports: frozenset[str]) -> None:
    for sentence in ignored(directory, reports):
        log.warning("template_ignored", "{sentence}", sentence=sentence.rstrip("."))
