"""Schedule of a run, all of it from the seed: which fault, when, on which server, for how long. Pure."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, Self, TypeVar

_T = TypeVar("_T")

Target = Literal["relay", "cron", "db", "smtp", "postgres", "mail"]
ON_A_SERVER: Final = frozenset({"relay", "cron", "db", "smtp"})


@dataclass(frozen=True, slots=True)
class Shape:
    """Target of a kind of fault, and its length in leases. No target is hit by two at once."""

    target: Target
    least: float = 0.0
    most: float = 0.0


@dataclass(frozen=True, slots=True)
class Strike:
    """Planned fault. `at_s` counts from the first message; `coin` in [0, 1) decides its details."""

    number: int
    kind: str
    at_s: float
    host: int
    length_s: float
    coin: float

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """Return a strike of a verdict's schedule; further columns of the row are ignored."""
        return cls(*(row[name] for name in cls.__dataclass_fields__))

    def as_row(self) -> dict[str, Any]:
        """Return the strike as a verdict keeps it."""
        return asdict(self)


def plan(
    seed: int | str,
    kinds: Sequence[str],
    shapes: Mapping[str, Shape],
    *,
    seconds: float,
    servers: int,
    lease_s: float,
    every_s: float,
) -> list[Strike]:
    """Plan strikes about every `every_s`; each kind once before any comes again. The last may end after `seconds`."""
    draw = random.Random(f"{seed}/plan")
    bag = _shuffled_for_ever(draw, kinds)
    free_at: dict[tuple[str, int], float] = {}
    strikes: list[Strike] = []
    at_s = draw.uniform(0, every_s)
    while at_s < seconds and kinds:
        kind = next(bag)
        shape = shapes[kind]
        length_s = draw.uniform(shape.least, shape.most) * lease_s
        hosts = draw.sample(range(servers), servers) if shape.target in ON_A_SERVER else [0]
        host = min(hosts, key=lambda one: max(free_at.get((shape.target, one), 0.0), at_s))
        begins_s = max(at_s, free_at.get((shape.target, host), 0.0))
        free_at[shape.target, host] = begins_s + length_s + 0.1
        strikes.append(Strike(len(strikes), kind, round(begins_s, 3), host, round(length_s, 3), draw.random()))
        at_s += draw.uniform(0.5, 1.5) * every_s
    return sorted((one for one in strikes if one.at_s < seconds), key=lambda one: one.at_s)


def storm(seed: int | str, kills: int, *, seconds: float, servers: int) -> list[Strike]:
    """Plan SIGKILLs of relays, evenly over the time, each server in turn in an order that differs each time."""
    draw = random.Random(f"{seed}/storm")
    hosts = _shuffled_for_ever(draw, range(servers))
    every_s = seconds / kills
    return [
        Strike(n, "kill", round((n + draw.random()) * every_s, 3), next(hosts), 0.0, draw.random())
        for n in range(kills)
    ]


def _shuffled_for_ever(draw: random.Random, values: Sequence[_T]) -> Iterator[_T]:
    while True:
        yield from draw.sample(values, len(values))
