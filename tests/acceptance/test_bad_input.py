"""What people get wrong, one by one: the exit code says so, stderr says what and how to mend it, secrets stay secret.

The server of these tests listens on TCP and asks for passwords there, as a company's does.
"""

import asyncio
import os
import re
import time
from pathlib import Path

import asyncpg
import pytest

from outbox.sandbox.postgres import postgres
from outbox.testing.postgres import FAST
from tests.support.fleet import free_port

SECRET = "s3cr3t-Zebra"

REPORT = """
[reports.progress]
recipients = "select id::text as key, email from people"
data = "select :key as key"
link = "https://reports.example.com/r/{token}"
"""


async def refused(fleet, *arguments, code=2, environment=None, deadline_s=30):
    """The sentences with which a command refuses; without a traceback or a secret anywhere."""
    ended = await fleet.run(*arguments, environment=environment, deadline_s=deadline_s)
    assert (ended.code, ended.out) == (code, ""), ended
    assert SECRET not in ended.err
    return ended.sentences


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_without_a_config_each_command_says_what_it_needs(fleet):
    fleet.settings = ""
    (fleet.directory / "elsewhere").mkdir()
    for command, keys in {
        ("generate",): ["database_url", "sender", "reports"],
        ("relay",): ["database_url", "smtp_url"],
        ("status",): ["database_url"],
        ("init",): ["database_url"],
        ("resolve", "key", "--sent"): ["database_url"],
    }.items():
        said = await refused(fleet, *command)
        assert [sentence.partition(":")[0] for sentence in said] == keys
        assert all("is not set; write " in sentence for sentence in said)


async def test_a_config_that_is_named_must_exist(fleet):
    assert await refused(fleet, "--config", "nowhere.toml", "status") == [
        "--config: nowhere.toml does not exist; name a file that does."
    ]
    (sentence,) = await refused(fleet, "status", environment={"OUTBOX_CONFIG": "/nowhere/outbox.toml"})
    assert sentence.startswith("OUTBOX_CONFIG: /nowhere/outbox.toml does not exist")


async def test_a_config_that_cannot_be_read_or_is_no_toml_is_named_with_its_line(fleet):
    fleet.settings = f'database_url = "postgresql://me:{SECRET}@host/db"\nsender = no quotes {SECRET}\n'
    (sentence,) = await refused(fleet, "status")
    assert "outbox.toml, line 2" in sentence
    assert "is not TOML" in sentence
    (fleet.directory / "latin.toml").write_bytes(b'sender = "J\xfcrgen"\n')
    (sentence,) = await refused(fleet, "--config", "latin.toml", "status")
    assert "latin.toml, line 1: is not UTF-8" in sentence
    (sentence,) = await refused(fleet, "--config", ".", "status")
    assert "cannot be read" in sentence


async def test_all_faults_come_at_once(fleet):
    fleet.settings = f"""
database_url = "postgresql://me:{SECRET}@host:99999/db"
smtp_url = "http://me:{SECRET}@host"
sender = "nobody"
in_doubt = "panic"
lease = 3
[retry]
base_s = "soon"
[reports.progress]
cadence = "yearly"
timezone = "America/New_Yrok"
recipients = "select 1"
data = "select 1"
link = "https://example.com"
"""
    said = await refused(fleet, "generate")
    for key in (
        "database_url", "smtp_url", "sender", "in_doubt", "lease", "retry.base_s",
        "reports.progress.cadence", "reports.progress.timezone", "reports.progress.data", "reports.progress.link",
    ):  # fmt: skip
        assert sum(sentence.startswith(key + ": ") for sentence in said) == 1, (key, said)
    assert len(said) == 10
    assert any("did you mean America/New_York?" in sentence for sentence in said)


async def test_an_unknown_report_is_refused_with_those_that_there_are(fleet):
    (sentence,) = await refused(fleet, "generate", "progres")
    assert sentence.startswith("reports.progres: is not configured; write one of progress")
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.edition") == 0


async def test_an_unknown_command_or_option_is_refused_with_a_hint(fleet):
    for words in (("generat",), ("generate", "--perod", "2026-W48"), ("resolve", "--snet"), ("generate", "--period")):
        ended = await fleet.run(*words)
        assert ended.code == 2
        assert "Traceback" not in ended.err
        assert "Error: " in ended.err


async def test_resolve_wants_exactly_one_decision(fleet):
    for words in ((), ("--sent", "--resend"), ("--sent", "--resend", "--discard")):
        assert await refused(fleet, "resolve", "key", *words) == ["Say one of --sent, --resend and --discard."]


async def test_sender_and_smtp_url_are_asked_for_only_by_the_commands_that_need_them(fleet):
    fleet.settings = f'database_url = "{fleet.database}"\n{REPORT}'
    (sentence,) = await refused(fleet, "generate")
    assert sentence.startswith("sender: is not set; ")
    (sentence,) = await refused(fleet, "relay")
    assert sentence.startswith("smtp_url: is not set; ")
    assert (await fleet.run("status")).code == 0
    assert (await fleet.run("init")).code == 0


async def test_a_variable_wins_over_the_file(fleet):
    fleet.settings = (
        f'database_url = "postgresql://me:{SECRET}@localhost:1/nowhere"\nsender = "a@example.com"\n' + REPORT
    )
    await fleet.hire(1)
    environment = {"OUTBOX_DATABASE_URL": fleet.database, "OUTBOX_SENDER": "Env <env@example.com>"}
    ended = await fleet.run("generate", environment=environment)
    assert (ended.code, ended.err) == (0, ""), ended
    assert await fleet.connection.fetchval("SELECT sender FROM outbox.email") == "env@example.com"


async def test_everything_can_come_from_variables(fleet):
    fleet.settings = ""
    await fleet.hire(1)
    report = '{recipients = "select id::text as key, email from people", data = "select :key as k", link = "x{token}"}'
    environment = {
        "OUTBOX_DATABASE_URL": fleet.database,
        "OUTBOX_SENDER": "env@example.com",
        "OUTBOX_REPORTS": f"{{progress = {report}}}",
        "OUTBOX_LEASE_S": "5",
        "OUTBOX_GUARD_S": "2.5",
    }
    ended = await fleet.run("generate", environment=environment)
    assert (ended.code, ended.err) == (0, ""), ended
    environment["OUTBOX_LEASE_S"] = "soon"
    (sentence,) = await refused(fleet, "generate", environment=environment)
    assert sentence.startswith("OUTBOX_LEASE_S: is not TOML")


async def test_the_config_may_be_named_before_the_command_after_it_or_by_a_variable(fleet):
    good = fleet.write_settings().rename(fleet.directory / "good.toml")
    fleet.settings = "garbled ="
    for words, environment in (
        (("--config", str(good), "status"), None),
        (("status", "--config", str(good)), None),
        (("status", "-c", "good.toml"), None),
        (("status",), {"OUTBOX_CONFIG": str(good)}),
        (("status", "-c", "good.toml"), {"OUTBOX_CONFIG": "/nowhere.toml"}),
    ):
        ended = await fleet.run(*words, environment=environment)
        assert (ended.code, ended.err) == (0, ""), words


# ── the database ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def company_server():
    """A Postgres on TCP with a password; gives its port."""
    port = free_port()
    rules = Path(f"/tmp/outbox-hba-{os.getpid()}.conf")  # pytest's own directories are closed to Postgres' user
    rules.write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
    rules.chmod(0o644)
    settings = {**FAST, "listen_addresses": "127.0.0.1", "hba_file": str(rules)}
    with postgres(settings=settings, port=port) as server:
        asyncio.run(_hire_a_role(server.url))
        yield port
    rules.unlink()


async def _hire_a_role(url):
    admin = await asyncpg.connect(url)
    await admin.execute(f"CREATE ROLE mailer LOGIN PASSWORD '{SECRET}'")
    await admin.execute("CREATE DATABASE company OWNER mailer")
    await admin.close()


def all_commands():
    return ("generate",), ("relay",), ("status",), ("init",), ("resolve", "key", "--sent")


async def all_refuse(fleet, within_s):
    """What all commands say at last, started at once; the same but for the operating system's words."""
    began = time.monotonic()
    processes = [await fleet.start(*words) for words in all_commands()]
    ends = [await process.ended() for process in processes]
    assert time.monotonic() - began < within_s
    for ended in ends:
        assert (ended.code, ended.out) == (1, ""), ended
        assert SECRET not in ended.err
        assert "Traceback" not in ended.err
    said = [ended.err.splitlines()[-1].removeprefix("outbox: ") for ended in ends]
    assert len({(sentence.partition(" (")[0], sentence.rpartition("; ")[2]) for sentence in said}) == 1, said
    return said[0]


async def test_a_database_that_is_down_is_waited_for_as_long_as_a_lease_and_no_longer(fleet):
    port = free_port()
    fleet.database = f"postgresql://mailer:{SECRET}@127.0.0.1:{port}/company"
    said = await all_refuse(fleet, within_s=15)
    assert said.startswith(f"Postgres at postgresql://mailer:***@127.0.0.1:{port}/company does not answer (")
    assert said.endswith("; start it or correct database_url.")


async def test_generate_reports_once_that_it_waits_for_the_database(fleet):
    """Cron mails each line to a person."""
    fleet.database = f"postgresql://mailer@127.0.0.1:{free_port()}/company"
    fleet.top = "lease_s = 3\nguard_s = 1"
    first, last = await refused(fleet, "generate", code=1)
    assert re.fullmatch(re.escape(last) + r" Trying again for up to \d s\.", first)


async def test_a_port_on_which_no_postgres_answers_is_named(fleet):
    fleet.database = f"postgresql://mailer@127.0.0.1:{fleet.sink.port}/company"
    (sentence,) = await refused(fleet, "status", code=1)
    assert "/company refuses TLS: it has none, or is no Postgres; correct host and port of database_url" in sentence


async def test_a_right_password_is_let_in_and_a_wrong_one_is_refused_at_once_and_shown_nowhere(fleet, company_server):
    address = f"127.0.0.1:{company_server}/company"
    fleet.database = f"postgresql://mailer:{SECRET}@{address}"
    ended = await fleet.run("init")
    assert (ended.code, ended.err) == (0, "")
    fleet.database = f"postgresql+asyncpg://mailer:{SECRET}-not@{address}"
    said = await all_refuse(fleet, within_s=10)
    assert said.startswith(f"Postgres at postgresql://mailer:***@{address} refuses the user or password")
    assert "password authentication failed" in said


async def test_a_database_that_does_not_exist_is_named(fleet, company_server):
    fleet.database = f"postgresql://mailer:{SECRET}@127.0.0.1:{company_server}/compnay"
    said = await all_refuse(fleet, within_s=10)
    assert 'database "compnay" does not exist' in said
    assert "create it or correct database_url" in said


async def test_a_host_that_does_not_exist_is_named(fleet):
    fleet.database = f"postgresql://mailer:{SECRET}@db.invalid/company"
    (sentence,) = await refused(fleet, "status", code=1)
    assert "postgresql://mailer:***@db.invalid/company does not answer" in sentence


async def test_a_read_only_database_is_named_so(fleet):
    name = await fleet.connection.fetchval("SELECT current_database()")
    await fleet.connection.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    await fleet.hire(1)
    for command in ("generate", "relay"):
        ended = await fleet.run(command)
        assert ended.code == 1
        assert "Traceback" not in ended.err
        assert "read-only" in ended.err.splitlines()[-1]
    assert (await fleet.run("status")).code == 0


# ── the two queries ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "recipients, says",
    [
        ("selec id from people", "syntax error"),
        ("select id::text as key, emial as email from people", 'column "emial" does not exist'),
        ("select id::text as key from people", "returns no column email"),
        ("select email from people", "returns no column key"),
        ("select id::text as key, email from people where email <> :company", "company"),
        ("select 1 / (id - 1) as key, email from people", "division by zero"),
        ("delete from people", "syntax error"),
    ],
)
async def test_a_recipients_query_that_cannot_be_used_is_one_sentence_and_nothing_is_made(fleet, recipients, says):
    fleet.recipients = recipients
    await fleet.hire(3)
    (sentence,) = await refused(fleet, "generate", code=1)
    assert sentence.startswith("reports.progress.recipients: ")
    assert says in sentence
    assert "sqlalchemy" not in sentence
    assert await fleet.connection.fetchval("SELECT count(*) FROM people") == 3
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.report") == 0


@pytest.mark.parametrize(
    "data, says",
    [
        ("selec :key", "syntax error"),
        ("select nothing from people where id::text = :key", 'column "nothing" does not exist'),
        ("select done from progress where person_id = :key", "compare with cast(:key as int)"),
        ("select person_id::text as key, done from progress where person_id = any(:keys)", "cast(:key"),
        ("select done from progress where person_id::text = any(:keys)", "returns no column key"),
        ("select done from progress where person_id::text = :key and day < :until", "until"),
        ("select done from nowhere where key = :key", 'relation "nowhere" does not exist'),
    ],
)
async def test_a_data_query_that_cannot_be_used_is_one_sentence_and_nothing_is_made(fleet, data, says):
    fleet.data = data
    await fleet.hire(3)
    (sentence,) = await refused(fleet, "generate", code=1)
    assert sentence.startswith("reports.progress.data: ")
    assert says in sentence
    assert "sqlalchemy" not in sentence
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.report") == 0
