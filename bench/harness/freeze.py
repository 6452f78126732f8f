"""Freeze, resume and kill a whole Postgres server: postmaster and backends at once."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from outbox.sandbox.postgres import Server


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
    """Send a signal to the processes that still exist."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)


def freeze(server: Server) -> None:
    """Stop all its processes (SIGSTOP). The postmaster comes first, so that it starts no child meanwhile."""
    os.kill(server.pid, signal.SIGSTOP)
    send(family_of(server.pid), signal.SIGSTOP)


def thaw(server: Server) -> None:
    """Resume all its processes (SIGCONT)."""
    send(family_of(server.pid), signal.SIGCONT)


def kill(server: Server) -> None:
    """Kill all its processes at once (SIGKILL), as a lost host would."""
    send(family_of(server.pid), signal.SIGKILL)
    server.stop("immediate")
