"""`outbox web`: raw bytes for its pages, its forms and its board."""

import asyncio
from contextlib import contextmanager

import asyncpg

from tests.fuzz.endpoints import HTTP
from tests.fuzz.harness import TARGETS, Target, pieces
from tests.fuzz.served import ANSWER_MAX_S, heads, served

BOARD_TOKEN = "a-board-token-of-more-than-32-letters"
PAGE_TOKEN = "fuzzfuzzfuzzfuzzfuzzfu"
MARK = b"<fuzz>"  # never comes back as markup

_WEB = (
    *HTTP, b"/r/{page}", b"/u/{page}", b"/r/", b"/u/", b"/emails", b"/emails/1", b"/emails/9223372036854775808",
    b"/editions/1",
    b"/editions/1/", b"/pauses", b"/decisions", b"/confirm", b"/decide", b"/sign-in", b"/sign-out", b"/events",
    b"/emails/1/html",
    b"/emails/1/source", b"?state=dead", b"&to=", b"&report=", b"&reply=", b"&page=", b"state=", b"name=",
    b"token={board}",
    b"&", b"=", b"+", b"%3Cfuzz%3E", MARK, b'"><fuzz>', b"%ff", b"X-Forwarded-For: 203.0.113.9, 10.0.0.1\r\n",
    b"X-Forwarded-For: ", b"X-Forwarded-Proto: https\r\n", b"Sec-Fetch-Site: same-origin\r\n",
    b"Sec-Fetch-Site: cross-site\r\n",
    b"Origin: http://x\r\n", b"Cookie: ", b"outbox=", b";", b"Content-Type: application/x-www-form-urlencoded\r\n",
    b"Content-Type: multipart/form-data; boundary=B\r\n", b"--B\r\n", b"Last-Event-ID: 1\r\n",
    b"List-Unsubscribe=One-Click",
    b"Authorization: Basic eDp5\r\n",
)  # fmt: skip
_HOST = b"Host: localhost\r\nX-Forwarded-For: 198.51.100.%d\r\n"
_FORM = b"name=ann&token={board}"
_SEEDS = (
    b"GET /r/{page} HTTP/1.1\r\n" + _HOST % 1 + b"\r\n",
    b"POST /u/{page} HTTP/1.1\r\n"
    + _HOST % 2
    + b"Content-Length: 26\r\nContent-Type: application/x-www-form-urlencoded\r\n\r\n"
    b"List-Unsubscribe=One-Click",
    b"POST /sign-in HTTP/1.1\r\n" + _HOST % 3 + b"Sec-Fetch-Site: same-origin\r\nContent-Length: %d\r\n"
    b"Content-Type: application/x-www-form-urlencoded\r\n\r\n" % (len(_FORM) - 7 + len(BOARD_TOKEN)) + _FORM,
    b"GET /emails?state=dead&to=%3Cfuzz%3E HTTP/1.1\r\n" + _HOST % 4 + b"Cookie: outbox=x\r\n\r\n",
    b"POST /decide HTTP/1.1\r\n" + _HOST % 5 + b"Content-Length: 9\r\n\r\nverb=x&y=",
)
_PROBE = b"GET /r/{page} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


async def _make_page(url):
    """Write an edition with one report, whose token is known."""
    connection = await asyncpg.connect(url)
    try:
        edition = await connection.fetchval(
            "INSERT INTO outbox.edition (report, period, starts_at, ends_at)"
            " VALUES ('progress', '2026-W47', '2026-11-16Z', '2026-11-23Z') RETURNING id"
        )
        await connection.execute(
            "INSERT INTO outbox.report (edition, recipient_key, token, title, html)"
            " VALUES ($1, '1', $2, 'Progress', '<h1>x</h1>')",
            edition,
            PAGE_TOKEN,
        )
    finally:
        await connection.close()


@contextmanager
def _opened(url):
    asyncio.run(_make_page(url))
    settings = (
        f'database_url = "{url}"\nsmtp_url = "smtp://127.0.0.1:1"\nsender = "reports@example.com"\n'
        f'[web]\nboard_token = "{BOARD_TOKEN}"\ntrusted_proxies = ["127.0.0.1"]\n'
    )
    secrets = [BOARD_TOKEN, PAGE_TOKEN]
    with served("web", "--http", "127.0.0.1:0", settings=settings, event="web_listening", secrets=secrets) as web:

        def filled(request):
            return request.replace(b"{page}", PAGE_TOKEN.encode()).replace(b"{board}", BOARD_TOKEN.encode())

        def any_bytes_get_an_answer_of_http_or_none_without_markup_of_theirs(request):
            answer = web.ask(filled(request))
            for status, head in heads(answer):
                assert status < 500 or status in (501, 503, 505), head[:500]
                if status != 400 and b"text/html" in head:
                    assert b"ontent-" in head
                    assert b"olicy" in head
            assert MARK not in answer
            assert BOARD_TOKEN.encode() not in answer
            ((status, _),) = heads(web.ask(filled(_PROBE), silent_s=ANSWER_MAX_S))
            assert status == 200

        yield any_bytes_get_an_answer_of_http_or_none_without_markup_of_theirs


TARGETS["web"] = Target("web", pieces(*_WEB, seeds=_SEEDS), bytes, _opened, needs_database=True)
