"""Resources that processes have used, as Linux counts them below /proc."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from outbox.database.driver import DriverConnection

TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def cpu_s(pids: Iterable[int]) -> float:
    """Return the CPU seconds of these processes, and of those of their children that have ended."""
    return sum(sum(map(int, _stat(pid)[11:15])) for pid in pids) / TICKS_PER_S


def family(pid: int) -> list[int]:
    """Return a process and its present children."""
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid, *(number for number in numbers if (stat := _stat(number)) and int(stat[1]) == pid)]


def memory_mb(pid: int) -> float:
    """Return the memory that would be free without it: what it shares with others counts in part."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


async def postmaster(connection: DriverConnection) -> int:
    """Return the process id of the server that answers."""
    return int(await connection.fetchval(r"SELECT split_part(pg_read_file('postmaster.pid'), E'\n', 1)"))


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on (see proc(5)); none for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
