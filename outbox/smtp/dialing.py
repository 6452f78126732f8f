"""Connections to a host name with several addresses ("Happy Eyeballs", RFC 8305).

An address that does not answer delays a connection by a quarter of a second, one that accepts the connection and then
says nothing by a few seconds; neither prevents it. No address is given up before the common deadline, and each one is
tried before it: the last of n gets at least 1/n of the time.
"""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, Final, Generic, TypeVar

STAGGER_S: Final = 0.25  # RFC 8305 §5, "Connection Attempt Delay"
SPEECH_S: Final = 5.0  # until another address is asked as well; servers delay their greeting on purpose
PASSED_S: Final = 300.0  # for which an address that failed or was slow is asked after the others

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address of a host, as `socket.connect` takes it."""

    family: int
    sockaddr: tuple[Any, ...]

    def __str__(self) -> str:
        host = str(self.sockaddr[0])
        return f"[{host}]" if ":" in host else host


class AllFailedError(Exception):
    """No attempt succeeded; `failures` has one error for each endpoint, in the order in which they were asked."""

    def __init__(self, failures: "list[tuple[Endpoint, Exception]]") -> None:
        super().__init__("; ".join(f"{endpoint}: {error}" for endpoint, error in failures))
        self.failures = failures


async def resolve(host: str, port: int) -> list[Endpoint]:
    """Return the addresses of a host, the families taking turns (RFC 8305 §4).

    Raises:
        OSError: the name has no address, or the resolver does not answer.

    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    endpoints = dict.fromkeys(Endpoint(family, sockaddr) for family, _, _, _, sockaddr in found)
    families: dict[int, list[Endpoint]] = {}
    for endpoint in endpoints:
        families.setdefault(endpoint.family, []).append(endpoint)
    return [endpoint for endpoint in chain.from_iterable(zip_longest(*families.values())) if endpoint is not None]


async def connect_to(endpoint: Endpoint) -> socket.socket:
    """Return a connected, non-blocking socket.

    Raises:
        OSError: the connection is refused, or there is no route to the address.

    """
    sock = socket.socket(endpoint.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, endpoint.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


class Attempt:
    """One attempt of a race; it reports when its connection is established."""

    def __init__(self, endpoint: Endpoint, now: float) -> None:
        self.endpoint = endpoint
        self._since = now
        self._patience_s = STAGGER_S

    def is_connected(self) -> None:
        """Report that the host accepted the connection, so that its greeting is worth waiting for."""
        self._since = asyncio.get_running_loop().time()
        self._patience_s = SPEECH_S

    def is_slow_at(self, share_s: float) -> float:
        """Return when the next endpoint is to be asked as well; `share_s` is the least time that each one gets."""
        return self._since + min(self._patience_s, share_s)


@dataclass(slots=True)
class Won(Generic[T]):
    """Result of the attempt that succeeded first, and the endpoints that failed or were slower."""

    result: T
    endpoint: Endpoint
    passed: list[Endpoint]


async def race(
    endpoints: Iterable[Endpoint],
    attempt: Callable[[Attempt], Awaitable[T]],
    *,
    within_s: float,
    discard: Callable[[T], None],
) -> Won[T]:
    """Return the first success; the next endpoint is asked when the last one failed or has been silent for a while.

    Attempts that are no longer needed are cancelled; `discard` closes the result of one that succeeds all the same.

    Raises:
        AllFailedError: none succeeded within this time. Those that said nothing have a TimeoutError.

    """
    run: _Race[T] = _Race(list(endpoints), attempt, within_s, discard)
    try:
        return await run.run()
    finally:
        await run.end()


class _Race(Generic[T]):
    def __init__(
        self,
        endpoints: list[Endpoint],
        attempt: Callable[[Attempt], Awaitable[T]],
        within_s: float,
        discard: Callable[[T], None],
    ) -> None:
        self._endpoints, self._attempt, self._discard = endpoints, attempt, discard
        self._loop = asyncio.get_running_loop()
        self._ends_at = self._loop.time() + within_s
        self._share_s = within_s / max(len(endpoints), 1)
        self._waiting = list(endpoints)
        self._asked: dict[asyncio.Future[T], Attempt] = {}
        self._failures: dict[Endpoint, Exception] = {}

    async def run(self) -> Won[T]:
        latest: Attempt | None = None
        while self._waiting or self._asked:
            now = self._loop.time()
            if now >= self._ends_at:
                break
            at = 0.0 if not self._asked or latest is None else latest.is_slow_at(self._share_s)
            if self._waiting and now >= at:
                latest = self._ask(now)
                continue
            wake_at = min(at, self._ends_at) if self._waiting else self._ends_at
            done, _ = await asyncio.wait(self._asked, timeout=wake_at - now, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in self._asked if task in done]:  # in the order in which they were asked
                endpoint = self._asked.pop(task).endpoint
                error = task.exception()
                if error is None:
                    slower = [other.endpoint for other in self._asked.values()]
                    return Won(task.result(), endpoint, [*self._failures, *slower])
                if not isinstance(error, Exception):
                    raise error
                self._failures[endpoint] = error
        silent = {other: TimeoutError() for other in self._endpoints if other not in self._failures}
        raise AllFailedError([(endpoint, {**silent, **self._failures}[endpoint]) for endpoint in self._endpoints])

    def _ask(self, now: float) -> Attempt:
        attempt = Attempt(self._waiting.pop(0), now)
        self._asked[asyncio.ensure_future(self._attempt(attempt))] = attempt
        return attempt

    async def end(self) -> None:
        """Cancel the attempts that still run, and discard the results of those that succeed in the same moment."""
        for task in self._asked:
            task.cancel()
        for outcome in await asyncio.gather(*self._asked, return_exceptions=True):
            if not isinstance(outcome, BaseException):
                self._discard(outcome)


class Dialer:
    """Connections to one host and port. Addresses that failed or were slow recently are tried last.

    It remembers the addresses that failed, not the one that worked: a name may have several addresses to spread the
    load.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._passed_until: dict[Endpoint, float] = {}

    async def open(
        self, attempt: Callable[[Attempt], Awaitable[T]], *, within_s: float, discard: Callable[[T], None]
    ) -> T:
        """Resolve the name and return the first success of a race over its addresses.

        Raises:
            AllFailedError: see `race`.
            OSError: the name has no address.
            TimeoutError: the resolver did not answer in this time.

        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + within_s
        async with asyncio.timeout_at(ends_at):
            found = await resolve(self.host, self.port)
        now = loop.time()
        self._passed_until = {one: until for one, until in self._passed_until.items() if until > now}
        found.sort(key=lambda endpoint: endpoint in self._passed_until)
        try:
            won = await race(found, attempt, within_s=ends_at - now, discard=discard)
        except AllFailedError:
            self._passed_until.clear()  # none is better than another
            raise
        self._passed_until |= dict.fromkeys(won.passed, loop.time() + PASSED_S)
        self._passed_until.pop(won.endpoint, None)
        return won.result
