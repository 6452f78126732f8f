"""Execution of a schedule of faults."""

import asyncio
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

from bench.faults import network, postgres, process  # noqa: F401 - they enter their faults
from bench.faults.environment import LOST, Environment
from bench.faults.registry import FAULTS, Struck
from bench.faults.schedule import Strike
from outbox.errors import OutboxError

__all__ = ["FAULTS", "Nemesis", "Struck"]


@dataclass(eq=False)
class Nemesis:
    """Executor of a schedule; `done` has the results."""

    environment: Environment
    strikes: list[Strike]
    done: list[Struck] = field(default_factory=list)

    async def run(self) -> None:
        """Execute all strikes at their times, from now; return when the last one is over."""
        begins = time.monotonic()
        self.done = [Struck(strike) for strike in self.strikes]
        await asyncio.gather(*(self._strike(struck, begins) for struck in self.done))

    async def _strike(self, struck: Struck, begins: float) -> None:
        await asyncio.sleep(max(begins + struck.strike.at_s - time.monotonic(), 0))
        planned = FAULTS[struck.strike.kind]
        turn = self.environment.postgres_turn if planned.shape.target == "postgres" else nullcontext()
        try:
            async with turn:  # one that takes longer than planned holds up the next
                struck.now()
                struck.note = await planned.act(self.environment, struck)
        except (*LOST, OutboxError) as error:  # another fault has taken from this one what it needs
            struck.note = f"came to nothing: {error or type(error).__name__}"
        struck.ended_at = time.time()
