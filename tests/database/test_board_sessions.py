"""Sign-ins to the board: cookies, the table behind them, and how they end."""

import hashlib
import re

import asyncpg
import pytest
from starlette.requests import Request

from outbox.errors import DatabaseUnavailableError
from outbox.settings import WebSettings
from outbox.settings.urls import DatabaseUrl
from outbox.web.board import sessions as module
from outbox.web.board.auth import Authenticator
from outbox.web.board.sessions import SESSION_S, Session, Sessions
from outbox.web.queries import Store
from outbox.web.responses import notice
from outbox.web.security import Callers
from tests.unit.web.test_security import TOKEN, request

LINK = "a-random-token-of-this-run-00000"


@pytest.fixture
async def store(database):
    store = Store(DatabaseUrl.parse(database))
    yield store
    await store.close()


def authenticator(store, **settings):
    link = settings.pop("link_token", None)
    web = WebSettings(**settings)
    return Authenticator(web, store, Callers(web.proxies), link_token=link)


async def rows(connection):
    return [row["name"] for row in await connection.fetch("SELECT name FROM outbox.board_session ORDER BY name")]


async def test_a_cookie_is_good_only_whole_and_with_its_token_and_for_half_a_day(connection, store):
    here = Sessions(store, TOKEN)
    cookie = here.cookie(await here.begin("Anna"))
    assert (await here.find(cookie)).name == "Anna"
    assert (await Sessions(store, TOKEN).find(cookie)).name == "Anna"  # another server with the same token
    assert await Sessions(store, TOKEN[::-1]).find(cookie) is None  # the token was changed
    for at in range(len(cookie)):
        other = "A" if cookie[at] != "A" else "B"
        assert await here.find(cookie[:at] + other + cookie[at + 1 :]) is None
    for broken in ("", "x", "====", "A" * 64, "é" * 64, cookie + "AAAA", cookie[:-4]):
        assert await here.find(broken) is None
    left = "SELECT extract(epoch FROM expires_at - now())::float8 FROM outbox.board_session"
    assert SESSION_S - 60 < await connection.fetchval(left) <= SESSION_S
    await connection.execute("UPDATE outbox.board_session SET created_at = now() - interval '2 s', expires_at = now()")
    assert await here.find(cookie) is None


async def test_the_table_holds_nothing_that_signs_in(connection, store):
    here = Sessions(store, TOKEN)
    session = await here.begin("Anna")
    kept = await connection.fetchval("SELECT id FROM outbox.board_session")
    assert kept == hashlib.sha256(session.value.encode()).digest()
    # A row of one's own does not help: its value is in no cookie that was signed with the token.
    value = "e" * 43
    await connection.execute("INSERT INTO outbox.board_session (id, name, expires_at) VALUES ($1, 'Eve', 'tomorrow')",
                             hashlib.sha256(value.encode()).digest())  # fmt: skip
    signed_otherwise = Sessions(store, TOKEN[::-1]).cookie(Session(value, "Eve"))
    for forged in (value, f"{value}.", f"{value}.{'e' * 64}", signed_otherwise):
        assert await here.find(forged) is None
    assert (await here.find(here.cookie(Session(value, "Eve")))).name == "Eve"  # with the token it would be good


async def test_a_sign_out_ends_a_copied_cookie_on_every_server(connection, store):
    here, there = Sessions(store, TOKEN), Sessions(store, TOKEN)
    session = await here.begin("Anna")
    cookie = here.cookie(session)
    assert await there.find(cookie) is not None
    await here.end(session)
    assert await here.find(cookie) is None
    assert await there.find(cookie) is None
    assert not await there.is_valid(session)
    assert await rows(connection) == []


async def test_expired_sessions_are_removed(connection, store, monkeypatch):
    monkeypatch.setattr(module, "CLEAN_S", 0)
    here = Sessions(store, TOKEN)
    cookie = here.cookie(await here.begin("Anna"))
    await connection.execute(
        "INSERT INTO outbox.board_session (id, name, created_at, expires_at)"
        " SELECT decode(repeat(to_char(n, 'FM00'), 32), 'hex'), 'old', now() - interval '2 d', now() - interval '1 d'"
        "   FROM generate_series(10, 19) n"
    )
    assert await here.find(cookie) is not None
    assert await rows(connection) == ["Anna"]


async def test_while_postgres_is_away_only_a_session_that_was_just_seen_is_believed(connection, store, monkeypatch):
    here, there = Sessions(store, TOKEN), Sessions(store, TOKEN)
    session = await here.begin("Anna")
    cookie = here.cookie(session)
    monkeypatch.setattr(module, "FIND", "SELECT pg_terminate_backend(pg_backend_pid()), $1::bytea")
    assert (await here.find(cookie)).name == "Anna"
    with pytest.raises(DatabaseUnavailableError):
        await there.find(cookie)
    monkeypatch.setattr(module, "BELIEVED_S", -1)
    with pytest.raises(DatabaseUnavailableError):
        await here.find(cookie)


@pytest.mark.parametrize(
    ("scheme", "root", "name", "is_secure"),
    [
        ("http", "", "outbox_board", False),
        ("https", "", "__Host-outbox_board", True),
        ("https", "/mail", "__Secure-outbox_board", True),
    ],
)
async def test_the_cookie_is_kept_from_scripts_other_sites_other_hosts_and_plain_http(
    store, scheme, root, name, is_secure
):
    here = authenticator(store, board_token=TOKEN)
    body = f"name=Anna&token={TOKEN}".encode()
    asked = form_of(body, scheme=scheme)
    asked.scope["root_path"] = root
    entered = await here.enter(asked)
    assert entered.headers["location"] == f"{root}/"
    said = entered.headers["set-cookie"]
    assert said.startswith(f"{name}=")
    assert {"httponly", "samesite=strict"} <= set(said.lower().split("; "))
    assert ("Secure" in said.split("; ")) is is_secure
    assert f"Path={root or '/'}" in said
    assert "Domain" not in said
    cookie = said.partition(";")[0].partition("=")[2]
    again = request(scheme=scheme, cookie=f"{name}={cookie}")
    again.scope["root_path"] = root
    assert (await here.user(again)).name == "Anna"
    if is_secure:  # a cookie that another host or plain http could have set counts for nothing
        tossed = request(scheme=scheme, cookie=f"outbox_board={cookie}")
        tossed.scope["root_path"] = root
        assert await here.user(tossed) is None


def form_of(body, **headers):
    return request(method="POST", body=body, content_type="application/x-www-form-urlencoded", **headers)


async def test_a_sign_in_makes_a_new_session_and_ends_the_former_one_of_the_browser(connection, store):
    here = authenticator(store, board_token=TOKEN)
    first = await here.sessions.begin("Anna")
    planted = f"outbox_board={here.sessions.cookie(first)}"
    entered = await here.enter(form_of(f"name=Bob&token={TOKEN}".encode(), cookie=planted))
    assert here.sessions.cookie(first) not in entered.headers["set-cookie"]
    assert await rows(connection) == ["Bob"]
    assert await here.user(request(cookie=planted)) is None
    for name in ("", "   "):
        assert (await here.enter(form_of(f"name={name}&token={TOKEN}".encode()))).status_code == 400
    assert await rows(connection) == ["Bob"]


async def shown(_):
    return notice(request(), 200, "shown", "")


def linked(query, **headers):
    asked = request(**headers)
    asked.scope["query_string"] = query.encode()
    return Request(asked.scope, asked.receive)


@pytest.mark.parametrize(
    ("site", "status"), [(None, 303), ("none", 303), ("same-origin", 303), ("cross-site", 200), ("same-site", 200)]
)
async def test_the_link_signs_in_and_leads_to_an_address_without_the_token(connection, store, site, status):
    here = authenticator(store, link_token=LINK)
    headers = {"sec_fetch_site": site} if site is not None else {}
    answer = await here.linked(shown)(linked(f"token={LINK}", **headers))
    assert answer.status_code == status
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert LINK not in answer.body.decode()
    assert answer.headers.get("location", "/") == "/"
    if status == 200:  # along a redirect from another site a strict cookie is not sent
        assert '<meta http-equiv="refresh" content="0; url=/">' in answer.body.decode()
    cookie = answer.headers["set-cookie"].partition(";")[0]
    assert (await here.user(request(cookie=cookie))).name == "link"
    again = await here.linked(shown)(linked(f"token={LINK}", cookie=cookie))
    assert "set-cookie" not in again.headers
    assert await rows(connection) == ["link"]


@pytest.mark.parametrize("query", ["token=", "token=guess", f"token={LINK[:-1]}", f"token={LINK}x", f"token={TOKEN}"])
async def test_no_other_link_signs_in(connection, store, query):
    here = authenticator(store, link_token=LINK)
    assert (await here.linked(shown)(linked(query))).status_code == 403
    head = linked(f"token={LINK}")
    head.scope["method"] = "HEAD"
    assert "set-cookie" not in (await here.linked(shown)(head)).headers
    assert await rows(connection) == []


@pytest.mark.parametrize("settings", [{"board_token": TOKEN}, {"board_header": "X-User", "board_users": ["a@b"],
                                                               "trusted_proxies": ["10.0.0.0/8"]}])  # fmt: skip
async def test_a_lasting_token_is_never_taken_from_an_address(connection, store, settings):
    """It would stay in a proxy's log."""
    here = authenticator(store, **settings, link_token=LINK)
    for token in (TOKEN, LINK):
        answer = await here.linked(shown)(linked(f"token={token}"))
        assert "set-cookie" not in answer.headers
    assert await rows(connection) == []


async def test_the_right_token_is_never_refused_whatever_was_guessed_from_the_same_address(store, caplog):
    here = authenticator(store, board_token=TOKEN)
    statuses = [(await here.enter(form_of(f"name=x&token=guess{n}".encode()))).status_code for n in range(100)]
    assert (statuses.count(403), statuses.count(429)) == (here.failures.most, 100 - here.failures.most)
    assert (await here.enter(form_of(f"name=Anna&token={TOKEN}".encode()))).status_code == 303
    assert "guess" not in caplog.text
    assert TOKEN not in caplog.text
    assert len(re.findall("a sign-in to the board from 10.0.0.1 failed", caplog.text)) == here.failures.most


@pytest.mark.parametrize(
    "values",
    [
        "'x', 'n', now() + interval '1 h'",
        "sha256('x'), '', now() + interval '1 h'",
        "sha256('x'), repeat('x', 501), now() + interval '1 h'",
        "sha256('x'), 'n', now()",
        "sha256('x'), 'n', 'infinity'",
    ],
)
async def test_impossible_sessions_are_refused(connection, values):
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(f"INSERT INTO outbox.board_session (id, name, expires_at) VALUES ({values})")
