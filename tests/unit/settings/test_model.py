import pickle
import re
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from outbox.errors import ConfigurationError
from outbox.reports.period import Cadence, Covers
from outbox.settings import (
    DkimSettings,
    ReportSettings,
    RetrySettings,
    RouteSettings,
    ServerSettings,
    Settings,
    WebSettings,
    WhenInDoubt,
)
from outbox.settings.urls import DatabaseUrl
from tests.support.settings_files import REPORT, SECRET, WHOLE, faults, read


def test_what_is_left_out_has_its_default():
    settings = read(WHOLE)
    assert settings.in_doubt is WhenInDoubt.HOLD
    assert (settings.retry.base_s, settings.retry.max_s, settings.retry.attempts_max) == (30, 3600, 12)
    assert (settings.connections_max, settings.messages_per_connection_max, settings.batch_max) == (
        16,
        500,
        100,
    )
    assert (settings.lease_s, settings.guard_s, settings.drain_s, settings.poll_max_s) == (10, 5, 30, 5)
    assert (settings.connect_timeout_s, settings.command_timeout_s) == (30, 300)
    assert (settings.data_done_timeout_s, settings.idle_s) == (600, 5)
    report = settings.report("progress")
    assert (report.cadence, report.covers) == (Cadence.WEEKLY, Covers.PREVIOUS)
    assert (report.timezone, report.zone, report.title) == ("UTC", ZoneInfo("UTC"), "Progress")


def test_what_is_written_is_read():
    settings = read(
        WHOLE.replace(
            "[reports", 'in_doubt = "ask"\nresolver = "m:f"\nlease_s = 3\nguard_s = 1.5\n[retry]\nmax_s = 60\n[reports'
        )
        + 'cadence = "daily"\ncovers = "current"\ntimezone = "America/New_York"\ntitle = "Week by week"\n'
        + '[reports.by_class-2]\nsource = "my.app:Report"\nlink = "{token}"'
    )
    assert settings.in_doubt is WhenInDoubt.ASK
    assert (settings.lease_s, settings.guard_s, settings.retry.max_s) == (3, 1.5, 60)
    report = settings.report("progress")
    assert (report.cadence, report.covers) == (Cadence.DAILY, Covers.CURRENT)
    assert (report.zone, report.title) == (ZoneInfo("America/New_York"), "Week by week")
    assert settings.report("by_class-2").source == "my.app:Report"
    assert settings.report("by_class-2").title == "By class 2"


@pytest.mark.parametrize(
    "sender",
    [
        "nobody",
        "a@b, c@d",
        "Group: a@b;",
        "smtp://bob:x@mail",
        "a <b> <c@d>",
        "a@b <c@d>",
        r"\"a\nb\" <c@d>",
        "a@b <c@d",
        "Jörg <jörg@bücher.example>",
        "a@b\\nBcc: c@d",
        "<>",
        "a@b@c",
        "a b@c",
        "",
    ],
)
def test_a_sender_that_is_not_one_mailbox_is_refused(sender):
    (fault,) = faults(f'sender = "{sender}"')
    assert fault.startswith("sender: is not one mailbox;")


@pytest.mark.parametrize(
    "sender",
    ["a@b", "reports@example.com", "Jörg <j.o+x@example.com>", '"Reports, Inc" <reports@example.com>'],
)
def test_a_sender_is_an_address_with_or_without_a_name(sender):
    assert read(OUTBOX_SENDER=sender).sender == sender


@pytest.mark.parametrize(
    "address", ["a..b@example.com", ".a@example.com", "a@example.invalid", "a@10.0.0.5", f"{'a' * 65}@example.com"]
)
def test_a_sender_whose_address_no_message_may_have_is_refused_with_the_reason(address):
    (problem,) = faults(f'sender = "Reports <{address}>"')
    assert problem.startswith(f"sender: '{address}' is no email address: ")
    assert problem.endswith("; correct it.")


@pytest.mark.parametrize("address", ["staging@example.com", " a.b+c@host ", "x@localhost", "ü@c"])
def test_redirect_to_is_one_address_from_the_file_or_the_environment(address):
    assert read(OUTBOX_REDIRECT_TO=address).redirect_to == address.strip()
    assert read(f'redirect_to = "{address}"').redirect_to == address.strip()


@pytest.mark.parametrize(
    "address", ["", "staging", "a@b@c", "A <a@example.com>", "a b@c", "a@b>", "a..b@c", "a@-b", "a@ü", "a@" + "b" * 64]
)
def test_what_is_no_address_redirects_nothing_and_is_refused(address):
    (fault,) = faults(f'redirect_to = "{address}"')
    assert fault.startswith('redirect_to: is not one address; write one like "staging@example.com"')


def test_settings_never_show_a_secret():
    settings = read(
        OUTBOX_DATABASE_URL=f"postgresql://bob:{SECRET}@db/app",
        OUTBOX_SMTP_URL=f"smtp://{SECRET}:{SECRET}@mail:587",
    )
    assert settings.smtp_url is not None
    assert settings.smtp_url.password == SECRET
    shown = [str(settings), repr(settings), str(settings.model_dump()), settings.model_dump_json()]
    shown += [f"{settings.smtp_url}", f"{settings.smtp_url!r}", f"{settings.database_url}"]
    assert not [text for text in shown if SECRET in text]
    assert "smtp://***@mail:587" in repr(settings)
    assert "postgresql://bob:***@db/app" in repr(settings)


def test_settings_do_not_change_and_can_be_copied():
    settings = read(WHOLE)
    with pytest.raises(ValueError, match="frozen"):
        settings.lease_s = 3
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert settings.model_copy(update={"lease_s": 20.0}).lease_s == 20


def test_what_a_command_needs_and_is_not_set_is_a_fault_each():
    with pytest.raises(ConfigurationError) as caught:
        read("").require("database_url", "smtp_url", "sender", "reports")
    assert caught.value.faults == [
        (
            "database_url: is not set; write database_url ="
            ' "postgresql://user:password@host/database" in outbox.toml,'
            " or set OUTBOX_DATABASE_URL."
        ),
        'smtp_url: is not set; write smtp_url = "smtp://host:25" in outbox.toml, or set OUTBOX_SMTP_URL.',
        (
            'sender: is not set; write sender = "Progress reports <reports@example.com>" in'
            " outbox.toml, or set"
            " OUTBOX_SENDER."
        ),
        (
            "reports: is not set; write a table [reports.NAME] with link, recipients and data"
            " in outbox.toml, or set"
            " OUTBOX_REPORTS."
        ),
    ]
    read(WHOLE).require("database_url", "smtp_url", "sender", "reports")


def test_a_report_that_is_not_there_names_those_that_are():
    settings = read(WHOLE + REPORT.replace("progress", "sales", 1))
    with pytest.raises(ConfigurationError) as caught:
        settings.report("progres")
    assert caught.value.faults == [
        "reports.progres: is not configured; write one of progress, sales (did you mean progress?)."
    ]
    with pytest.raises(ConfigurationError, match="reports: is not set"):
        read("").report("progress")


def test_settings_can_be_made_without_a_file():
    settings = Settings.model_validate({"database_url": "postgresql:///app", "directory": Path("/etc")})
    assert settings.database_url == DatabaseUrl("postgresql:///app")
    assert Settings(database_url=settings.database_url).directory == Path.cwd()


def test_the_page_of_settings_names_every_key_with_its_default():
    page = (Path(__file__).parents[3] / "docs" / "settings.md").read_text()
    row = re.compile(r"^\| `(\w+)` \| ([^|]*?) ?\|", re.MULTILINE)
    told = [dict(row.findall(part)) for part in re.split(r"^## ", page, flags=re.MULTILINE)]
    _, top, dkim, retry, route, report, web = told
    tables = (
        *((Settings, top), (DkimSettings, dkim), (RetrySettings, retry)),
        *((RouteSettings, route), (ReportSettings, report), (WebSettings, web)),
    )
    for model, said in tables:
        as_at_the_top = set(ServerSettings.model_fields) if model is RouteSettings else set()
        assert set(said) == set(model.model_fields) - {"directory"} - as_at_the_top
        for key, shown in said.items():
            default = model.model_fields[key].default
            if isinstance(default, str | float | bool) and default != "":
                assert shown.strip("`").lower() == str(default).lower().removesuffix(".0"), key
