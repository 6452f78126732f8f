"""One relay in this loop, one scripted server, one connection: the endings that a try of SMTP can meet, and its fate.

Sockets and Postgres are real; the relay is no process here, so that an ending costs a fraction of a second. What a
process adds (kills, pauses, its log) is other tests' business.
"""

import asyncio
import functools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trustme

from outbox.relay import connections as connections_module
from outbox.relay.relay import Relay
from outbox.sandbox.smtp_sink import Action, Reply, Sink, Stage, Visit
from outbox.settings import Settings
from tests.support.fault_levers import post
from tests.support.fleet import Fleet, until

TIMEOUT_S = 0.5
BIG = 6_000_000  # bytes of a message that the kernel does not take as a whole; 4 MB it does
LOGIN = ("user", "se cret@1")
SETUP = (Stage.CONNECT, Stage.EHLO, Stage.STARTTLS, Stage.AUTH)


@dataclass(frozen=True)
class Fate:
    """What the database says of an email at last, and how often the server accepted it."""

    state: str
    attempt: int
    withdrawn: int
    trail: tuple[str, ...]
    accepted: int


SENT = Fate("sent", 1, 0, ("accepted",), 1)
SENT_THOUGH_DEFERRED = Fate("sent", 2, 0, ("deferred", "accepted"), 1)
SENT_THOUGH_WITHDRAWN = Fate("sent", 2, 1, ("withdrawn", "accepted"), 1)
DEAD = Fate("dead", 1, 0, ("refused",), 0)
DOUBT = Fate("in_doubt", 1, 0, ("in_doubt",), 0)
DOUBT_THOUGH_ACCEPTED = Fate("in_doubt", 1, 0, ("in_doubt",), 1)


@dataclass(frozen=True)
class Way:
    """How mail goes over a connection: `ready` messages at once, of which number `faulty` meets the ending."""

    pipelining: bool
    ready: int
    faulty: int


PIPELINED = Way(pipelining=True, ready=1, faulty=1)
SEVERAL = Way(pipelining=True, ready=4, faulty=2)
STEPWISE = Way(pipelining=False, ready=4, faulty=2)


class Script:
    """`action` at `stage`, once: to message number `faulty` of those posted together, or to the next set-up.

    `then` is what the same message meets at later stages. With `refusing` the first message is refused at its RCPT,
    so that a RSET comes before the second.
    """

    def __init__(self, *, refusing: bool = False) -> None:
        self.refusing = refusing
        self.arm(Stage.QUIT, None, faulty=0, then={})
        self.met.set()

    def arm(self, stage: Stage, action: Action | None, *, faulty: int, then: Mapping[Stage, Action]) -> None:
        self.stage, self.action, self.faulty, self.then = stage, action, faulty, dict(then)
        self.met = asyncio.Event()
        self.visit: Visit | None = None
        self.behind = b""
        self.begun = 0

    def __call__(self, stage: Stage, visit: Visit) -> Action | None:
        self.begun += stage is Stage.MAIL
        assert stage is not Stage.DOT or not visit.behind, "the next envelope waits for the reply to the dot"
        if self.met.is_set():
            is_same = visit is self.visit and self.begun == self.faulty
            return self.then.pop(stage, None) if is_same else None
        if stage is self.stage and (stage in (*SETUP, Stage.RSET, Stage.QUIT) or self.begun == self.faulty):
            self.visit, self.behind = visit, visit.behind
            self.met.set()
            return self.action
        if self.refusing and stage is Stage.RCPT and self.begun == 1:
            return Reply("550 5.1.1 never")
        return None


@dataclass
class Line:
    """A relay and its server. `meet` posts messages of which one meets an ending, and gives its fate."""

    fleet: Fleet
    way: Way
    sink: Sink
    script: Script
    relay: Relay
    posted: int = 0

    async def meet(
        self,
        stage: Stage,
        action: Action | None,
        *,
        size: int = 200,
        then: Mapping[Stage, Action] | None = None,
        meanwhile: Callable[[str], Awaitable[None]] | None = None,
    ) -> Fate:
        """The fate of the message that met it; those before and behind it were sent, once, at their first try.

        `then` is what it meets at later stages; `meanwhile` is called with its key once the ending is met.
        """
        if stage in SETUP or size >= BIG:  # a connection that has carried much has a kernel that takes much
            self.sink.drop_connections()
            await until(lambda: not self.sink.connections, "the connection is gone, so a new one is set up")
        way, first = self.way, self.posted + 1
        self.posted += way.ready
        self.script.arm(stage, action, faulty=way.faulty, then=then or {})
        await self._post(first, size)
        await until(self.script.met.is_set, f"{stage} is reached")
        if meanwhile is not None:
            await meanwhile(f"mail{first + way.faulty - 1}")
        await self.fleet.settled()
        fates = [await fate(self.fleet, number) for number in range(first, first + way.ready)]
        faulty = fates.pop(way.faulty - 1)
        usual = [DEAD if self.script.refusing and number == 0 else SENT for number in range(way.ready - 1)]
        assert fates == usual, f"those beside the message that met {action} at {stage}"
        if way.ready == 1:
            await self._send_another()
        return faulty

    async def _send_another(self) -> None:
        """The relay goes on after it."""
        self.posted += 1
        await post(self.fleet, 1, first=self.posted)
        await self.fleet.settled()
        assert await fate(self.fleet, self.posted) == SENT

    async def _post(self, first: int, size: int) -> None:
        async with self.fleet.connection.transaction():
            for number in range(self.way.ready):
                is_faulty = number + 1 == self.way.faulty
                await self.fleet.put_emails(1, first=first + number, size=size if is_faulty else 200)
            await self.fleet.connection.execute("NOTIFY outbox")


async def fate(fleet: Fleet, number: int) -> Fate:
    row = await fleet.connection.fetchrow(
        "SELECT d.state, d.attempt, d.withdrawn, array(SELECT a.verdict FROM outbox.attempt a WHERE a.email = d.email"
        " ORDER BY a.settled_at, a.attempt) AS trail"
        " FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email WHERE m.key = $1",
        f"mail{number}",
    )
    accepted = fleet.sink.addresses[f"p{number}@example.com"]
    return Fate(row["state"], row["attempt"], row["withdrawn"], tuple(row["trail"]), accepted)


@functools.cache
def authority() -> trustme.CA:
    return trustme.CA()


@functools.cache
def server_context() -> ssl.SSLContext:
    """A server's, with a certificate for localhost."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority().issue_cert("localhost").configure_cert(context)
    return context


@asynccontextmanager
async def relaying(fleet: Fleet, smtp_url: str, **changes: Any) -> AsyncIterator[Relay]:
    """A relay in this loop with one connection, which trusts the authority; it must end well."""
    settings = Settings.model_validate(
        {
            "database_url": fleet.database,
            "smtp_url": smtp_url,
            "retry": {"base_s": 0.05, "max_s": 0.2, "attempts_max": 4},
            "connections_max": 1,
            "connect_timeout_s": TIMEOUT_S,
            "command_timeout_s": TIMEOUT_S,
            "data_done_timeout_s": TIMEOUT_S,
            "drain_s": 1,
            **changes,
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections_module, "DEADLINE_CHECK_S", 0.05)
        certificates = fleet.directory / "authority.pem"
        authority().cert_pem.write_to_path(str(certificates))
        patch.setenv("SSL_CERT_FILE", str(certificates))
        relay = Relay(settings)
        complaints: list[Any] = []  # of the loop: errors in callbacks, which nobody awaits
        asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
        running = asyncio.create_task(relay.run())
        try:
            yield relay
        finally:
            relay.stop()
            await asyncio.wait_for(running, 20)
    assert complaints == []


@asynccontextmanager
async def line(
    fleet: Fleet, way: Way, *, tls: bool = False, login: bool = False, refusing: bool = False, **changes: Any
) -> AsyncIterator[Line]:
    """A relay and its server, for as long as endings are met; at its end nobody was sent anything twice."""
    script = Script(refusing=refusing)
    sink = Sink(
        script,
        pipelining=way.pipelining,
        tls=server_context() if tls else None,
        login=LOGIN if login else None,
    )
    async with sink:
        fleet.sink = sink
        user = "user:se%20cret%401@" if login else ""
        async with relaying(fleet, f"smtp://{user}localhost:{sink.port}", **changes) as relay:
            yield Line(fleet, way, sink, script, relay)
        assert fleet.twice == {}
        assert {visit.tls for visit in sink.visits if visit.accepted} == {tls}
        assert {visit.authenticated for visit in sink.visits if visit.accepted} == {login}
