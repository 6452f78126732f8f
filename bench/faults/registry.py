"""Faults by name. A new one is a function under `@fault`, in the module of its target (process, postgres, network).

It acts on the environment from outside, for as long as its strike says, and then restores it. It returns a note for
the verdict; "" if all went as planned.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from bench.faults.environment import Environment
from bench.faults.schedule import Shape, Strike, Target
from bench.faults.server import ServerProcess

NOBODY: Final = "there was no process"


@dataclass(eq=False)
class Struck:
    """Strike with its real times."""

    strike: Strike
    began_at: float = 0.0
    ended_at: float = 0.0
    note: str = ""
    victim: ServerProcess | None = None

    def now(self) -> None:
        """Note that it begins now, after what it waited for."""
        self.began_at = time.time()

    def as_row(self) -> dict[str, Any]:
        """Return the row that a verdict keeps."""
        process = self.victim
        return {
            **self.strike.as_row(),
            "began_at": self.began_at,
            "ended_at": self.ended_at,
            "victim": f"{process.what} {process.number}, pid {process.child.pid}" if process else "",
            "note": self.note,
        }


Act = Callable[[Environment, Struck], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Fault:
    """Fault behind a name in --faults."""

    act: Act
    shape: Shape
    says: str
    alone: bool = False
    """Whether the promise is another one under it, so that it is in no mix unless it is named."""


FAULTS: dict[str, Fault] = {}


def fault(
    name: str, target: Target, least: float = 0.0, most: float = 0.0, *, alone: bool = False
) -> Callable[[Act], Act]:
    """Enter a fault under its name; it lasts from `least` to `most` leases."""

    def enter(act: Act) -> Act:
        FAULTS[name] = Fault(act, Shape(target, least, most), (act.__doc__ or "").split("\n", 1)[0].rstrip("."), alone)
        return act

    return enter
