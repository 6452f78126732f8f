"""The report behind a link, as it was generated, and the page on which one click ends the emails.

The report is a sandboxed document with an opaque origin: it runs no script, sends no form and loads nothing but images.
So neither a report's data nor the user's own template can act on this site or its visitors. A link that is unknown,
expired, pruned or another recipient's gets the same answer.
"""

import hmac
import re
from codecs import BOM_UTF8
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from outbox.database.connection import Connection
from outbox.errors import DatabaseUnavailableError
from outbox.settings import EditionSettings, WebSettings
from outbox.web.history import read_history, with_history
from outbox.web.queries import Store
from outbox.web.responses import notice, page
from outbox.web.security import Callers, FailedAttemptLimiter, Lookups, body_of, is_own
from outbox.web.words import WORDS, language_of

TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{16,128}")  # generate makes 22 characters, 128 bits
FIELD: Final = re.compile(rb"name=([\"']?)List-Unsubscribe\1[ \t]*(?:[;\n]|$)", re.IGNORECASE)
VALUE: Final = re.compile(rb"\n\n[ \t]*One-Click[ \t]*(?:\n|$)", re.IGNORECASE)
FIELD_MAX: Final = 200  # bytes of the one field that is looked for in a form, however it is encoded

UNDO: Final = b"undo=yes"
UNSUBSCRIBE: Final = "SELECT outbox.unsubscribe($1)"
RESUBSCRIBE: Final = "SELECT outbox.resubscribe($1)"
# The report of a token and the language of its page, which is the reader's.
ABOUT: Final = """
SELECT e.report, r.title,
       substring(left(r.html, 2000) from '<html[^>]*[[:space:]]lang=["'']?([A-Za-z0-9-]{2,35})') AS lang
  FROM outbox.report r JOIN outbox.edition e ON e.id = r.edition WHERE r.token = $1
"""

POLICY: Final = (
    "sandbox allow-popups allow-popups-to-escape-sandbox; default-src 'none'; img-src data: https:; "
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# One statement for every way in which a page may not be shown, so that all take the same time.
REPORT: Final = """
SELECT r.id, r.token, r.html
  FROM outbox.report r
 WHERE r.token = $1 AND r.html <> ''
   AND ($2::float8 IS NULL OR r.created_at > now() - $2 * interval '1 second')
   AND ($3::text IS NULL
        OR EXISTS (SELECT FROM outbox.email m WHERE m.report = r.id AND lower(m.recipient) = $3)
        OR EXISTS (SELECT FROM outbox.digest_item i WHERE i.report = r.id AND lower(i.address) = $3))
"""


def is_one_click(body: bytes) -> bool:
    """Return True if a form has the field of RFC 8058 §3.1, in any of the encodings of forms, among any others.

    Mail providers send it with a line end, with further fields, percent-encoded or in other letters. The form is
    untrusted, so each byte is read only a few times.
    """
    if any(
        _is_the_field(pair) for pair in re.split(rb"[&;\r\n\0]+", body.removeprefix(BOM_UTF8)) if len(pair) <= FIELD_MAX
    ):
        return True
    # Of a multipart form, the head of a part is the text before its value, after the last empty line.
    before = VALUE.split(body.replace(b"\r\n", b"\n"))[:-1]
    return any(FIELD.search(one.rpartition(b"\n\n")[2]) for one in before)


def _is_the_field(pair: bytes) -> bool:
    name, _, value = pair.partition(b"=")
    return _decoded(name) == b"list-unsubscribe" and _decoded(value) == b"one-click"


def _decoded(text: bytes) -> bytes:
    return unquote_to_bytes(text.replace(b"+", b" ")).strip().lower()


@dataclass(frozen=True, slots=True)
class About:
    """Report of a token, as its reader knows it."""

    title: str = ""
    language: str | None = None


class Pages:
    """Pages for those who hold a link. A valid link is never refused: only failed attempts are counted."""

    def __init__(
        self, settings: WebSettings, store: Store, callers: Callers, reports: Mapping[str, EditionSettings]
    ) -> None:
        self.settings = settings
        self.reports = reports
        self.store = store
        self.callers = callers
        self.lookups = Lookups()
        self.failed_links = FailedAttemptLimiter()
        self.failed_unsubscribes = FailedAttemptLimiter()

    async def report(self, request: Request) -> Response:
        """GET /r/{token}."""
        html = await self._html(request, request.path_params["token"])
        if html is None:
            return self._missing(request, self.failed_links)
        return HTMLResponse(html, headers={"Content-Security-Policy": POLICY})

    async def _html(self, request: Request, token: str) -> str | None:
        user = None
        if self.settings.user_header is not None:
            user = (self.callers.user(request, self.settings.user_header) or "").lower()
        if not TOKEN.fullmatch(token):
            return None
        async with self._connection(request) as connection:
            row = await connection.fetchrow(REPORT, token, self.settings.expires_s, user)
            # An index compares byte by byte; compare the token itself in constant time.
            if row is None or not hmac.compare_digest(row["token"], token):
                return None
            html: str = row["html"]
            if self.settings.history:
                html = with_history(html, await read_history(connection, row["id"], self.settings.expires_s))
        return html

    async def offer(self, request: Request) -> Response:
        """GET /u/{token}: change nothing, since programs follow the links in emails.

        Without a database, and for a link that nobody has, it names no report.
        """
        try:
            about = await self._about(request)
        except DatabaseUnavailableError:
            about = None
        return self._page(
            request, about or About(), "unsubscribe.html.j2", "unsubscribe", "offer", button="unsubscribe"
        )

    async def unsubscribe(self, request: Request) -> Response:
        """POST /u/{token}: from a mail program (RFC 8058), or from a button of ours, which may also undo it.

        A request without a body counts as one click: the address alone names the list and the reader.
        """
        body = await body_of(request)
        undoes = body == UNDO and is_own(request)
        if not undoes and body.strip() and not is_one_click(body):
            return notice(request, 400, "Not done", "The request does not say List-Unsubscribe=One-Click.")
        about = await self._about(request, RESUBSCRIBE if undoes else UNSUBSCRIBE)
        if about is None:
            return self._missing(request, self.failed_unsubscribes)
        if undoes:
            return self._page(request, about, "notice.html.j2", "undone", "again")
        return self._page(request, about, "unsubscribed.html.j2", "done", "no more", button="undo")

    def _page(
        self, request: Request, about: About, template: str, title: str, text: str, *, button: str = "undo"
    ) -> Response:
        """Return a page in the reader's language."""
        language = language_of(about.language, request.headers.get("accept-language", ""))
        words = WORDS[language]
        return page(
            request,
            template,
            title=words[title],
            report=about.title,
            words=words[text].replace("{title}", about.title),
            button=words[button],
            language=language,
        )

    async def _about(self, request: Request, decision: str | None = None) -> About | None:
        """Return the report of the token, after a decision about it; None if no report has the token."""
        token = request.path_params["token"]
        if not TOKEN.fullmatch(token):
            return None
        async with self._connection(request) as connection:
            if decision is not None and await connection.fetchval(decision, token) is None:
                return None
            row = await connection.fetchrow(ABOUT, token)
        if row is None:
            return None
        ours = self.reports.get(row["report"])
        # A page that is pruned has no language any more; a report that these settings do not have is known by its page.
        return About(
            ours.title if ours is not None else row["title"],
            row["lang"] or (ours.locale if ours is not None else None),
        )

    @asynccontextmanager
    async def _connection(self, request: Request) -> AsyncIterator[Connection]:
        """Wait for the client's turn, then for a connection."""
        async with self.lookups.turn(request, self.callers.address(request)), self.store.connection() as connection:
            yield connection

    def _missing(self, request: Request, failures: FailedAttemptLimiter) -> Response:
        """Return the one answer for each way in which a link is not valid."""
        language = language_of(None, request.headers.get("accept-language", ""))
        words = WORDS[language]
        if (wait_s := failures.take(self.callers.address(request))) > 0:
            after = str(int(wait_s) + 1)
            return notice(request, 429, words["too many"], words["wait"], language=language, Retry_After=after)
        return notice(request, 404, words["not found"], words["no page"], language=language)

    def routes(self) -> list[Route]:
        """Return their routes."""
        return [
            Route("/r/{token}", self.report),
            Route("/u/{token}", self.offer),
            Route("/u/{token}", self.unsubscribe, methods=["POST"]),
        ]
