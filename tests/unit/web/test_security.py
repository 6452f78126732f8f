"""Clients and their failed attempts, framing of requests, and who may use the board."""

import asyncio
import re
import time
from collections import Counter

import pytest
from starlette.requests import ClientDisconnect, Request

import outbox.web
from outbox.reports.translations import PHRASES
from outbox.settings import Settings, WebSettings
from outbox.web.board.auth import Authenticator, fields_of
from outbox.web.board.live import Live
from outbox.web.board.streams import STREAMS_MAX
from outbox.web.history import Earlier, read_history, with_history
from outbox.web.report_pages import is_one_click
from outbox.web.responses import notice
from outbox.web.security import (
    BODY_MAX,
    LOOKUPS_MAX,
    LOOKUPS_WAITING_MAX,
    Callers,
    FailedAttemptLimiter,
    Guarded,
    Lookups,
    TooManyLookupsError,
    is_own,
)
from outbox.web.words import WORDS, language_of

TOKEN = "an-operators-token-of-32-letters"
PROXY = {"trusted_proxies": ["10.0.0.0/8", "::1"]}


def request(client="10.0.0.1", method="GET", body=b"", scheme="http", **headers):
    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in {"host": "mail", **headers}.items()]

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {
        "type": "http", "method": method, "path": "/", "query_string": b"", "headers": sent, "scheme": scheme,
        "client": (client, 4711), "server": ("mail", 80), "root_path": "",
    }  # fmt: skip
    return Request(scope, receive)


def callers(**settings):
    return Callers(WebSettings(**{**PROXY, **settings}).proxies)


def authenticator(**settings):
    web = WebSettings(**{**PROXY, **settings})
    return Authenticator(web, None, Callers(web.proxies))


@pytest.mark.parametrize(
    ("client", "forwarded", "address"),
    [
        ("198.51.100.1", None, "198.51.100.1"),
        ("198.51.100.1", "203.0.113.9", "198.51.100.1"),  # it is no proxy of ours
        ("10.0.0.1", "203.0.113.9", "203.0.113.9"),
        ("10.0.0.1", "1.1.1.1, 203.0.113.9", "203.0.113.9"),  # the client may write what it likes before it
        ("10.0.0.1", "203.0.113.9, 10.2.3.4", "203.0.113.9"),
        ("10.0.0.1", "10.9.9.9, 10.2.3.4", "10.9.9.9"),
        ("::ffff:10.0.0.1", "2001:db8::1", "2001:db8::1"),
        ("10.0.0.1", "203.0.113.9:4711, 10.2.3.4:80", "203.0.113.9"),
        ("10.0.0.1", "[2001:db8::1]:4711", "2001:db8::1"),
        ("10.0.0.1", "unknown", "unknown"),
        ("10.0.0.1", ",,", "10.0.0.1"),
    ],
)
def test_the_client_is_the_last_address_that_no_trusted_proxy_has(client, forwarded, address):
    headers = {"x_forwarded_for": forwarded} if forwarded is not None else {}
    assert callers().address(request(client, **headers)) == address


def test_a_user_and_https_are_believed_of_a_trusted_proxy_only():
    said = {"x_user": "ann@example.com", "x_forwarded_proto": "https"}
    assert callers().user(request("10.0.0.1", **said), "X-User") == "ann@example.com"
    assert callers().user(request("198.51.100.1", **said), "X-User") is None
    assert callers().is_https(request("10.0.0.1", **said))
    assert not callers().is_https(request("198.51.100.1", **said))
    twice = request("10.0.0.1", **said)
    twice.scope["headers"].append((b"x-user", b"bob@example.com"))
    assert callers().user(Request(twice.scope), "X-User") is None


def test_failed_attempts_are_bounded_per_client_and_so_is_the_wait_and_the_memory():
    now = [0.0]
    failures = FailedAttemptLimiter(most=3, every_s=10, clients_max=100, clock=lambda: now[0])
    assert [failures.take("203.0.113.9") for _ in range(3)] == [0, 0, 0]
    assert [failures.take("203.0.113.9") for _ in range(500)] == [10] * 500  # a burst makes the wait no longer
    assert failures.take("203.0.113.8") == 0
    now[0] = 10.0
    assert failures.take("203.0.113.9") == 0
    assert failures.take("203.0.113.9") == 10
    for _ in range(3):
        failures.take("2001:db8::1")
    assert failures.take("2001:db8::2") > 0  # a client has the whole network of 64 bits
    assert failures.take("2001:db8:0:1::1") == 0
    for n in range(1000):
        failures.take(f"198.51.{n // 250}.{n % 250}")
    assert len(failures) == 100


async def test_lookups_of_one_client_are_bounded_and_what_it_gave_up_is_not_looked_up():
    lookups, running, most, done = Lookups(), 0, 0, []

    async def look_up(n, gone=False):
        nonlocal running, most
        asked = request(f"203.0.113.{n % 2}")
        if gone:
            asked._is_disconnected = True
        async with lookups.turn(asked, asked.client.host):
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            done.append(n)

    await asyncio.gather(*(look_up(n) for n in range(100)))
    assert (len(done), most) == (100, 2 * LOOKUPS_MAX)
    with pytest.raises(ClientDisconnect):
        await look_up(1, gone=True)
    crowd = [asyncio.create_task(look_up(2 * n)) for n in range(LOOKUPS_WAITING_MAX + 1)]
    ended = await asyncio.gather(*crowd, return_exceptions=True)
    assert [type(error) for error in ended if error is not None] == [TooManyLookupsError]
    assert lookups._clients == {}


@pytest.mark.parametrize(
    ("headers", "own"),
    [
        ({"sec_fetch_site": "same-origin"}, True),
        ({"sec_fetch_site": "same-site", "origin": "http://mail"}, False),
        ({"sec_fetch_site": "cross-site"}, False),
        ({"sec_fetch_site": "none"}, False),
        ({"origin": "https://mail"}, True),
        ({"origin": "https://mail.evil.example"}, False),
        ({"origin": "null"}, False),
        ({}, True),
    ],
)
def test_a_form_counts_only_from_a_page_of_this_origin(headers, own):
    assert is_own(request(method="POST", **headers)) is own


async def test_a_proxy_lets_in_whom_the_settings_name_and_nobody_else():
    here = authenticator(board_header="X-User", board_users=["Ann@example.com"])
    assert (await here.user(request("10.0.0.1", x_user="ann@Example.com"))).name == "ann@Example.com"
    assert await here.user(request("10.0.0.1", x_user="bob@example.com")) is None
    assert await here.user(request("198.51.100.1", x_user="ann@example.com")) is None
    assert await here.user(request("10.0.0.1")) is None
    assert here.ask(request()).status_code == 403


@pytest.mark.parametrize(
    ("settings", "headers", "fields", "status"),
    [
        ({}, {}, "csrf={csrf}&key=a", 200),
        ({}, {}, "csrf=guess&key=a", 403),
        ({}, {}, "key=a", 403),
        ({}, {"sec_fetch_site": "cross-site"}, "csrf={csrf}&key=a", 403),
        ({}, {"content_type": "text/plain"}, "csrf={csrf}&key=a", 403),
        ({}, {"cookie": ""}, "csrf={csrf}&key=a", 403),  # a form is tied to the browser that got it
        ({}, {"cookie": "outbox_board_form=of-another"}, "csrf={csrf}&key=a", 403),
        ({"read_only": True}, {}, "csrf={csrf}&key=a", 403),
        ({}, {"x_user": "bob@example.com"}, "csrf={csrf}&key=a", 403),  # and to the user
        ({}, {"x_user": "eve@example.com"}, "csrf={csrf}&key=a", 403),
    ],
)
async def test_a_decision_needs_a_user_a_form_of_theirs_and_a_board_that_decides(settings, headers, fields, status):
    users = {"board_header": "X-User", "board_users": ["ann@example.com", "bob@example.com"]}
    here = authenticator(**users, **settings)
    ann = {"x_user": "ann@example.com"}
    user = await here.user(request(**ann))
    cookie = {"cookie": f"outbox_board_form={user.form_cookie}"}
    assert (await here.user(request(**ann, **cookie))).csrf == user.csrf
    decided = []

    async def decide(asked, who, said):
        decided.append((who.name, said["key"]))
        return notice(asked, 200, "Done", "")

    body = fields.format(csrf=user.csrf).encode()
    form = {"content_type": "application/x-www-form-urlencoded"}
    answer = await here.decided(decide)(request(method="POST", body=body, **{**form, **ann, **cookie, **headers}))
    assert answer.status_code == status
    assert decided == ([("ann@example.com", "a")] if status == 200 else [])


async def test_a_form_of_too_many_fields_or_another_kind_has_none():
    kind = {"content_type": "application/x-www-form-urlencoded"}
    assert await fields_of(request(body=b"a=1&b=%C3%A4", **kind)) == {"a": "1", "b": "ä"}
    assert await fields_of(request(body=b"&".join(b"a=1" for _ in range(101)), **kind)) == {}
    assert await fields_of(request(body=b"a=\xff", **kind)) == {}
    assert await fields_of(request(body=b"a=1")) == {}


MULTIPART = b"".join((
    b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--x\r\n",
    b"Content-Disposition: form-data; name=List-Unsubscribe\r\nContent-Type: text/plain\r\n\r\nOne-Click\r\n--x--",
))  # fmt: skip


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"List-Unsubscribe=One-Click", True),
        (
            b'--x\r\nContent-Disposition: form-data; name="List-Unsubscribe"\r\n\r\nOne-Click\r\n--x--\r\n',
            True,
        ),
        (b"List-Unsubscribe=One-Click\r\n", True),
        (b"List-Unsubscribe=One-Click\n", True),
        (b"list-unsubscribe=one-click", True),
        (b"List-Unsubscribe=One%2DClick", True),
        (b"List%2dUnsubscribe=One%2dClick", True),
        (b"List-Unsubscribe=+One-Click%0D%0A", True),
        (b"a=1&List-Unsubscribe=One-Click&b=2", True),
        (b"b=" + b"x" * 60_000 + b"&List-Unsubscribe=One-Click", True),
        (b"a=1\r\nList-Unsubscribe=One-Click\r\n", True),  # text/plain, HTML Living Standard §4.10.21.8
        (
            MULTIPART,
            True,
        ),
        (b'--x\nContent-Disposition: form-data; name="list-unsubscribe"; x=y\n\none-click\n--x--\n', True),
        (b"--x\nContent-Disposition: form-data; name='List-Unsubscribe' \n\nOne-Click\n--x--\n", True),
        (b"List-Unsubscribe=One-Click;a=1", True),
        (b"\xef\xbb\xbfList-Unsubscribe=One-Click\0", True),
        (b"", False),
        (b"List-Unsubscribe=No", False),
        (b"List-Unsubscribe", False),
        (b"One-Click", False),
        (b"List-Unsubscribe=One-Click-Not", False),
        (b"a=List-Unsubscribe=One-Click", False),
        (b"a=List-Unsubscribe%3DOne-Click", False),
        (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nOne-Click\r\n--x--\r\n', False),
    ],
)
def test_one_click_is_said_in_either_kind_of_form(body, says):
    assert is_one_click(body) is says


def test_the_application_for_other_servers_is_made_from_the_settings_that_commands_read(monkeypatch, tmp_path):
    (tmp_path / "other.toml").write_text('database_url = "postgresql://nobody@127.0.0.1:1/none"\n[web]\nboard = false')
    monkeypatch.setenv("OUTBOX_CONFIG", str(tmp_path / "other.toml"))
    monkeypatch.delitem(vars(outbox.web), "app", raising=False)
    app = outbox.web.app
    assert app is outbox.web.app
    assert {route.path for route in app.routes} == {"/r/{token}", "/u/{token}"}
    monkeypatch.delitem(vars(outbox.web), "app")


def test_a_history_stands_before_the_pages_end_and_draws_what_several_editions_say():
    editions = [
        Earlier("New", "n" * 22, {"Done": 3.0, "Left": 1.0}),
        Earlier("Mid & co", "m" * 22, {"Done": 1.0}),
        Earlier("Old", "o" * 22, {"Done": 2.0}),
    ]
    page = with_history("<body><pre></body></pre><p>x</BODY ></html>", editions)
    assert page.startswith("<body><pre></body></pre><p>x<style>")
    assert page.endswith("</nav>\n</BODY ></html>")
    assert re.findall(r'points="([^"]+)"', page) == ["0.0,14.0 60.0,26.0 120.0,2.0"]
    assert "Mid &amp; co" in page
    assert "Left" not in page
    assert with_history("<p>x", editions[:1]) == "<p>x"
    assert with_history("<p>x", editions).startswith("<p>x<style>")


def test_a_long_form_that_says_it_almost_is_read_in_a_moment():
    for almost in (
        b"name=List-Unsubscribe\r\n",
        b"&",
        b"=&",
        b"List-Unsubscribe=%",
        b"\n\nOne-Click\n",
        b"%2B" * 60 + b"&",
    ):
        body = almost * (BODY_MAX // len(almost))
        began_at = time.perf_counter()
        assert not is_one_click(body)
        assert time.perf_counter() - began_at < 0.25


@pytest.mark.parametrize(
    ("report", "accepted", "language"),
    [
        ("de", "", "de"), ("de-CH", "fr", "de"), ("pt-BR", "en-US,en;q=0.9", "pt"), ("en-GB", "de", "en"),
        ("en", "", "en"), ("en", "de-DE,de;q=0.9,en;q=0.8", "de"), (None, "en;q=0.4, fr;q=0.5", "fr"),
        (None, "ja, sv", "sv"), ("ar", "", "en"), ("ar", "nl", "nl"), (None, "de;q=0", "en"),
        (None, "de;q=0, it;q=0.1", "it"), (None, "*", "en"),
        (None, "ja", "en"), (None, ",;q=,de;q=x,DE ; q=0.3", "de"), (None, "x" * 10_000, "en"), ("", "pl", "pl"),
    ],
)  # fmt: skip
def test_a_page_is_in_the_language_of_its_report_else_of_the_browser(report, accepted, language):
    assert language_of(report, accepted) == language


def test_every_language_of_the_packaged_reports_has_all_words():
    assert set(WORDS) == set(PHRASES)
    assert {frozenset(words) for words in WORDS.values()} == {frozenset(WORDS["en"])}
    for key, text in WORDS["en"].items():
        assert all(words[key].count("{title}") == text.count("{title}") for words in WORDS.values()), key


@pytest.mark.parametrize(
    ("headers", "version", "status"),
    [
        ({"content_length": "3", "transfer_encoding": "chunked"}, "1.1", 400),
        ({"transfer_encoding": "chunked"}, "1.0", 400),
        ({"transfer_encoding": "chunked"}, "1.1", 200),
        ({"content_length": "3"}, "1.1", 200),
    ],
)
async def test_a_request_with_two_lengths_is_refused_and_its_connection_closed(headers, version, status):
    answers = []

    async def send(message):
        answers.append(message)

    async def app(scope, receive, send):
        await notice(Request(scope), 200, "t", "w")(scope, receive, send)

    asked = request(method="POST", **headers)
    asked.scope.update(raw_path=b"/", http_version=version)
    await Guarded(app)(asked.scope, asked.receive, send)
    assert answers[0]["status"] == status
    assert ((b"connection", b"close") in answers[0]["headers"]) is (status == 400)


async def test_a_length_of_thousands_of_digits_is_too_large_whatever_server_lets_it_in():
    answers = []

    async def send(message):
        answers.append(message)

    asked = request(method="POST", content_length="9" * 5000)
    asked.scope["raw_path"] = b"/"
    await Guarded(None)(asked.scope, asked.receive, send)
    assert answers[0]["status"] == 413


@pytest.mark.parametrize("figures", ["[" * 3000, f"[[&quot;a&quot;,{'9' * 400}]]"])
async def test_figures_that_are_none_leave_a_page_without_a_line(figures):
    class Connection:
        async def fetch(self, *_):
            return [{"title": "t", "token": "t", "head": f'<meta name="outbox-figures" content="{figures}">'}]

    (edition,) = await read_history(Connection(), 1, None)
    assert edition.figures == {}


@pytest.fixture
def live():
    live = Live(Settings(database_url="postgresql://nobody@127.0.0.1:1/none"), None)
    live._begin = lambda: None
    return live


async def signed_in():
    return True


async def begun(live, viewer, is_signed_in=signed_in):
    stream = live.events("", viewer, is_signed_in, draw=lambda _: {})
    return stream, await anext(stream)


async def test_no_more_streams_than_the_bound_are_open_however_many_come_in_one_moment(live):
    streams = [await begun(live, "ann") for _ in range(STREAMS_MAX)]
    assert {said for _, said in streams} == {b"retry: 2000\n\n"}
    assert not live.streams.has_room("ann")
    stream, said = await begun(live, "ann")
    assert said == b"retry: 30000\n\n"
    assert [one async for one in stream] == []
    await streams[0][0].aclose()
    assert live.streams.has_room("ann")


async def test_one_viewer_with_many_streams_leaves_room_for_others(live):
    anns = [await begun(live, "ann") for _ in range(STREAMS_MAX)]
    assert live.streams.has_room("bob")
    bobs = [await begun(live, "bob") for _ in range(5)]
    assert {said for _, said in bobs} == {b"retry: 2000\n\n"}
    assert Counter(stream.viewer for stream in live.streams._open) == {"ann": STREAMS_MAX - 5, "bob": 5}
    assert [one async for one in anns[0][0]] == []  # the oldest ended
    assert await anext(anns[-1][0])


async def test_a_stream_ends_with_the_sign_in(live, monkeypatch):
    monkeypatch.setattr("outbox.web.board.live.SIGNED_IN_S", 0)
    answers = iter([True, False])

    async def is_signed_in():
        return next(answers)

    stream, _ = await begun(live, "ann", is_signed_in)
    assert (await anext(stream)).startswith(b"data: ")
    live._wake()
    assert [one async for one in stream] == []
    assert live.streams._open == []
