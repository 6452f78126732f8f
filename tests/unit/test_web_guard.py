"""Who asks, how often in vain, from where; and who may come in by the board's door."""

import re
import time

import pytest
from starlette.requests import Request

import outbox.web
from outbox.settings import Settings, WebSettings
from outbox.web.board.live import VIEWERS_MAX, Live
from outbox.web.board.signing import COOKIE, Door, fields_of
from outbox.web.guard import BODY_MAX, Callers, Guarded, Misses, is_own
from outbox.web.history import Earlier, read_history, with_history
from outbox.web.looks import notice
from outbox.web.pages import is_one_click
from outbox.web.serve import is_loopback

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


def door(is_open=False, **settings):
    web = WebSettings(**{**PROXY, **settings})
    return Door(web, Callers(web.proxies), Misses(), is_open=is_open)


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


def test_misses_come_back_one_by_one_for_each_address_and_memory_is_bounded():
    now = [0.0]
    misses = Misses(most=3, every_s=10, addresses_max=100, clock=lambda: now[0])
    for _ in range(3):
        assert misses.wait_s("203.0.113.9") == 0
        misses.add("203.0.113.9")
    assert misses.wait_s("203.0.113.9") == 10
    assert misses.wait_s("203.0.113.8") == 0
    now[0] = 10.0
    assert misses.wait_s("203.0.113.9") == 0
    misses.add("203.0.113.9")
    assert misses.wait_s("203.0.113.9") == 10
    for _ in range(3):
        misses.add("2001:db8::1")
    assert misses.wait_s("2001:db8::2") > 0  # a client has the whole network of 64 bits
    assert misses.wait_s("2001:db8:0:1::1") == 0
    for n in range(1000):
        misses.add(f"198.51.{n // 250}.{n % 250}")
    assert len(misses) == 100


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


def signed_in(at, name="Anna"):
    visitor = at.sign_in(name, TOKEN)
    return visitor, {"cookie": f"{COOKIE}={visitor.cookie}"}


def test_a_cookie_is_good_only_whole_here_and_for_half_a_day(monkeypatch):
    here = door(board_token=TOKEN)
    visitor, cookie = signed_in(here)
    assert here.visitor(request(**cookie)).name == "Anna"
    assert door(board_token=TOKEN).visitor(request(**cookie)).name == "Anna"  # another server with the same token
    assert door(board_token=TOKEN[::-1]).visitor(request(**cookie)) is None
    for at in range(0, len(visitor.cookie), 7):
        other = "A" if visitor.cookie[at] != "A" else "B"
        broken = visitor.cookie[:at] + other + visitor.cookie[at + 1 :]
        assert here.visitor(request(cookie=f"{COOKIE}={broken}")) is None
    for broken in ("", "x", "====", "A" * 200):
        assert here.visitor(request(cookie=f"{COOKIE}={broken}")) is None
    later = time.time() + 12 * 3600 + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert here.visitor(request(**cookie)) is None


def test_the_cookie_is_kept_from_scripts_other_sites_and_plain_http():
    here = door(board_token=TOKEN)
    visitor, _ = signed_in(here)
    for scheme, is_secure in (("http", False), ("https", True)):
        response = notice(request(), 200, "t", "w")
        here.remember(request(scheme=scheme), response, visitor)
        said = response.headers["set-cookie"].lower()
        assert "httponly" in said
        assert "samesite=strict" in said
        assert ("; secure" in said) is is_secure


def test_a_proxy_lets_in_whom_the_settings_name_and_nobody_else():
    here = door(board_header="X-User", board_users=["Ann@example.com"])
    assert here.visitor(request("10.0.0.1", x_user="ann@Example.com")).name == "ann@Example.com"
    assert here.visitor(request("10.0.0.1", x_user="bob@example.com")) is None
    assert here.visitor(request("198.51.100.1", x_user="ann@example.com")) is None
    assert here.visitor(request("10.0.0.1")) is None
    assert here.ask(request()).status_code == 403


@pytest.mark.parametrize(
    ("settings", "headers", "fields", "status"),
    [
        ({}, {}, "csrf={csrf}&key=a", 200),
        ({}, {}, "csrf=guess&key=a", 403),
        ({}, {}, "key=a", 403),
        ({}, {"sec_fetch_site": "cross-site"}, "csrf={csrf}&key=a", 403),
        ({}, {"content_type": "text/plain"}, "csrf={csrf}&key=a", 403),
        ({"read_only": True}, {}, "csrf={csrf}&key=a", 403),
        ({}, {"cookie": ""}, "csrf={csrf}&key=a", 401),
    ],
)
async def test_a_decision_needs_a_visitor_a_form_of_theirs_and_a_board_that_decides(settings, headers, fields, status):
    here = door(board_token=TOKEN, **settings)
    visitor, cookie = signed_in(here)
    decided = []

    async def decide(asked, who, said):
        decided.append((who.name, said["key"]))
        return notice(asked, 200, "Done", "")

    body = fields.format(csrf=visitor.csrf).encode()
    asked = request(
        method="POST", body=body, **{"content_type": "application/x-www-form-urlencoded", **cookie, **headers}
    )
    answer = await here.decided(decide)(asked)
    assert answer.status_code == status
    assert decided == ([("Anna", "a")] if status == 200 else [])


async def test_a_form_of_too_many_fields_or_another_kind_has_none():
    kind = {"content_type": "application/x-www-form-urlencoded"}
    assert await fields_of(request(body=b"a=1&b=%C3%A4", **kind)) == {"a": "1", "b": "ä"}
    assert await fields_of(request(body=b"&".join(b"a=1" for _ in range(101)), **kind)) == {}
    assert await fields_of(request(body=b"a=\xff", **kind)) == {}
    assert await fields_of(request(body=b"a=1")) == {}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"List-Unsubscribe=One-Click", True),
        (
            b'--x\r\nContent-Disposition: form-data; name="List-Unsubscribe"\r\n\r\nOne-Click\r\n--x--\r\n',
            True,
        ),
        (b"", False),
        (b"List-Unsubscribe=No", False),
        (b"a=List-Unsubscribe=One-Click", False),
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


@pytest.mark.parametrize(
    ("host", "is_it"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("", False), ("0.0.0.0", False), ("mail", False)],
)
def test_a_loopback_address_is_one_that_only_this_machine_reaches(host, is_it):
    assert is_loopback(host) is is_it


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
    body = b"name=List-Unsubscribe\r\n" * (BODY_MAX // 23)
    began_at = time.perf_counter()
    assert not is_one_click(body)
    assert time.perf_counter() - began_at < 0.25


def test_whom_the_proxy_let_in_once_has_not_shown_the_token():
    both = {"board_token": TOKEN, "board_header": "X-User"}
    visitor = door(**both, board_users=["ann@example.com"]).visitor(request(x_user="ann@example.com"))
    cookie = {"cookie": f"{COOKIE}={visitor.cookie}"}
    assert door(**both, board_users=["bob@example.com"]).visitor(request("203.0.113.9", **cookie)) is None
    known = door(**both, board_users=["ann@example.com"]).visitor(request(**cookie, x_user="ann@example.com"))
    assert (known.csrf, known.can_leave) == (visitor.csrf, False)


def test_a_proxy_that_says_nothing_of_itself_is_no_browser_of_this_machine():
    here = door(is_open=True, trusted_proxies=[])
    assert here.visitor(request("127.0.0.1", host="127.0.0.1:8025")) is not None
    by_nginx = request("127.0.0.1", host="127.0.0.1:8025", connection="close")  # what `proxy_pass` alone sends
    by_nginx.scope["http_version"] = "1.0"
    assert here.visitor(by_nginx) is None
    for told in ({"origin": "https://board.example"}, {"referer": "https://board.example/emails"}):
        assert here.visitor(request("127.0.0.1", host="127.0.0.1:8025", **told)) is None
    assert here.visitor(request("127.0.0.1", host="127.0.0.1:8025", origin="http://127.0.0.1:8025")) is not None


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


async def test_however_many_look_on_in_one_moment_no_more_are_told_than_may_be():
    live = Live(Settings(database_url="postgresql://nobody@127.0.0.1:1/none"), None)
    live.end()
    live._streams = VIEWERS_MAX - 1
    both = [live.events(""), live.events("")]
    assert [await anext(one) for one in both] == [b"retry: 2000\n\n", b"retry: 30000\n\n"]
    assert [one async for one in both[1]] == []
    assert live._streams == VIEWERS_MAX
    await both[0].aclose()
    assert live._streams == VIEWERS_MAX - 1
