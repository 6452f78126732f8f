"""The database's password changes while everything runs: the file first or the role first, and sessions end."""

import signal
from urllib.parse import quote

import asyncpg
import pytest

from outbox.database import schema
from outbox.database.opening import connect
from outbox.database.refusal import DatabaseLoginError
from outbox.sandbox.postgres import postgres
from outbox.settings import load
from outbox.settings.urls import DatabaseUrl
from outbox.testing.postgres import FAST
from tests.faults.test_failover import PEOPLE
from tests.support.fleet import Fleet, until
from tests.support.web_client import opened


class Company(Fleet):
    """A fleet whose role has a password, and whose URL is in a file."""

    @property
    def secret(self):
        return self.directory / "database-url"

    def write_secret(self, password):
        """As Kubernetes and systemd do: whole, by renaming."""
        user, _, rest = self.database.removeprefix("postgresql://").partition("@")
        written = self.secret.with_suffix(".new")
        written.write_text(f"postgresql://{user}:{quote(password)}@{rest}")
        written.rename(self.secret)

    async def change_password(self, password):
        await self.connection.execute(f"ALTER ROLE app PASSWORD '{password}'")

    async def end_sessions(self):
        await self.connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")

    async def start(self, *arguments, environment=None, within=()):
        variables = {"OUTBOX_DATABASE_URL_FILE": str(self.secret), **(environment or {})}
        return await super().start(*arguments, environment=variables, within=within)


@pytest.fixture
def server():
    with postgres(settings=FAST) as started:
        rules = started.data / "pg_hba.conf"
        rules.write_text("local all app scram-sha-256\n" + rules.read_text())
        started.restart()
        yield started


@pytest.fixture
async def company(server, sink, forks, tmp_path):
    leader = await asyncpg.connect(server.url)
    await schema.initialise(leader)
    await leader.execute(PEOPLE)
    await leader.execute("CREATE ROLE app SUPERUSER LOGIN PASSWORD 'old'")
    found = Company(server.url.replace("postgres@", "app@"), leader, sink, tmp_path, forks=forks)
    found.write_secret("old")
    yield found
    await found.stop_all()
    await leader.close()


def sessions(relay):
    return "".join(relay.log).count("holds its lock")


@pytest.mark.parametrize("file_first", [True, False])
async def test_a_running_relay_takes_the_new_password_from_its_file(company, file_first):
    relay = await company.relay()
    if file_first:
        company.write_secret("new")
    await company.change_password("new")
    await company.end_sessions()
    if not file_first:
        await relay.says("refuses the user or password", deadline_s=40)
        company.write_secret("new")
    await until(lambda: sessions(relay) == 2, "the relay has a session again", deadline_s=60)
    await company.put_emails(3)
    await until(lambda: len(company.sink.accepted) == 3, "emails are accepted")
    assert "database_login_renewed" in "".join(relay.log)


async def test_a_relay_whose_login_is_refused_says_so_once_and_goes_on_trying(company):
    relay = await company.relay()
    await company.change_password("new")
    await company.end_sessions()
    await relay.says("refuses the user or password", deadline_s=40)
    before = _refusals(company)
    for _ in range(3):  # of ever longer pauses
        seen = _refusals(company)
        await until(lambda seen=seen: _refusals(company) > seen, "the relay tries again", deadline_s=60)
    assert _refusals(company) - before < 20
    assert "".join(relay.log).count("session_refused") == 1
    assert relay.process.returncode is None
    await company.change_password("old")  # as the file has it: no file changes
    await until(lambda: sessions(relay) == 2, "the relay has a session again", deadline_s=60)


async def test_a_relay_whose_login_is_refused_stops_when_it_is_told_to(company):
    relay = await company.relay()
    await company.change_password("new")
    await company.end_sessions()
    await relay.says("refuses the user or password", deadline_s=40)
    relay.send(signal.SIGTERM)
    assert (await relay.ended(20)).code == 0


def _refusals(company):
    return company.log_file.read_text(errors="replace").count('password authentication failed for user "app"')


@pytest.fixture(autouse=True)
def log_file(company, server):
    company.log_file = server.log


@pytest.mark.parametrize("command", ["relay", "generate", "status", "doctor"])
async def test_a_refused_login_at_the_start_ends_with_one_sentence(company, command):
    company.write_secret("wrong")
    ended = await company.run(command, deadline_s=40)
    assert ended.code == 1
    assert "Traceback" not in ended.out + ended.err
    assert "wrong" not in ended.out + ended.err
    said = " ".join((ended.out if command == "doctor" else ended.sentences[-1]).split())
    assert "refuses the user or password of database_url" in said


async def test_a_session_opened_long_after_the_rotation_has_the_new_login(company):
    """Every command and page opens its sessions through `connect`."""
    settings = load(company.write_settings(), {"OUTBOX_DATABASE_URL_FILE": str(company.secret)})
    url = settings.database_url
    await (await connect(url, application="one")).close()
    await company.change_password("new")
    with pytest.raises(DatabaseLoginError):
        await connect(url, application="two")
    company.write_secret("new")
    for _ in range(2):
        await (await connect(url, application="three")).close()
    assert "new" in url.login.current.dsn


async def test_a_file_that_names_another_database_is_not_taken_and_said(company):
    settings = load(company.write_settings(), {"OUTBOX_DATABASE_URL_FILE": str(company.secret)})
    await company.change_password("new")
    company.secret.write_text(company.database.replace("app@/postgres", "app:new@/template1"))
    assert DatabaseUrl.parse(company.secret.read_text())
    with pytest.raises(DatabaseLoginError, match="another server or database; restart outbox"):
        await connect(settings.database_url, application="test")


async def test_web_pages_come_back_after_a_rotation(company):
    _, browser = await opened(company)
    page = f"/r/{'x' * 22}"
    assert (await browser.ask(page)).status == 404
    await company.change_password("new")
    await company.end_sessions()

    async def answers(status):
        return (await browser.ask(page)).status == status

    await until(lambda: answers(503), "pages say that the database is away")
    company.write_secret("new")
    await until(lambda: answers(404), "pages are back")
