"""Files and variables that people write: lists of addresses, settings, URLs, schedules."""

import re
import tempfile
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from zoneinfo import ZoneInfo

from hypothesis import strategies as st

from outbox.errors import ConfigurationError
from outbox.feedback.suppression_import import entries_of
from outbox.mail.mailbox import comparable
from outbox.reports.schedule import Schedule, fault_of
from outbox.settings import load
from outbox.settings.urls import DatabaseUrl, SmtpAddress, parse_listen
from tests.fuzz.harness import TARGETS, Target, fuzzed, words

# ── lists that providers export ──────────────────────────────────────────────────────────────────────────────────────

_LIST = words(
    "ann@example.com", "\n", "\r\n", "\r", ",", ";", '"', '""', "#", "email", "EmailAddress", "reason", "report",
    "bounce",
    "hardbounce", "\ufeff", "\0", "\t", " ", "é@bücher.example", "@", "x" * 200, "\u2028", "\udcff",
    seeds=("email,reason\nann@example.com,bounce\n", "ann@example.com\nbo@example.com\n"),
)  # fmt: skip


@fuzzed("lists", _LIST, str)
def a_list_gives_addresses_in_their_one_form_or_a_few_sentences(text):
    try:
        found = entries_of(text, name="list.csv")
    except ConfigurationError as error:
        assert len(str(error).splitlines()) <= 12
        return
    for one in found:
        assert comparable(one.address) == one.address
        assert not re.search(r"[\s\0]", one.address)
        assert "\0" not in one.report
    again = entries_of("\n".join(one.address for one in found), name="again")
    assert [one.address for one in again] == list(dict.fromkeys(one.address for one in found))


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SECRET = "s3cret-of-the-fuzz"
_TOML = """\
database_url = "postgresql://app:s3cret-of-the-fuzz@db/app"
smtp_url = "smtp://user:s3cret-of-the-fuzz@mail:587"
sender = "Progress reports <reports@example.com>"
rate = "14/s"
[retry]
base_s = 30
[reports.progress]
cadence = "weekly"
timezone = "America/New_York"
schedule = "0 6 * * mon"
recipients = "select 1"
data = "select 1"
link = "https://reports.example.com/r/{token}"
"""
_SETTINGS = st.fixed_dictionaries({
    "file": words(
        "=", '"', "'", '"""', "[", "]", "[[", "{", "}", ".", ",", "\n", "#", "\\", "\\u0000", "\0", "é", "1e999",
        "-1", "nan",
        "true", "0x", "2026-11-23", "[reports.x]\n", "[web]\n", "[routes.bulk]\n", "[digest]\n",
        "database_url = ", "a.",
        "smtp_url", "sender = ", "rate = ", "http = ", SECRET, "postgresql://", "smtp://", "@", ":", "/", "?", "%",
        seeds=(_TOML,) * 3, size_max=30_000,
    ),
    "variables": st.dictionaries(
        st.sampled_from([
            "OUTBOX_DATABASE_URL", "OUTBOX_SMTP_URL", "OUTBOX_SENDER", "OUTBOX_RETRY", "OUTBOX_REPORTS",
            "OUTBOX_RATE",
            "OUTBOX_WEB", "OUTBOX_HTTP", "OUTBOX_ROUTES", "OUTBOX_DKIM", "OUTBOX_LEASE_S", "OUTBOX_RESOLVER",
        ]),
        words(
            "{", "}", "[", "]", "=", '"', ",", "board_token", SECRET, "smtp://u:", "@h", "1", "-", "nan", "s",
            "/", "\n", "a.b",
            seeds=(f"postgresql://app:{SECRET}@db/app", f'{{board_token = "{SECRET}"}}'), size_max=20_000,
        ),
        max_size=3,
    ),
})  # fmt: skip


@contextmanager
def _settings(_):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "outbox.toml")
        path.touch(mode=0o600)

        def settings_load_or_each_error_is_a_sentence_without_a_secret(example):
            path.write_text(example["file"], errors="replace")
            variables = {name: value.replace("\0", "") for name, value in example["variables"].items()}
            try:
                found = load(path, variables)
            except ConfigurationError as error:
                assert str(error).strip()
                # A secret that stands in a key of its own is never shown; one that is the key's name may be.
                if f":{SECRET}@" in example["file"] + str(variables):
                    assert f":{SECRET}" not in str(error)
                assert not re.search(r"[\0\x1b]", str(error))
            else:
                assert SECRET not in f"{found.database_url!r} {found.smtp_url!r} {found.web.board_token!r}"

        yield settings_load_or_each_error_is_a_sentence_without_a_secret


TARGETS["settings"] = Target("settings", _SETTINGS, dict, _settings)

_URL = words(
    "postgresql://", "postgres://", "postgresql+asyncpg://", "smtp://", "smtps://", "lmtp://", "lmtp:///",
    "file:///", "@",
    ":", "/", "?", "#", "%", "%00", "%40", "%ff", "[", "]", "::1", "h", "25", "65536", ",", "&", "=", "host=",
    "password=",
    "sslmode=", SECRET, "user", " ", "\0", "\n", "é", "\u2028", "\udcff",
    seeds=(f"postgresql://u:{SECRET}@h:5432/d?host=/s", f"smtp://u:{SECRET}@h:587",
    f"postgresql://h/d?password={SECRET}"),
    size_max=20_000,
)  # fmt: skip


@fuzzed("urls", _URL, str)
def a_url_shows_itself_without_its_password_or_is_refused_without_it(text):
    for parse in (DatabaseUrl.parse, SmtpAddress.parse):
        try:
            found = parse(text)
        except ValueError as error:
            assert SECRET not in str(error)
            continue
        # Where it is the password, and nowhere else: in a path or a name it is no secret.
        if text.count(SECRET) == 1 and re.search(rf"//[^@/?:]*:{SECRET}@|[?&]password={SECRET}(&|$)", text):
            assert SECRET not in f"{found} {found!r}"
    try:
        _, port = parse_listen(text)
    except ValueError:
        return
    assert 0 <= port <= 65535


# ── schedules ────────────────────────────────────────────────────────────────────────────────────────────────────────

_CRON = words(
    "*", "/", ",", "-", "?", "L", "#", " ", "0", "1", "5", "29", "30", "31", "59", "60", "mon", "feb", "W", "7",
    "9" * 5000,
    "\t", "\n", "é", "²", "٣", "1-5", "*/7", "0 6 * * ", "\udcff", "mon#5", "0,",
    seeds=("0 6 * * mon", "*/5 0-23/2 1,15 feb mon-fri", "59 23 29 2 *", "0 0 L * *", "30 2 * * sun#5"),
    size_max=20_000,
)  # fmt: skip
_WHEN = st.fixed_dictionaries({
    "expression": _CRON,
    "zone": st.sampled_from(["UTC", "America/New_York", "Australia/Lord_Howe", "Africa/Casablanca", "Pacific/Apia"]),
    "minute": st.integers(0, 60 * 24 * 365 * 60),
})  # fmt: skip


@fuzzed("schedules", _WHEN, dict)
def a_schedule_that_is_taken_ticks_forwards_and_every_other_is_refused_in_a_sentence(example):
    expression = example["expression"]
    fault = fault_of(expression)
    if fault is not None:
        assert "\n" not in fault
        assert len(fault) < 300
        return
    now = datetime(1990, 1, 1, tzinfo=UTC) + timedelta(minutes=example["minute"])
    schedule = Schedule(expression, ZoneInfo(example["zone"]))
    last = now
    for tick in islice(schedule.after(now), 3):
        assert tick > last
        assert schedule.latest(tick) == tick
        last = tick
    latest = schedule.latest(now)
    assert latest is None or latest <= now
