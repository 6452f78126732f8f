"""Pytest plugin with fixtures for applications that use outbox: a real Postgres, a real mail server, real commands.

    def test_a_new_user_is_welcomed(outbox_database, outbox_smtp):
        sign_up(outbox_database.url, "ada@example.com")  # your code, which calls outbox.enqueue
        outbox_database.deliver(outbox_smtp)
        (mail,) = outbox_smtp.messages
        assert (mail.to, mail.subject) == (["ada@example.com"], "Welcome, Ada")

`pip install 'outbox-mail[testing]'`, and pytest finds them; docs/testing.md shows all. Nothing is imported and nothing
is started before a test asks for a fixture. The rooms, from what sees all to what sees little:

    commands     outbox.toml of a test, and the commands run with it
    postgres     a server for the session, a database for each test, a real relay that delivers
    smtp         a mail server that keeps what it is sent, and says what a test wants it to say
    mail         an email as it was put in, or as it arrived
    loop_thread  the thread in which all of that waits, so that any test can use it: plain, asyncio or anyio
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from outbox.sandbox.postgres import Server
    from outbox.testing.commands import Commands, SettingsFile
    from outbox.testing.loop_thread import Background
    from outbox.testing.postgres import Database
    from outbox.testing.smtp import SmtpServer


@pytest.fixture(scope="session")
def _outbox_background() -> "Iterator[Background]":
    from outbox.testing.loop_thread import Background

    with Background() as background:
        yield background


@pytest.fixture(scope="session")
def outbox_postgres() -> "Iterator[Server]":
    """Run an embedded Postgres for the session; each worker of pytest-xdist has its own. It ends with this process.

    `.url`, `.database_url(name)`; it listens on a socket that nobody else can reach, and does without fsync.
    """
    from outbox.sandbox.postgres import postgres
    from outbox.testing.postgres import FAST

    with postgres(settings=FAST) as server:
        yield server


@pytest.fixture(scope="session")
def outbox_template(outbox_postgres: "Server", _outbox_background: "Background") -> str:
    """Return the URL of the database that each test gets a copy of: the schema of outbox, and nothing else.

    To have your own tables in it, override it in conftest.py, and leave no connection open:

        @pytest.fixture(scope="session")
        def outbox_template(outbox_template):
            with psycopg.connect(outbox_template) as connection:
                connection.execute("create table people (…)")
            return outbox_template
    """
    from outbox.testing.postgres import make_template

    return _outbox_background.run(make_template(outbox_postgres))


@pytest.fixture
def outbox_database(
    outbox_postgres: "Server", outbox_template: str, _outbox_background: "Background"
) -> "Iterator[Database]":
    """Make a database for this test, a copy of `outbox_template`: `.url`, `.emails()`, `.deliver(outbox_smtp)`."""
    from outbox.testing.postgres import copied

    with copied(outbox_postgres, outbox_template, _outbox_background) as database:
        yield database


@pytest.fixture
def outbox_smtp(_outbox_background: "Background") -> "Iterator[SmtpServer]":
    """Run a mail server for this test: `.url`, `.messages`, `.wait_for(n)`, `.reply("RCPT", "550 no such user")`."""
    from outbox.testing.smtp import SmtpServer

    with SmtpServer(_outbox_background) as server:
        yield server


@pytest.fixture
def outbox_settings(outbox_database: "Database", outbox_smtp: "SmtpServer", tmp_path: Path) -> "SettingsFile":
    """Write an outbox.toml in `tmp_path` with this test's servers; call it with further settings."""
    from outbox.testing.commands import SettingsFile

    return SettingsFile(tmp_path, database_url=outbox_database.url, smtp_url=outbox_smtp.url)


@pytest.fixture
def outbox_run(outbox_settings: "SettingsFile") -> "Commands":
    """Run `outbox …` as a process with the settings of `outbox_settings`: `outbox_run("generate", "progress").out`."""
    from outbox.testing.commands import Commands

    return Commands(outbox_settings)
