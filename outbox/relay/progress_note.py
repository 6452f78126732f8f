"""Progress note in a relay's row, which `outbox status` and `outbox watch` show."""

from dataclasses import dataclass
from typing import Final

from outbox.database.connection import Connection
from outbox.database.values import storable

NOTE: Final = "UPDATE outbox.relay SET trouble = $2, stale = $3, sent = $4, last_reply = $5 WHERE id = $1"


@dataclass(frozen=True, slots=True)
class Note:
    """Progress of a relay in its present session."""

    trouble: str | None = None
    """Reason why it cannot work."""
    stale: int = 0
    """Number of its verdicts that came too late."""
    sent: int = 0
    """Number of emails that servers have accepted from this session."""
    last_reply: str | None = None
    """Latest reply of the server, or reason why a connection failed."""


async def write_note(connection: Connection, relay: int, note: Note) -> None:
    """Write the note into the relay's row."""
    trouble, last_reply = (text and storable(text) for text in (note.trouble, note.last_reply))
    await connection.execute(NOTE, relay, trouble, note.stale, note.sent, last_reply)


STATEMENTS: Final = (NOTE,)
