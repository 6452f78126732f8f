"""Journal of a sink: a file with a line for each accepted message and recipient."""

import asyncio
from pathlib import Path
from typing import Final

from outbox.sandbox.smtp_sink.record import Accepted

_FLUSH_S: Final = 0.05


class Journal:
    """File of tab-separated lines: Unix time, peer's port, recipient, Message-ID. Written a few times per second."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._lines: list[str] = []
        self._flush_at: asyncio.TimerHandle | None = None

    def note(self, accepted: Accepted) -> None:
        """Add a message; its lines are in the file within 50 ms."""
        head, tail = f"{accepted.at:.6f}\t{accepted.peer_port}\t", f"\t{accepted.message_id}\n"
        self._lines += [f"{head}{recipient}{tail}" for recipient in accepted.recipients]
        if self._flush_at is None:
            self._flush_at = asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)

    def flush(self) -> None:
        """Write the waiting lines, in one write."""
        if self._flush_at is not None:
            self._flush_at.cancel()
            self._flush_at = None
        self._file.write("".join(self._lines).encode())
        self._lines.clear()

    def close(self) -> None:
        """Write the rest and close the file."""
        self.flush()
        self._file.close()
