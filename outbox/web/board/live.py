"""Live state of the fleet, read once for all viewers of a process and sent to them as it changes.

It reads the snapshots of `outbox watch`, as seldom as that, and does not listen: a flood of NOTIFY costs nothing here.
While the board has no viewer it reads only the relays' own counts, every few seconds, for the plot of the last hour.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import asyncpg

from outbox.errors import DatabaseUnavailableError
from outbox.log import Events
from outbox.operations.snapshot import Snapshot
from outbox.operations.watch import Watcher
from outbox.settings import Settings
from outbox.web.board.streams import Streams
from outbox.web.board.throughput import Hour
from outbox.web.queries import Store

log = Events("outbox.web")

LOOK_S: Final = 1.0  # between two snapshots, while there are viewers
REST_S: Final = 10.0  # between two samples, while there are none
WANTED_S: Final = 15.0  # for so long a page that was requested counts as a viewer
FRESH_S: Final = 2.0
NEWEST: Final = 100_000  # emails among which what is settled is counted: never the whole table
WAIT_MAX_S: Final = 1.5  # a page waits so long for a look of this moment, and then shows an older one
HEARTBEAT_S: Final = 10.0
SIGNED_IN_S: Final = 10.0  # between two checks of a viewer's session
STREAM_MAX_S: Final = 900.0  # then the browser comes again, and has to be signed in still
RELAYS_MAX: Final = 30
GONE_MAX: Final = 5

# All relays that live, and the latest of the others, for their last replies.
FLEET: Final = """
SELECT id, host, pid, version, route, started_at, ended_at, sent, last_reply, trouble, now() AS at FROM (
    (SELECT * FROM outbox.relay WHERE ended_at IS NULL ORDER BY id DESC LIMIT 500)
    UNION
    (SELECT * FROM outbox.relay ORDER BY id DESC LIMIT $1)
) r ORDER BY id
"""

# The hour before this process, as far as the newest emails show it: an index on times would cost relays each email.
BEFORE: Final = """
SELECT (extract(epoch FROM settled_at) / 60)::bigint AS minute, count(*) AS n
  FROM (SELECT state, settled_at FROM outbox.delivery ORDER BY email DESC LIMIT $1) d
 WHERE state = 'sent' AND settled_at > now() - interval '1 hour' AND settled_at <= now() GROUP BY 1
"""
BEFORE_MAX: Final = 50_000


@dataclass(frozen=True, slots=True)
class RelayKnown:
    """Row of a relay, alive or not."""

    id: int
    host: str
    pid: int
    version: str
    route: str
    started_at: datetime
    ended_at: datetime | None
    sent: int
    last_reply: str | None
    trouble: str | None


@dataclass(frozen=True, slots=True)
class Seen:
    """Facts that a page shows. `age_s` is the age of the snapshot, `trouble` the reason why there is no newer one."""

    snapshot: Snapshot | None
    age_s: float
    trouble: str | None
    relays: list[RelayKnown] = field(default_factory=list)
    """Relays that live, then the latest that do not."""


Draw = Callable[[str], dict[str, Any]]
"""Function that returns an event's content for an application that is mounted below a path."""


class Live:
    """Poller for the whole process, and the events for its viewers."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.watcher = Watcher(settings, newest=NEWEST)
        self.hour = Hour()
        self.store = store
        self._waiting: set[asyncio.Event] = set()
        self.streams = Streams()
        self._relays: dict[int, RelayKnown] = {}
        self._wanted_until = 0.0
        self._wanted = asyncio.Event()
        self._ending = False
        self._looks = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._events: dict[str, bytes] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Poll until the application ends."""
        self._begin()
        try:
            yield
        finally:
            await self.close()

    async def close(self) -> None:
        """Stop polling."""
        self.end()
        for task in self._tasks:
            task.cancel()
        self.watcher.close()  # before the wait, since a look that is cancelled would wait for its rollback
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self) -> None:
        """Start polling at the first request: a mounted application may not run its lifespan."""
        if not self._tasks and not self._ending:
            self._tasks = [asyncio.create_task(self._poll()), asyncio.create_task(self._announce())]
            for task in self._tasks:
                task.add_done_callback(_log_crash)

    def end(self) -> None:
        """End all streams: the process stops."""
        self._ending = True
        self._wake()

    @property
    def seen(self) -> Seen:
        """Return the latest facts."""
        snapshot = self.watcher.snapshot
        now = time.monotonic()
        age_s = 0.0 if snapshot is None else now - self.watcher.looked_at
        trouble = self.watcher.trouble
        if trouble is None and (waited_s := self.watcher.waited_s(now)) > FRESH_S * 2:
            trouble = f"Postgres has not answered for {waited_s:.0f} s"
        living = {relay.id for relay in snapshot.relays} if snapshot is not None else set()
        known = [relay for relay in self._relays.values() if relay.id in living]
        gone = [relay for relay in reversed(self._relays.values()) if relay.id not in living]
        return Seen(snapshot, age_s, trouble, known + gone[:GONE_MAX])

    async def fresh(self) -> Seen:
        """Return the facts of this moment, or older ones if Postgres takes longer than a page may."""
        self._want()
        ends_at = time.monotonic() + WAIT_MAX_S
        while not self._is_fresh and (left_s := ends_at - time.monotonic()) > 0:
            await self._woken(left_s)
        return self.seen

    @property
    def _is_fresh(self) -> bool:
        """Return True if waiting is of no use: the facts are of this moment, or the read in progress takes long."""
        snapshot, watcher, now = self.watcher.snapshot, self.watcher, time.monotonic()
        if self._ending or watcher.trouble is not None:
            return True
        if snapshot is None:
            return False
        is_counted = snapshot.waiting is not None or self._looks > 1
        return (is_counted and now - watcher.looked_at < FRESH_S) or watcher.waited_s(now) > WAIT_MAX_S

    async def events(
        self, root: str, viewer: str, is_signed_in: Callable[[], Awaitable[bool]], *, draw: Draw
    ) -> AsyncIterator[bytes]:
        """Yield an event for each change; end with the process, the session, or after `STREAM_MAX_S`.

        `root` is the path below which the application is mounted, `viewer` the owner of the stream. The event of a
        `root` is drawn once for all its viewers.
        """
        ends_at = time.monotonic() + STREAM_MAX_S
        said = b""
        if (stream := self.streams.enter(viewer)) is None:  # many came at once, each before the others were counted
            yield b"retry: 30000\n\n"
            return
        try:
            yield b"retry: 2000\n\n"
            checked_at = time.monotonic()
            while not self._ending and not stream.is_ended and time.monotonic() < ends_at:
                if time.monotonic() - checked_at >= SIGNED_IN_S:
                    if not await is_signed_in():
                        return
                    checked_at = time.monotonic()
                self._want()
                event = self._event(root, draw)
                yield event if event != said else b": still here\n\n"
                said = event
                await self._woken(HEARTBEAT_S)
        finally:
            self.streams.leave(stream)

    async def _woken(self, at_most_s: float) -> None:
        news = asyncio.Event()
        self._waiting.add(news)
        try:
            async with asyncio.timeout(at_most_s):
                if not self._ending:
                    await news.wait()
        except TimeoutError:
            pass  # no change: the caller goes on
        finally:
            self._waiting.discard(news)

    def _event(self, root: str, draw: Draw) -> bytes:
        if root not in self._events:
            self._events[root] = f"data: {json.dumps(draw(root))}\n\n".encode()
        return self._events[root]

    def _want(self) -> None:
        self._begin()
        self._wanted_until = time.monotonic() + WANTED_S
        self._wanted.set()

    def _wake(self) -> None:
        self._events.clear()
        for news in self._waiting:
            news.set()

    async def _poll(self) -> None:
        """Poll for ever: whole snapshots while there are viewers, else the relays' counts."""
        while True:
            is_wanted = time.monotonic() < self._wanted_until
            await self._read_fleet()
            if is_wanted:
                await self.watcher.look_again()
                self._looks += 1
                await asyncio.sleep(LOOK_S)
                continue
            self._wanted.clear()
            try:
                async with asyncio.timeout(REST_S):
                    await self._wanted.wait()
            except TimeoutError:
                continue  # time for a sample

    async def _announce(self) -> None:
        """Wake the streams for each change, and every second while the facts grow old."""
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self.watcher.seen.wait()
            except TimeoutError:
                if self.watcher.trouble is None and self.watcher.asked_at is None:
                    continue  # it rests
            self.watcher.seen.clear()
            self._wake()

    async def _read_fleet(self) -> None:
        try:
            async with self.store.connection() as connection:
                rows = await connection.fetch(FLEET, RELAYS_MAX)
                if not self.hour.is_begun and rows:
                    self.hour.begin(await connection.fetch(BEFORE, BEFORE_MAX), rows[0]["at"])
        except (DatabaseUnavailableError, asyncpg.PostgresError):
            return  # the watcher reports what is wrong
        self._relays = {row["id"]: RelayKnown(*list(row)[:-1]) for row in rows}
        if rows:
            self.hour.note(rows[0]["at"], {row["id"]: row["sent"] for row in rows})


def _log_crash(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("board_fault", "live updates of the board stopped: {error}", error=repr(error), exc_info=error)
