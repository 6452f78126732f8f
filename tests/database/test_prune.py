import asyncio
from datetime import timedelta
from itertools import count

import asyncpg
import pytest

from outbox.database.locks import PRUNE_LOCK
from outbox.errors import ConfigurationError, DatabaseUnavailableError, OutboxError
from outbox.mail.removed_message import LOST, PRUNED
from outbox.operations import prune
from outbox.operations.prune import keep_of
from outbox.operations.resolve import Decision, explain, resolve
from outbox.relay.failover import reassert_portion
from outbox.relay.settlement import Settlement, states_of
from outbox.relay.tick import TickRequest, tick
from outbox.relay.verdict_history import RecentVerdict
from outbox.settings.urls import DatabaseUrl
from outbox.smtp.verdict import Outcome
from tests.support.fleet import until

KEEP = timedelta(days=400)
BODY = b"Subject: hello\r\n\r\n" + b"x" * 70
SETTLED = ("sent", "dead", "cancelled", "expired")
OPEN = ("pending", "sending", "in_doubt")

EDITION = "INSERT INTO outbox.edition (report, period, starts_at, ends_at) VALUES ('r', $1, '2025-01-06', '2025-01-13')"

# Two tries each: one that was deferred, and the one that the state is about.
PUT = """
WITH given AS (SELECT n.key, n.id FROM unnest($1::text[], $2::bigint[]) AS n (key, id)
), report AS (
    INSERT INTO outbox.report (edition, recipient_key, token, title, html, created_at)
    SELECT (SELECT max(id) FROM outbox.edition), key, 'token of ' || key, 'title', '<p>page</p>',
           now() - $4 * interval '1 day' FROM given
    RETURNING id, recipient_key AS key, created_at
), email AS (
    INSERT INTO outbox.email (id, key, report, sender, recipient, message_id, message, created_at)
    SELECT g.id, key, r.id, 'a@example.com', key || '@example.com', '<' || key || '@x>', $5, created_at
      FROM report r JOIN given g USING (key) RETURNING id, created_at
), delivery AS (
    INSERT INTO outbox.delivery (email, due_at, state, attempt, relay, marked_at, doubted_at, settled_at)
    SELECT id, created_at, $3::text, 2, CASE WHEN $3 IN ('sending', 'in_doubt') THEN 1 END, created_at,
           CASE WHEN $3 = 'in_doubt' THEN now() END, CASE WHEN NOT $3 = ANY ($6::text[]) THEN created_at END
      FROM email WHERE $3 <> 'undelivered'
)
INSERT INTO outbox.attempt (email, attempt, verdict, reply)
SELECT id, attempt, 'deferred', 'reply ' || attempt FROM email, generate_series(1, 2) AS attempt
"""


async def put(connection, *keys, state="sent", days=500, ids=None, body=BODY):
    """Emails with their reports and trails, made so many days ago; in the order of `keys` their ids grow."""
    if not await connection.fetchval("SELECT count(*) FROM outbox.edition"):
        await connection.execute(EDITION, "2025-W02")
    last = await connection.fetchval("SELECT coalesce(max(id), 0) FROM outbox.email")
    given = ids or list(range(last + 1, last + 1 + len(keys)))
    await connection.execute(PUT, list(keys), given, state, float(days), body, list(OPEN))


async def run(database, keep=KEEP, **how):
    return await prune.prune(DatabaseUrl.parse(database), keep, **how)


def counts(pruned):
    return pruned.emails, pruned.attempts, pruned.pages, pruned.unsettled


async def whole(connection):
    """The keys of the emails that have their body."""
    rows = await connection.fetch("SELECT key FROM outbox.email WHERE message <> $1 ORDER BY id", PRUNED)
    return [row["key"] for row in rows]


async def pages(connection):
    rows = await connection.fetch("SELECT recipient_key FROM outbox.report WHERE html <> '' ORDER BY id")
    return [row["recipient_key"] for row in rows]


async def trail(connection, key):
    rows = await connection.fetch(
        "SELECT a.attempt FROM outbox.attempt a JOIN outbox.email m ON m.id = a.email WHERE m.key = $1 ORDER BY 1", key
    )
    return [row["attempt"] for row in rows]


async def up_to(connection, what="email"):
    return await connection.fetchval("SELECT up_to FROM outbox.pruned WHERE what = $1", what)


async def everything(connection):
    tables = ("edition", "report", "email", "delivery", "attempt", "pruned")
    return [await connection.fetch(f"SELECT t::text FROM outbox.{table} t ORDER BY 1") for table in tables]


@pytest.mark.parametrize("state", SETTLED)
async def test_what_is_old_and_settled_loses_its_body_and_its_page_and_keeps_its_rows(connection, database, state):
    await put(connection, "old", state=state)
    before = await connection.fetchrow("SELECT key, report, sender, recipient, message_id FROM outbox.email")
    delivery = await connection.fetchrow("SELECT * FROM outbox.delivery")
    assert counts(await run(database)) == (1, 2 if state == "sent" else 1, 1, 0)
    assert await connection.fetchval("SELECT message FROM outbox.email") == PRUNED
    assert await connection.fetchval("SELECT html FROM outbox.report") == ""
    assert await connection.fetchrow("SELECT key, report, sender, recipient, message_id FROM outbox.email") == before
    assert await connection.fetchrow("SELECT * FROM outbox.delivery") == delivery


async def test_the_trail_of_what_was_sent_goes_and_of_the_rest_the_last_try_stays(connection, database):
    for state in SETTLED:
        await put(connection, state, state=state)
    await run(database)
    assert {state: await trail(connection, state) for state in SETTLED} == {
        "sent": [], "dead": [2], "cancelled": [2], "expired": [2],
    }  # fmt: skip


@pytest.mark.parametrize("state", [*OPEN, "undelivered"])
async def test_what_is_not_settled_is_never_touched_however_old(connection, database, state):
    await put(connection, "open", state=state, days=5000)
    before = await everything(connection)
    assert counts(await run(database)) == (0, 0, 0, 1)
    assert (await everything(connection))[:-1] == before[:-1]


async def test_what_is_younger_is_not_touched(connection, database):
    await put(connection, "old", days=400.01)
    await put(connection, "young", days=399.99)
    assert counts(await run(database)) == (1, 2, 1, 0)
    assert (await whole(connection), await pages(connection), await trail(connection, "young")) == (
        ["young"], ["young"], [1, 2],
    )  # fmt: skip


async def test_a_page_stays_as_long_as_a_mail_that_links_to_it_may_be_sent(connection, database):
    await put(connection, "one", days=500)
    await connection.execute("UPDATE outbox.email SET created_at = now()")
    assert counts(await run(database)) == (0, 0, 0, 0)
    assert await pages(connection) == ["one"]
    await connection.execute("UPDATE outbox.email SET report = NULL")
    assert counts(await run(database)) == (0, 0, 1, 0), "nobody links to it"


async def test_what_a_failover_left_of_a_message_is_kept_as_it_is(connection, database):
    await put(connection, "lost", body=LOST)
    assert counts(await run(database)) == (0, 2, 1, 0)
    assert await connection.fetchval("SELECT message FROM outbox.email") == LOST


async def test_a_dry_run_says_what_would_go_and_changes_nothing(connection, database):
    await put(connection, *(f"old{n}" for n in range(5)))
    await put(connection, "open", state="in_doubt")
    await put(connection, "dead", state="dead")
    await put(connection, "young", days=1)
    before = await everything(connection)
    said = await run(database, dry_run=True, batch_max=2)
    assert await everything(connection) == before
    done = await run(database, batch_max=2)
    assert counts(said) == counts(done) == (6, 11, 6, 1)
    assert counts(await run(database, dry_run=True)) == (0, 0, 0, 1)


async def test_what_is_pruned_is_not_walked_over_again(connection, database, monkeypatch):
    monkeypatch.setattr(prune, "OVERLAP", 0)
    await put(connection, *(f"old{n}" for n in range(1, 8)))
    await run(database, batch_max=3)
    assert (await up_to(connection), await up_to(connection, "report")) == (7, 7)
    await connection.execute("UPDATE outbox.email SET message = 'again' WHERE id = 7")
    await put(connection, "more")
    assert counts(await run(database, batch_max=3)) == (1, 2, 1, 0)
    assert await whole(connection) == ["old7"], "a row behind the watermark is not looked at"


@pytest.mark.parametrize("batch_max", [1, 2, 3, 10])
async def test_what_is_left_behind_is_pruned_by_a_later_run(connection, database, monkeypatch, batch_max):
    monkeypatch.setattr(prune, "OVERLAP", 0)
    await put(connection, "one")
    await put(connection, "open", state="in_doubt")
    await put(connection, "three", "four")
    await put(connection, "young", days=300)
    await put(connection, "six", "seven")
    done = await run(database, batch_max=batch_max)
    seen_all = batch_max > 1  # a batch of one that is young ends the walk
    assert await whole(connection) == ["open", "young"] + ([] if seen_all else ["six", "seven"])
    assert counts(done)[3] == 1
    assert (await up_to(connection), await up_to(connection, "report")) == (1, 1)

    await connection.execute("UPDATE outbox.delivery SET state = 'dead', settled_at = now(), doubted_at = NULL"
                             " WHERE state = 'in_doubt'")  # fmt: skip
    await run(database, batch_max=batch_max)
    assert await whole(connection) == ["young"] + ([] if seen_all else ["six", "seven"])
    assert (await up_to(connection), await up_to(connection, "report")) == (4, 4)

    await run(database, timedelta(days=200), batch_max=batch_max)
    assert await whole(connection) == await pages(connection) == []
    assert (await up_to(connection), await up_to(connection, "report")) == (7, 7)


async def test_an_email_with_a_smaller_id_that_comes_later_is_pruned_by_a_later_run(connection, database):
    late = await asyncpg.connect(database)
    await put(connection, "one")
    transaction = late.transaction()
    await transaction.start()
    await put(late, "two", days=450)
    await put(connection, "three", ids=[3])
    await run(database)
    assert (await whole(connection), await up_to(connection)) == ([], 3)
    await transaction.commit()
    await late.close()
    assert await whole(connection) == ["two"]

    assert counts(await run(database, timedelta(days=480))) == (0, 0, 0, 0)
    assert await up_to(connection) == 1, "it ends before what is young, also where it was further"
    assert counts(await run(database)) == (1, 2, 1, 0)
    assert await up_to(connection) == 3


async def test_batches_are_bounded_and_a_stop_ends_after_the_one_under_way(connection, database):
    await put(connection, *(f"old{n}" for n in range(7)))
    stop, seen = asyncio.Event(), []

    def after_two(pruned):
        seen.append((pruned.emails, round(pruned.share, 2)))
        if len(seen) == 2:
            stop.set()

    done = await run(database, batch_max=3, stop=stop, progress=after_two)
    assert counts(done) == (6, 12, 0, 0)
    assert [emails for emails, _ in seen] == [3, 6]
    assert len(await whole(connection)) == 1
    assert counts(await run(database, batch_max=3)) == (1, 2, 7, 0)


async def test_it_pauses_as_long_as_its_batches_take(connection, database, monkeypatch):
    await put(connection, *(f"old{n}" for n in range(4)))
    await connection.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(0.1); RETURN new; END $$;"
        "CREATE TRIGGER slow BEFORE UPDATE ON outbox.email FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    pauses = []

    async def rest(_, pause_s):
        pauses.append(pause_s)

    monkeypatch.setattr(prune._Walk, "_rest", rest)
    await run(database, batch_max=2)
    assert all(0.2 < pause_s < 5 for pause_s in pauses[:2])
    assert len(pauses) == 4, "two batches of emails, two of pages"


async def test_two_do_not_prune_at_once(connection, database):
    await put(connection, "old")
    await connection.execute("SELECT pg_advisory_lock($1, 0)", PRUNE_LOCK)
    with pytest.raises(OutboxError, match="Another `outbox prune` runs in this database; "):
        await run(database)
    assert counts(await run(database, dry_run=True)) == (1, 2, 1, 0), "who only looks is in nobody's way"
    await connection.execute("SELECT pg_advisory_unlock($1, 0)", PRUNE_LOCK)


async def test_the_next_may_begin_before_the_server_has_seen_that_this_one_is_gone(database, monkeypatch):
    ended, end = [], asyncpg.Connection.terminate
    monkeypatch.setattr(asyncpg.Connection, "terminate", lambda self: ended.append(self))  # noqa: PLW0108 - a function binds
    await run(database)
    await run(database)
    monkeypatch.undo()
    for connection in ended:
        end(connection)


@pytest.mark.parametrize("odd", ["-infinity", "4713-01-01 BC", "0001-01-01 UTC"])
async def test_rows_of_times_that_python_cannot_represent_are_pruned(connection, database, odd):
    await put(connection, "odd", "old")
    await connection.execute(f"UPDATE outbox.email SET created_at = '{odd}' WHERE id = 1")
    await connection.execute(f"UPDATE outbox.report SET created_at = '{odd}' WHERE id = 1")
    assert counts(await run(database)) == (2, 4, 2, 0)


@pytest.mark.parametrize("batch_max", [1, 2, 100])
async def test_a_row_from_before_a_check_that_it_breaks_stays_and_the_others_are_pruned(
    connection, database, batch_max
):
    await connection.execute("ALTER TABLE outbox.email DROP CONSTRAINT email_sizes")
    await put(connection, "mail1", "mail2", "mail3", "mail4")
    await connection.execute("UPDATE outbox.email SET message_id = repeat('x', 2000) WHERE key IN ('mail2', 'mail3')")
    await connection.execute(
        "ALTER TABLE outbox.email ADD CONSTRAINT email_sizes CHECK (octet_length(message_id) <= 998) NOT VALID"
    )
    for emails in (2, 0):
        found = await run(database, batch_max=batch_max)
        assert found.emails == emails
        assert await whole(connection) == ["mail2", "mail3"]


async def test_a_row_that_somebody_holds_is_passed_over(connection, database):
    await put(connection, "held", state="dead")
    await put(connection, "old")
    other = await asyncpg.connect(database)
    await other.execute("BEGIN")
    await other.execute("SELECT FROM outbox.delivery WHERE email = 1 FOR UPDATE")
    assert counts(await run(database)) == (1, 2, 1, 1)
    await other.close()
    assert await up_to(connection) == 0
    assert counts(await run(database)) == (1, 1, 1, 0)


async def test_what_waits_for_too_long_says_so_and_goes_on_from_there(connection, database):
    await put(connection, *(f"old{n}" for n in range(3)))
    other = await asyncpg.connect(database)
    await other.execute("BEGIN")
    await other.execute("SELECT FROM outbox.email WHERE id = 3 FOR UPDATE")
    said = rf"did not finish a batch \(pid {other.get_server_pid()} \(role .*lock timeout\); run `outbox prune`"
    with pytest.raises(DatabaseUnavailableError, match=said):
        await run(database, batch_max=2)
    await other.close()
    assert await up_to(connection) == 2
    assert counts(await run(database)) == (1, 2, 3, 0)


async def waits(connection):
    async def for_a_row():
        return await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )

    await until(for_a_row, "somebody waits for a lock")


async def test_a_dead_letter_that_is_pruned_at_this_moment_is_not_sent_again(connection, database):
    await put(connection, "dead", state="dead")
    pruner = await asyncpg.connect(database)
    person = await asyncpg.connect(database)
    async with pruner.transaction():
        before = await pruner.fetchval("SELECT now() - interval '400 days'")
        row = await pruner.fetchrow(prune.PRUNE_EMAILS, 0, 10, before, prune.REMOVED, True, PRUNED)
        assert row["bared"] == 1
        decided = asyncio.create_task(resolve(person, ["dead"], Decision.RESEND))
        await waits(connection)
    assert await decided == []
    assert await connection.fetchval("SELECT state FROM outbox.delivery") == "dead"
    assert (await explain(person, ["dead"], Decision.RESEND))["dead"].startswith("dead cannot be sent: `outbox prune` ")
    await pruner.close()
    await person.close()


async def test_a_dead_letter_that_is_sent_again_at_this_moment_is_not_pruned(connection, database):
    await put(connection, "dead", state="dead")
    person = await asyncpg.connect(database)
    async with person.transaction(isolation="read_committed"):
        assert await resolve(person, ["dead"], Decision.RESEND) == ["dead"]
        assert counts(await run(database)) == (0, 0, 0, 1)
    await person.close()
    assert counts(await run(database)) == (0, 0, 0, 1)
    assert (await whole(connection), await pages(connection)) == (["dead"], ["dead"])


async def test_a_dead_letter_that_was_sent_again_since_the_batch_began_is_not_pruned(connection, database):
    await put(connection, "dead", state="dead")
    person, pruner = await asyncpg.connect(database), await asyncpg.connect(database)
    await connection.execute(  # a batch that is held up between its snapshot and its lock of the row
        "CREATE FUNCTION hold(bytea) RETURNS bytea LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_advisory_xact_lock(7); RETURN $1; END $$; SELECT pg_advisory_lock(7)"
    )
    batch = prune.PRUNE_EMAILS.replace("m.message = ANY", "hold(m.message) = ANY")
    before = await connection.fetchval("SELECT now() - interval '400 days'")
    pruning = asyncio.create_task(pruner.fetchrow(batch, 0, 10, before, prune.REMOVED, True, PRUNED))
    await waits(connection)
    assert await resolve(person, ["dead"], Decision.RESEND) == ["dead"]
    await connection.execute("SELECT pg_advisory_unlock(7)")
    row = await pruning
    assert (row["bared"], row["attempts"], row["stay"]) == (0, 0, 1)
    assert (await whole(connection), await trail(connection, "dead")) == (["dead"], [1, 2, 2])
    await person.close()
    await pruner.close()


@pytest.mark.parametrize("state", ["sent", "dead"])
@pytest.mark.parametrize(
    "outcome",
    [
        Outcome("sent", "accepted", "250 ok"),
        Outcome("dead", "refused", "550 no"),
        Outcome("in_doubt", "in_doubt", "silence"),
        Outcome("pending", "deferred", "451 later", 0.0),
    ],
    ids=lambda outcome: outcome.state,
)
async def test_a_verdict_that_comes_after_all_that_breaks_nothing(connection, database, state, outcome):
    await put(connection, "old", state=state)
    await run(database)
    before = await everything(connection)
    late = Settlement(1, 1, "old", 2, marked=True, outcome=outcome)
    done = await tick(connection, 1, TickRequest(settlements=[late], claims_max=10))
    assert (done.settled, done.claims) == (frozenset(), [])
    assert (await states_of(connection, [1]))[1] == (state, 2)
    told = RecentVerdict("old", "a@example.com", "b@example.com", "<old@x>", BODY, 1, 2, outcome)
    done = await reassert_portion(connection, [told])
    assert (done.emails["old"].email, done.changed) == (1, 0)
    assert await everything(connection) == before


async def test_a_prune_that_lost_postgres_says_so_in_a_sentence(connection, database):
    await put(connection, *(f"old{n}" for n in range(4)))
    rounds = count(1)

    def cut(_):
        if next(rounds) == 1:
            ended = connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'outbox prune' AND datname = current_database()"
            )
            cutting.append(asyncio.create_task(ended))

    cutting = []
    with pytest.raises(
        DatabaseUnavailableError, match=r"^The session with Postgres at .* was lost \(.+\); run `outbox"
    ):
        await run(database, batch_max=1, progress=cut)
    await cutting[0]
    done = await run(database)
    assert counts(done)[2:] == (4, 0)
    assert await whole(connection) == []


async def test_bodies_and_pages_go_by_heap_only_updates_where_their_page_has_room(connection, database):
    for table in ("email", "report"):
        await connection.execute(f"ALTER TABLE outbox.{table} SET (fillfactor = 40)")
    await put(connection, *(f"old{n}" for n in range(300)))
    await run(database)

    async def heap_only():
        rows = await connection.fetch(
            "SELECT relname, n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables"
            " WHERE schemaname = 'outbox' AND relname IN ('email', 'report') ORDER BY 1"
        )
        return [tuple(row) for row in rows] == [("email", 300, 300), ("report", 300, 300)]

    await until(heap_only, "all of them are heap-only")


@pytest.mark.parametrize("text, hours", [("400d", 9600), ("52w", 8736), ("48h", 48), ("24h", 24), (" 1d ", 24)])
def test_a_stretch_of_time_is_a_number_and_a_unit(text, hours):
    assert keep_of(text) == timedelta(hours=hours)


@pytest.mark.parametrize(
    "text, said",
    [
        ("12h", "--keep: 12h is too short; keep at least 1d."),
        ("90min", "--keep: 90min is too short; keep at least 1d."),
        ("99999999d", "--keep: 99999999d is too long; keep at most 36500d."),
        ("36501d", "--keep: 36501d is too long; keep at most 36500d."),
        ("9999999w", "--keep: 9999999w is too long; keep at most 36500d."),
        *((bad, f"--keep: {bad!r} is no stretch of time; write one such as 400d, 52w or 48h.")
          for bad in ("400", "d", "", "-3d", "0d", "4y", "1d 2h", "٤d")),
    ],
)  # fmt: skip
def test_any_other_is_refused_in_a_sentence(text, said):
    with pytest.raises(ConfigurationError) as refused:
        keep_of(text)
    assert str(refused.value) == said
