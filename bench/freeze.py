"""Stop a Postgres as its host would: postmaster and backends at once, to be continued later, or killed."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from outbox.embedded import Server


def family_of(pid: int) -> list[int]:
    """Return the process and its children, the process first."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()  # proc(5): state, then the parent
            if int(fields[1]) == pid:
                children.append(int(stat.parent.name))
    return [pid, *children]


def send(pids: list[int], signum: signal.Signals) -> None:
    """Send a signal to those that are there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)


def freeze(server: Server) -> None:
    """Stop all its processes (SIGSTOP). The postmaster goes first, so that it has no new child meanwhile."""
    os.kill(server.pid, signal.SIGSTOP)
    send(family_of(server.pid), signal.SIGSTOP)


def thaw(server: Server) -> None:
    """Let all its processes go on (SIGCONT)."""
    send(family_of(server.pid), signal.SIGCONT)


def kill(server: Server) -> None:
    """End all its processes at once (SIGKILL), as a lost host does."""
    send(family_of(server.pid), signal.SIGKILL)
    server.stop("immediate")
