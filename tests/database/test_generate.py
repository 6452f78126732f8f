"""generate on real Postgres, in one process: races made with locks, with the source and with the progress callback."""

import asyncio
import sys
import threading
from types import ModuleType

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from outbox.database.connection import is_lost
from outbox.database.engine import engine
from outbox.database.locks import BUCKET_LOCKS, NAMESPACE_MASK
from outbox.errors import DatabaseUnavailableError
from outbox.generate import report_maker, run, shared_work
from outbox.generate.buckets import BUCKETS, bucket_of
from outbox.generate.report_builder import NewReport
from outbox.generate.run import generate
from outbox.generate.session import GenerateSession
from outbox.generate.write import enqueue_reports
from outbox.settings import load
from outbox.settings.urls import DatabaseUrl
from tests.support.fleet import until

SETTINGS = """
database_url = "{database}"
sender = "Progress reports <reports@example.com>"
lease_s = 4
guard_s = 2
[reports.progress]
source = "company_of_the_test:Source"
link = "https://reports.example.com/r/{{token}}"
"""


class Company:
    """A source that the test holds in its hand: who there is, how often each was built, and a gate for some."""

    def __init__(self, people):
        self.people = people
        self.built = []
        self.before_build = lambda _: None

    def recipients(self, _period):
        return [{"key": key, "email": f"{key}@example.com"} for key in self.people]

    def build(self, recipient, _period):
        self.built.append(recipient.key)
        self.before_build(recipient)
        return [{"done": 1}]


@pytest.fixture
def company(monkeypatch):
    made = Company([f"k{n}" for n in range(40)])
    module = ModuleType("company_of_the_test")
    module.Source = lambda: made
    monkeypatch.setitem(sys.modules, "company_of_the_test", module)
    return made


@pytest.fixture
def settings(database, tmp_path):
    path = tmp_path / "outbox.toml"
    path.write_text(SETTINGS.format(database=database))
    return load(path, {})


async def reports(connection):
    return await connection.fetchval("SELECT count(*) FROM outbox.report")


async def test_what_was_made_between_asking_and_locking_is_not_computed_again(settings, company):
    """This run asks what is missing; before it takes a lock another run makes everything and ends."""
    others = []

    def meanwhile(result):
        if result.expected and not others:
            others.append(None)
            thread = threading.Thread(target=lambda: others.append(asyncio.run(generate(settings, "progress"))))
            thread.start()
            thread.join()

    calls = []

    def after_asking(result):
        calls.append(result)
        if len(calls) == 2:  # the first look at what is missing is over, no lock is held yet
            meanwhile(result)

    result = await generate(settings, "progress", progress=after_asking)
    assert others[1].made == 40
    assert (result.made, result.elsewhere, result.failed) == (0, 40, {})
    assert sorted(company.built) == sorted(company.people)


async def test_a_bucket_is_worked_on_by_one_server_while_the_others_make_the_rest(settings, company, connection):
    """The first run stands in one build; the second makes all other buckets, and waits for this one."""
    reached, go_on = threading.Event(), threading.Event()
    held = []

    def stand(recipient):
        if not held:
            held.append(recipient.key)
            reached.set()
            assert go_on.wait(20)

    company.before_build = stand
    first = asyncio.create_task(generate(settings, "progress"))
    await asyncio.to_thread(reached.wait, 20)
    edition = await connection.fetchval("SELECT id FROM outbox.edition")
    numbers = await connection.fetch(
        "SELECT objid::bigint AS n FROM pg_locks WHERE locktype = 'advisory' AND classid::bigint = $1"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        BUCKET_LOCKS,
    )
    theirs = {row["n"] - edition * BUCKETS for row in numbers}
    assert 1 <= len(theirs) <= report_maker.BUCKETS_AT_ONCE
    second = asyncio.create_task(generate(settings, "progress"))
    elsewhere = [key for key in company.people if bucket_of(key) not in theirs]

    async def the_rest_is_made():
        return await reports(connection) >= len(elsewhere)

    await until(the_rest_is_made, "the second run makes all other buckets")
    assert not second.done()
    go_on.set()
    results = await asyncio.gather(first, second)
    assert sum(result.made for result in results) == 40
    assert sorted(company.built) == sorted(company.people)
    assert results[0].failed == results[1].failed == {}


async def test_a_bucket_that_a_session_holds_is_taken_over_the_moment_the_session_ends(settings, company, connection):
    await generate(settings, "progress")
    edition = await connection.fetchval("SELECT id FROM outbox.edition")
    await connection.execute("TRUNCATE outbox.report, outbox.email, outbox.delivery")
    dying = await asyncpg.connect(settings.database_url.dsn)
    await dying.fetch(
        "SELECT pg_advisory_lock($1, n) FROM unnest($2::int[]) n",
        BUCKET_LOCKS,
        [(edition * BUCKETS + bucket) & NAMESPACE_MASK for bucket in range(BUCKETS)],
    )
    run = asyncio.create_task(generate(settings, "progress"))

    async def it_is_refused():
        return await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'outbox generate'"
            " AND datname = current_database() AND query LIKE '%pg_try_advisory_lock%'"
        )

    await until(it_is_refused, "the run asks for the locks")
    assert await reports(connection) == 0
    assert len(company.built) == 40
    await dying.close()
    async with asyncio.timeout(10):
        result = await run
    assert (result.made, await reports(connection)) == (40, 40)


def test_a_statement_between_the_servers_farewell_and_the_end_of_the_stream_means_a_lost_session():
    """asyncpg then says InternalClientError, "cannot switch to state 15": seen when a stopped generate woke up."""
    assert is_lost(asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress"))


async def test_a_session_that_was_lost_is_never_replaced_in_silence(settings, connection):
    """SQLAlchemy reconnects an invalidated connection at its next use: such a session would hold no bucket's lock."""
    async with GenerateSession.open(settings) as session:
        ((backend,),) = await session.fetch(text("SELECT pg_backend_pid()"))
        await connection.execute("SELECT pg_terminate_backend($1)", backend)
        for _ in range(3):
            with pytest.raises((DatabaseUnavailableError, SQLAlchemyError)):
                await session.fetch(text("SELECT 1"))


async def test_no_transaction_is_open_while_a_report_is_computed(settings, company, connection):
    reached, go_on = threading.Event(), threading.Event()

    def stand(recipient):
        reached.set()
        assert go_on.wait(20)

    company.before_build = stand
    run = asyncio.create_task(generate(settings, "progress"))
    await asyncio.to_thread(reached.wait, 20)
    states = await connection.fetch(
        "SELECT state, xact_start FROM pg_stat_activity WHERE application_name = 'outbox generate'"
        " AND datname = current_database()"
    )
    go_on.set()
    await run
    assert [tuple(row) for row in states] == [("idle", None)]


async def test_all_locks_are_given_back_before_the_session_ends(settings, company, connection, monkeypatch):
    """Counted at the run's last statement, with its session still open."""
    fetched = []
    original = run.write_unreached

    async def write_unreached(*arguments):
        await original(*arguments)
        fetched.append(
            await connection.fetchval(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid::bigint = $1"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
                BUCKET_LOCKS,
            )
        )

    monkeypatch.setattr(run, "write_unreached", write_unreached)
    await generate(settings, "progress")
    assert fetched == [0]


async def test_windows_bound_what_is_in_memory_and_every_recipient_is_made(settings, company, connection, monkeypatch):
    monkeypatch.setattr(run, "WINDOW_MAX", 7)
    result = await generate(settings, "progress")
    assert (result.expected, result.made, result.elsewhere) == (40, 40, 0)
    again = await generate(settings, "progress")
    assert (again.expected, again.made, again.elsewhere) == (40, 0, 40)
    assert await connection.fetchval("SELECT expected FROM outbox.edition") == 40
    assert await reports(connection) == 40


async def test_one_who_failed_here_and_was_made_elsewhere_meanwhile_is_no_failure(
    settings, company, connection, monkeypatch
):
    """The exit code tells the truth for the fleet. The first run fails for one, then stands in the third bucket: by
    then it has let go of the first, since it reads one portion ahead.
    """
    monkeypatch.setattr(report_maker, "BUCKETS_AT_ONCE", 1)
    monkeypatch.setattr(shared_work.random, "sample", lambda population, _: list(population))
    unlucky = min(company.people, key=bucket_of)
    failed, begun, reached, go_on = [], set(), threading.Event(), threading.Event()

    def fail_then_stand(recipient):
        if recipient.key == unlucky and not failed:
            failed.append(recipient.key)
            raise OSError("a passing fault")
        begun.add(bucket_of(recipient.key))
        if len(begun) == 3 and not reached.is_set():
            reached.set()
            assert go_on.wait(20)

    company.before_build = fail_then_stand
    first = asyncio.create_task(generate(settings, "progress"))
    await asyncio.to_thread(reached.wait, 20)
    second = asyncio.create_task(generate(settings, "progress"))

    async def made_by_the_second():
        return await connection.fetchval("SELECT count(*) FROM outbox.report WHERE recipient_key = $1", unlucky)

    await until(made_by_the_second, "the second run makes what the first could not")
    go_on.set()
    results = await asyncio.gather(first, second)
    assert [result.failed for result in results] == [{}, {}]
    assert [result.made + result.elsewhere for result in results] == [40, 40]


def new(key, email):
    return NewReport(
        recipient_key=key, token=f"token {email}", title="t", html="h", email_id=email, key=f"progress/x/{key}",
        sender="reports@example.com", address="a@example.com", message_id=f"<{email}@example.com>", message=b"m",
    )  # fmt: skip


@pytest.fixture
async def edition(connection):
    return await connection.fetchval(
        "INSERT INTO outbox.edition (report, period, starts_at, ends_at) VALUES ('progress', 'x', now(), now() + '1 s')"
        " RETURNING id"
    )


async def test_of_two_transactions_for_one_recipient_the_later_writes_nothing(database, connection, edition):
    url = DatabaseUrl.parse(database)
    first, second = engine(url, application="first"), engine(url, application="second")
    async with first.connect() as one, second.connect() as other:
        assert await enqueue_reports(one, edition, [new("a", 1), new("b", 2)]) == 2
        assert await enqueue_reports(other, edition, [new("b", 3), new("c", 4)]) == 1
        assert await enqueue_reports(other, edition, [new("b", 5)]) == 0
    rows = await connection.fetch("SELECT key, id FROM outbox.email ORDER BY key")
    assert [tuple(row) for row in rows] == [("progress/x/a", 1), ("progress/x/b", 2), ("progress/x/c", 4)]
    assert await connection.fetchval("SELECT count(*) FROM outbox.delivery") == 3


async def test_two_batches_with_common_keys_in_any_order_do_not_deadlock(database, connection, edition):
    url = DatabaseUrl.parse(database)
    keys = [f"k{n:02}" for n in range(50)]
    first, second = engine(url, application="first"), engine(url, application="second")
    async with first.connect() as one, second.connect() as other:
        for turn in range(10):
            base = 1000 * turn
            made = await asyncio.gather(
                enqueue_reports(one, edition, [new(f"{turn} {k}", base + n) for n, k in enumerate(keys, 1)]),
                enqueue_reports(
                    other, edition, [new(f"{turn} {k}", base + 500 + n) for n, k in enumerate(keys[::-1], 1)]
                ),
            )
            assert sum(made) == 50
    assert await connection.fetchval("SELECT count(*) FROM outbox.email") == 500


async def test_one_notification_per_transaction_and_none_when_nothing_was_new(database, connection, edition):
    heard = []
    listener = await asyncpg.connect(database)
    await listener.add_listener("outbox", lambda *words: heard.append(words))
    async with engine(DatabaseUrl.parse(database), application="one").connect() as one:
        await enqueue_reports(one, edition, [new("a", 1), new("b", 2), new("c", 3)])
        await enqueue_reports(one, edition, [new("a", 4)])
        await enqueue_reports(one, edition, [new("d", 5)])
    await connection.execute("NOTIFY outbox, 'last'")
    await until(lambda: any(words[3] == "last" for words in heard), "the last notification")
    await listener.close()
    assert len(heard) == 3


async def test_report_email_and_delivery_are_committed_together_or_not_at_all(database, connection, edition):
    """The second of three rows breaks a CHECK of the email table, which is written after the reports."""
    bad = new("b", 2)
    object.__setattr__(bad, "address", "two words")
    async with engine(DatabaseUrl.parse(database), application="one").connect() as one:
        with pytest.raises(Exception, match="email_recipient_check"):
            await enqueue_reports(one, edition, [new("a", 1), bad, new("c", 3)])
    for table in ("report", "email", "delivery"):
        assert await connection.fetchval(f"SELECT count(*) FROM outbox.{table}") == 0
