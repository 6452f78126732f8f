"""Editions on real Postgres: who is expected, what an edition without reports becomes, and what others made."""

import asyncio
import sys
import threading
from datetime import timedelta
from types import ModuleType

import asyncpg
import pytest

from outbox.database.engine import engine
from outbox.database.locks import EDITION_LOCKS
from outbox.errors import ConfigurationError, OutboxError, SourceError
from outbox.generate import run as making
from outbox.generate.edition import EXPECT, open_edition, plan_edition
from outbox.generate.no_recipients import NoRecipientsError
from outbox.generate.run import generate
from outbox.generate.schedule_state import read
from outbox.monitoring.completion import CANDIDATES, COMPLETE, Candidate, is_complete
from outbox.operations.attention import Kind, concerns_of
from outbox.operations.audit import audit
from outbox.operations.mark_done import EmailsExistError, mark_done, undo_mark_done
from outbox.operations.snapshot import read_snapshot
from outbox.operations.waive import Owed, waive
from outbox.settings import load
from tests.support.fleet import until

WEEK = "2026-W40"
SETTINGS = """
database_url = "{database}"
sender = "Progress reports <reports@example.com>"
lease_s = 4
guard_s = 2
[reports.progress]
source = "company_of_the_editions:Source"
link = "https://reports.example.com/r/{{token}}"
[reports.sql]
recipients = "select id::text as key, email, name from people"
data = "select 1 as done where :key <> ''"
link = "https://reports.example.com/r/{{token}}"
{more}
"""


class Company:
    """A source that the test holds in its hand: rows of recipients, and what happens in a build."""

    def __init__(self, *keys):
        self.rows = [person(key) for key in keys]
        self.before_build = lambda _: None

    def recipients(self, _period):
        return self.rows

    def build(self, recipient, _period):
        self.before_build(recipient.key)
        return [{"done": 1}]


def person(key, email=None):
    return {"key": key, "email": f"{key}@example.com" if email is None else email}


@pytest.fixture
def company(monkeypatch):
    made = Company("a", "b", "c")
    module = ModuleType("company_of_the_editions")
    module.Source = lambda: made
    monkeypatch.setitem(sys.modules, "company_of_the_editions", module)
    return made


@pytest.fixture
def write(database, tmp_path):
    """Give settings; what is given is added to the table of the report `sql`."""

    def write(more=""):
        path = tmp_path / "outbox.toml"
        path.write_text(SETTINGS.format(database=database, more=more))
        return load(path, {})

    return write


@pytest.fixture
def settings(write):
    return write()


async def make(settings, name="progress"):
    return await generate(settings, name, period_key=WEEK)


async def send_all(connection):
    await connection.execute(
        "UPDATE outbox.delivery SET state = 'sent', attempt = 1, relay = 1, marked_at = now(), settled_at = now()"
        " WHERE state = 'pending'"
    )


async def complete(connection):
    """Complete each edition that is, as a relay does; return which are."""
    for row in await connection.fetch(CANDIDATES):
        candidate = Candidate(*row)
        if await is_complete(connection, candidate):
            await connection.execute(COMPLETE, candidate.id, candidate.expected)
    rows = await connection.fetch("SELECT report FROM outbox.edition WHERE completed_at IS NOT NULL ORDER BY id")
    return [row["report"] for row in rows]


async def expected(connection):
    return await connection.fetchval("SELECT expected FROM outbox.edition")


async def unreached(connection):
    rows = await connection.fetch("SELECT recipient_key FROM outbox.unreached ORDER BY 1")
    return [row["recipient_key"] for row in rows]


# ── distinct recipients ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("rows", "count", "failed"),
    [
        ([*map(person, "abcdefga")], 7, []),
        ([*map(person, "aabbccddeeffgg")], 7, []),
        ([*map(person, "abcdefg"), person("a", "not an address")], 7, []),  # the first row counts
        ([person("a", "not an address"), *map(person, "bcdefga")], 7, ["a"]),
        ([person("", "x@example.com"), *map(person, "abcdefg"), person("", "x@example.com")], 8,
         ["(no key, x@example.com)"]),
        ([person("a\0", "x@example.com"), *map(person, "abcdefg")], 8, [r"'a\x00'"]),  # two keys, not one
    ],
)  # fmt: skip
async def test_a_recipient_counts_once_however_far_apart_its_rows_are(
    settings, company, connection, monkeypatch, rows, count, failed
):
    monkeypatch.setattr(making, "WINDOW_MAX", 3)
    monkeypatch.setattr("outbox.operations.audit.WINDOW_MAX", 3)
    company.rows = rows
    for _ in range(2):  # the second run finds everything made
        result = await make(settings)
        assert (result.expected, list(result.failed)) == (count, failed)
        assert await expected(connection) == count
    assert await connection.fetchval("SELECT count(*) FROM outbox.report") == count - len(failed)
    await send_all(connection)
    assert (await complete(connection) == ["progress"]) == (not failed)
    found = await audit(settings, "progress", WEEK)
    assert (found.expected, found.sent, found.is_well) == (count, count - len(failed), not failed)


async def test_who_comes_for_one_who_left_is_owed_a_report_before_the_edition_is_complete(
    settings, company, connection
):
    """The reports are as many as the recipients, but one of them is of a recipient who has left."""
    await make(settings)
    await send_all(connection)
    assert await complete(connection) == ["progress"]
    company.rows = [person("b"), person("c"), person("new", "not an address")]
    result = await make(settings)
    assert (result.expected, list(result.failed)) == (3, ["new"])
    assert await connection.fetchval("SELECT count(*) FROM outbox.report") == 3
    (candidate,) = await connection.fetch(CANDIDATES)
    assert not await is_complete(connection, Candidate(*candidate)), "the dead man's switch is not called"
    assert await complete(connection) == []
    company.rows[-1] = person("new")
    await make(settings)
    assert await complete(connection) == []
    await send_all(connection)
    assert await complete(connection) == ["progress"]


async def test_of_two_looks_the_one_that_began_later_counts(settings, company, connection):
    """The first run reads three recipients and stands in a build; the second reads another list, and ends before it."""
    reached, go_on = threading.Event(), threading.Event()

    def stand(_):
        if not reached.is_set():
            reached.set()
            assert go_on.wait(20)

    company.before_build = stand
    first = asyncio.create_task(make(settings))
    await asyncio.to_thread(reached.wait, 20)
    company.rows = [*company.rows, person("new", "not an address")]
    second = asyncio.create_task(make(settings))
    await until(lambda: _sessions(connection, 2), "both share the edition's lock")
    go_on.set()
    results = await asyncio.gather(first, second)
    assert [result.expected for result in results] == [3, 4]
    assert (await expected(connection), await unreached(connection)) == (4, ["new"])
    # Whichever of the two ended last: an older look writes nothing.
    edition = await connection.fetchrow("SELECT id, looked_at FROM outbox.edition")
    look = {"id": edition["id"], "expected": 3, "looked_at": edition["looked_at"] - timedelta(seconds=1)}
    look |= {"may_be_empty": False, "failed": 0, "made": 0}
    async with engine(settings.database_url, application="late").begin() as late:
        assert (await late.execute(EXPECT, look)).rowcount == 0
        assert (await late.execute(EXPECT, look | {"looked_at": edition["looked_at"]})).rowcount == 1


async def _sessions(connection, count):
    return count == await connection.fetchval(
        "SELECT count(DISTINCT pid) FROM pg_locks WHERE locktype = 'advisory' AND classid::bigint = $1 AND granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        EDITION_LOCKS,
    )


# ── an edition without recipients ────────────────────────────────────────────────────────────────────────────────────


async def test_an_edition_without_recipients_is_an_error_and_never_complete(write, settings, connection):
    with pytest.raises(NoRecipientsError, match=r"sql 2026-W40: the recipients query returns no row, so nobody .*"
                       r"row level security, .*set may_be_empty = true in \[reports\.sql\]"):  # fmt: skip
        await make(settings, "sql")
    assert await expected(connection) == 0
    assert await complete(connection) == []
    (concern,) = concerns_of(await read_snapshot(connection))
    assert (concern.kind, concern.subject) == (Kind.EMPTY, f"sql {WEEK}")
    assert not (await audit(settings, "sql", WEEK)).is_well
    assert "names no recipient" in (await audit(settings, "sql", WEEK)).sentence

    allowing = write("may_be_empty = true")
    assert (await make(allowing, "sql")).expected == 0
    assert concerns_of(await read_snapshot(connection)) == []
    assert await complete(connection) == ["sql"]
    assert (await audit(allowing, "sql", WEEK)).is_well

    await connection.execute("INSERT INTO people VALUES (1, 'p1@example.com', 'One')")
    assert (await make(settings, "sql")).made == 1
    assert await complete(connection) == []
    await connection.execute("DELETE FROM people")
    with pytest.raises(NoRecipientsError):
        await make(settings, "sql")
    assert await expected(connection) == 1, "what was found before stays"


async def test_row_level_security_that_hides_everybody_is_named(settings, connection):
    await connection.execute(
        "INSERT INTO people VALUES (1, 'p1@example.com', 'One'); ALTER TABLE people ENABLE ROW LEVEL SECURITY;"
        "DROP ROLE IF EXISTS n_generates; CREATE ROLE n_generates LOGIN; GRANT SELECT ON people TO n_generates;"
        "GRANT USAGE ON SCHEMA outbox TO n_generates; GRANT ALL ON ALL TABLES IN SCHEMA outbox TO n_generates"
    )
    url = settings.database_url.dsn.replace("//postgres@", "//n_generates@")
    path = settings.directory / "outbox.toml"
    path.write_text(SETTINGS.format(database=url, more=""))
    try:
        with pytest.raises(NoRecipientsError, match=r"it limits what role n_generates sees of (public\.)?people\)"):
            await make(load(path, {}), "sql")
    finally:
        await until(
            lambda: connection.fetchval("SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = 'n_generates'"),
            "it is gone",
        )
        await connection.execute("DROP OWNED BY n_generates; DROP ROLE n_generates")


# ── an edition that nothing could be made of ─────────────────────────────────────────────────────────────────────────

WRONG = {
    "recipients": ("from people", "from persons"),
    "data": ("where :key", "from nowhere where :key"),
}


@pytest.mark.parametrize("query", WRONG)
async def test_a_generate_that_fails_at_once_leaves_no_edition(settings, connection, query):
    await connection.execute("INSERT INTO people VALUES (1, 'p1@example.com', 'One')")
    path = settings.directory / "outbox.toml"
    path.write_text(path.read_text().replace(*WRONG[query]))
    for _ in range(2):
        with pytest.raises(SourceError):
            await make(load(path, {}), "sql")
        assert await connection.fetchval("SELECT count(*) FROM outbox.edition") == 0
    if query == "recipients":
        assert await connection.fetchval("SELECT count(*) FROM outbox.definition") == 0, "nothing was agreed either"
    assert (await make(settings, "sql")).made == 1


async def test_an_edition_that_another_generate_makes_stays_when_one_fails(settings, company, connection):
    """This server's templates are broken; the other has opened the edition and stands in its first build."""
    reached, go_on = threading.Event(), threading.Event()

    def stand(_):
        reached.set()
        assert go_on.wait(20)

    company.before_build = stand
    company.rows = [person(f"k{n}") for n in range(40)]
    other = asyncio.create_task(make(settings))
    await asyncio.to_thread(reached.wait, 20)
    broken = settings.directory / "here" / "templates" / "progress" / "email.txt.j2"
    broken.parent.mkdir(parents=True)
    broken.write_text("{% if %}")
    (settings.directory / "here" / "outbox.toml").write_text((settings.directory / "outbox.toml").read_text())
    with pytest.raises(SourceError, match="email"):
        await make(load(settings.directory / "here" / "outbox.toml", {}))
    assert await connection.fetchval("SELECT count(*) FROM outbox.report") == 0
    go_on.set()
    assert (await other).made == 40
    assert await connection.fetchval("SELECT count(*) FROM outbox.edition") == 1


async def test_an_edition_is_removed_only_if_nothing_is_known_of_it(settings, company, connection):
    await make(settings)
    rows = await connection.fetch("""
        INSERT INTO outbox.edition (report, period, starts_at, ends_at, expected, done_elsewhere_at)
        VALUES ('x', '1', 'yesterday', now(), 0, NULL), ('x', '2', 'yesterday', now(), NULL, now()),
               ('x', '3', 'yesterday', now(), NULL, NULL) RETURNING id""")
    made = await connection.fetchval("UPDATE outbox.edition SET expected = NULL WHERE report = 'progress' RETURNING id")
    removed = [
        await connection.fetchval("SELECT outbox.remove_unused_edition($1)", edition)
        for edition in (made, *(row["id"] for row in rows))
    ]
    assert removed == [False, False, False, True]


# ── what another system made ─────────────────────────────────────────────────────────────────────────────────────────

DONE = {"who": "ann@host", "why": "the old cron sent it"}


async def mark(settings, **how):
    async with engine(settings.database_url, application="outbox mark-done").connect() as connection:
        return await mark_done(connection, "progress", settings.report("progress"), WEEK, **DONE, **how)


async def test_generate_does_not_make_an_edition_that_is_done_elsewhere(settings, company, connection):
    assert await mark(settings) == f"progress {WEEK} is marked as done elsewhere: outbox will not make it."
    assert "declared as done elsewhere by ann@host at" in await mark(settings), "a second time changes nothing"
    result = await make(settings)
    assert (result.made, result.declared.who, result.declared.why) == (0, *DONE.values())
    assert await connection.fetchval("SELECT count(*) FROM outbox.report") == 0
    assert await connection.fetchval("SELECT count(*) FROM outbox.edition WHERE completed_at IS NULL") == 0
    rows = await connection.fetch("SELECT who, what, target, why FROM outbox.operation")
    assert [tuple(row) for row in rows] == [("ann@host", "mark-done", f"progress {WEEK}", "the old cron sent it")]

    async with engine(settings.database_url, application="undo").connect() as session:
        undo = (session, "progress", settings.report("progress"), WEEK)
        assert "is no longer marked as done elsewhere" in await undo_mark_done(*undo, **DONE)
        with pytest.raises(OutboxError, match="nothing to undo"):
            await undo_mark_done(*undo, **DONE)
    assert await connection.fetchval("SELECT count(*) FROM outbox.edition") == 0
    assert (await make(settings)).made == 3


async def test_an_edition_with_emails_is_done_elsewhere_only_if_somebody_says_what_becomes_of_them(
    settings, company, connection
):
    await make(settings)
    await connection.execute("UPDATE outbox.delivery SET state = 'cancelled', settled_at = now() WHERE email = 1")
    with pytest.raises(EmailsExistError, match=r"has 3 emails \(1 cancelled, 2 pending\) already; nothing was marked"):
        await mark(settings)
    company.rows.append(person("new"))
    assert "Its 3 emails (1 cancelled, 2 pending) stay as they are" in await mark(settings, keep_emails=True)
    assert (await make(settings)).made == 0
    assert await connection.fetchval("SELECT count(*) FROM outbox.delivery WHERE state = 'pending'") == 2
    looked = await audit(settings, "progress", WEEK)
    assert looked.sentence == (
        f"Not well: 2 of the 3 emails that outbox made of progress {WEEK} are not sent: 2 waiting; "
        "the edition was done elsewhere."
    )
    assert not looked.is_well
    await connection.execute("UPDATE outbox.delivery SET state = 'cancelled', settled_at = now()")
    assert (await audit(settings, "progress", WEEK)).is_well, "of the new recipient nobody needs to hear"


async def undo_mark(settings):
    async with engine(settings.database_url, application="undo").connect() as connection:
        return await undo_mark_done(connection, "progress", settings.report("progress"), WEEK, **DONE)


async def test_after_an_undo_the_edition_is_complete_only_when_generate_has_seen_all_recipients(
    settings, company, connection
):
    """A generate was killed after two of three reports, so nobody knows how many recipients there are."""
    third = company.rows.pop()
    await make(settings)
    await send_all(connection)
    await connection.execute("UPDATE outbox.edition SET expected = NULL, looked_at = NULL")
    await mark(settings, keep_emails=True)
    await undo_mark(settings)
    assert await complete(connection) == []
    company.rows.append(third)
    assert (await make(settings)).made == 1
    await send_all(connection)
    assert await complete(connection) == ["progress"]


async def test_a_waiver_that_is_undone_does_not_open_an_edition_that_is_done_elsewhere(settings, company, connection):
    """Its dead man's switch is not for outbox to call."""
    company.rows[-1] = person("c", "not an address")
    await make(settings)
    await send_all(connection)
    await waive(connection, [Owed("progress", WEEK, "c")], who="ann", why="")
    await mark(settings, keep_emails=True)
    await waive(connection, [Owed("progress", WEEK, "c")], who="ann", why="", undo=True)
    assert await connection.fetchval("SELECT completed_at FROM outbox.edition") is not None
    await connection.execute("UPDATE outbox.edition SET completed_at = NULL")
    assert await connection.fetch(CANDIDATES) == []


async def test_no_report_is_added_to_an_edition_that_is_done_elsewhere_not_even_by_an_older_version(
    settings, company, connection
):
    """An older generate knows nothing of declarations and of the edition's lock. One that has begun is waited for."""
    insert = "INSERT INTO outbox.report (edition, recipient_key, token, title, html) VALUES ($1, $2, $2, 't', 'h')"
    async with engine(settings.database_url, application="open").connect() as session:
        report = settings.report("progress")
        planned = await plan_edition(session, "progress", report, WEEK)
        edition = (await open_edition(session, "progress", report, planned.period)).id
    older = await asyncpg.connect(settings.database_url.dsn)
    transaction = older.transaction()
    await transaction.start()
    await older.execute(insert, edition, "old")
    marking = asyncio.create_task(mark(settings))
    await until(lambda: _waits(connection, "outbox mark-done"), "mark-done waits for the report")
    await transaction.commit()
    with pytest.raises(EmailsExistError):
        await marking

    async with connection.transaction():
        await connection.execute("SELECT FROM outbox.edition FOR UPDATE")
        late = asyncio.create_task(older.execute(insert, edition, "late"))
        await until(lambda: _waits(connection, ""), "the report waits for the declaration")
        await connection.execute("UPDATE outbox.edition SET done_elsewhere_at = now(), done_elsewhere_by = 'ann'")
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError, match=f"progress {WEEK} is done elsewhere"):
        await late
    assert await connection.fetchval("SELECT array_agg(recipient_key) FROM outbox.report") == ["old"]
    await older.close()


async def _waits(connection, application):
    return await connection.fetchval(
        "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = $1"
        " AND datname = current_database()",
        application,
    )


async def test_an_edition_that_a_generate_makes_at_this_moment_cannot_be_declared(settings, company, connection):
    reached, go_on = threading.Event(), threading.Event()

    def stand(_):
        reached.set()
        assert go_on.wait(20)

    company.before_build = stand
    run = asyncio.create_task(make(settings))
    await asyncio.to_thread(reached.wait, 20)
    with pytest.raises(OutboxError, match=r"is being made at this moment by pid \d+ .*; nothing was marked"):
        await mark(settings, keep_emails=True)
    go_on.set()
    assert (await run).made == 3


async def test_a_generate_that_has_opened_the_edition_sees_a_declaration_before_it_makes_anything(
    settings, company, connection, monkeypatch
):
    """It waits for the edition's lock, which the declaring session holds; the row that it has opened was not marked."""
    opened = []

    async def open_and_count(*arguments):
        opened.append(await open_edition(*arguments))
        return opened[-1]

    monkeypatch.setattr("outbox.generate.edition_lock.open_edition", open_and_count)
    async with engine(settings.database_url, application="open").connect() as session:
        report = settings.report("progress")
        planned = await plan_edition(session, "progress", report, WEEK)
        edition = await open_edition(session, "progress", report, planned.period)
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1, $2)", EDITION_LOCKS, edition.id)
        run = asyncio.create_task(make(settings))
        await until(lambda: len(opened) > 1, "it has found the lock held, and tries again")
        await connection.execute("UPDATE outbox.edition SET done_elsewhere_at = now(), completed_at = now()")
    assert (await run).declared is not None
    assert await connection.fetchval("SELECT count(*) FROM outbox.report") == 0


async def test_a_stranger_who_holds_the_lock_of_an_edition_stops_nobody(settings, company, connection, monkeypatch):
    """Any role that connects can take it. The generate goes on without it after a while."""
    monkeypatch.setattr("outbox.generate.edition_lock.WAIT_MAX_S", 0.2)
    async with engine(settings.database_url, application="open").connect() as session:
        report = settings.report("progress")
        planned = await plan_edition(session, "progress", report, WEEK)
        edition = await open_edition(session, "progress", report, planned.period)
    await connection.execute("DROP ROLE IF EXISTS n_edition; CREATE ROLE n_edition LOGIN")
    stranger = await asyncpg.connect(settings.database_url.dsn.replace("//postgres@", "//n_edition@"))
    await stranger.execute("SELECT pg_advisory_lock($1, $2)", EDITION_LOCKS, edition.id)
    assert (await make(settings)).made == 3
    assert "stay as they are" in await mark(settings, keep_emails=True)
    await stranger.close()
    await until(
        lambda: connection.fetchval("SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = 'n_edition'"),
        "it is gone",
    )
    await connection.execute("DROP ROLE n_edition")


async def test_a_schedule_is_new_until_a_relay_has_followed_it_and_knows_what_outbox_has_made(connection):
    await connection.execute("""
        INSERT INTO outbox.edition (report, period, starts_at, ends_at, done_elsewhere_at)
        VALUES ('made', '1', 'yesterday', now(), NULL), ('declared', '1', 'yesterday', now(), now());
        INSERT INTO outbox.schedule (report, tick_at) VALUES ('followed', now())""")
    seen = await read(connection, ["made", "declared", "followed", "unknown"])
    assert seen.new == {"made": {"1"}, "declared": frozenset(), "unknown": frozenset()}


async def test_a_period_that_is_none_cannot_be_declared(settings):
    async with engine(settings.database_url, application="x").connect() as session:
        with pytest.raises(ConfigurationError, match=r"^PERIOD, for report progress: '2026-40' is not a weekly period"):
            await mark_done(session, "progress", settings.report("progress"), "2026-40", **DONE)
