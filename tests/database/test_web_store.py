"""What the web pages ask of Postgres is found by index and holds nobody up; and whom they do not wait for."""

import asyncio
import json
import socket

import asyncpg
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from outbox.address import DatabaseUrl
from outbox.errors import DatabaseUnavailableError
from outbox.settings import Settings
from outbox.web import serve
from outbox.web.application import create
from outbox.web.history import EARLIER
from outbox.web.pages import REPORT
from outbox.web.store import CONNECTIONS_MAX, Store
from tests.fleet import until

REPORTS = 100_000

FILL = f"""
INSERT INTO outbox.edition (report, period, starts_at, ends_at)
SELECT 'r', n::text, now() - n * interval '7 days', now() - (n - 1) * interval '7 days' FROM generate_series(1, 20) n;
INSERT INTO outbox.report (edition, recipient_key, token, title, html)
SELECT 1 + n % 20, n / 20, 'token-' || lpad(n::text, 16, '0'), 't', 'h' FROM generate_series(1, {REPORTS}) n;
"""


def nodes(plan):
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


@pytest.mark.parametrize("analysed", [False, True])
async def test_a_page_among_a_hundred_thousand_is_found_by_index(connection, analysed):
    await connection.execute("ALTER TABLE outbox.report SET (autovacuum_enabled = off)")
    await connection.execute(FILL)
    if analysed:
        await connection.execute("ANALYZE outbox.report, outbox.edition")
    await connection.execute("SET plan_cache_mode = force_generic_plan")
    for statement, values in ((REPORT, "'token-0000000000050000', 8640000, 'a@b'"), (EARLIER, "50000, NULL, 12, 4096")):
        await connection.execute(f"PREPARE said AS {statement}")
        (found,) = await connection.fetchrow(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE said ({values})")
        await connection.execute("DEALLOCATE said")
        plan = json.loads(found)[0]["Plan"]
        on_reports = [node for node in nodes(plan) if node.get("Relation Name") == "report"]
        assert on_reports
        assert {node["Node Type"] for node in on_reports} == {"Index Scan"}
        assert plan["Actual Rows"] == (0 if statement is REPORT else 12)


async def test_a_row_that_others_hold_is_not_waited_for_longer_than_a_moment(connection, database):
    store = Store(DatabaseUrl.parse(database))
    async with connection.transaction():
        await connection.execute("LOCK TABLE outbox.report IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(DatabaseUnavailableError):
            async with asyncio.timeout(3), store.connection() as held:
                await held.fetch(REPORT, "x", None, None)
    with pytest.raises(DatabaseUnavailableError, match="in time"):
        async with store.connection() as held:
            await held.execute("SET statement_timeout = 50; SELECT pg_sleep(5)")
    with pytest.raises(asyncpg.UndefinedTableError):
        async with store.connection() as held:
            await held.execute("SELECT FROM none")
    await store.close()


async def test_sessions_are_bounded_and_one_that_was_ended_is_replaced(connection, database):
    store = Store(DatabaseUrl.parse(database))

    async def busy():
        async with store.connection() as held:
            await held.fetch("SELECT pg_sleep(0.05)")

    await asyncio.gather(*(busy() for _ in range(3 * CONNECTIONS_MAX)))
    ours = "FROM pg_stat_activity WHERE application_name = 'outbox web' AND datname = current_database()"
    assert await connection.fetchval(f"SELECT count(*) {ours}") <= CONNECTIONS_MAX
    await connection.execute(f"SELECT pg_terminate_backend(pid) {ours}")

    async def works():
        try:
            await busy()
        except DatabaseUnavailableError:
            return False
        return True

    await until(works, "a new session is there")
    with pytest.raises(DatabaseUnavailableError):
        async with store.connection() as held:
            await held.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    await until(works, "a new session is there")
    await store.close()


@pytest.mark.parametrize(("user", "is_theirs"), [("p1@example.com", True), ("p2@example.com", False), ("", False)])
async def test_a_page_that_a_digest_tells_of_is_its_addressees_too(connection, user, is_theirs):
    await connection.execute(FILL.replace(str(REPORTS), "1"))
    await connection.execute(
        "INSERT INTO outbox.digest_item (report, address, link) SELECT id, 'P1@example.com', '' FROM outbox.report"
    )
    token = await connection.fetchval("SELECT token FROM outbox.report")
    assert (await connection.fetchrow(REPORT, token, None, user) is not None) is is_theirs


class Served:
    """The application behind the real server, in this process, so that its patience can be shortened."""

    def __init__(self, app):
        self.listening = serve._listen("127.0.0.1:0")
        self.port = self.listening.getsockname()[1]
        self.server = serve._Server(serve._config(app, 5), None)

    async def __aenter__(self):
        self.task = asyncio.create_task(self.server.serve(sockets=[self.listening]))
        await until(lambda: self.server.started, "it serves")
        return self

    async def __aexit__(self, *_):
        self.server.should_exit = True
        await self.task

    async def ask(self, path, host="x"):
        reader, writer = await self.connect()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        return answer

    async def connect(self):
        return await asyncio.open_connection("127.0.0.1", self.port, limit=2**10)


def settings(database):
    return Settings.model_validate({"database_url": database})


async def test_who_says_or_reads_nothing_is_not_waited_for(connection, database, monkeypatch):
    monkeypatch.setattr(serve, "REQUEST_MAX_S", 0.3)
    monkeypatch.setattr(serve, "STALL_MAX_S", 0.3)
    await connection.execute(FILL.replace(str(REPORTS), "1"))
    await connection.execute("UPDATE outbox.report SET html = repeat('x', 30000000)")
    token = await connection.fetchval("SELECT token FROM outbox.report")
    async with Served(create(settings(database))) as served:
        for said in (b"", b"GET / HTTP/1.1\r\nHos", b"POST /sign-in HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"):
            reader, writer = await served.connect()
            writer.write(said)
            async with asyncio.timeout(5):
                assert len(await reader.read()) < 3000  # the end, after at most a word that it is not so
            writer.close()
        _, writer = await served.connect()
        writer.write(f"GET /r/{token} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        writer.transport.pause_reading()
        await until(lambda: served.server.server_state.tasks, "the page is on its way")
        await until(lambda: not served.server.server_state.connections, "it gives up")
        writer.transport.abort()
        assert (await served.ask(f"/r/{token}")).endswith(b"x" * 1000)


async def test_the_application_may_be_mounted_in_another_below_a_path(connection, database):
    await connection.execute(FILL.replace(str(REPORTS), "40"))
    mounted = create(settings(database), is_local=True)
    async with Served(Starlette(routes=[Mount("/mail", mounted)])) as served:
        # Else the body of an answer waits 40 ms for the client to acknowledge its head.
        assert served.listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        page = await served.ask("/mail/r/token-0000000000000021")
        assert page.startswith(b"HTTP/1.1 200")
        assert b"private, no-store" in page
        board = await served.ask("/mail/")
        assert b"HTTP/1.1 403" in board  # Host is x, which is no loopback address
        assert b"HTTP/1.1 404" in await served.ask("/r/token-0000000000000021")
        board = await served.ask("/mail/", host="127.0.0.1")
        assert b"All is well" in board  # whom nobody tells that it begins, looks on all the same
        assert b'href="/mail/editions"' in board
    await mounted.state.live.close()
    await mounted.state.store.close()
