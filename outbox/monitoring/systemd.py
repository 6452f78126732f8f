"""What systemd is told: that the relay is ready, how it goes, that it still makes progress, that it stops.

The protocol of sd_notify(3): datagrams on the socket that NOTIFY_SOCKET names. Without it everything here is nothing.
"""

import os
import socket
from collections.abc import Mapping

from outbox.log import Events

log = Events("outbox.relay")


class Notifier:
    """Tells the service manager. It never blocks and never raises: a manager that does not listen is no reason to stop.

    `watchdog_s` is within how long it must hear of progress, or None if it does not watch.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.watchdog_s = _watchdog_s(environ)
        place = environ.get("NOTIFY_SOCKET", "")
        # An abstract socket's name begins with NUL, which the variable writes as @.
        self._place = "\0" + place[1:] if place.startswith("@") else place
        self._status = ""
        self._is_stopping = False
        self._is_warned = False
        self._socket: socket.socket | None = None
        if place[:1] in {"/", "@"} and hasattr(socket, "AF_UNIX"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    @property
    def is_heard(self) -> bool:
        """Whether anybody wants to be told."""
        return self._socket is not None

    def ready(self) -> None:
        """The relay holds its session: what waits for this service may start."""
        self._tell("READY=1")

    def status(self, words: str) -> None:
        """How it goes, in one line, for `systemctl status`; told when it changes."""
        if words != self._status:
            self._status = words
            self._tell("STATUS=" + " ".join(words.split()))

    def progress(self) -> None:
        """The relay makes progress: it is not to be restarted."""
        self._tell("WATCHDOG=1")

    def stopping(self) -> None:
        """The relay drains; told once."""
        if not self._is_stopping:
            self._is_stopping = True
            self._tell("STOPPING=1")

    def close(self) -> None:
        """Tell nothing more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, what: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(what.encode("utf-8", "replace"), self._place)
        except BlockingIOError:
            return  # its queue is full: it hears the next one
        except (
            OSError
        ) as error:  # it is told again: a watchdog that nobody feeds ends a relay in the middle of its work
            if not self._is_warned:
                self._is_warned = True
                log.warning("notify_failed", "NOTIFY_SOCKET cannot be told ({reason}); trying again", reason=error)


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """WATCHDOG_USEC in seconds, if it is meant for this process (sd_watchdog_enabled(3))."""
    meant_for, text = environ.get("WATCHDOG_PID", ""), environ.get("WATCHDOG_USEC", "")
    if not (text.isascii() and text.isdigit()) or int(text) == 0 or meant_for not in {"", str(os.getpid())}:
        return None
    return int(text) / 1e6
