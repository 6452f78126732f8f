"""Tries that wait for a connection, in the order in which they start, prepared in threads where that takes long."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from outbox.smtp.outgoing import OutgoingEmail, Try
from outbox.smtp.route_headers import RouteHeaders, prepare


class ReadyQueue:
    """Queue of tries for one route with these headers.

    The first try starts only once it is signed, if the route signs. That takes milliseconds, in which the event loop
    has marks and its session to look after.
    """

    def __init__(
        self,
        headers: RouteHeaders | None,
        *,
        on_signed: Callable[[], None],
        on_done: Callable[[asyncio.Task[None]], None],
    ) -> None:
        """`on_signed` is called after each signature, `on_done` with the task that signed."""
        self._tries: deque[Try] = deque()
        self._headers = headers
        self._on_signed = on_signed
        self._on_done = on_done
        self._signs = headers is not None and headers.is_slow
        self._signing: asyncio.Task[None] | None = None
        # Its own: in the loop's, names that do not resolve and disks that hang take all threads, of all routes.
        self._signing_thread = ThreadPoolExecutor(1, "outbox signing") if self._signs else None
        self._checking_thread = ThreadPoolExecutor(1, "outbox checking")  # it starts with the first large message

    def __len__(self) -> int:
        return len(self._tries)

    def __iter__(self) -> Iterator[Try]:
        return iter(self._tries)

    @property
    def has_next(self) -> bool:
        """Return True if the first try can be started: it is there, and signed if it is to be."""
        return bool(self._tries) and (not self._signs or self._tries[0].prepared is not None)

    def add(self, tries: Sequence[Try]) -> None:
        """Add tries: suspects in front, since each moment in which one is held counts against it, then urgent ones."""
        ordinary = [one for one in tries if not (one.outgoing.suspect or one.outgoing.urgent)]
        self._tries.extend(ordinary)
        if len(ordinary) < len(tries):
            self._tries.extendleft(one for one in reversed(tries) if one.outgoing.urgent and not one.outgoing.suspect)
            self._tries.extendleft(one for one in tries if one.outgoing.suspect)
        self._sign()

    def put_first(self, tried: Try) -> None:
        """Put a try back that a connection did not send."""
        self._tries.appendleft(tried)

    def pop(self, now: float) -> Try:
        """Return the first try, which starts now."""
        tried = self._tries.popleft()
        tried.start(now)
        return tried

    def pop_last(self) -> Try:
        """Return the try that would have waited for the longest."""
        return self._tries.pop()

    def take_all(self) -> list[Try]:
        """Return all tries, and forget them."""
        tries = list(self._tries)
        self._tries.clear()
        return tries

    async def prepare_large(self, emails: Sequence[OutgoingEmail]) -> list[Try]:
        """Return a try for each large email, prepared in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._checking_thread, _prepared, emails, self._headers)

    async def end(self) -> None:
        """Stop the threads; what they have begun is not waited for."""
        if self._signing is not None:
            self._signing.cancel()
            await asyncio.gather(self._signing, return_exceptions=True)
        for thread in (self._signing_thread, self._checking_thread):
            if thread is not None:
                thread.shutdown(wait=False, cancel_futures=True)

    def _sign(self) -> None:
        if self._signs and self._signing is None and any(one.prepared is None for one in self._tries):
            self._signing = asyncio.get_running_loop().create_task(self._sign_all())
            self._signing.add_done_callback(self._on_done)

    async def _sign_all(self) -> None:
        """Sign until all that waits is signed. A try that is taken from the queue meanwhile is signed for nothing."""
        loop = asyncio.get_running_loop()
        try:
            while (tried := next((one for one in self._tries if one.prepared is None), None)) is not None:
                tried.prepare(await loop.run_in_executor(self._signing_thread, prepare, tried.outgoing, self._headers))
                self._on_signed()
        finally:
            self._signing = None


def _prepared(emails: Sequence[OutgoingEmail], headers: RouteHeaders | None) -> list[Try]:
    return [Try(outgoing, prepare(outgoing, headers)) for outgoing in emails]
