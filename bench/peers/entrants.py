"""Peers that take part, and their variants; pure."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Peer:
    """Peer, as it is named with `--only`."""

    name: str
    module: str
    imports: tuple[str, ...]
    requirements: tuple[str, ...]
    """What it needs of requirements.txt, as its users would name it."""
    ready_too: bool = True
    """Whether it can be handed ready bytes."""
    alone: bool = False
    """Whether one command makes all of the workers."""
    queue: bool = True
    """Whether it is a queue at all, and so a rival."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """Peer in one variant."""

    peer: Peer
    ready: bool

    @property
    def handed(self) -> str:
        """Return what its workers are given."""
        return "pre-built" if self.ready else "as documented"

    @property
    def title(self) -> str:
        """Return its row in the table."""
        return f"{self.peer.name}, {self.handed}"


PEERS: Final = (
    Peer("procrastinate", "procrastinate", ("procrastinate", "psycopg"), ("procrastinate", "psycopg[binary]")),
    Peer("pgqueuer", "pgqueuer", ("pgqueuer", "asyncpg"), ("pgqueuer", "asyncpg")),
    Peer("celery", "celery", ("celery", "redis"), ("celery", "redis", "hiredis")),
    Peer("faststream-outbox", "faststream_outbox", ("faststream_outbox", "asyncpg"), ("faststream-outbox", "asyncpg")),
    Peer("dbos", "dbos", ("dbos", "psycopg"), ("dbos",)),
    Peer(
        "django-mailer", "django_mailer", ("mailer", "psycopg"), ("django-mailer", "psycopg[binary]"),
        ready_too=False,
    ),
    Peer(
        "django-post_office", "post_office", ("post_office", "psycopg"), ("django-post_office", "psycopg[binary]"),
        ready_too=False, alone=True,
    ),
    Peer("cron-script", "naive", ("psycopg",), ("psycopg[binary]",), ready_too=False, queue=False),
    Peer("cron-script-alone", "naive", ("psycopg",), ("psycopg[binary]",), ready_too=False, alone=True, queue=False),
)  # fmt: skip
OUTBOX: Final = "outbox"
RELAY: Final = "relay"
SMTP_SOURCE: Final = "smtp-source"
NAMES: Final = (OUTBOX, *(peer.name for peer in PEERS), SMTP_SOURCE)


def entrants(peers: list[Peer]) -> list[Entrant]:
    """Return every peer in each of its variants."""
    return [Entrant(peer, ready) for peer in peers for ready in (False, True) if not ready or peer.ready_too]
