"""What users' own tests have of `outbox.testing`: little projects, run by a pytest of their own."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

SIGNUP = """
    from outbox import Email, enqueue

    def welcome(name):
        return Email(key=f"welcome/{name}", sender="Shop <shop@example.com>", to=f"{name}@example.com",
                     subject=f"Welcome, {name}", text="Hello\\nyou", html="<p>Hello</p>")
"""

PLAIN = """
    import psycopg, pytest
    from pathlib import Path
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session
    from outbox import Attachment, Email, enqueue
    from signup import welcome

    @pytest.fixture
    def engine(outbox_database):
        engine = create_engine(outbox_database.url_for("psycopg"))
        yield engine
        engine.dispose()

    def test_what_is_rolled_back_was_never_there(engine, outbox_database):
        with Session(engine) as session:
            enqueue(session, welcome("ada"))
            session.rollback()
        assert outbox_database.emails() == []

    def test_what_is_committed_arrives(engine, outbox_database, outbox_smtp):
        with Session(engine) as session, session.begin():
            enqueue(session, welcome("ada"))
        (waits,) = outbox_database.emails()
        assert (waits.key, waits.state, waits.attempts) == ("welcome/ada", "pending", 0)
        assert (waits.subject, waits.text, waits.html.strip()) == ("Welcome, ada", "Hello\\nyou", "<p>Hello</p>")
        (sent,) = outbox_database.deliver(outbox_smtp)
        (mail,) = outbox_smtp.messages
        assert (sent.state, sent.attempts, sent.raw) == ("sent", 1, mail.raw)
        assert (mail.sender, mail.recipients, mail.to) == ("shop@example.com", ["ada@example.com"], ["ada@example.com"])

    def test_attachments_and_headers_are_read(outbox_database):
        with psycopg.connect(outbox_database.url) as connection:
            pdf = Attachment("é.pdf", b"%PDF", "application/pdf")
            enqueue(connection, Email(key="k", sender="a@example.com", to="b@example.com", subject="Grüße ✓", text="x",
                                      attachments=[pdf], headers={"X-Order": "7"}))
        (email,) = outbox_database.emails()
        assert (email.subject, email.headers["X-Order"], email.html) == ("Grüße ✓", "7", "")
        assert email.attachments == [("é.pdf", "application/pdf", b"%PDF")]

    @pytest.mark.parametrize("address", ["bob@example.com", None])
    def test_a_550_makes_a_dead_letter(engine, outbox_database, outbox_smtp, address):
        outbox_smtp.reply("RCPT", "550 5.1.1 no such user", recipient=address)
        with Session(engine) as session, session.begin():
            enqueue(session, welcome("ada"))
            enqueue(session, welcome("bob"))
        ada, bob = outbox_database.deliver(outbox_smtp)
        assert (bob.state, ada.state) == ("dead", "sent" if address else "dead")
        assert "550 5.1.1 no such user" in bob.reply

    def test_a_451_is_outlived_and_so_is_a_stall(engine, outbox_database, outbox_smtp):
        outbox_smtp.reply("RCPT", "451 4.3.0 later", times=2)
        outbox_smtp.stall("DATA", times=1)
        with Session(engine) as session, session.begin():
            enqueue(session, welcome("ada"))
        (ada,) = outbox_database.deliver(outbox_smtp, command_timeout_s=0.2)
        assert (ada.state, len(outbox_smtp.wait_for(1))) == ("sent", 1)

    @pytest.mark.parametrize("accepted", [False, True])
    def test_a_cut_after_the_dot_is_in_doubt(engine, outbox_database, outbox_smtp, accepted):
        outbox_smtp.cut("DOT", times=1, accepted=accepted)
        with Session(engine) as session, session.begin():
            enqueue(session, welcome("ada"))
        (ada,) = outbox_database.deliver(outbox_smtp)
        assert (ada.state, len(outbox_smtp.messages)) == ("in_doubt", accepted)

    def test_what_cannot_be_is_said(engine, outbox_database, outbox_smtp, outbox_run):
        for wrong in (("RCPT", "no"), ("PING", "550 no"), ("RCPT", "250 x\\r\\n")):
            with pytest.raises(ValueError, match="no SMTP reply|no stage"):
                outbox_smtp.reply(*wrong)
        with pytest.raises(ValueError, match="nobody knows the recipient"):
            outbox_smtp.reply("MAIL", "550 no", recipient="a@example.com")
        with pytest.raises(AssertionError, match="0 of 1 emails came within 0.01 s"):
            outbox_smtp.wait_for(1, within_s=0.01)
        with pytest.raises(AssertionError, match="ended with 2, not 0(.|\\\\n)*reports: is not set"):
            outbox_run("generate", "nosuch")
        outbox_smtp.stall("CONNECT")
        with Session(engine) as session, session.begin():
            enqueue(session, welcome("ada"))
        with pytest.raises(AssertionError, match=r"not delivered within 0.3 s: welcome/ada"):
            outbox_database.deliver(outbox_smtp, within_s=0.3, drain_s=0)
"""

REPORT = """
    import json
    from pathlib import Path

    SETTINGS = Path(__file__).parent / "deploy" / "outbox.toml"

    def test_a_report_is_made_and_read(outbox_settings, outbox_run, outbox_database, outbox_smtp):
        outbox_settings(SETTINGS, reports={"progress": {"title": "Your progress"}})
        outbox_database.execute("insert into people values (1, 'ada@example.com', $1)", "Ada")
        outbox_run("generate", "progress", "--period", "2026-W47")
        (waits,) = outbox_database.emails()
        assert "<h1" in waits.page and waits.state == "pending"
        outbox_run("relay", "--until-empty")
        (mail,) = outbox_smtp.messages
        assert (mail.subject, mail.to) == ("Yours: Your progress", ["ada@example.com"])
        assert "reports.example.com/r/" in mail.html
        assert json.loads(outbox_run("status", "--json").out)["sent"] == 1

    def test_the_database_is_another_one(outbox_database, outbox_run):
        assert outbox_database.emails() == []
        assert outbox_run("list", code=None).code == 0
"""

CONFTEST = """
    import psycopg, pytest

    @pytest.fixture(scope="session")
    def outbox_template(outbox_template):
        with psycopg.connect(outbox_template) as connection:
            connection.execute("create table people (id int primary key, email text, name text)")
        return outbox_template
"""

DEPLOYED = """
    database_url = "postgresql://production.example.com/app"
    smtp_url = "smtp://production.example.com"
    sender = "Reports <reports@example.com>"
    [reports.progress]
    source = "mine:Progress"
    link = "https://reports.example.com/r/{token}"
"""

MINE = """
    from outbox import Recipient

    class Progress:
        def recipients(self, period):
            return [Recipient("1", "ada@example.com", "Ada")]

        async def build(self, recipient, period):
            return [{"day": period.starts_at, "done": 3}]
"""

ASYNC = """
    import asyncio, asyncpg, pytest
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
    from outbox import enqueue
    from signup import welcome

    {mark}
    async def test_an_async_test_enqueues_and_delivers(outbox_database, outbox_smtp):
        connection = await asyncpg.connect(outbox_database.url)
        transaction = connection.transaction()
        await transaction.start()
        await enqueue(connection, welcome("eve"))
        await transaction.rollback()
        await connection.close()
        engine = create_async_engine(outbox_database.url_for("asyncpg"))
        async with AsyncSession(engine) as session, session.begin():
            await enqueue(session, welcome("ada"))
        await engine.dispose()
        delivering = asyncio.create_task(asyncio.to_thread(outbox_database.deliver, outbox_smtp))
        assert len(await asyncio.to_thread(outbox_smtp.wait_for, 1)) == 1
        assert [one.state for one in await delivering] == ["sent"]
"""


WITHOUT_PLUGINS = ("-p", "no:asyncio", "-p", "no:anyio")
ASYNC_PLUGINS = {
    "asyncio": ("-p", "no:anyio", "-o", "asyncio_default_fixture_loop_scope=function"),
    "anyio": ("-p", "no:asyncio"),
}


def run_pytest(directory, *arguments, plugins=WITHOUT_PLUGINS, **files):
    for name, text in files.items():
        path = directory / name.replace("__", "/").replace("_toml", ".toml").replace("_j2", ".j2")
        path = path if path.suffix else path.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *plugins, *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "OUTBOX"))}
    return subprocess.run(command, cwd=directory, env=kept, capture_output=True, text=True, timeout=120, check=False)


def passed(ended, count):
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{count} passed" in ended.stdout, ended.stdout


def test_a_plain_project_sees_what_it_put_in_and_what_the_mail_server_did_to_it(tmp_path):
    passed(run_pytest(tmp_path, signup=SIGNUP, test_plain=PLAIN), 9)


def test_a_report_with_deployed_settings_tables_and_templates_of_ones_own_is_made_and_read(tmp_path):
    files = {"deploy__templates__progress__subject.txt_j2": "Yours: {{ title }}", "deploy__outbox_toml": DEPLOYED}
    passed(run_pytest(tmp_path, mine=MINE, conftest=CONFTEST, test_report=REPORT, **files), 2)


@pytest.mark.parametrize("plugin", ASYNC_PLUGINS)
def test_an_async_project_does_the_same(tmp_path, plugin):
    code = ASYNC.replace("{mark}", f"@pytest.mark.{plugin}")
    backend = "import pytest\n@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n"
    passed(run_pytest(tmp_path, plugins=ASYNC_PLUGINS[plugin], signup=SIGNUP, conftest=backend, test_async=code), 1)


def test_a_wrong_expectation_fails(tmp_path):
    """What the fixtures say is what is: of each fact the opposite fails."""
    wrong = PLAIN.replace(".emails() == []", ".emails() != []")
    for right, opposite in (('"sent", 1, mail.raw', '"sent", 2, mail.raw'), ('"dead", "sent" if', '"dead", "dead" if'),
                            ('"application/pdf", b"%PDF")]', '"application/pdf", b"")]')):  # fmt: skip
        assert right in wrong
        wrong = wrong.replace(right, opposite)
    chosen = "rolled or committed or attachments or 550"
    ended = run_pytest(tmp_path, "-k", chosen, signup=SIGNUP, test_plain=wrong)
    assert ended.returncode == 1
    assert "4 failed, 1 passed" in ended.stdout, ended.stdout


def test_a_killed_pytest_leaves_no_server_behind_and_workers_of_xdist_share_nothing(tmp_path):
    code = """
        import os, signal, pytest

        @pytest.mark.parametrize("n", range(2))
        def test_it_is_killed(outbox_postgres, outbox_database, n):
            print(outbox_postgres.pid, flush=True)
            if "PYTEST_XDIST_WORKER" not in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)
    """
    passed(run_pytest(tmp_path, "-n", "2", test_kill=code), 2)
    killed = run_pytest(tmp_path, "-s", test_kill=code)
    assert killed.returncode == -signal.SIGKILL
    server = int(killed.stdout.split()[-1])
    end = time.monotonic() + 20
    while Path(f"/proc/{server}").exists():
        assert time.monotonic() < end, "the server outlived pytest"
        time.sleep(0.02)


def test_the_plugin_imports_nothing_before_it_is_asked(tmp_path):
    code = """
        import sys

        def test_it(pytestconfig):
            assert pytestconfig.pluginmanager.hasplugin("outbox")
            assert not [name for name in sys.modules if name.startswith("outbox.") and name != "outbox.testing"]
            assert not {"asyncpg", "sqlalchemy", "pydantic", "jinja2"} & set(sys.modules)
    """
    passed(run_pytest(tmp_path, test_it=code), 1)
