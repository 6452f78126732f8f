"""What users' own tests have of `outbox.testing`: little projects, run by a pytest of their own."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

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
        assert not {"dead_man_url", "http"} & set(outbox_settings.values), "nobody is to hear of a test"
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

    @pytest.fixture
    def anyio_backend():
        return "asyncio"
"""

DEPLOYED = """
    database_url = "postgresql://production.example.com/app"
    smtp_url = "smtp://production.example.com"
    sender = "Reports <reports@example.com>"
    dead_man_url = "http://production.example.com/ping"
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


def run_pytest(directory, *arguments, files):
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "OUTBOX"))}
    return subprocess.run(command, cwd=directory, env=kept, capture_output=True, text=True, timeout=120, check=False)


# Of each fact the opposite: what the fixtures say is what is.
WRONG = [
    (".emails() == []", ".emails() != []"),
    ('"sent", 1, mail.raw', '"sent", 2, mail.raw'),
    ('"dead", "sent" if', '"dead", "dead" if'),
    ('"application/pdf", b"%PDF")]', '"application/pdf", b"")]'),
    ('("sent", 1)', '("dead", 1)'),
    ('("in_doubt", accepted)', '("in_doubt", not accepted)'),
]


def test_users_tests_pass_where_they_are_right_and_fail_where_they_are_wrong(tmp_path):
    """Plain, of pytest-asyncio and of anyio; with tables, settings and templates of their own; on two workers."""
    wrong = PLAIN
    for right, opposite in WRONG:
        assert right in wrong
        wrong = wrong.replace(right, opposite)
    files = {
        "signup.py": SIGNUP,
        "mine.py": MINE,
        "conftest.py": CONFTEST,
        "deploy/outbox.toml": DEPLOYED,
        "deploy/templates/progress/subject.txt.j2": "Yours: {{ title }}",
        "test_plain.py": PLAIN,
        "test_wrong.py": wrong,
        "test_report.py": REPORT,
        "test_asyncio.py": ASYNC.replace("{mark}", "@pytest.mark.asyncio"),
        "test_anyio.py": ASYNC.replace("{mark}", "@pytest.mark.anyio"),
    }
    ended = run_pytest(tmp_path, "-n", "2", "-rf", "-o", "asyncio_default_fixture_loop_scope=function", files=files)
    failed = set(re.findall(r"^FAILED (\S+)", ended.stdout, re.MULTILINE))
    assert failed == {
        "test_wrong.py::test_what_is_rolled_back_was_never_there",
        "test_wrong.py::test_what_is_committed_arrives",
        "test_wrong.py::test_attachments_and_headers_are_read",
        "test_wrong.py::test_a_550_makes_a_dead_letter[bob@example.com]",
        "test_wrong.py::test_a_451_is_outlived_and_so_is_a_stall",
        "test_wrong.py::test_a_cut_after_the_dot_is_in_doubt[False]",
        "test_wrong.py::test_a_cut_after_the_dot_is_in_doubt[True]",
    }, ended.stdout
    assert "7 failed, 15 passed" in ended.stdout, ended.stdout


def test_a_killed_pytest_leaves_no_server_behind(tmp_path):
    code = """
        import os, signal

        def test_it_is_killed(outbox_postgres, outbox_database):
            print(outbox_postgres.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = run_pytest(tmp_path, "-s", "-p", "no:asyncio", files={"test_kill.py": code})
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
    ended = run_pytest(tmp_path, "-p", "no:asyncio", files={"test_it.py": code})
    assert ended.returncode == 0, ended.stdout + ended.stderr
