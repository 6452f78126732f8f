"""A pool with all that it works with, for tests that need no network and no database."""

import itertools
from collections import Counter
from types import SimpleNamespace

from outbox.relay.marks import Marks
from outbox.relay.pool import Pool
from outbox.relay.server_state import ServerState
from outbox.relay.verdict_history import VerdictHistory
from outbox.relay.verdicts import Verdicts
from outbox.settings import Settings
from outbox.smtp.connection_history import ConnectionHistory
from outbox.smtp.outgoing import OutgoingEmail, Try

ROUTE = "mx.example.com:25"
_emails = itertools.count(1)


class Connection(SimpleNamespace):
    """What a pool sees of a connection."""

    def __init__(self) -> None:
        super().__init__(
            started=[],
            limits=[],
            current=None,
            awaiting_reply=None,
            silence_s=0.0,
            began_at=0.0,
            is_draining=False,
            history=ConnectionHistory(),
        )

    def start(self, tried) -> None:
        self.started.append(tried)

    def close_politely(self) -> None:
        self.is_draining = True

    def limit_to(self, messages) -> None:
        self.limits.append(messages)

    __hash__ = object.__hash__


def a_try(sender: str = "a@example.com", *, recipient: str | None = None, withdrawn: int = 0, **fields: object) -> Try:
    """A try of an email of its own."""
    email = next(_emails)
    recipient = recipient or f"p{email}@example.com"
    return Try(
        OutgoingEmail(1, email, f"mail{email}", withdrawn, withdrawn, sender, recipient, "<1@x>", b"x\r\n", **fields)
    )


def settings(**changed: object) -> Settings:
    return Settings(database_url="postgresql://u@h/d", smtp_url="smtp://mx.example.com:25", **changed)


def a_server(chosen: Settings | None = None) -> ServerState:
    return ServerState(ROUTE, chosen or settings(), wake=lambda: None)


def some_verdicts(server: ServerState) -> Verdicts:
    return Verdicts(
        server.settings, server, VerdictHistory(), counts=Counter(), observers=(), on_settlement=lambda: None
    )


def a_pool(chosen: Settings | None = None, *, headers: object = None, is_held: bool = True) -> Pool:
    """A pool whose session is held, or lost if not `is_held`."""
    server = a_server(chosen)
    verdicts = some_verdicts(server)
    marks = Marks(verdicts, is_held=lambda _: is_held)
    route = SimpleNamespace(headers=headers, name=ROUTE)
    return Pool(
        route,
        server,
        marks,
        verdicts,
        settings=server.settings,
        is_held=lambda _: is_held,
        wake=lambda: None,
    )
