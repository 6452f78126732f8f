"""Snapshots of `outbox watch` on real Postgres: little is read, seldom, and of one moment."""

from datetime import UTC, datetime

from outbox.operations import watch
from outbox.operations.watch import Seldom, Watcher

NOW = datetime(2026, 11, 23, tzinfo=UTC)


def fetching(statement):
    return lambda connection: connection.fetch(statement)


async def test_a_count_that_takes_long_is_asked_for_seldom_and_given_up_in_the_end(connection, monkeypatch):
    async with connection.transaction(readonly=True):
        quick = Seldom()
        await quick.ask(connection, NOW, fetching("SELECT clock_timestamp() AS at"))
        first = quick.value
        quick._again_at = 0.0
        await quick.ask(connection, NOW, fetching("SELECT clock_timestamp() AS at"))
        assert quick.value != first

        slow = Seldom()
        await slow.ask(connection, NOW, fetching("SELECT clock_timestamp() AS at, pg_sleep(0.05)"))
        first = slow.value
        await slow.ask(connection, NOW, fetching("SELECT clock_timestamp() AS at, pg_sleep(0.05)"))
        assert slow.value is first, "twenty times as long must be over"

        monkeypatch.setattr(watch, "COUNT_MAX_S", 0.05)
        slow._again_at = 0.0
        await slow.ask(connection, NOW, fetching("SELECT pg_sleep(5)"))
        assert slow.value is None
        assert await connection.fetchval("SELECT 1") == 1, "the look goes on"


async def test_a_look_counts_each_reason_once(fleet):
    await fleet.put_emails(8)
    execute = fleet.connection.execute
    await execute("INSERT INTO outbox.relay (host, pid, backend_pid, version) VALUES ('web1', 1, 1, '0')")
    await execute("UPDATE outbox.delivery SET due_at = now() + interval '1 hour' WHERE email = 1")
    await execute("UPDATE outbox.delivery SET due_at = 'infinity', paused = 'progress' WHERE email = 2")
    await execute("UPDATE outbox.delivery SET relay = 1 WHERE email = 3")
    marked = "relay = 1, attempt = 1, marked_at = now()"
    await execute(f"UPDATE outbox.delivery SET state = 'sending', {marked} WHERE email = 4")
    doubted = "state = 'in_doubt', doubted_at = now(), due_at = 'infinity'"
    await execute(f"UPDATE outbox.delivery SET {doubted}, {marked} WHERE email = 5")
    await execute(f"UPDATE outbox.delivery SET state = 'sent', settled_at = now(), {marked} WHERE email = 6")
    await execute("INSERT INTO outbox.pause (report, who, why) VALUES ('progress', 'alice', 'bad data')")
    watcher = Watcher(watch.Settings(database_url=fleet.database))
    try:
        await watcher.look_again()
        assert watcher.trouble is None
        look = watcher.snapshot
        assert (look.waiting.due, look.waiting.postponed, look.waiting.in_doubt) == (2, 1, 1)
        assert (dict(look.waiting.in_flight), dict(look.waiting.paused)) == ({1: 2}, {"progress": 1})
        assert look.waiting.next_at > look.at > look.waiting.oldest_due_at
        assert (look.settled, look.in_doubt, look.relays) == ({"sent": 1}, ["mail5"], [])
        assert [(pause.report, pause.who, pause.why) for pause in look.pauses] == [("progress", "alice", "bad data")]
    finally:
        watcher.close()
