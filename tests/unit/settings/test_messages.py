import pytest

from outbox.errors import ConfigurationError
from outbox.settings import load
from tests.support.settings_files import ENCODE, LINK, QUERIES, REPORT, SECRET, WHOLE, faults

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


@pytest.mark.parametrize(("text", "sentence"), ONE_FAULT)
def test_a_fault_is_one_sentence_with_the_key_and_the_mend(text, sentence):
    assert faults(text) == [sentence]


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


@pytest.mark.parametrize("key", ["sender", "in_doubt", "lease_s", "retry", "reports", "databaseurl"])
def test_a_secret_in_the_wrong_key_is_not_shown_either(key):
    (fault,) = faults(f'{key} = "smtp://bob:{SECRET}@mail"')
    assert SECRET not in fault


@pytest.mark.parametrize("key", ["cadence", "covers", "timezone", "source", "link", "smtp_url"])
def test_nor_in_the_wrong_key_of_a_report(key):
    text = REPORT.replace("link", "old") if key == "link" else REPORT
    assert SECRET not in "".join(faults(f'{text}{key} = "smtp://bob:{SECRET}@mail"'))


def test_the_error_does_not_carry_the_input_along():
    with pytest.raises(ConfigurationError) as caught:
        load(environ={"OUTBOX_DATABASE_URL": f"x://{SECRET}"})
    assert caught.value.__suppress_context__
    assert SECRET not in repr(caught.value.__context__)
