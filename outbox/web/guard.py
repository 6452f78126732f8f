"""Who asks, how often in vain, and how much; and the headers that every answer bears. Knows no pages.

All of it is plain ASGI around the application, so that it holds for what a router refuses, too.
"""

import ipaddress
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outbox.log import Events

log = Events("outbox.web")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

TARGET_MAX: Final = 2048  # bytes of a path with its query
HEAD_MAX: Final = 16 * 1024
BODY_MAX: Final = 64 * 1024
LENGTH_DIGITS_MAX: Final = 20  # of a Content-Length; int() takes no more than 4,300

# What a page may do unless it says otherwise: nothing.
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "private, no-store",
    "Referrer-Policy": "no-referrer",
    "X-Robots-Tag": "noindex, nofollow, noarchive",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


class TooLargeError(Exception):
    """A request has more of a body than anything here asks for."""


class Guarded:
    """The application, with HEADERS on every answer that does not say otherwise, and without what is too large.

    A fault of ours is logged whole, but for the address that was asked for: it may hold a token.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is a request of a fair size."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        begun = False

        async def with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if (fault := _excess(scope)) is not None:
            await _refuse(with_headers, *fault)
        else:
            try:
                await self.app(scope, receive, with_headers)
            except ClientDisconnect:
                log.debug("client_gone", "a client went away before it had said its request")
            except Exception:
                log.exception("web_fault", "a fault of outbox itself: a {method} failed", method=scope["method"])
                if begun:
                    raise
                await _refuse(with_headers, 500, b"Something went wrong here; the operator's log says what.\n")


def _excess(scope: Scope) -> tuple[int, bytes] | None:
    """What of a request is too large, as it is to be answered. How long a body really is `body_of` finds out."""
    said = Headers(scope=scope).get("content-length", "0")
    if len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"]) > TARGET_MAX:
        return 414, b"The address is too long.\n"
    if sum(len(name) + len(value) for name, value in scope["headers"]) > HEAD_MAX:
        return 431, b"The request's headers are too large.\n"
    if said.isdecimal() and (len(said) > LENGTH_DIGITS_MAX or int(said) > BODY_MAX):
        return 413, b"The request is too large.\n"
    return None


async def _refuse(send: Send, status: int, words: bytes) -> None:
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(words)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words})


async def body_of(request: Request) -> bytes:
    """The body, as long as it has at most BODY_MAX bytes.

    Raises:
        TooLargeError: it has more; nothing further is read.
    """
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > BODY_MAX:
            raise TooLargeError
    return bytes(found)


class Callers:
    """Whom a request comes from, behind proxies that are trusted."""

    def __init__(self, proxies: Iterable[Network]) -> None:
        self.proxies = list(proxies)

    def is_proxied(self, request: HTTPConnection) -> bool:
        """Whether the one who holds the other end of the connection is a trusted proxy."""
        return self._is_trusted(_peer(request))

    def address(self, request: HTTPConnection) -> str:
        """The client's address: the last in X-Forwarded-For that no trusted proxy has, if a trusted one sends it."""
        address = _peer(request)
        said = ",".join(request.headers.getlist("x-forwarded-for"))
        for forwarded in reversed([_without_port(part.strip()) for part in said.split(",") if part.strip()]):
            if not self._is_trusted(address):
                break
            address = forwarded
        return address

    def user(self, request: HTTPConnection, header: str) -> str | None:
        """Who a trusted proxy says it is; None if nobody says so, or says it twice."""
        said = request.headers.getlist(header)
        if not self.is_proxied(request) or len(said) != 1:
            return None
        return said[0].strip() or None

    def is_https(self, request: HTTPConnection) -> bool:
        """Whether the client came by https: to us, or to a trusted proxy that says so."""
        said = request.headers.get("x-forwarded-proto", "") if self.is_proxied(request) else ""
        return (said or request.url.scheme) == "https"

    def _is_trusted(self, address: str) -> bool:
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        return any(found in network for network in self.proxies)


def _without_port(address: str) -> str:
    """The address alone: some proxies add the client's port, which changes with each of its connections."""
    found = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]+)?|([0-9.]+):[0-9]+", address)
    return (found[1] or found[2]) if found else address


def _peer(request: HTTPConnection) -> str:
    return request.client.host if request.client is not None else ""


class Misses:
    """How often an address asked in vain lately. Who asks well is never counted, however many share an address.

    Each has `most` misses in hand, of which one comes back every `every_s`. Of addresses at most `addresses_max` are
    remembered, those that missed last; an IPv6 address counts as its network of 64 bits, which one client has whole.
    """

    def __init__(
        self,
        most: int = 20,
        every_s: float = 3.0,
        addresses_max: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = most
        self.every_s = every_s
        self.addresses_max = addresses_max
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()  # when it has all its misses in hand again

    def wait_s(self, address: str) -> float:
        """How long it has to wait before it may ask again; 0 if not at all."""
        ahead_s = self._full_at.get(_counted(address), 0.0) - self._clock()
        return max(ahead_s - (self.most - 1) * self.every_s, 0.0)

    def add(self, address: str) -> None:
        """Count a miss."""
        key, now = _counted(address), self._clock()
        self._full_at[key] = max(self._full_at.pop(key, 0.0), now) + self.every_s
        while len(self._full_at) > self.addresses_max:
            self._full_at.popitem(last=False)

    def __len__(self) -> int:
        return len(self._full_at)


def _counted(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


def is_own(request: Request) -> bool:
    """Whether a request that changes something comes from a page of this very origin, as the browser says.

    `Sec-Fetch-Site` is sent by all browsers of today, `Origin` by older ones; where neither is there, the token in
    the form decides alone.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin = request.headers.get("origin")
    if origin is None:
        return True
    return origin.partition("://")[2] == request.headers.get("host")
