import pickle
import re
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

import outbox.settings
from outbox.errors import ConfigurationError
from outbox.reports.period import Cadence, Covers
from outbox.settings import (
    DkimSettings,
    ReportSettings,
    RetrySettings,
    RouteSettings,
    Settings,
    WaySettings,
    WebSettings,
    WhenInDoubt,
    duration_s,
    load,
)
from outbox.settings.urls import DatabaseUrl, SmtpAddress
from outbox.trust import distrust_of

SECRET = "s3cr3t"
QUERIES = """
link = "https://reports.example.com/r/{token}"
recipients = "select id::text as key, email from people"
data = "select day from progress where person_id = cast(:key as int)"
"""
REPORT = f"[reports.progress]{QUERIES}"
WHOLE = f"""
database_url = "postgresql://bob@db/app"
smtp_url = "smtp://mail:25"
sender = "Progress reports <reports@example.com>"
{REPORT}
"""
ENCODE = "percent-encode @ / ? # : and % in the user and the password (p@ss is p%40ss)"
LINK = "https://reports.example.com/r/{token}"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test has a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str = "", **variables: str) -> Settings:
    Path("outbox.toml").write_text(text, encoding="utf-8")
    return load(environ=variables)


def faults(text: str = "", **variables: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        read(text, **variables)
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


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


ONE_FAULT = [
    # numbers
    ("lease_s = 1", "lease_s: 1 is too small; write 2 or more."),
    ('lease_s = "10"', "lease_s: is not a number; write one without quotes."),
    ("drain_s = true", "drain_s: is not a number; write one without quotes."),
    ("idle_s = inf", "idle_s: is not a finite number; write one such as 30."),
    ("connections_max = 0", "connections_max: 0 is too small; write 1 or more."),
    ("connections_max = 1001", "connections_max: 1001 is too large; write 1000 or less."),
    ("batch_max = 1.5", "batch_max: is not a whole number; write one without quotes and without a point."),
    ("guard_s = 10", "guard_s: 10 is not below lease_s; write less than 10."),
    ("lease_s = 4", "guard_s: 5 is not below lease_s; write less than 4."),
    ("[retry]\nbase_s = 7200", "retry.max_s: 3600 is below base_s; write at least 7200."),
    ("[retry]\nattempts_max = 0", "retry.attempts_max: 0 is too small; write 1 or more."),
    # schedules
    (
        f'{REPORT}schedule = "60 6 * * mon"',
        (
            'reports.progress.schedule: "60 6 * * mon" has an unknown minute; write one like "0 6 * * mon"'
            " (minute, hour, day of month, month, day of week)."
        ),
    ),
    (
        f'{REPORT}schedule = "@weekly"',
        (
            'reports.progress.schedule: this has 1 field instead of 5; write one like "0 6 * * mon"'
            " (minute, hour, day of month, month, day of week)."
        ),
    ),
    (f"{REPORT}schedule = 6", "reports.progress.schedule: is not text; put it in quotes."),
    (
        f'{REPORT}schedule = "0 6 * * mon"\ncatch_up = "soon"',
        'reports.progress.catch_up: "soon" is no length of time; write one like "48h", "90min" or "5d".',
    ),
    (
        f'{REPORT}catch_up = "12h"',
        ('reports.progress.catch_up: stands without a schedule; write one beside it, like schedule = "0 6 * * mon".'),
    ),
    # names
    (
        "conections_max = 3",
        (
            "conections_max: is not a key that outbox knows; take it out or mend its name (did you mean"
            " connections_max?)."
        ),
    ),
    (
        "[retry]\nattempts = 3",
        ("retry.attempts: is not a key that outbox knows; take it out or mend its name (did you mean attempts_max?)."),
    ),
    (
        f'{REPORT}timezon = "UTC"',
        (
            "reports.progress.timezon: is not a key that outbox knows; take it out or mend its"
            " name (did you mean"
            " timezone?)."
        ),
    ),
    (
        f"{REPORT}lease_s = 10",
        "reports.progress.lease_s: belongs at the top level; move it above the first [table].",
    ),
    (
        'directory = "/etc"',
        "directory: is not a key that outbox knows; take it out or mend its name.",
    ),
    (
        f'[reports."My Report"]{QUERIES}',
        'reports."My Report": is no name for a report; use a-z, 0-9, - and _, and begin with a letter.',
    ),
    ("retry = 3", "retry: is not a table; begin it with [retry] and write its keys below."),
    ("reports = 3", "reports: is not a table; begin it with [reports.NAME] and write its keys below."),
    (
        "[reports]\nprogress = 3",
        "reports.progress: is not a table; begin it with [reports.progress] and write its keys below.",
    ),
    ('rate = "14"', 'rate: "14" is no rate; write one like "14/s", "600/min" or "5000/h".'),
    ('rate = "0/s"', 'rate: "0/s" is no rate; write one like "14/s", "600/min" or "5000/h".'),
    ('rate = "0.00001/h"', 'rate: "0.00001/h" is no rate; write one like "14/s", "600/min" or "5000/h".'),
    (
        f'{REPORT}send_before = "99999999999d"',
        'reports.progress.send_before: "99999999999d" is no length of time; write one like "48h", "90min" or "5d".',
    ),
    ("rate = 14", "rate: is not text; put it in quotes."),
    ("daily_max = 0", "daily_max: 0 is too small; write 1 or more."),
    (
        f'{REPORT}send_before = "Monday"',
        'reports.progress.send_before: "Monday" is no length of time; write one like "48h", "90min" or "5d".',
    ),
    # choices
    ('in_doubt = "hodl"', "in_doubt: \"hodl\" is not a choice; write 'hold', 'resend' or 'ask'."),
    (
        f'{REPORT}cadence = "hourly"',
        "reports.progress.cadence: \"hourly\" is not a choice; write 'weekly', 'daily' or 'monthly'.",
    ),
    (
        f'{REPORT}covers = "next"',
        "reports.progress.covers: \"next\" is not a choice; write 'previous' or 'current'.",
    ),
    (
        f'{REPORT}timezone = "America/New_Yorc"',
        (
            'reports.progress.timezone: "America/New_Yorc" is no IANA timezone; write one like'
            " America/New_York"
            " (did you mean America/New_York?)."
        ),
    ),
    # addresses
    (
        'database_url = "mysql://bob:s3cr3t@db/app"',
        "database_url: is not a Postgres URL; write one like postgresql://user:password@host/database.",
    ),
    ("database_url = 5432", "database_url: is not text; put it in quotes."),
    (
        'smtp_url = "bob:s3cr3t@mail"',
        "smtp_url: is not an SMTP URL; write one like smtp://user:password@host:587.",
    ),
    (
        'smtp_url = "smtp://bob@mail"',
        "smtp_url: has half a login; write user:password@ before the host, or neither.",
    ),
    ('smtp_url = "smtp://bob:%FF@mail"', f"smtp_url: has a bad port or login; write host:587, and {ENCODE}."),
    ('smtp_url = "smtp://:25"', "smtp_url: names no host and port; write one like smtp://host:25."),
    (
        'smtp_url = "smtp://mail:smtp"',
        f"smtp_url: has a bad port or login; write host:587, and {ENCODE}.",
    ),
    (
        'smtp_url = "smtp://mail/?tls=1"',
        f"smtp_url: goes on after host and port; end it there, and {ENCODE}.",
    ),
    (
        'sender = "Reports, Inc <reports@example.com>"',
        (
            'sender: is not one mailbox; write one like "Progress reports'
            ' <reports@example.com>", with a domain'
            " in ASCII, and with quotes around a name that has punctuation."
        ),
    ),
    # reports
    (
        REPORT.replace("{token}", "{key}"),
        "reports.progress.link: has no {token}; write one like " + LINK + ".",
    ),
    (
        '[reports.progress]\nsource = "my.app:Report"',
        f'reports.progress.link: is missing; write one like "{LINK}".',
    ),
    (
        f'[reports.progress]\nlink = "{LINK}"\nrecipients = "select 1"',
        ('reports.progress.data: is missing; write a query that says what is in a report, or source = "module:Class".'),
    ),
    (
        f'[reports.progress]\nlink = "{LINK}"\nrecipients = " "\ndata = "select :key"',
        (
            "reports.progress.recipients: is missing; write a query that says who is owed a"
            " report, or source ="
            ' "module:Class".'
        ),
    ),
    (
        f'[reports.progress]\nlink = "{LINK}"\nsource = "my.app:Report"\nrecipients = "select 1"',
        ("reports.progress.recipients: stands beside source; keep the source, or the queries recipients and data."),
    ),
    (
        REPORT.replace(":key", ":id"),
        (
            "reports.progress.data: uses neither :key nor :keys; compare with :key (one"
            " recipient) or with :keys (a"
            " batch of them)."
        ),
    ),
    (
        REPORT.replace("cast(:key as int)", ":id::key"),
        (
            "reports.progress.data: uses neither :key nor :keys; compare with :key (one"
            " recipient) or with :keys (a"
            " batch of them)."
        ),
    ),
    (
        REPORT.replace(":key", ":key + any(:keys)"),
        (
            "reports.progress.data: uses both :key and :keys; compare with :key (one recipient)"
            " or with :keys (a"
            " batch of them)."
        ),
    ),
    (
        f'[reports.progress]\nlink = "{LINK}"\nsource = "my.app"',
        'reports.progress.source: "my.app" names no class; write one like "myapp.reports:Progress".',
    ),
    (
        f'{REPORT}title = "a\\nb"',
        "reports.progress.title: has a line break or another control character; write it on one line.",
    ),
]


def test_the_digest_is_a_report_without_queries_that_must_be_there_when_one_is_collected():
    collected, link = REPORT + 'deliver = "digest"\n', 'link = "https://x/{token}"\n'
    settings = read(f"{collected}[digest]\n{link}")
    assert settings.reports["progress"].is_collected
    assert settings.report("digest") == settings.digest
    assert (settings.digest.title, settings.digest.cadence, settings.digest.is_collected) == (
        "Your reports",
        "weekly",
        False,
    )
    assert read(collected, OUTBOX_DIGEST=f"{{{link.strip()}}}").digest == settings.digest
    assert list(settings.editions) == ["progress", "digest"]
    (missing,) = faults(collected)
    assert missing.startswith(
        'digest: is missing, but reports.progress has deliver = "digest"; write a table [digest] '
    )
    wrong = faults(f'{collected}send_before = "2h"\n[digest]\n{link}data = "x"\ncadense = "daily"')
    assert [fault.partition(";")[0] for fault in wrong] == [
        "reports.progress.deliver: stands beside send_before, but the report has no email of its own",
        "digest.data: is not a key that outbox knows",
        "digest.cadense: is not a key that outbox knows",
    ]
    assert faults(REPORT.replace("[reports.progress]", "[reports.digest]")) == [
        "reports: no report can be called digest, since that is the name of the digest; call it otherwise."
    ]


@pytest.mark.parametrize(("text", "sentence"), ONE_FAULT)
def test_a_fault_is_one_sentence_with_the_key_and_the_mend(text, sentence):
    assert faults(text) == [sentence]


@pytest.mark.parametrize(
    "name",
    ["localtime", "right/America/New_York", "posix/UTC", "America", "../UTC", "/etc/localtime", "", "utc+1"],
)
def test_a_zone_that_servers_may_read_differently_is_refused(name):
    (fault,) = faults(f'{REPORT}timezone = "{name}"')
    assert fault.startswith(f'reports.progress.timezone: "{name}" is no IANA timezone;')


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


def test_a_query_may_cast_and_use_keys_for_a_batch():
    data = "select key from t where key = any(:keys) and day >= :starts_at::date"
    assert read(REPORT.replace("select day from progress where person_id = cast(:key as int)", data))


def test_all_faults_come_at_once():
    found = faults(
        'lease_s = 1\nin_doubt = "x"\nsmtp_url = "x"\ndirectory = "x"\nx = 1\n[retry]\nmax_s = 0\n'
        '[reports.a]\ncadence = "x"\n[reports.B]\nlink = "x"\nsource = "x"',
        OUTBOX_GUARD_S="x",
        OUTBOX_SENDER="x",
    )
    assert sorted(fault.partition(": ")[0] for fault in found) == [
        "OUTBOX_GUARD_S",
        "OUTBOX_SENDER",
        "directory",
        "in_doubt",
        "lease_s",
        "reports.B",
        "reports.B.link",
        "reports.B.source",
        "reports.a.cadence",
        "reports.a.data",
        "reports.a.link",
        "reports.a.recipients",
        "retry.max_s",
        "smtp_url",
        "x",
    ]


def test_a_variable_wins_over_the_whole_key_of_the_file():
    settings = read(
        WHOLE + "[retry]\nattempts_max = 3",
        OUTBOX_DATABASE_URL="postgres://other/app",
        OUTBOX_LEASE_S="20.5",
        OUTBOX_IN_DOUBT="resend",
        OUTBOX_RETRY="{base_s = 1}",
        OUTBOX_REPORTS=f'{{other = {{source = "a:B", link = "{LINK}"}}}}',
    )
    assert str(settings.database_url) == "postgresql://other/app"
    assert (settings.lease_s, settings.in_doubt) == (20.5, WhenInDoubt.RESEND)
    assert (settings.retry.base_s, settings.retry.attempts_max) == (1, 12)
    assert list(settings.reports) == ["other"]


def test_a_secret_may_stand_in_a_file_that_a_variable_names():
    Path("secret").write_text(f"postgres://bob:{SECRET}@db/app\n")
    Path("empty").write_text(" \n")
    settings = read(WHOLE, OUTBOX_DATABASE_URL_FILE="secret", OUTBOX_SMTP_URL_FILE=" ")
    assert settings.database_url is not None
    assert settings.database_url.dsn == f"postgresql://bob:{SECRET}@db/app"
    assert str(settings.smtp_url) == "smtp://mail:25"
    settings = read(WHOLE, OUTBOX_DATABASE_URL_FILE="nothing-here", OUTBOX_DATABASE_URL="postgresql:///app")
    assert str(settings.database_url) == "postgresql:///app"
    with pytest.raises(ConfigurationError) as caught:
        read(WHOLE, OUTBOX_DATABASE_URL_FILE="nothing-here", OUTBOX_SMTP_URL_FILE="empty")
    assert caught.value.faults == [
        (
            "OUTBOX_DATABASE_URL_FILE: nothing-here cannot be read (No such file or directory); "
            "name a file that this user can read."
        ),
        "OUTBOX_SMTP_URL_FILE: empty is empty; write the value into it.",
    ]


def test_a_variable_that_is_empty_or_unknown_changes_nothing():
    settings = read(WHOLE, OUTBOX_DATABASE_URL="", OUTBOX_LEASE_S=" ", OUTBOX_SHOE_SIZE="9", OUTBOX_DIRECTORY="/x")
    assert settings == read(WHOLE)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"OUTBOX_LEASE_S": "1"}, "OUTBOX_LEASE_S: 1 is too small; write 2 or more."),
        (
            {"OUTBOX_LEASE_S": "10 s"},
            "OUTBOX_LEASE_S: is not TOML; write what would follow `lease_s =` in one line.",
        ),
        (
            {"OUTBOX_BATCH_MAX": "3\nlease_s = 3"},
            "OUTBOX_BATCH_MAX: is not TOML; write what would follow `batch_max =` in one line.",
        ),
        (
            {"OUTBOX_RETRY": "{base = 1}"},
            ("OUTBOX_RETRY.base: is not a key that outbox knows; take it out or mend its name (did you mean base_s?)."),
        ),
        (
            {"OUTBOX_SMTP_URL": f"smtp://a:{SECRET}"},
            f"OUTBOX_SMTP_URL: has a bad port or login; write host:587, and {ENCODE}.",
        ),
    ],
)
def test_a_fault_of_a_variable_says_the_variables_name(variables, sentence):
    assert faults(WHOLE, **variables) == [sentence]


def test_the_file_is_the_one_of_the_argument_else_of_the_variable_else_of_the_directory(here):
    for name, lease_s in (("outbox", 11), ("variable", 12), ("argument", 13)):
        (here / name).mkdir()
        (here / name / "my.toml").write_text(f"lease_s = {lease_s}")
    (here / "outbox.toml").write_text("lease_s = 10")
    environ = {"OUTBOX_CONFIG": "variable/my.toml"}
    assert load(Path("argument/my.toml"), environ).lease_s == 13
    assert load(environ=environ).lease_s == 12
    assert load(environ={}).lease_s == 10
    assert load(environ=environ).directory == here / "variable"
    assert load(environ={}).directory == here


def test_a_file_that_somebody_puts_there_after_it_was_looked_for_is_not_read(here, monkeypatch):
    """As another user can in /tmp: between the look at who may write the file and its opening."""

    def looked_at_just_before(path):
        try:
            return distrust_of(path)
        finally:
            (here / "outbox.toml").write_text("lease_s = 77")

    with monkeypatch.context() as patch:
        patch.setattr(outbox.settings, "distrust_of", looked_at_just_before)
        assert load(environ={}).lease_s != 77
    assert load(environ={}).lease_s == 77


def test_without_any_file_the_variables_are_enough(here):
    settings = load(environ={"OUTBOX_DATABASE_URL": "postgresql:///app"})
    settings.require("database_url")
    assert settings.directory == here


def test_a_file_that_was_named_must_be_there():
    with pytest.raises(ConfigurationError) as caught:
        load(Path("x.toml"), {})
    assert caught.value.faults == ["--config: x.toml does not exist; name a file that does."]
    with pytest.raises(ConfigurationError) as caught:
        load(environ={"OUTBOX_CONFIG": "y.toml"})
    assert caught.value.faults == ["OUTBOX_CONFIG: y.toml does not exist; name a file that does."]


def test_a_file_that_cannot_be_read_is_a_fault(here):
    with pytest.raises(ConfigurationError) as caught:
        load(here, {})
    assert caught.value.faults == [f"{here}: cannot be read (Is a directory); make it a file that this user can read."]
    Path("outbox.toml").write_bytes(b'sender = "a@b"\ntitle = "\xff"')
    with pytest.raises(ConfigurationError) as caught:
        load(environ={})
    assert caught.value.faults == ["outbox.toml, line 2: is not UTF-8; save the file as UTF-8."]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_and_line_ends_of_windows_are_no_part_of_the_settings(here, newline):
    (here / "outbox.toml").write_bytes(b"\xef\xbb\xbf" + WHOLE.replace("\n", newline).encode())
    (here / "url").write_bytes(b"\xef\xbb\xbfsmtp://other:25" + newline.encode())
    (here / "reports").write_bytes(b'\xef\xbb\xbf{weekly = {link = "https://x/{token}", source = "a:B"}}')
    settings = load(environ={"OUTBOX_SMTP_URL_FILE": "url", "OUTBOX_REPORTS_FILE": "reports"})
    assert settings.sender == "Progress reports <reports@example.com>"
    assert (settings.smtp_url.host, list(settings.reports)) == ("other", ["weekly"])
    (here / "outbox.toml").write_bytes(b"\xef\xbb\xbfa = 1\nb = J\xfc")
    assert faults_of({}) == ["outbox.toml, line 2: is not UTF-8; save the file as UTF-8."]
    (here / "outbox.toml").write_bytes("sender = 'a'".encode("utf-16"))
    assert faults_of({}) == ["outbox.toml, line 1: is not UTF-8; save the file as UTF-8."]


def faults_of(environ):
    with pytest.raises(ConfigurationError) as caught:
        load(environ=environ)
    return caught.value.faults


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (f"a = 1\ndatabase_url = postgresql://bob:{SECRET}@db", "outbox.toml, line 2, column 16"),
        (f'smtp_url = "smtp://bob:{SECRET}@mail', "outbox.toml, last line"),
    ],
)
def test_a_file_that_is_not_toml_says_the_line_and_no_secret(text, where):
    (fault,) = faults(text)
    assert fault.startswith(f"{where}: is not TOML (")
    assert fault.endswith("); correct it there or in the line before.")
    assert SECRET not in fault


@pytest.mark.parametrize(
    ("url", "dsn", "redacted"),
    [
        (
            "postgresql://bob:s3cr3t@db:5433/app",
            "postgresql://bob:s3cr3t@db:5433/app",
            "postgresql://bob:***@db:5433/app",
        ),
        ("postgresql+asyncpg://bob@db/app", "postgresql://bob@db/app", "postgresql://bob@db/app"),
        (" postgres://db/app\n", "postgresql://db/app", "postgresql://db/app"),
        (
            "postgresql:///app?host=/run/pg",
            "postgresql:///app?host=/run/pg",
            "postgresql:///app?host=/run/pg",
        ),
        ("postgresql://a,[::1]:5432/x", "postgresql://a,[::1]:5432/x", "postgresql://a,[::1]:5432/x"),
        (
            "postgresql://db/app?user=bob&password=s3cr3t&sslpassword=s3cr3t",
            "postgresql://db/app?user=bob&password=s3cr3t&sslpassword=s3cr3t",
            "postgresql://db/app?user=bob&password=***&sslpassword=***",
        ),
        (
            "postgresql://db/app?%70assword=s3cr3t",
            "postgresql://db/app?%70assword=s3cr3t",
            "postgresql://db/app?password=***",
        ),
    ],
)
def test_a_database_url_is_kept_for_asyncpg_and_shown_without_secrets(url, dsn, redacted):
    parsed = DatabaseUrl.parse(url)
    assert parsed.dsn == dsn
    assert str(parsed) == parsed.redacted == redacted
    assert repr(parsed) == f"DatabaseUrl('{redacted}')"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("smtp://mail", SmtpAddress("mail", 25, implicit_tls=False)),
        ("smtp://mail:587/", SmtpAddress("mail", 587, implicit_tls=False)),
        ("smtps://mail", SmtpAddress("mail", 465, implicit_tls=True)),
        ("SMTPS://[::1]:2465", SmtpAddress("::1", 2465, implicit_tls=True)),
        ("smtp://bob:p%40s%2Fs@mail", SmtpAddress("mail", 25, False, "bob", "p@s/s")),
        ("smtp://bob%40example.com:a:b@mail", SmtpAddress("mail", 25, False, "bob@example.com", "a:b")),
    ],
)
def test_an_smtp_url_is_taken_apart(url, address):
    assert SmtpAddress.parse(url) == address
    assert SmtpAddress.parse(address.redacted.replace("***@", "u:p@")).host == address.host


# Each of these is a password that was not percent-encoded, or an address that is wrong otherwise.
BROKEN = [
    "bob:s3cr3t@host/x",
    "http://bob:s3cr3t@host/x",
    "{}://bob:s3cr3t/9@host/x",
    "{}://bob:12/s3cr3t@host/x",
    "{}://bob:12#s3cr3t@host/x",
    "{}://bob:12?s3cr3t@host/x",
    "{}://bob:s3cr3t@9@host/x",
    "{}://bob:s3cr3t [9@host/x",
    "{}://bob:[s3cr3t@host/x",
    "{}://bob@host:s3cr3t/x",
    "{}://bob:s3cr3t@host:99999/x",
    "{}://bob:s3cr3t@host/x#y",
    "{}://bob:s3cr3t\\u0007@host/x",
    "{}://host/x?s3cr3t",
]


@pytest.mark.parametrize("url", BROKEN)
@pytest.mark.parametrize(("key", "scheme"), [("database_url", "postgresql"), ("smtp_url", "smtp")])
def test_a_broken_address_is_refused_without_showing_any_of_it(key, scheme, url):
    (fault,) = faults(f'{key} = "{url.format(scheme)}"')
    assert fault.startswith(f"{key}: ")
    assert SECRET not in fault


@pytest.mark.parametrize("key", ["sender", "in_doubt", "lease_s", "retry", "reports", "databaseurl"])
def test_a_secret_in_the_wrong_key_is_not_shown_either(key):
    (fault,) = faults(f'{key} = "smtp://bob:{SECRET}@mail"')
    assert SECRET not in fault


@pytest.mark.parametrize("key", ["cadence", "covers", "timezone", "source", "link", "smtp_url"])
def test_nor_in_the_wrong_key_of_a_report(key):
    text = REPORT.replace("link", "old") if key == "link" else REPORT
    assert SECRET not in "".join(faults(f'{text}{key} = "smtp://bob:{SECRET}@mail"'))


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


def test_the_error_does_not_carry_the_input_along():
    with pytest.raises(ConfigurationError) as caught:
        load(environ={"OUTBOX_DATABASE_URL": f"x://{SECRET}"})
    assert caught.value.__suppress_context__
    assert SECRET not in repr(caught.value.__context__)


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


@pytest.mark.parametrize(("rate", "per_s"), [("14/s", 14.0), ("600/min", 10.0), ("7200 / h", 2.0), ("0.5/s", 0.5)])
def test_a_rate_is_read_per_second(rate, per_s):
    assert Settings(rate=rate).rate_per_s == per_s


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("90min", 5400), ("48h", 172_800), ("400d", 34_560_000), ("2w", 1_209_600)]
)
def test_a_length_of_time_is_read_in_seconds(text, seconds):
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "5", "-3d", "1e3d", "5 days", "inf h"])
def test_what_is_no_length_of_time_is_none(text):
    assert duration_s(text) == 0


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


@pytest.mark.parametrize("name", ["mail.example.com", "[192.0.2.1]", "[IPv6:2001:db8::1]", " mail.example.com. "])
def test_a_name_for_ehlo_is_fully_qualified_or_an_address_literal_and_each_route_may_have_its_own(name):
    settings = read(f'helo_name = "{name}"\n{WHOLE}{ROUTE}helo_name = "bulk.example.com"')
    assert settings.helo_name == name.strip(" .")
    assert settings.on_route("bulk").helo_name == "bulk.example.com"


@pytest.mark.parametrize(
    "name", ["", "web1", "3f2a9bc41d07", "10.0.0.5", "[2001:db8::1]", "a b.example.com", "a_b.example"]
)
def test_a_name_that_servers_refuse_in_ehlo_is_refused_in_the_settings(name):
    (fault,) = faults(f'helo_name = "{name}"')
    assert fault.startswith("helo_name: ")
    assert "is not a fully qualified domain name or an address literal" in fault


ROUTE = '[routes.bulk]\nsmtp_url = "smtp://u:s3cr3t@bulk:25"\n'


def test_a_route_is_as_the_top_level_where_it_says_nothing():
    settings = read(
        f'rate = "14/s"\ndaily_max = 9\n{WHOLE}{ROUTE}rate = "2/s"\nconnections_max = 3\nreports = ["progress"]'
    )
    bulk = settings.on_route("bulk")
    assert (bulk.rate, bulk.daily_max, bulk.connections_max, str(bulk.smtp_url)) == ("2/s", 9, 3, "smtp://***@bulk:25")
    assert settings.on_route("") is settings
    assert bulk.reports == settings.reports
    assert SECRET not in repr(bulk)


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ('reports = ["progres"]', 'routes: bulk names the report "progres", which is not configured; mend the name,'),
        ('reports = "progress"', "routes.bulk.reports: is not a list; put it into brackets"),
        ('domains = ["a@b.example"]', "routes.bulk.domains: this is no domain; write one like example.com"),
        ('domains = ["*"]', 'routes.bulk.domains: "*" is no domain; write one like example.com'),
        ('domains = ["bücher.example"]', 'routes.bulk.domains: "bücher.example" is no domain'),
        ('domains = ["a.example", "A.example"]', "routes: a.example stands in bulk twice; keep it in one place."),
        ('rate = "fast"', 'routes.bulk.rate: "fast" is no rate; write one like'),
        ("conections_max = 3", "routes.bulk.conections_max: is not a key that outbox knows"),
        ("lease_s = 3", "routes.bulk.lease_s: belongs at the top level"),
        ('[routes.more]\nreports = ["progress"]', "routes.more.smtp_url: is missing; write one like"),
        ('[routes.Bulk]\nsmtp_url = "smtp://a:25"', "routes.Bulk: is no name for a route; use a-z"),
    ],
)
def test_a_route_that_cannot_be_is_one_sentence(said, fault):
    (sentence,) = faults(f"{WHOLE}{ROUTE}{said}")
    assert sentence.startswith(fault), sentence


def test_a_report_without_an_email_of_its_own_takes_no_route_but_the_digest_does():
    collected = f'{WHOLE}deliver = "digest"\n[digest]\nlink = "{LINK}"\n{ROUTE}'
    (sentence,) = faults(f'{collected}reports = ["progress"]')
    assert 'write "digest" in its place' in sentence
    assert read(f'{collected}reports = ["digest"]').routes["bulk"].reports == ["digest"]


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
        as_at_the_top = set(WaySettings.model_fields) if model is RouteSettings else set()
        assert set(said) == set(model.model_fields) - {"directory"} - as_at_the_top
        for key, shown in said.items():
            default = model.model_fields[key].default
            if isinstance(default, str | float | bool) and default != "":
                assert shown.strip("`").lower() == str(default).lower().removesuffix(".0"), key


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ('{ "References" = "<{key}@bücher.example>" }', "beyond ASCII"),
        ('{ "Sender" = "nobody" }', "Sender cannot be written: 'nobody' is no email address"),
        ('{ "List-Unsubscribe" = "" }', "is empty"),
        ('{ "X-A" = "a\\nb" }', "X-A has a line break"),
    ],
)
def test_a_field_that_could_never_be_written_is_an_error_of_the_settings(headers, said):
    (fault,) = faults(f"headers = {headers}")
    assert fault.startswith("headers")
    assert said in fault
    assert read('headers = { "Feedback-ID" = "{key}:a", "X-A" = "Grüße {email_id}" }\n' + WHOLE).headers
