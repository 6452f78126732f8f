"""The report behind a link, as it was generated, and the page on which one click ends the emails.

The report is a sandboxed document with an opaque origin: it runs no script, sends no form and loads nothing but images.
So neither a report's data nor the user's own template can act on this site or its visitors. A link that is unknown,
expired, pruned or another recipient's gets the same answer.
"""

import hmac
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from outbox.settings import WebSettings
from outbox.web.guard import Callers, FailedAttemptLimiter, Lookups, body_of, is_own
from outbox.web.history import read_history, with_history
from outbox.web.looks import NO_PAGE, NOT_FOUND, notice, page
from outbox.web.store import Store

TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{16,128}")  # generate makes 22 characters, 128 bits
FIELD: Final = re.compile(rb'name="?List-Unsubscribe"?(?:\r\n|$)')

UNDO: Final = b"undo=yes"
UNSUBSCRIBE: Final = "SELECT outbox.unsubscribe($1)"
RESUBSCRIBE: Final = "SELECT outbox.resubscribe($1)"

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
    """Return True if a form has the one field of RFC 8058 §3.1, in either of the two encodings of forms.

    The form is untrusted, so each byte is read only a few times: the head of a part is the text before its value, after
    the last empty line.
    """
    if body == b"List-Unsubscribe=One-Click":
        return True
    before = body.split(b"\r\n\r\nOne-Click\r\n")[:-1]
    return any(FIELD.search(one.rpartition(b"\r\n\r\n")[2]) for one in before)


class Pages:
    """Pages for those who hold a link. A valid link is never refused: only failed attempts are counted."""

    def __init__(self, settings: WebSettings, store: Store, callers: Callers) -> None:
        self.settings = settings
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
        """GET /u/{token}: change nothing, since programs follow the links in emails."""
        return page(request, "unsubscribe.html.j2", title="Unsubscribe")

    async def unsubscribe(self, request: Request) -> Response:
        """POST /u/{token}: from a mail program (RFC 8058), or from a button of ours, which may also undo it."""
        body = await body_of(request)
        undoes = body == UNDO and is_own(request)
        if not undoes and not is_one_click(body):
            return notice(request, 400, "Not done", "The request does not say List-Unsubscribe=One-Click.")
        name = await self._decided(request, RESUBSCRIBE if undoes else UNSUBSCRIBE)
        if name is None:
            return self._missing(request, self.failed_unsubscribes)
        if undoes:
            return notice(request, 200, "Undone", f"You get emails of “{name}” again.")
        return page(request, "unsubscribed.html.j2", title="Done", name=name)

    async def _decided(self, request: Request, statement: str) -> str | None:
        """Return the report's name; None if no report has the token."""
        token = request.path_params["token"]
        if not TOKEN.fullmatch(token):
            return None
        async with self._connection(request) as connection:
            name: str | None = await connection.fetchval(statement, token)
        return name

    @asynccontextmanager
    async def _connection(self, request: Request) -> AsyncIterator[Any]:
        """Wait for the client's turn, then for a connection."""
        async with self.lookups.turn(request, self.callers.address(request)), self.store.connection() as connection:
            yield connection

    def _missing(self, request: Request, failures: FailedAttemptLimiter) -> Response:
        """Return the one answer for each way in which a link is not valid."""
        if (wait_s := failures.take(self.callers.address(request))) > 0:
            after = str(int(wait_s) + 1)
            return notice(request, 429, "Too many attempts", "Wait a little and try again.", Retry_After=after)
        return notice(request, 404, NOT_FOUND, NO_PAGE)

    def routes(self) -> list[Route]:
        """Return their routes."""
        return [
            Route("/r/{token}", self.report),
            Route("/u/{token}", self.offer),
            Route("/u/{token}", self.unsubscribe, methods=["POST"]),
        ]
