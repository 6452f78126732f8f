"""What the web pages ask of Postgres is found by index and holds nobody up; and whom they do not wait for."""

import asyncio
import json
import re
import resource
import socket
from contextlib import suppress
from functools import partial

import asyncpg
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from outbox.errors import DatabaseUnavailableError
from outbox.settings import Settings
from outbox.settings.urls import DatabaseUrl
from outbox.web import connections, server
from outbox.web.application import create
from outbox.web.history import EARLIER
from outbox.web.queries import CONNECTIONS_MAX, Store
from outbox.web.report_pages import REPORT
from outbox.web.security import LOOKUPS_MAX, Callers
from tests.support.fleet import until


@pytest.fixture(autouse=True)
def many_files():
    """Both ends of hundreds of connections are in this process; an ordinary user may have 1,024 files at first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


REPORTS = 100_000
TOKEN = "an-operators-token-of-32-letters"

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

    def __init__(self, app, settings):
        self.listening = server._listen("127.0.0.1:0")
        self.port = self.listening.getsockname()[1]
        self.server = server._Server(server._config(app, settings), None)

    async def __aenter__(self):
        self.task = asyncio.create_task(self.server.serve(sockets=[self.listening]))
        await until(lambda: self.server.started, "it serves")
        return self

    async def __aexit__(self, *_):
        self.server.should_exit = True
        await self.task

    async def ask(self, path, form=None, **headers):
        reader, writer = await self.connect()
        sent = {"Host": "x", "Connection": "close", **headers}
        if form is not None:
            sent |= {"Content-Type": "application/x-www-form-urlencoded", "Content-Length": len(form)}
        head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        writer.write(f"{'GET' if form is None else 'POST'} {path} HTTP/1.1\r\n{head}\r\n{form or ''}".encode())
        answer = await reader.read()
        writer.close()
        return answer

    async def connect(self):
        return await asyncio.open_connection("127.0.0.1", self.port, limit=2**10)


def settings(database, **web):
    return Settings.model_validate({"database_url": database, "drain_s": 5, "web": web})


async def test_who_says_or_reads_nothing_is_not_waited_for(connection, database, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_MAX_S", 0.3)
    monkeypatch.setattr(connections, "STALL_MAX_S", 0.3)
    await connection.execute(FILL.replace(str(REPORTS), "1"))
    await connection.execute("UPDATE outbox.report SET html = repeat('x', 30000000)")
    token = await connection.fetchval("SELECT token FROM outbox.report")
    async with Served(create(settings(database, board_token=TOKEN)), settings(database)) as served:
        for said in (b"", b"GET / HTTP/1.1\r\nHos", b"POST /sign-in HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"):
            reader, writer = await served.connect()
            writer.write(said)
            async with asyncio.timeout(5):
                assert len(await reader.read()) < 5000  # the end, after at most a word that it is not so
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
    mounted = create(settings(database, board_token=TOKEN))
    async with Served(Starlette(routes=[Mount("/mail", mounted)]), settings(database)) as served:
        # Else the body of an answer waits 40 ms for the client to acknowledge its head.
        assert served.listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        page = await served.ask("/mail/r/token-0000000000000021")
        assert page.startswith(b"HTTP/1.1 200")
        assert b"private, no-store" in page
        assert b"HTTP/1.1 404" in await served.ask("/r/token-0000000000000021")
        for host in ("x", "127.0.0.1", "localhost"):
            assert b"HTTP/1.1 401" in await served.ask("/mail/", Host=host)
        entered = await served.ask("/mail/sign-in", form=f"name=Anna&token={TOKEN}")
        assert b"\r\nlocation: /mail/\r\n" in entered
        cookie = re.search(rb"outbox_board=[^;]+(?=;.*Path=/mail;)", entered)[0].decode()
        board = await served.ask("/mail/", Cookie=cookie)
        assert b"All is well" in board  # live although nobody tells a mounted application that it begins
        assert b'href="/mail/editions"' in board
    await mounted.state.live.close()
    await mounted.state.store.close()


async def test_an_application_without_a_sign_in_has_no_board_and_says_so(connection, database, caplog):
    await connection.execute(FILL.replace(str(REPORTS), "40"))
    app = create(settings(database))
    assert "there is no board" in caplog.text
    async with Served(app, settings(database)) as served:
        assert b"HTTP/1.1 200" in await served.ask("/r/token-0000000000000021", Host="127.0.0.1")
        for path in ("/", "/events", "/emails", "/editions", "/?token=", "/sign-in"):
            assert b"HTTP/1.1 404" in await served.ask(path, Host="127.0.0.1")
    caplog.clear()
    create(settings(database, board=False))
    assert caplog.text == ""
    assert create(settings(database), link_token="").state.live is None


HALF_SAID = {
    "nothing": b"",
    "half a head": b"GET / HTTP/1.1\r\nHos",
    "half a body": b"POST /sign-in HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nname",
    "between two requests": b"GET /none HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("said", HALF_SAID)
async def test_a_client_that_keeps_many_connections_waiting_shuts_out_nobody(database, said):
    async with Served(create(settings(database, board=False)), settings(database)) as served:
        opened = []
        for _ in range(connections.CONNECTIONS_MAX + 5):
            opened.append(await served.connect())
            opened[-1][1].write(HALF_SAID[said])
        for _ in range(3):
            assert b"HTTP/1.1 404" in await served.ask("/none")
        for _, writer in opened:
            writer.close()


@pytest.mark.parametrize("asked", ["POST /sign-in", "POST /u/{token}", "GET /r/{token}", "GET /none"])
@pytest.mark.parametrize("pause_s", [None, 0.05])
async def test_a_body_that_is_no_http_gets_one_answer_and_is_no_fault_of_ours(database, caplog, asked, pause_s):
    only_pages = settings(database, board_token=TOKEN)
    async with Served(create(only_pages), only_pages) as served:
        reader, writer = await served.connect()
        line = asked.format(token="x" * 22)
        writer.write(f"{line} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        if pause_s is not None:
            await asyncio.sleep(pause_s)
        writer.write(b"no size\r\n")
        async with asyncio.timeout(5):
            assert (await reader.read()).count(b"HTTP/1.1 ") == 1
        writer.close()
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def test_hundreds_of_requests_of_one_client_in_one_moment_are_all_answered(database):
    async with Served(create(settings(database, board=False)), settings(database)) as served:
        answers = await asyncio.gather(*(served.ask("/none") for _ in range(480)))
        assert {answer[:12] for answer in answers} == {b"HTTP/1.1 404"}


class Counted:
    """A connection as `Connections` sees it."""

    def __init__(self, peer, waiting_since, unread=0):
        self.peer, self.waiting_since, self.aborted, self.unread = peer, waiting_since, False, unread
        self.transport = self

    def get_write_buffer_size(self):
        return self.unread

    def abort(self):
        self.aborted = True


def ended(every):
    return [one.aborted for one in every].count(True)


def test_the_connection_that_waited_longest_for_its_client_gives_way():
    held = connections.Connections(Callers([]), total_max=100, client_max=100, clock=lambda: 100)
    busy = [Counted("a", None) for _ in range(40)]
    greedy = [Counted("b", n) for n in range(30)]
    few = [Counted(f"c{n}", 0) for n in range(30)]
    assert all(held.admit(one) for one in [*busy, *greedy, *few])
    for n in range(5):  # of whom holds most of the waiting ones, the oldest
        assert held.admit(Counted("d", None))
        assert [one.aborted for one in greedy] == [True] * (n + 1) + [False] * (29 - n)
    proxy = [Counted("", 10) for _ in range(50)]  # a trusted proxy has no bound of its own
    assert all(held.admit(one) for one in proxy)
    assert len(held) == 100
    assert ended(busy) == 0
    for one in [*busy, *greedy, *few, *proxy]:
        held.discard(one)
    assert set(held._counts) == {"d"}


def test_a_client_beyond_its_bound_loses_what_waited_a_while_and_nothing_that_is_under_way():
    now = [0.0]
    held = connections.Connections(Callers([]), total_max=100, client_max=10, clock=lambda: now[0])
    first = [Counted("a", 0.0) for _ in range(30)]
    assert all(held.admit(one) for one in first)  # all in one moment
    assert ended(first) == 0
    now[0] = 5.0
    later = [Counted("a", 5.0) for _ in range(20)]
    assert all(held.admit(one) for one in later)
    assert (ended(first), ended(later)) == (20, 0)


def test_one_client_that_keeps_the_whole_server_busy_gives_up_some_to_others_but_not_to_itself():
    held = connections.Connections(Callers([]), total_max=100, client_max=100, clock=lambda: 0)
    busy = [Counted("a", None) for _ in range(100)]
    assert all(held.admit(one) for one in busy)
    assert not held.admit(Counted("a", None))
    for n in range(30):
        assert held.admit(Counted("b", None))
        assert ended(busy) == n + 1
    while held.admit(Counted("b", None)):
        pass
    assert held._counts["a"] >= held._counts["b"]


async def test_an_answer_that_is_not_read_to_its_end_is_not_kept_for_ever(connection, database, monkeypatch):
    monkeypatch.setattr(connections, "STALL_MAX_S", 0.3)
    await connection.execute(FILL.replace(str(REPORTS), "1"))
    await connection.execute("UPDATE outbox.report SET html = repeat('x', 8000000)")
    token = await connection.fetchval("SELECT token FROM outbox.report")
    async with Served(create(settings(database, board=False)), settings(database)) as served:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, ("127.0.0.1", served.port))
        await loop.sock_sendall(raw, f"GET /r/{token} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await until(lambda: served.server.server_state.tasks, "the page is on its way")
        taken = 0

        async def gives_up():
            """Read a little now and then, fewer bytes than a client has to take."""
            nonlocal taken
            with suppress(BlockingIOError, ConnectionError):
                taken += len(raw.recv(1))
            return not served.server.server_state.connections

        await until(gives_up, "the connection is ended")
        assert taken
        raw.close()


async def test_answers_that_are_not_read_take_a_bounded_part_of_the_memory(connection, database, monkeypatch):
    size, most = 8_000_000, 30_000_000
    monkeypatch.setattr(server, "Connections", partial(connections.Connections, unread_max=most))
    await connection.execute(FILL.replace(str(REPORTS), "1"))
    await connection.execute("UPDATE outbox.report SET html = repeat('x', $1::integer)", size)
    token = await connection.fetchval("SELECT token FROM outbox.report")
    asked = f"GET /r/{token} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    proxied = settings(database, board=False)
    async with Served(create(proxied), proxied) as served:
        loop = asyncio.get_running_loop()
        silent = []
        for n in range(1, 21):
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.setblocking(False)
            silent.append(raw)
            await loop.sock_connect(raw, ("127.0.0.1", served.port))
            await loop.sock_sendall(raw, asked)
            await until(lambda n=n: served.server.server_state.total_requests >= n, "the page is on its way")
            held = served.server.server_state.connections
            assert sum(one.transport.get_write_buffer_size() for one in held) < most + size
        assert len(held) < len(silent)
        assert (await served.ask(f"/r/{token}")).endswith(b"x" * 1000)
        for raw in silent:
            raw.close()


def test_the_client_with_most_unread_bytes_gives_way_and_not_the_answer_that_was_just_written():
    held = connections.Connections(Callers([]), unread_max=100)
    many = [Counted("a", n, unread=20) for n in range(4)]
    one, answered = Counted("b", 0, unread=20), Counted("c", 9, unread=60)
    assert all(held.admit(each) for each in [*many, one, answered])
    held.bound_unread(answered)
    assert [each.aborted for each in many] == [True, True, True, False]
    assert ended([one, answered]) == 0
    alone = Counted("c", 9, unread=500)
    assert held.admit(alone)
    held.bound_unread(alone)
    assert not alone.aborted
    assert len(held) == 1


async def test_lookups_of_a_flood_leave_connections_to_others(connection, database):
    """Guesses that all wait for a lock on the table: another client's session is still to be had."""
    proxied = settings(database, board=False, trusted_proxies=["127.0.0.1"])
    app = create(proxied)
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    async with Served(app, proxied) as served:
        async with connection.transaction():
            await connection.execute("LOCK TABLE outbox.report IN ACCESS EXCLUSIVE MODE")
            flood = [
                asyncio.create_task(served.ask(f"/r/{n:022}", **{"X-Forwarded-For": "203.0.113.7"})) for n in range(60)
            ]

            async def all_turns_taken():
                found = await connection.fetchval(waiting)
                assert found <= LOOKUPS_MAX
                return found == LOOKUPS_MAX

            await until(all_turns_taken, "lookups wait for the lock")
            async with asyncio.timeout(2), app.state.store.connection() as held:
                assert await held.fetchval("SELECT 1") == 1
        answers = await asyncio.gather(*flood)
        assert {answer[:12] for answer in answers} <= {b"HTTP/1.1 404", b"HTTP/1.1 429", b"HTTP/1.1 503"}
