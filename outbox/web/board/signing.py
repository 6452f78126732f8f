"""Who looks at the board: somebody whom a trusted proxy names, or who showed the token; and the token of each form."""

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from outbox.database import storable
from outbox.errors import ConfigurationError
from outbox.settings import SECRET_MIN, WebSettings
from outbox.web.guard import Callers, Misses, body_of, is_own
from outbox.web.looks import notice, page

COOKIE: Final = "outbox_board"
SESSION_S: Final = 12 * 3600
FIELDS_MAX: Final = 100
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})

Page = Callable[[Request, "Visitor"], Awaitable[Response]]
Decision = Callable[[Request, "Visitor", dict[str, str]], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who looks. `csrf` stands in each of their forms; `can_leave` if they signed in here."""

    name: str
    csrf: str
    can_leave: bool = False
    cookie: str | None = None  # to be set with the answer: the visitor is new here


class Door:
    """Lets in who may see the board. `is_open` lets in who comes to a loopback address by its own name."""

    def __init__(self, settings: WebSettings, callers: Callers, misses: Misses, *, is_open: bool = False) -> None:
        self.settings = settings
        self.callers = callers
        self.misses = misses
        self.is_open = is_open
        self.token = _token_of(settings)
        # Without a token there is no secret that servers share: a form is then good where it was made.
        self._key = hmac.digest((self.token or secrets.token_urlsafe(32)).encode(), b"outbox board cookie", "sha256")

    def visitor(self, request: Request) -> Visitor | None:
        """Who looks, None if they have to sign in."""
        known = self._read(request.cookies.get(COOKIE, ""))
        if self.settings.board_header is not None:
            name = self.callers.user(request, self.settings.board_header)
            if name is not None and name.lower() in self.settings.board_users:
                is_theirs = known is not None and (known.name, known.can_leave) == (name, False)
                return known if is_theirs else self._new(name)
        if self.token is not None:
            return known if known is not None and known.can_leave else None
        if self.is_open and self._is_local(request):
            return known if known is not None and known.name == "loopback" else self._new("loopback")
        return None

    def _is_local(self, request: Request) -> bool:
        """Whether a browser here means this very address: not a name that points here, not a proxy before it.

        nginx by itself names no client and asks for the address that it was given, but by HTTP/1.0, which no browser
        speaks; and what a browser says of where it comes from passes through.
        """
        forwarded = {"forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via"} & set(request.headers)
        if forwarded or request.scope.get("http_version") == "1.0":
            return False
        told = (request.headers.get("origin", ""), request.headers.get("referer", ""))
        hosts = [request.headers.get("host", ""), *(one.split("/")[2] for one in told if one.count("/") > 1)]
        return all(_named(host) in LOOPBACK for host in hosts)

    def sign_in(self, name: str, token: str) -> Visitor | None:
        """The visitor who shows the token; None if it is not the one."""
        name = " ".join(name.split())[:80]
        if self.token is None or not name or not hmac.compare_digest(_digest(token), _digest(self.token)):
            return None
        return self._new(name, can_leave=True)

    def _new(self, name: str, *, can_leave: bool = False) -> Visitor:
        """The cookie says whether the token was shown: whom a proxy names has it for the forms' sake only."""
        csrf = secrets.token_urlsafe(16)
        until = int(time.time()) + SESSION_S
        said = json.dumps({"name": name, "csrf": csrf, "until": until, "can_leave": can_leave}).encode()
        signed = base64.urlsafe_b64encode(hmac.digest(self._key, said, "sha256") + said).decode()
        return Visitor(name, csrf, can_leave, signed)

    def _read(self, cookie: str) -> Visitor | None:
        """The visitor whom a cookie of ours names, while it is valid."""
        try:
            raw = base64.b64decode(cookie, altchars=b"-_", validate=True)
        except ValueError:
            return None
        signature, said = raw[:32], raw[32:]
        if not hmac.compare_digest(signature, hmac.digest(self._key, said, "sha256")):
            return None
        known: dict[str, Any] = json.loads(said)
        if known["until"] <= time.time():
            return None
        return Visitor(known["name"], known["csrf"], can_leave=known.get("can_leave", False))

    def remember(self, request: Request, response: Response, visitor: Visitor) -> None:
        """Set the visitor's cookie: no script reads it, no other site sends it."""
        if visitor.cookie is not None:
            response.set_cookie(
                COOKIE,
                visitor.cookie,
                max_age=SESSION_S,
                path=request.scope.get("root_path", "") or "/",
                secure=self.callers.is_https(request),
                httponly=True,
                samesite="strict",
            )

    def shown(self, page_of: Page) -> Callable[[Request], Awaitable[Response]]:
        """A page for visitors; others are asked to sign in."""

        async def answer(request: Request) -> Response:
            visitor = self.visitor(request)
            if visitor is None:
                return self.ask(request)
            response = await page_of(request, visitor)
            self.remember(request, response, visitor)
            return response

        return answer

    def decided(self, decision: Decision) -> Callable[[Request], Awaitable[Response]]:
        """What a visitor decides by a form of ours: its fields, each once. Refused if read only."""

        async def answer(request: Request) -> Response:
            visitor = self.visitor(request)
            if visitor is None:
                return self.ask(request)
            if self.settings.read_only:
                return notice(request, 403, "Read only", "This board shows, and decides nothing ([web] read_only).")
            fields = await fields_of(request)
            if not is_own(request) or not hmac.compare_digest(_digest(fields.get("csrf", "")), _digest(visitor.csrf)):
                return notice(request, 403, "Not done", "This form is too old or not from here; load its page again.")
            return await decision(request, visitor, fields)

        return answer

    def ask(self, request: Request, fault: str = "", status: int = 401) -> Response:
        """The form to sign in, or the word that there is no way in."""
        if self.token is None:
            return notice(request, 403, "Not for you", "The board is for those whom the operator has named.")
        return page(request, "board/sign_in.html.j2", status=status, title="Sign in", fault=fault)

    async def enter(self, request: Request) -> Response:
        """POST /sign-in."""
        address = self.callers.address(request)
        if (wait_s := self.misses.wait_s(address)) > 0:
            busy = notice(request, 429, "Too many tries", "Wait a little, and try again.")
            busy.headers["Retry-After"] = str(int(wait_s) + 1)
            return busy
        fields = await fields_of(request)
        visitor = self.sign_in(fields.get("name", ""), fields.get("token", "")) if is_own(request) else None
        if visitor is None:
            self.misses.add(address)
            return self.ask(request, "This is not the token.", 403)
        response = RedirectResponse(request.scope.get("root_path", "") + "/", 303)
        self.remember(request, response, visitor)
        return response

    async def leave(self, request: Request) -> Response:
        """POST /sign-out."""
        visitor, fields = self.visitor(request), await fields_of(request)
        response = RedirectResponse(request.scope.get("root_path", "") + "/", 303)
        if visitor is not None and is_own(request) and fields.get("csrf") == visitor.csrf:
            response.delete_cookie(COOKIE, path=request.scope.get("root_path", "") or "/")
        return response


async def fields_of(request: Request) -> dict[str, str]:
    """The fields of a form, the last of each name, as Postgres can hold them; none if it is no form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        return {}
    try:
        said = parse_qsl((await body_of(request)).decode(), keep_blank_values=True, max_num_fields=FIELDS_MAX)
        return {storable(name): storable(value) for name, value in said}
    except ValueError:
        return {}


def _named(host: str) -> str:
    """The name in `name:port`."""
    host = host.rpartition("@")[2]
    return host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _token_of(settings: WebSettings) -> str | None:
    if settings.board_token is not None:
        return settings.board_token.get_secret_value()
    if settings.board_token_file is None:
        return None
    try:
        token = Path(settings.board_token_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigurationError(
            f"web.board_token_file: {settings.board_token_file} cannot be read ({reason}); name a file that can."
        ) from None
    if len(token) < SECRET_MIN:
        raise ConfigurationError(
            f"web.board_token_file: {settings.board_token_file} holds too short a token; "
            f"write at least {SECRET_MIN} random characters."
        )
    return token
