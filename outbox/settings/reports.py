"""Tables `[reports.NAME]` and `[digest]`: period, schedule, queries, delivery and language of one report."""

import re
from enum import StrEnum
from typing import Annotated, Final
from zoneinfo import ZoneInfo, available_timezones

from pydantic import Field, ValidationInfo, field_validator

from outbox.reports.language import find
from outbox.reports.period import Cadence, Covers
from outbox.reports.query_parameters import parse
from outbox.reports.schedule import Schedule, fault_of
from outbox.settings.keys import DIGEST
from outbox.settings.values import CONTROL, REFERENCE, Table, duration_s, is_duration, shown
from outbox.suggestions import did_you_mean

_LINK_MAX: Final = 900  # in a header, whose lines end at 998 (RFC 5322 §2.1.1)
# Mail readers follow only https in List-Unsubscribe (RFC 8058 §3.1).
_HTTPS: Final = re.compile(r"https://[A-Za-z0-9.:\[\]-]+([/?][!#-;=?-~]*)?")


class Deliver(StrEnum):
    """Way of a report to its recipient: in an email of its own, or in the next digest for the address."""

    EMAIL = "email"
    DIGEST = "digest"


class Priority(StrEnum):
    """Order of emails that wait for the same route: urgent ones go first."""

    NORMAL = "normal"
    URGENT = "urgent"


class FirstTick(StrEnum):
    """Tick that a new schedule starts with."""

    NEXT = "next"
    LATEST = "latest"


class EditionSettings(Table):
    """Settings that reports and the digest share: period, schedule, links and priority of their emails."""

    cadence: Cadence = Cadence.WEEKLY
    covers: Covers = Covers.PREVIOUS
    timezone: str = "UTC"
    link: str
    unsubscribe: str | None = None  # one click there ends the emails; mail readers use it too (RFC 8058)
    schedule: str | None = None  # cron expression by which relays start the edition: "0 6 * * mon"
    first_tick: FirstTick = FirstTick.NEXT  # tick that a new schedule starts with
    catch_up: str | None = None  # an edition is still started for so long after its tick; one cadence if None
    send_before: str | None = None  # "48h": an email that was made longer ago expires; None: never
    priority: Priority = Priority.NORMAL  # urgent: before others that wait for the same route
    locale: str = "en"  # of dates, numbers and the packaged words, for recipients without a `locale` of their own
    title: str = ""  # never empty once it is read as part of Settings: the report's name stands in

    @property
    def zone(self) -> ZoneInfo:
        """Return the civil time in which periods begin and end."""
        return ZoneInfo(self.timezone)

    @property
    def is_collected(self) -> bool:
        """Return True if the report goes into a digest instead of an email of its own."""
        return False

    @property
    def is_empty_allowed(self) -> bool:
        """Return True if an edition without recipients is right; a digest has none when nothing waits for it."""
        return True

    @property
    def send_before_s(self) -> float | None:
        """Return how many seconds after it was made an email expires; None is never."""
        return None if self.send_before is None else duration_s(self.send_before)

    def unsubscribe_link(self, token: str) -> str | None:
        """Return the link by which the recipient with this token ends the emails; None if there is none."""
        return self.unsubscribe and self.unsubscribe.replace("{token}", token)

    @property
    def is_urgent(self) -> bool:
        """Return True if its emails go before others."""
        return self.priority is Priority.URGENT

    @property
    def ticks(self) -> Schedule | None:
        """Return the schedule in the report's civil time; None if only cron or a person starts editions."""
        return None if self.schedule is None else Schedule(self.schedule, self.zone)

    @field_validator("schedule")
    @classmethod
    def _is_cron(cls, schedule: str | None) -> str | None:
        if schedule is not None and (problem := fault_of(schedule)) is not None:
            raise ValueError(f"{shown(schedule)} {problem}")
        return schedule

    @field_validator("catch_up", "send_before")
    @classmethod
    def _is_duration(cls, length: str | None) -> str | None:
        if length is not None and not is_duration(length):
            raise ValueError(f'{shown(length)} is no length of time; write one like "48h", "90min" or "5d"')
        return length

    @field_validator("catch_up", "first_tick")
    @classmethod
    def _follows_a_schedule(cls, given: str | None, info: ValidationInfo) -> str | None:
        if given not in (None, FirstTick.NEXT) and info.data.get("schedule", "") is None:
            raise ValueError('stands without a schedule; write one beside it, like schedule = "0 6 * * mon"')
        return given

    @field_validator("timezone")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (KeyError, ValueError, OSError):  # unknown, outside of the database, a directory of it
            known = False
        else:
            # Servers must agree: `localtime` differs between them, and right/ counts leap seconds.
            known = name != "localtime" and not name.startswith(("posix", "right/"))
        if not known:
            guess = did_you_mean(name, available_timezones() - {"localtime"})
            raise ValueError(f"{shown(name)} is no IANA timezone; write one like America/New_York{guess}")
        return name

    @field_validator("locale")
    @classmethod
    def _names_a_language(cls, locale: str) -> str:
        if locale != "en" and find(locale) is None:
            raise ValueError(f"{shown(locale)} names no language; write one like en, de, fr-CA or pt-BR")
        return locale

    @field_validator("link")
    @classmethod
    def _has_the_token(cls, link: str) -> str:
        if "{token}" not in link:
            raise ValueError("has no {token}; write one like https://reports.example.com/r/{token}")
        return link

    @field_validator("unsubscribe")
    @classmethod
    def _fits_in_a_header(cls, link: str | None) -> str | None:
        if link is None:
            return None
        if "{token}" not in link:
            raise ValueError("has no {token}; write one like https://reports.example.com/u/{token}")
        if not _HTTPS.fullmatch(link) or "=?" in link or len(link) > _LINK_MAX:
            raise ValueError(
                "cannot stand in List-Unsubscribe: mail readers follow nothing but https there (RFC 8058), in ASCII; "
                "write one like https://reports.example.com/u/{token}"
            )
        return link

    @field_validator("title")
    @classmethod
    def _is_one_line(cls, title: str) -> str:
        if CONTROL.search(title):
            raise ValueError("has a line break or another control character; write it on one line")
        return title


class DigestSettings(EditionSettings):
    """Table `[digest]`: one email per address and period that lists all reports with `deliver = "digest"`."""

    title: str = "Your reports"


class ReportSettings(EditionSettings):
    """Table `[reports.NAME]`: one report, its delivery, and the queries or the Python class that it is made from."""

    deliver: Deliver = Deliver.EMAIL
    source: str | None = None
    recipients: str | None = None
    data: str | None = None
    may_be_empty: Annotated[bool, Field(strict=True)] = False  # an edition without recipients is not an error

    @property
    def is_collected(self) -> bool:
        """Return True if the report goes into a digest instead of an email of its own."""
        return self.deliver is Deliver.DIGEST

    @property
    def is_empty_allowed(self) -> bool:
        """Return True if an edition without recipients is right."""
        return self.may_be_empty

    @field_validator("deliver")
    @classmethod
    def _has_an_email_that_expires(cls, deliver: Deliver, info: ValidationInfo) -> Deliver:
        if deliver is Deliver.DIGEST and info.data.get("send_before") is not None:
            raise ValueError(
                "stands beside send_before, but the report has no email of its own; move send_before to [digest]"
            )
        return deliver

    @field_validator("source")
    @classmethod
    def _names_a_class(cls, source: str | None) -> str | None:
        if source is not None and not REFERENCE.fullmatch(source):
            raise ValueError(f'{shown(source)} names no class; write one like "myapp.reports:Progress"')
        return source

    @field_validator("recipients", "data")
    @classmethod
    def _comes_from_queries_or_a_source(cls, query: str | None, info: ValidationInfo) -> str | None:
        if "source" not in info.data:
            return query  # `source` is invalid itself, and must be corrected first
        if info.data["source"] is not None and query is not None:
            raise ValueError("stands beside source; keep the source, or the queries recipients and data")
        if info.data["source"] is None and not (query or "").strip():
            wanted = "who is owed a report" if info.field_name == "recipients" else "what is in a report"
            raise ValueError(f'is missing; write a query that says {wanted}, or source = "module:Class"')
        return query

    @field_validator("data")
    @classmethod
    def _selects_by_key(cls, data: str | None) -> str | None:
        used = {"key", "keys"}.intersection(parse(data or "").names)
        if data is not None and len(used) != 1:
            wrong = "uses both :key and :keys" if used else "uses neither :key nor :keys"
            raise ValueError(f"{wrong}; compare with :key (one recipient) or with :keys (a batch of them)")
        return data


def with_titles(reports: dict[str, ReportSettings]) -> dict[str, ReportSettings]:
    """Return the reports; one without a title gets it from its name.

    Raises:
        ValueError: a report has the name of the digest.

    """
    if DIGEST in reports:
        raise ValueError("no report can be called digest, since that is the name of the digest; call it otherwise")
    return {
        name: report if report.title else report.model_copy(update={"title": _title_of(name)})
        for name, report in reports.items()
    }


def _title_of(name: str) -> str:
    return re.sub("[_-]+", " ", name).strip().capitalize()
