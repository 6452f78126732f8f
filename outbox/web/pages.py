"""The report behind a link, as it was generated, and the page on which one click ends the emails.

The report is answered as a document of its own, sandboxed: an opaque origin that runs no script, sends no form and
loads nothing but images. So a report's data, or a template of the user's, cannot act on this site or its visitors. A
link that is unknown, expired, pruned or somebody else's is answered alike, whichever it is.
"""

import hmac
import re
from typing import Final

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from outbox.settings import WebSettings
from outbox.web.guard import Callers, Misses, body_of, is_own
from outbox.web.history import read_history, with_history
from outbox.web.looks import notice, page
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

# One look for every way in which a page may not be shown, so that all take the same steps.
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
    """Whether a form has the one field of RFC 8058 §3.1, in either of the two ways in which forms are sent.

    Anybody may send one, so each byte is looked at a few times at most: a part's head is what stands before its value,
    down from the last empty line.
    """
    if body == b"List-Unsubscribe=One-Click":
        return True
    before = body.split(b"\r\n\r\nOne-Click\r\n")[:-1]
    return any(FIELD.search(one.rpartition(b"\r\n\r\n")[2]) for one in before)


class Pages:
    """What those see who hold a link."""

    def __init__(self, settings: WebSettings, store: Store, callers: Callers, misses: Misses) -> None:
        self.settings = settings
        self.store = store
        self.callers = callers
        self.misses = misses

    async def report(self, request: Request) -> Response:
        """GET /r/{token}."""
        address = self.callers.address(request)
        if (wait_s := self.misses.wait_s(address)) > 0:
            return self._busy(request, wait_s)
        html = await self._html(request, request.path_params["token"])
        if html is None:
            self.misses.add(address)
            return self._missing(request)
        return HTMLResponse(html, headers={"Content-Security-Policy": POLICY})

    async def _html(self, request: Request, token: str) -> str | None:
        user = None
        if self.settings.user_header is not None:
            user = (self.callers.user(request, self.settings.user_header) or "").lower()
        if not TOKEN.fullmatch(token):
            return None
        async with self.store.connection() as connection:
            row = await connection.fetchrow(REPORT, token, self.settings.expires_s, user)
            # An index compares byte by byte; that it found the very token is said in constant time.
            if row is None or not hmac.compare_digest(row["token"], token):
                return None
            html: str = row["html"]
            if self.settings.history:
                html = with_history(html, await read_history(connection, row["id"], self.settings.expires_s))
        return html

    async def offer(self, request: Request) -> Response:
        """GET /u/{token}: nothing changes by looking, since programs follow links in emails."""
        return page(request, "unsubscribe.html.j2", title="Unsubscribe")

    async def unsubscribe(self, request: Request) -> Response:
        """POST /u/{token}: by a mail program (RFC 8058), or by a button of ours, which may undo it, too."""
        address = self.callers.address(request)
        if (wait_s := self.misses.wait_s(address)) > 0:
            return self._busy(request, wait_s)
        body = await body_of(request)
        undoes = body == UNDO and is_own(request)
        if not undoes and not is_one_click(body):
            return notice(request, 400, "Not done", "The request does not say List-Unsubscribe=One-Click.")
        name = await self._decided(request.path_params["token"], RESUBSCRIBE if undoes else UNSUBSCRIBE)
        if name is None:
            self.misses.add(address)
            return self._missing(request)
        if undoes:
            return notice(request, 200, "Undone", f"Emails of “{name}” come to your address again.")
        return page(request, "unsubscribed.html.j2", title="Done", name=name)

    async def _decided(self, token: str, statement: str) -> str | None:
        """The report's name; None if no report has the token."""
        if not TOKEN.fullmatch(token):
            return None
        async with self.store.connection() as connection:
            name: str | None = await connection.fetchval(statement, token)
        return name

    def _missing(self, request: Request) -> Response:
        return notice(request, 404, "Nothing here", "This link leads to no page: it is not whole, or its time is over.")

    def _busy(self, request: Request, wait_s: float) -> Response:
        return notice(request, 429, "Too many tries", "Wait a little, and try again.", Retry_After=str(int(wait_s) + 1))

    def routes(self) -> list[Route]:
        """All that they answer."""
        return [
            Route("/r/{token}", self.report),
            Route("/u/{token}", self.offer),
            Route("/u/{token}", self.unsubscribe, methods=["POST"]),
        ]
