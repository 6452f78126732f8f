"""Bounds on requests and clients: size, framing, failed attempts, parallel lookups; and the headers of every answer.

It knows no pages. `Guarded` is plain ASGI around the application, so that it holds for what the router refuses, too.
"""

import asyncio
import ipaddress
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outbox.log import Events
from outbox.web.sub_path import ORIGIN

log = Events("outbox.web")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

TARGET_MAX: Final = 2048  # bytes of a path with its query
HEAD_MAX: Final = 16 * 1024
BODY_MAX: Final = 64 * 1024
LENGTH_DIGITS_MAX: Final = 20  # of a Content-Length; int() takes no more than 4,300
LOOKUPS_MAX: Final = 4  # of one client at once; fewer than the database connections, so that others have some
LOOKUPS_WAITING_MAX: Final = 1000  # of one client

# A page may do nothing unless its own answer allows it.
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
    """The body of a request is larger than BODY_MAX."""


class TooManyLookupsError(Exception):
    """One client has more than LOOKUPS_WAITING_MAX lookups waiting."""


class Guarded:
    """The application behind checks of size and framing, with HEADERS on every answer that does not set its own.

    An unexpected exception is logged with its traceback but without the address that was asked for, which may hold a
    token.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused, pass on any other."""
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

        if (refusal := _refusal(scope)) is not None:
            await _refuse(with_headers, *refusal)
        else:
            try:
                await self.app(scope, receive, with_headers)
            except ClientDisconnect:
                log.debug("client_gone", "a client closed its connection before it was answered")
            except Exception:
                log.exception("web_fault", "internal error: a {method} request failed", method=scope["method"])
                if begun:
                    raise
                await _refuse(with_headers, 500, b"Internal error; see the operator's log.\n")


def _refusal(scope: Scope) -> tuple[int, bytes] | None:
    """Return the status and body for a request that exceeds a limit or is framed ambiguously; else None.

    A proxy may frame a request with both lengths by the other of the two, and take the rest of its body for another
    client's request (RFC 9112 §6.1 and §11.2). The real length of a body is checked in `body_of`.
    """
    headers = Headers(scope=scope)
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers and ("content-length" in headers or scope.get("http_version") == "1.0"):
        return 400, b"The request has two lengths: Content-Length and Transfer-Encoding.\n"
    if len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"]) > TARGET_MAX:
        return 414, b"The address is too long.\n"
    if sum(len(name) + len(value) for name, value in scope["headers"]) > HEAD_MAX:
        return 431, b"The request's headers are too large.\n"
    if length.isdecimal() and (len(length) > LENGTH_DIGITS_MAX or int(length) > BODY_MAX):
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
    """Return the body of at most BODY_MAX bytes.

    Raises:
        TooLargeError: it is larger; the rest is not read.
    """
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > BODY_MAX:
            raise TooLargeError
    return bytes(found)


class Callers:
    """Addresses and users of requests, behind the proxies that are trusted."""

    def __init__(self, proxies: Iterable[Network]) -> None:
        self.proxies = list(proxies)

    def is_proxied(self, request: HTTPConnection) -> bool:
        """Return True if the peer of the connection is a trusted proxy."""
        return self.is_proxy(_peer(request))

    def address(self, request: HTTPConnection) -> str:
        """Return the client's address: behind trusted proxies the last in X-Forwarded-For that is not one of them."""
        address = _peer(request)
        said = ",".join(request.headers.getlist("x-forwarded-for"))
        for forwarded in reversed([_without_port(part.strip()) for part in said.split(",") if part.strip()]):
            if not self.is_proxy(address):
                break
            address = forwarded
        return address

    def user(self, request: HTTPConnection, header: str) -> str | None:
        """Return the user whom a trusted proxy names; None if it names none, or two."""
        said = request.headers.getlist(header)
        if not self.is_proxied(request) or len(said) != 1:
            return None
        return said[0].strip() or None

    def is_https(self, request: HTTPConnection) -> bool:
        """Return True if the client uses https: to this server, or to a trusted proxy that says so."""
        said = request.headers.get("x-forwarded-proto", "") if self.is_proxied(request) else ""
        return (said or request.url.scheme) == "https"

    def is_proxy(self, address: str) -> bool:
        """Return True if the address is a trusted proxy's."""
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        return any(found in network for network in self.proxies)


def _without_port(address: str) -> str:
    """Return the address alone: some proxies add the client's port, which changes with each of its connections."""
    found = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]+)?|([0-9.]+):[0-9]+", address)
    return (found[1] or found[2]) if found else address


def _peer(request: HTTPConnection) -> str:
    return request.client.host if request.client is not None else ""


def client_of(address: str) -> str:
    """Return the client that an address counts for: itself, or its /64 network of IPv6, which one client has whole."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


class FailedAttemptLimiter:
    """Token bucket of failed attempts per client: `most` at once, and one more every `every_s`.

    Only a failed attempt asks for one, in the same step in which it is answered: however many come at once, no more
    than the bucket holds are answered as failed, and one that is refused costs nothing, so that the wait never grows
    beyond `every_s`. A valid link or token never asks. The `clients_max` clients that failed last are remembered.
    """

    def __init__(
        self,
        most: int = 20,
        every_s: float = 3.0,
        clients_max: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = most
        self.every_s = every_s
        self.clients_max = clients_max
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()  # when a client's bucket is full again

    def take(self, address: str) -> float:
        """Count a failed attempt and return 0; if the client has none left, return the seconds until it has."""
        client, now = client_of(address), self._clock()
        full_at = max(self._full_at.get(client, 0.0), now)
        wait_s = full_at - now - (self.most - 1) * self.every_s
        if wait_s > 0:
            return wait_s
        self._full_at[client] = full_at + self.every_s
        self._full_at.move_to_end(client)
        while len(self._full_at) > self.clients_max:
            self._full_at.popitem(last=False)
        return 0.0

    def __len__(self) -> int:
        return len(self._full_at)


@dataclass(slots=True)
class _Turns:
    free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(LOOKUPS_MAX))
    users: int = 0


class Lookups:
    """Bound on the lookups of one client that run in parallel, so that none takes every database connection."""

    def __init__(self) -> None:
        self._clients: dict[str, _Turns] = {}

    @asynccontextmanager
    async def turn(self, request: Request, address: str) -> AsyncIterator[None]:
        """Wait for the client's turn.

        Raises:
            ClientDisconnect: the client closed its connection meanwhile; nothing is looked up for it.
            TooManyLookupsError: more than LOOKUPS_WAITING_MAX of its lookups wait already.
        """
        client = client_of(address)
        turns = self._clients.setdefault(client, _Turns())
        if turns.users >= LOOKUPS_WAITING_MAX:
            raise TooManyLookupsError
        turns.users += 1
        try:
            async with turns.free:
                if await request.is_disconnected():
                    raise ClientDisconnect
                yield
        finally:
            turns.users -= 1
            if not turns.users:
                self._clients.pop(client, None)


def is_own(request: Request) -> bool:
    """Return True if a form was sent from a page of this very origin, as far as the browser says.

    Current browsers send `Sec-Fetch-Site` over https, others `Origin`. A proxy may have changed `Host`, so the address
    in the settings counts as well. Where both are missing the form's own token decides alone.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin = request.headers.get("origin")
    if origin is None or origin.lower() == request.scope.get(ORIGIN):
        return True
    return origin.partition("://")[2] == request.headers.get("host")
