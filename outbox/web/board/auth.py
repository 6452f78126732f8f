"""Authentication of the board's users, who sign in with the token or are named by a trusted proxy; tokens of forms.

The board always requires a sign-in. The origin of a request proves nothing: a reverse proxy, a TCP forwarder, another
user of this machine and a local program that fetches arbitrary URLs (SSRF) all connect from a loopback address.
"""

import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from outbox.database.values import storable
from outbox.errors import ConfigurationError
from outbox.log import Events
from outbox.settings import SECRET_MIN, WebSettings
from outbox.web.board.sessions import SESSION_S, Session, Sessions, form_token
from outbox.web.queries import Store
from outbox.web.responses import notice, page
from outbox.web.security import Callers, FailedAttemptLimiter, body_of, is_own

log = Events("outbox.web")

COOKIE: Final = "outbox_board"
FORM_COOKIE: Final = "outbox_board_form"  # for a user whom the proxy names; it proves no identity
NAME_MAX: Final = 80
LINK_NAME: Final = "link"  # user name of a sign-in by the link that `outbox web` printed
FIELDS_MAX: Final = 100
FORM_COOKIE_MAX: Final = 64

Page = Callable[[Request, "User"], Awaitable[Response]]
Decision = Callable[[Request, "User", dict[str, str]], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class User:
    """User of the board. `csrf` is in each of their forms."""

    name: str
    csrf: str
    session: Session | None = None
    """Session of the user; None if a proxy names them."""
    form_cookie: str | None = None
    """Cookie to set with the answer, for a user whom a proxy names."""

    @property
    def can_leave(self) -> bool:
        """Return True if the user signed in here, and so can sign out here."""
        return self.session is not None

    @property
    def key(self) -> str:
        """Return the same key for all requests of one sign-in, or of one user of the proxy."""
        return self.name if self.session is None else self.session.csrf


class Authenticator:
    """Authenticator of the board. `link_token` is the token of this run, used if the settings have no sign-in."""

    def __init__(self, settings: WebSettings, store: Store, callers: Callers, *, link_token: str | None = None) -> None:
        self.settings = settings
        self.callers = callers
        self.link_token = None if settings.has_sign_in else link_token
        self.token = _token_of(settings) or self.link_token
        self.sessions = None if self.token is None else Sessions(store, self.token)
        self.failures = FailedAttemptLimiter()

    async def user(self, request: Request) -> User | None:
        """Return the user of a request; None if they have to sign in.

        Raises:
            DatabaseUnavailableError: Postgres is down, so the session cannot be checked.
        """
        if self.settings.board_header is not None:
            name = self.callers.user(request, self.settings.board_header)
            if name is not None and name.lower() in self.settings.board_users:
                return self._proxied(request, name)
        cookie = request.cookies.get(self._cookie_name(request, COOKIE))
        if self.sessions is None or cookie is None:
            return None
        session = await self.sessions.find(cookie)
        return None if session is None else User(session.name, session.csrf, session)

    def _proxied(self, request: Request, name: str) -> User:
        """Return a user whom the proxy names. Their forms are tied to a random cookie, which any server can check."""
        cookie = request.cookies.get(self._cookie_name(request, FORM_COOKIE), "")
        known = bool(cookie) and len(cookie) <= FORM_COOKIE_MAX
        cookie = cookie if known else secrets.token_urlsafe(24)
        return User(name, form_token(cookie, name), form_cookie=None if known else cookie)

    def _is_token(self, token: str) -> bool:
        return self.token is not None and hmac.compare_digest(_digest(token), _digest(self.token))

    def _cookie_name(self, request: Request, name: str) -> str:
        """Return the cookie name that browsers protect from other hosts, and from http if this is https.

        RFC 6265bis, 4.1.3: a `__Host-` cookie was set by this host, over https and for all its paths.
        """
        if not self.callers.is_https(request):
            return name
        return f"__Host-{name}" if _path(request) == "/" else f"__Secure-{name}"

    def _set(self, request: Request, response: Response, name: str, value: str, age_s: int) -> None:
        """Set a cookie that no script reads and no other site sends."""
        response.set_cookie(
            self._cookie_name(request, name),
            value,
            max_age=age_s,
            path=_path(request),
            secure=self.callers.is_https(request),
            httponly=True,
            samesite="strict",
        )

    def shown(self, page_of: Page) -> Callable[[Request], Awaitable[Response]]:
        """Return the endpoint of a page for users; others get the sign-in form."""

        async def answer(request: Request) -> Response:
            user = await self.user(request)
            if user is None:
                return self.ask(request)
            response = await page_of(request, user)
            if user.form_cookie is not None:
                self._set(request, response, FORM_COOKIE, user.form_cookie, SESSION_S)
            return response

        return answer

    def decided(self, decision: Decision) -> Callable[[Request], Awaitable[Response]]:
        """Return the endpoint of a form of the board, which gets its fields. A read-only board refuses it."""

        async def answer(request: Request) -> Response:
            user = await self.user(request)
            if user is None:
                return self.ask(request)
            if self.settings.read_only:
                return notice(request, 403, "Read-only", "This board is read-only ([web] read_only = true).")
            fields = await fields_of(request)
            if not is_own(request) or not hmac.compare_digest(_digest(fields.get("csrf", "")), _digest(user.csrf)):
                return notice(
                    request, 403, "Not done", "This form has expired or comes from another site. Load its page again."
                )
            return await decision(request, user, fields)

        return answer

    def ask(self, request: Request, error: str = "", status: int = 401, **headers: str) -> Response:
        """Return the sign-in form, or a refusal if only a proxy signs users in."""
        if self.token is None:
            return notice(request, 403, "No access", "The operator has not given you access to this board.")
        response = page(
            request, "board/sign_in.html.j2", status=status, title="Sign in", error=error,
            by_link=self.link_token is not None,
        )  # fmt: skip
        for name, value in headers.items():
            response.headers[name.replace("_", "-")] = value
        return response

    def linked(self, shown: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Return the endpoint of a page at which the link of this run, `GET /?token=…`, signs in.

        The answer leads to the same page without the token, which keeps the token out of the history and the Referer.
        If the link was opened from a terminal or an address bar, the browser sends the strict cookie with a redirect.
        If it was followed from another site, the browser does not, so a page of the board leads on. A forged request
        cannot sign a user in, since it would need the token.
        """

        async def answer(request: Request) -> Response:
            token = request.query_params.get("token")
            if token is None or self.link_token is None or self.sessions is None or request.method != "GET":
                return await shown(request)
            if not self._is_token(token):
                return self._failed(
                    request, "This link is not valid; it works only until the `outbox web` that printed it ends."
                )
            home = _home(request)
            if request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
                response = page(request, "board/signed_in.html.j2", title="Signed in", home=home)
            else:
                response = RedirectResponse(home, 303)
            response.headers["Referrer-Policy"] = "no-referrer"
            if await self.user(request) is None:
                session = await self.sessions.begin(LINK_NAME)
                self._set(request, response, COOKIE, self.sessions.cookie(session), SESSION_S)
            return response

        return answer

    async def enter(self, request: Request) -> Response:
        """POST /sign-in."""
        fields = await fields_of(request)
        if self.sessions is None or not is_own(request):
            return self.ask(request, "Sign in from this page.", 403)
        if not self._is_token(fields.get("token", "")):
            return self._failed(request, "This is not the token.")
        name = " ".join(fields.get("name", "").split())[:NAME_MAX]
        if not name:
            return self.ask(request, "Give your name.", 400)
        # Always a new session, against session fixation; the former one of this browser ends.
        former = await self.sessions.find(request.cookies.get(self._cookie_name(request, COOKIE), ""))
        session = await self.sessions.begin(name)
        if former is not None:
            await self.sessions.end(former)
        response = RedirectResponse(_home(request), 303)
        self._set(request, response, COOKIE, self.sessions.cookie(session), SESSION_S)
        return response

    def _failed(self, request: Request, error: str) -> Response:
        address = self.callers.address(request)
        if (wait_s := self.failures.take(address)) > 0:
            return self.ask(request, "Too many failed sign-ins. Wait a little.", 429, Retry_After=str(int(wait_s) + 1))
        log.warning("sign_in_failed", "a sign-in to the board from {address} failed", address=address[:NAME_MAX])
        return self.ask(request, error, 403)

    async def leave(self, request: Request) -> Response:
        """POST /sign-out: end the session on every server, so that a copied cookie is invalid, too."""
        user, fields = await self.user(request), await fields_of(request)
        response = RedirectResponse(_home(request), 303)
        if user is None or user.session is None or self.sessions is None or not is_own(request):
            return response
        if hmac.compare_digest(_digest(fields.get("csrf", "")), _digest(user.csrf)):
            await self.sessions.end(user.session)
            self._set(request, response, COOKIE, "", 0)
        return response

    async def is_still(self, user: User) -> bool:
        """Return True if the session of a user has not ended."""
        return user.session is None or self.sessions is None or await self.sessions.is_valid(user.session)


async def fields_of(request: Request) -> dict[str, str]:
    """Return the fields of a form, the last of each name, as Postgres can hold them; none if it is not a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        return {}
    try:
        fields = parse_qsl((await body_of(request)).decode(), keep_blank_values=True, max_num_fields=FIELDS_MAX)
        return {storable(name): storable(value) for name, value in fields}
    except ValueError:
        return {}


def _path(request: Request) -> str:
    """Return the path below which the application is mounted."""
    return request.scope.get("root_path", "") or "/"


def _home(request: Request) -> str:
    """Return the address of the overview, always below this host."""
    return "/" + f"{request.scope.get('root_path', '')}/".lstrip("/")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _token_of(settings: WebSettings) -> str | None:
    if settings.board_token is not None:
        return settings.board_token.get_secret_value()
    if settings.board_token_file is None:
        return None
    try:
        token = Path(settings.board_token_file).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigurationError(
            f"web.board_token_file: {settings.board_token_file} cannot be read ({reason}); name a file that can."
        ) from None
    if len(token) < SECRET_MIN:
        raise ConfigurationError(
            f"web.board_token_file: the token in {settings.board_token_file} is too short; "
            f"write at least {SECRET_MIN} random characters."
        )
    return token
