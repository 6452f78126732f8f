"""generate among sessions that hold what it needs: keys, rows, tables, bucket locks. It ends, and names the holder."""

import asyncio
import re

import asyncpg
import pytest

from outbox.database.lock_wait import LockWaitError
from outbox.database.locks import BUCKET_LOCKS, NAMESPACE_MASK
from outbox.database.roles import grant_roles
from outbox.errors import SourceError
from outbox.generate import batch_writer, session, wait_bounds
from outbox.generate import run as making
from outbox.generate.buckets import BUCKETS, bucket_of
from outbox.generate.run import generate
from outbox.settings import load
from tests.database.test_generate import company as forty  # noqa: F401 - a fixture
from tests.support.fleet import until

WEEK = "2026-W47"
EARLIER = "2026-W46"
SETTINGS = """
database_url = "{database}"
sender = "Progress reports <reports@example.com>"
lease_s = 2
guard_s = 1
generate_wait_s = 2
[digest]
link = "https://reports.example.com/d/{{token}}"
[reports.progress]
source = "company_of_the_test:Source"
link = "https://reports.example.com/r/{{token}}"
[reports.sql]
recipients = "select id::text as key, email, name from people"
data = "select 1 as done where :key <> ''"
link = "https://reports.example.com/r/{{token}}"
[reports.collected]
deliver = "digest"
source = "company_of_the_test:Source"
link = "https://reports.example.com/r/{{token}}"
"""
EMAIL = """
INSERT INTO outbox.email (key, sender, recipient, message_id, message) VALUES ($1, $2, $3, '<1@x>', 'Subject: x')
"""
OURS = "reports@example.com"


@pytest.fixture
def company(forty):  # noqa: F811 - the fixture
    forty.people = [f"k{n}" for n in range(30)]
    return forty


@pytest.fixture
def settings(database, tmp_path):
    path = tmp_path / "outbox.toml"
    path.write_text(SETTINGS.format(database=database))
    return load(path, {})


@pytest.fixture
async def session_of(database, connection):
    """Opens sessions of a role that may connect and nothing else, or of one that may make reports."""
    roles = ("n_generates", "g_generates")
    opened = []

    async def drop():
        for name in roles:
            if await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", name):
                await connection.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")

    await drop()
    await grant_roles(connection)
    await connection.execute(
        "CREATE ROLE n_generates LOGIN; CREATE ROLE g_generates LOGIN; GRANT outbox_generate TO g_generates"
    )

    async def open_one(role):
        opened.append(await asyncpg.connect(re.sub("//[^@]*@", f"//{role}@", database)))
        return opened[-1]

    yield open_one
    for one in opened:
        await one.close()
    gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = ANY ($1::text[])"
    await until(lambda: connection.fetchval(gone, list(roles)), "they are gone")
    await drop()


async def states(connection):
    return await connection.fetchrow(
        "SELECT (SELECT count(*) FROM outbox.report) AS reports, (SELECT count(*) FROM outbox.email) AS emails,"
        " (SELECT count(*) FROM outbox.delivery) AS deliveries"
    )


def numbers(edition, buckets=range(BUCKETS)):
    return [(edition * BUCKETS + bucket) & NAMESPACE_MASK for bucket in buckets]


async def edition_of(connection, report="progress"):
    return await connection.fetchval(
        "INSERT INTO outbox.edition (report, period, starts_at, ends_at)"
        " VALUES ($1, $2, '2026-11-16 05:00+00', '2026-11-23 05:00+00') RETURNING id",
        report,
        WEEK,
    )


@pytest.mark.parametrize("blocked", [["k7"], ["k3", "k7", "k20"]])
async def test_a_blocked_key_stops_its_recipient_only_and_the_blocker_is_named(settings, company, connection, blocked):
    async with connection.transaction():
        for key in blocked:
            await connection.execute(EMAIL, f"progress/{WEEK}/{key}", OURS, f"{key}@example.com")
        async with asyncio.timeout(20):
            result = await generate(settings, "progress", period_key=WEEK)
        assert sorted(result.failed) == sorted(blocked)
        for key, why in result.failed.items():
            assert f"progress/{WEEK}/{key}" in why
            assert f"pid {connection.get_server_pid()} (role postgres" in why
        assert result.made == 30 - len(blocked)
    await connection.execute("DELETE FROM outbox.email WHERE report IS NULL")
    again = await generate(settings, "progress", period_key=WEEK)
    assert (again.made, again.elsewhere, again.failed) == (len(blocked), 30 - len(blocked), {})
    assert tuple(await states(connection)) == (30, 30, 30)


async def test_however_many_keys_are_blocked_generate_ends_and_names_each(settings, company, connection, monkeypatch):
    monkeypatch.setattr(batch_writer, "PATIENCE_S", 1.0)
    company.people = [f"k{n}" for n in range(200)]
    async with connection.transaction():
        for key in company.people[:150]:
            await connection.execute(EMAIL, f"progress/{WEEK}/{key}", OURS, f"{key}@example.com")
        async with asyncio.timeout(60):
            result = await generate(settings, "progress", period_key=WEEK)
        assert sorted(result.failed) == sorted(company.people[:150])
        assert result.made == 50


@pytest.mark.parametrize(
    ("first", "second"), [("delivery", "report"), ("edition", "definition")], ids=["writing", "planning"]
)
async def test_a_transaction_that_postgres_ends_in_a_deadlock_is_repeated(
    settings, company, connection, database, first: str, second: str
):
    """A tool locks our tables in another order than generate; Postgres ends the one that looks first: generate."""
    await generate(settings, "progress", period_key=EARLIER)
    watcher = await asyncpg.connect(database)
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"

    async def generate_waits():
        return await watcher.fetchval(waits) == 1

    async with connection.transaction():
        await connection.execute("SET LOCAL deadlock_timeout = '1 min'")
        await connection.execute(f"LOCK TABLE outbox.{first} IN ACCESS EXCLUSIVE MODE")
        making_reports = asyncio.create_task(generate(settings, "progress", period_key=WEEK))
        await until(generate_waits, f"generate has read or written {second}, and waits for {first}")
        await connection.execute(f"LOCK TABLE outbox.{second} IN ACCESS EXCLUSIVE MODE")
    result = await making_reports
    assert (result.made, result.failed) == (30, {})
    assert tuple(await states(connection)) == (60, 60, 60)
    count = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    await until(lambda: watcher.fetchval(count), "Postgres has counted a deadlock")
    await watcher.close()


async def test_a_transaction_that_holds_the_edition_itself_is_named(settings, company, connection):
    async with connection.transaction():
        await edition_of(connection)
        async with asyncio.timeout(15):
            with pytest.raises(
                LockWaitError, match=rf"progress: waited 3 s .* pid {connection.get_server_pid()} \(role"
            ):
                await generate(settings, "progress", period_key=WEEK)
    assert (await generate(settings, "progress", period_key=WEEK)).made == 30


async def test_a_row_that_another_keeps_locked_is_named_at_the_end_of_the_run(settings, company, connection):
    await edition_of(connection)
    async with connection.transaction():
        await connection.execute("SELECT FROM outbox.edition FOR NO KEY UPDATE")
        async with asyncio.timeout(15):
            with pytest.raises(LockWaitError, match=f"pid {connection.get_server_pid()}"):
                await generate(settings, "progress", period_key=WEEK)
        assert (await states(connection))["reports"] == 30
    result = await generate(settings, "progress", period_key=WEEK)
    assert (result.elsewhere, result.failed) == (30, {})


async def test_a_query_that_waits_for_a_locked_table_ends_the_run_and_names_who_holds_it(settings, connection):
    await connection.execute("INSERT INTO people VALUES (1, 'p1@example.com', 'One')")
    async with connection.transaction():
        await connection.execute("LOCK TABLE people IN ACCESS EXCLUSIVE MODE")
        async with asyncio.timeout(15):
            with pytest.raises(LockWaitError, match=f"a query waited 2 s .* pid {connection.get_server_pid()}"):
                await generate(settings, "sql", period_key=WEEK)
    assert (await generate(settings, "sql", period_key=WEEK)).made == 1


async def test_items_of_a_digest_that_another_keeps_locked_stop_their_recipient_only(settings, company, connection):
    company.people = ["k1", "k2", "k3"]
    await generate(settings, "collected", period_key=WEEK)
    async with connection.transaction():
        await connection.execute("SELECT FROM outbox.digest_item WHERE address = 'k2@example.com' FOR UPDATE")
        async with asyncio.timeout(15):
            result = await generate(settings, "digest", period_key=WEEK)
    assert (result.made, list(result.failed)) == (2, ["k2@example.com"])
    assert f"pid {connection.get_server_pid()}" in result.failed["k2@example.com"]
    assert (await generate(settings, "digest", period_key=WEEK)).made == 1


LOCKS = {
    "exclusive": "SELECT pg_advisory_lock({ns}, n) FROM unnest($1::int[]) n",
    "shared": "SELECT pg_advisory_lock_shared({ns}, n) FROM unnest($1::int[]) n",
    "of a transaction": "SELECT pg_advisory_xact_lock({ns}, n) FROM unnest($1::int[]) n",
}


@pytest.mark.parametrize("mode", LOCKS)
async def test_bucket_locks_of_a_role_that_cannot_make_reports_hinder_nobody(
    settings, company, connection, session_of, mode
):
    patient = settings.model_copy(update={"generate_wait_s": 600.0})
    edition = await edition_of(connection)
    stranger = await session_of("n_generates")
    async with stranger.transaction():
        await stranger.execute(LOCKS[mode].format(ns=BUCKET_LOCKS), numbers(edition))
        async with asyncio.timeout(60):
            results = await asyncio.gather(*(generate(patient, "progress", period_key=WEEK) for _ in range(3)))
    assert [result.failed for result in results] == [{}, {}, {}]
    assert [result.made + result.elsewhere for result in results] == [30, 30, 30]
    assert tuple(await states(connection)) == (30, 30, 30)


async def test_a_bucket_whose_holder_makes_nothing_is_given_up_by_name_and_the_rest_is_made(
    settings, company, connection, session_of
):
    edition = await edition_of(connection)
    held = {bucket_of("k1"), bucket_of("k2")}
    holder = await session_of("g_generates")
    await holder.execute(LOCKS["exclusive"].format(ns=BUCKET_LOCKS), numbers(edition, held))
    theirs = {key for key in company.people if bucket_of(key) in held}
    async with asyncio.timeout(15):
        result = await generate(settings, "progress", period_key=WEEK)
    assert set(result.failed) == theirs
    assert (result.made, result.expected) == (30 - len(theirs), 30)
    for why in result.failed.values():
        assert f"reserved by pid {holder.get_server_pid()} (role g_generates" in why
    await holder.close()
    again = await generate(settings, "progress", period_key=WEEK)
    assert (again.made, again.failed) == (len(theirs), {})


async def test_a_holder_that_was_given_up_is_not_waited_for_again_in_later_windows(
    settings, company, connection, session_of, monkeypatch
):
    monkeypatch.setattr(making, "WINDOW_MAX", 1)
    company.people = company.people[:5]
    edition = await edition_of(connection)
    holder = await session_of("g_generates")
    await holder.execute(LOCKS["exclusive"].format(ns=BUCKET_LOCKS), numbers(edition))
    waited_for = asyncio.get_running_loop().time()
    result = await generate(settings, "progress", period_key=WEEK)
    waited_for = asyncio.get_running_loop().time() - waited_for
    assert waited_for < len(company.people) * settings.generate_wait_s
    assert sorted(result.failed) == company.people


async def test_a_holder_whose_reports_keep_coming_is_waited_for_longer_than_the_bound(
    settings, company, connection, session_of
):
    """It makes one report of another recipient whenever the run looks and is about to lose its patience."""
    edition = await edition_of(connection)
    holder = await session_of("g_generates")
    await holder.execute(LOCKS["exclusive"].format(ns=BUCKET_LOCKS), numbers(edition))
    loop = asyncio.get_running_loop()
    run = asyncio.create_task(generate(settings, "progress", period_key=WEEK))
    began, made = loop.time(), 0
    while loop.time() - began < 2 * settings.generate_wait_s:
        made += 1
        await connection.execute(
            "INSERT INTO outbox.report (edition, recipient_key, token, title, html) VALUES ($1, $2, $2, '', '')",
            edition,
            f"other {made}",
        )
        done, _ = await asyncio.wait([run], timeout=settings.generate_wait_s / 4)
        assert not done, run.result().failed
    await holder.close()
    async with asyncio.timeout(10):
        result = await run
    assert (result.made, result.failed) == (30, {})


FOREIGN = {
    "another recipient": (OURS, "mallory@example.com"),
    "another sender": ("mallory@example.com", "k7@example.com"),
    "another case of the recipient": (OURS, "K7@example.com"),
}


@pytest.mark.parametrize("report", ["progress", "collected"])
@pytest.mark.parametrize("foreign", FOREIGN)
async def test_an_email_under_a_reports_key_with_another_envelope_fails_its_recipient_only(
    settings, company, connection, report, foreign
):
    key = f"{report}/{WEEK}/k7"
    await connection.execute(EMAIL, key, *FOREIGN[foreign])
    result = await generate(settings, report, period_key=WEEK)
    assert (result.made, list(result.failed)) == (29, ["k7"])
    assert f"key {key} belongs to an email that has another recipient or sender" in result.failed["k7"]
    assert f"outbox show {key}" in result.failed["k7"]
    assert await connection.fetchval("SELECT report IS NULL FROM outbox.email WHERE key = $1", key)
    assert not await connection.fetchval("SELECT count(*) FROM outbox.report WHERE recipient_key = 'k7'")
    again = await generate(settings, report, period_key=WEEK)
    assert (again.elsewhere, list(again.failed)) == (29, ["k7"])

    # What the sentence says to do helps.
    fix = re.search(r"\((UPDATE .*)\), and", result.failed["k7"])[1]
    await connection.execute(fix)
    mended = await generate(settings, report, period_key=WEEK)
    assert (mended.made, mended.failed) == (1, {})


@pytest.mark.parametrize("report", ["progress", "collected"])
async def test_an_email_that_a_failover_left_becomes_the_new_reports(settings, company, connection, report):
    key = f"{report}/{WEEK}/k7"
    await connection.execute(EMAIL, key, OURS, "k7@example.com")
    result = await generate(settings, report, period_key=WEEK)
    assert (result.made, result.failed) == (30, {})
    assert await connection.fetchval(
        "SELECT r.recipient_key FROM outbox.email m JOIN outbox.report r ON r.id = m.report WHERE m.key = $1", key
    ) == "k7"  # fmt: skip
    assert not await connection.fetchval("SELECT count(*) FROM outbox.digest_item i JOIN outbox.report r"
                                         " ON r.id = i.report WHERE r.recipient_key = 'k7'")  # fmt: skip


async def test_an_email_of_another_report_is_not_adopted(settings, company, connection):
    """A role that may make reports has pointed the victim's key at a report of its own."""
    other = await connection.fetchval(
        "INSERT INTO outbox.report (edition, recipient_key, token, title, html)"
        " VALUES ($1, 'k7', 'x', '', '') RETURNING id",
        await edition_of(connection, "sql"),
    )
    key = f"progress/{WEEK}/k7"
    await connection.execute(EMAIL, key, OURS, "k7@example.com")
    await connection.execute("UPDATE outbox.email SET report = $1", other)
    result = await generate(settings, "progress", period_key=WEEK)
    assert (result.made, list(result.failed)) == (29, ["k7"])
    assert not await connection.fetchval("SELECT outbox.adopt_email($1, $2, $3, 'k7@example.com')", key, other, OURS)


async def test_a_foreign_email_that_is_committed_while_generate_waits_for_its_key_is_not_adopted(
    settings, company, connection
):
    key = f"progress/{WEEK}/k7"
    async with connection.transaction():
        await connection.execute(EMAIL, key, OURS, "mallory@example.com")
        run = asyncio.create_task(generate(settings, "progress", period_key=WEEK))
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND transactionid = pg_current_xact_id()::xid"
        await until(lambda: connection.fetchval(waits), "the run waits for the key")
    result = await run
    assert (result.made, list(result.failed)) == (29, ["k7"])
    assert await connection.fetchval("SELECT recipient FROM outbox.email WHERE key = $1", key) == "mallory@example.com"


async def test_a_role_that_makes_reports_cannot_point_an_email_at_another_report(database, connection, session_of):
    edition = await edition_of(connection)
    reports = [
        await connection.fetchval(
            "INSERT INTO outbox.report (edition, recipient_key, token, title, html) VALUES ($1, $2, $2, '', '')"
            " RETURNING id",
            edition,
            key,
        )
        for key in ("k1", "k2")
    ]
    await connection.execute(EMAIL, f"progress/{WEEK}/k1", OURS, "k1@example.com")
    role = await session_of("g_generates")
    adopt = "SELECT outbox.adopt_email($1, $2, $3, $4)"
    mine = (f"progress/{WEEK}/k1", reports[0], OURS, "k1@example.com")
    assert not await role.fetchval(adopt, mine[0], reports[1], *mine[2:]), "the key is not that report's"
    assert await role.fetchval(adopt, *mine)
    assert not await role.fetchval(adopt, *mine), "once only"
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await role.execute("UPDATE outbox.email SET report = $1", reports[1])


ODD = ["-infinity", "infinity", "4713-01-01 BC", "20000-01-01", "0001-01-01 UTC", "9999-12-31 23:59:59 UTC"]


@pytest.mark.parametrize("odd", ODD)
async def test_an_edition_whose_bounds_python_cannot_represent_is_generated(settings, company, connection, odd):
    early = odd.startswith(("-", "4", "0"))
    await connection.execute(
        "INSERT INTO outbox.edition (report, period, starts_at, ends_at) VALUES ('progress', $1, "
        + (f"'{odd}', '2026-11-23')" if early else f"'2026-11-16', '{odd}')"),
        WEEK,
    )
    assert (await generate(settings, "progress", period_key=WEEK)).made == 30


async def test_a_time_that_python_cannot_represent_in_the_data_fails_its_recipient_only(settings, connection, tmp_path):
    await connection.execute("INSERT INTO people SELECT n, 'p' || n || '@example.com', '' FROM generate_series(1, 3) n")
    path = tmp_path / "outbox.toml"
    path.write_text(path.read_text().replace(
        "select 1 as done where :key <> ''",
        "select case :key when '2' then '4000-01-01 BC' when '3' then 'infinity' else 'now' end::timestamptz as at",
    ))  # fmt: skip
    result = await generate(load(path, {}), "sql", period_key=WEEK)
    assert (result.made, list(result.failed)) == (2, ["2"])
    assert "4000-01-01 00:00:00+00 BC, which Python cannot represent" in result.failed["2"]

    path.write_text(path.read_text().replace(
        "select id::text as key, email, name from people",
        "select id::text as key, email, '4000-01-01 BC'::timestamptz as since from people",
    ))  # fmt: skip
    with pytest.raises(SourceError, match=r"reports\.sql\.recipients: .* of key 1, which Python cannot represent"):
        await generate(load(path, {}), "sql", period_key="2026-W46")


def test_a_lock_is_waited_for_longer_than_a_lease_and_shorter_than_an_answer():
    """A stopped server loses its locks after a lease; a session that has no answer after three is lost."""
    assert 1 < session.LOCK_LEASES_MAX < wait_bounds.SILENT_LEASES_MAX
