"""Search for a host of a database URL that gives a session.

A URL may name several hosts, and a name may have several addresses. Each of them is asked, and one that does not answer
does not use up the time of the next: the next is asked beside it a moment later (RFC 8305, "Happy Eyeballs"), and the
first that gives a session wins. Hosts are asked in their order. Where `target_session_attrs` says which server is
wanted, any order is right, so the next host is asked soon; otherwise the order is a preference, and a host gets
`connect_timeout` before the next is asked. A host or address that did not answer is asked last for `SILENT_S`.
"""

import asyncio
import ipaddress
import random
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

from outbox.settings.postgres_hosts import Host, Plan

T = TypeVar("T")

ADDRESS_STAGGER_S: Final = 0.3  # RFC 8305 §5 recommends 0.25 s
HOST_STAGGER_S: Final = 0.5
HOST_SHARE_S: Final = 2.0  # as libpq's smallest connect_timeout
SHARES: Final = 0.6  # of the whole time, in which all hosts have been asked
REFUSED_GRACE_S: Final = 2.0  # for the other hosts, after one refused our login
AGAIN_S: Final = 1.0
SILENT_S: Final = 60.0


class NoHostError(Exception):
    """No host gave a session. `failures` has the hosts and addresses that were asked, each with its error."""

    def __init__(self, failures: Sequence[tuple[str, Exception]]) -> None:
        self.failures = list(failures)
        super().__init__("; ".join(f"{label}: {error}" for label, error in self.failures))


class SilenceError(TimeoutError):
    """No answer in time."""

    def __init__(self, waited_s: float) -> None:
        self.waited_s = waited_s
        super().__init__(f"no answer within {waited_s:.1f} s" if waited_s < 1 else f"no answer within {waited_s:.0f} s")


class PinnedLoop:
    """The running event loop, but connections of asyncpg to a host go to one address of it.

    asyncpg verifies the certificate for the host that it was given, and looks up and asks all addresses of that host
    by itself, one after the other, within one time limit. Only the event loop lies between these two. A request to
    cancel a statement takes the same way, so it reaches the same server.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, address: str) -> None:
        self._loop = loop
        self._address = address

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def __eq__(self, other: object) -> bool:  # asyncio.current_task(loop) looks loops up in a dict
        return other is self or other is self._loop

    def __hash__(self) -> int:
        return hash(self._loop)

    async def create_connection(self, factory: Any, host: str, port: int, **options: Any) -> Any:
        """Connect to the address; TLS from the first byte is for the host."""
        if options.get("ssl"):
            options.setdefault("server_hostname", host)
        return await self._loop.create_connection(factory, self._address, port, **options)


Opening = Callable[[Host, str, str | None], Awaitable[T]]
"""Opens a session with a host at an address ("": a socket), for a session attribute."""

_silent: dict[str, float] = {}
"""When each host and address that did not answer is asked in its turn again (time.monotonic)."""


class Dial(Generic[T]):
    """One search for a host that gives a session."""

    def __init__(
        self,
        plan: Plan,
        opening: Opening[T],
        *,
        discard: Callable[[T], None],
        is_definite: Callable[[Exception], bool],
        timeout_s: float,
    ) -> None:
        """`discard` ends what was opened and is not needed; `is_definite` recognizes a refused login."""
        self.plan = plan
        self._opening = opening
        self._discard = discard
        self._is_definite = is_definite
        self._timeout_s = timeout_s
        self._timeout: asyncio.Timeout | None = None
        self._outcomes: dict[str, Exception | float] = {}
        """For each address the error, or since when it is asked."""

    async def run(self) -> T:
        """Return what was opened first.

        Raises:
            NoHostError: all were asked, and none gave a session within `timeout_s`.

        """
        attrs = self.plan.target_session_attrs
        end = time.monotonic() + self._timeout_s
        if attrs != "prefer-standby":
            return await self._ask_all(attrs, end)
        with suppress(NoHostError):
            return await self._ask_all("standby", time.monotonic() + self._timeout_s / 2)
        return await self._ask_all("any", end)

    async def _ask_all(self, attrs: str | None, end: float) -> T:
        self._outcomes = {}
        hosts = list(self.plan.hosts)
        if self.plan.shuffles:
            random.shuffle(hosts)
        share_s = self.plan.connect_timeout_s or HOST_SHARE_S
        stagger_s = share_s if self.plan.is_ordered else min(HOST_STAGGER_S, share_s)
        stagger_s = min(stagger_s, SHARES * max(end - time.monotonic(), 0) / len(hosts))
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + end - time.monotonic()) as self._timeout:
                asked = [(str(host), lambda host=host: self._ask_host(host, attrs)) for host in hosts]
                return await self._race(asked, stagger_s)
        except (TimeoutError, _NoneError):
            now = time.monotonic()
            raise NoHostError(
                [
                    (label, SilenceError(now - found) if isinstance(found, float) else found)
                    for label, found in self._outcomes.items()
                ]
            ) from None

    async def _ask_host(self, host: Host, attrs: str | None) -> T:
        if host.is_socket:
            return await self._ask_address(host, "", attrs)
        label = f"resolver of {host.name}"
        self._outcomes[label] = time.monotonic()
        try:
            async with asyncio.timeout(self.plan.connect_timeout_s):
                addresses = [host.address] if host.address else await addresses_of(host.name, host.port)
        except (OSError, TimeoutError, UnicodeError) as error:
            self._outcomes[label] = self._failure(label, error)
            raise _NoneError from None
        del self._outcomes[label]
        asked = [
            (_label(host, address), lambda address=address: self._ask_address(host, address, attrs))
            for address in addresses
        ]
        return await self._race(asked, ADDRESS_STAGGER_S)

    async def _ask_address(self, host: Host, address: str, attrs: str | None) -> T:
        label = _label(host, address)
        self._outcomes[label] = time.monotonic()
        try:
            async with asyncio.timeout(self.plan.connect_timeout_s):
                found = await self._opening(host, address, attrs)
        except Exception as error:  # noqa: BLE001 - each is reported once all have been asked
            self._outcomes[label] = self._failure(label, error)
            is_definite = self._is_definite(error)
            if is_definite and self._timeout is not None and not self._timeout.expired():
                soon = asyncio.get_running_loop().time() + REFUSED_GRACE_S
                self._timeout.reschedule(min(soon, self._timeout.when() or soon))
            raise _NoneError(is_definite=is_definite) from None
        _silent.pop(label, None)
        _silent.pop(str(host), None)
        return found

    def _failure(self, label: str, error: Exception) -> Exception:
        asked_at = self._outcomes[label]
        if isinstance(error, TimeoutError) and not error.args and isinstance(asked_at, float):
            _silent[label] = time.monotonic() + SILENT_S
            return SilenceError(time.monotonic() - asked_at)
        return error

    async def _race(self, asked: Sequence[tuple[str, Callable[[], Awaitable[T]]]], stagger_s: float) -> T:
        """Start one after the other, the next once the former failed or took `stagger_s`; return the first result.

        While one is silent, those that answered without a session are asked again: one of them may be promoted.

        Raises:
            _NoneError: all failed.

        """
        began = time.monotonic()
        waiting = sorted(asked, key=lambda one: _silent.get(one[0], 0.0) > began)  # a stable sort: the others in order
        again: list[tuple[float, str, Callable[[], Awaitable[T]]]] = []
        running: dict[asyncio.Task[T], tuple[str, float, Callable[[], Awaitable[T]]]] = {}
        try:
            while waiting or running:
                if waiting:
                    label, start = waiting.pop(0)
                    running[asyncio.ensure_future(start())] = label, time.monotonic(), start
                next_s = max(again[0][0] - time.monotonic(), 0.0) if again else None
                ended, _ = await asyncio.wait(
                    running, timeout=stagger_s if waiting else next_s, return_when=asyncio.FIRST_COMPLETED
                )
                for task in ended:
                    label, _, start = running.pop(task)
                    error = task.exception()
                    if error is None:
                        return task.result()
                    if not isinstance(error, _NoneError):
                        raise error
                    if not error.is_definite:
                        again.append((time.monotonic() + AGAIN_S, label, start))
                while running and again and again[0][0] <= time.monotonic():
                    _, label, start = again.pop(0)
                    running[asyncio.ensure_future(start())] = label, time.monotonic(), start
            raise _NoneError
        finally:
            await self._end({task: (label, since) for task, (label, since, _) in running.items()}, stagger_s)

    async def _end(self, running: dict["asyncio.Task[T]", tuple[str, float]], stagger_s: float) -> None:
        """End the losers, so that no session of theirs stays open; those that had their turn count as silent."""
        now = time.monotonic()
        for task, (label, since) in running.items():
            if not task.done() and now - since > stagger_s / 2:
                _silent[label] = now + SILENT_S
            task.cancel()
            task.add_done_callback(self._discard_result)
        if running:
            await asyncio.wait(running, timeout=1.0)

    def _discard_result(self, task: "asyncio.Task[T]") -> None:
        if not task.cancelled() and task.exception() is None:
            self._discard(task.result())


class _NoneError(Exception):
    """No host or address that was asked gave a session; the outcomes have the reasons."""

    def __init__(self, *, is_definite: bool = False) -> None:
        self.is_definite = is_definite
        super().__init__()


def _label(host: Host, address: str) -> str:
    return str(host) if not address or address == host.name else f"{host} ({address})"


_lookups: dict[tuple[str, int], "asyncio.Future[list[str]]"] = {}


async def addresses_of(name: str, port: int) -> list[str]:
    """Return the addresses of a name in the resolver's order.

    The resolver has no time limit of its own. A lookup runs in a daemon thread, so that one which hangs keeps neither
    this process nor a pool's threads; those who ask for the same name meanwhile share it.

    Raises:
        OSError: the name has no address (socket.gaierror).

    """
    with suppress(ValueError):
        return [str(ipaddress.ip_address(name))]
    loop = asyncio.get_running_loop()
    running = _lookups.get((name, port))
    if running is None or running.get_loop() is not loop:
        running = _lookups[name, port] = loop.create_future()
        running.add_done_callback(lambda done: done.cancelled() or done.exception())
        threading.Thread(target=_look_up, args=(name, port, loop, running), name="resolver", daemon=True).start()
    return await asyncio.shield(running)


def _look_up(name: str, port: int, loop: asyncio.AbstractEventLoop, future: "asyncio.Future[list[str]]") -> None:
    found: list[str] = []
    failed: Exception | None = None
    try:
        entries = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        found = list(dict.fromkeys(_numeric(entry[4]) for entry in entries))
    except Exception as error:  # noqa: BLE001 - raised again where it is awaited
        failed = error

    def end() -> None:
        if _lookups.get((name, port)) is future:
            del _lookups[name, port]
        if not future.done():
            future.set_result(found) if failed is None else future.set_exception(failed)

    with suppress(RuntimeError):  # the loop was closed meanwhile
        loop.call_soon_threadsafe(end)


def _numeric(address: tuple[Any, ...]) -> str:
    """Return the address as text; a link-local one of IPv6 has a scope."""
    host = str(address[0])
    scope = address[3] if len(address) > 3 else 0  # noqa: PLR2004 - host, port, flow, scope
    return f"{host}%{scope}" if scope and "%" not in host else host
