"""Picture of a run: a lane per server, one for Postgres, one for the mail server; time goes to the right.

Plain SVG text, light or dark as the reader's system is. Knows nothing of how a run is made.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final
from xml.sax.saxutils import escape, quoteattr

LEFT: Final = 96
RIGHT: Final = 24
WIDTH: Final = 1280
TOP: Final = 92
LANE: Final = 66
GAP: Final = 12
ROWS: Final = {"marks": (24, 6), "sends": (34, 6), "settles": (44, 6)}
FLOOR: Final = 62

STYLE: Final = """
svg { background: var(--paper); font: 11px ui-sans-serif, system-ui, sans-serif; --paper: #fff; --ink: #1c2430;
 --faint: #6b7685; --line: #d9dee5; --lane: #f5f7f9; --mark: #b7791f; --send: #2563eb; --settle: #15803d;
 --claims: #94a3b8; --relay: #dc2626; --cron: #9333ea; --db: #0891b2; --smtp: #db2777; --doubt: #ea580c; }
@media (prefers-color-scheme: dark) { svg { --paper: #11161d; --ink: #e6ebf2; --faint: #93a0b1; --line: #2b3542;
 --lane: #18202a; --mark: #f0b849; --send: #6ea8fe; --settle: #4ade80; --claims: #64748b; --relay: #f87171;
 --cron: #c084fc; --db: #22d3ee; --smtp: #f472b6; --doubt: #fb923c; } }
text { fill: var(--ink); } .faint { fill: var(--faint); } .head { font-size: 15px; font-weight: 600; }
.lane { fill: var(--lane); } .grid { stroke: var(--line); } .claims { fill: var(--claims); opacity: .45; }
.marks { stroke: var(--mark); } .sends { stroke: var(--send); } .settles { stroke: var(--settle); }
.band { opacity: .2; } .edge { stroke-width: 1.5; } .name { font-size: 9px; } .doubt { fill: var(--doubt); }
.twice { fill: none; stroke: var(--relay); stroke-width: 2; }
"""
GROUPS: Final = {
    "relay": "relay",
    "cron": "cron",
    "db": "db",
    "postgres": "db",
    "smtp": "smtp",
    "mail": "smtp",
}


@dataclass(frozen=True, slots=True)
class Band:
    """Fault in a lane, in seconds from the beginning."""

    name: str
    target: str
    begins_s: float
    ends_s: float
    note: str = ""


@dataclass(eq=False)
class Lane:
    """Events of a lane, in seconds from the beginning; `claims` are (when, how many)."""

    name: str
    bands: list[Band] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)
    sends: list[float] = field(default_factory=list)
    settles: list[float] = field(default_factory=list)
    doubts: list[float] = field(default_factory=list)
    twice: list[float] = field(default_factory=list)
    claims: list[tuple[float, int]] = field(default_factory=list)


def draw(
    title: str, subtitle: str, lanes: Sequence[Lane], *, ends_s: float, notes: Iterable[tuple[float, str]] = ()
) -> str:
    """Return the SVG. `notes` are moments of the whole run, as (second, word)."""
    height = TOP + len(lanes) * (LANE + GAP) + 34
    scale = (WIDTH - LEFT - RIGHT) / max(ends_s, 0.1)
    parts = [
        _opening(title, height),
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="var(--paper)"/>',
        f'<text class="head" x="{LEFT}" y="26">{escape(title)}</text>',
        f'<text class="faint" x="{LEFT}" y="44">{escape(subtitle)}</text>',
        *_legend(),
    ]
    most = max((count for lane in lanes for _, count in lane.claims), default=1)
    for number, lane in enumerate(lanes):
        parts += _lane(lane, TOP + number * (LANE + GAP), scale, most)
    parts += _time(height, ends_s, scale, notes)
    return "\n".join([*parts, "</svg>\n"])


def _opening(title: str, height: float) -> str:
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label={quoteattr(title)}>'


def _legend() -> list[str]:
    parts, x = [], float(LEFT)
    for kind, word in (("marks", "marked"), ("sends", "accepted"), ("settles", "settled")):
        parts.append(f'<path class="{kind}" d="M{x + 3} 56v9M{x + 6} 56v9M{x + 9} 56v9"/>')
        parts.append(f'<text x="{x + 16}" y="65">{word}</text>')
        x += 74
    parts.append(f'<rect class="claims" x="{x}" y="57" width="12" height="8"/><text x="{x + 16}" y="65">in hand</text>')
    x += 74
    parts.append(f'<circle class="doubt" cx="{x + 6}" cy="61" r="3"/><text x="{x + 16}" y="65">in doubt</text>')
    x += 74
    for group, word in (("relay", "process"), ("cron", "generate"), ("db", "Postgres, or the way to it")):
        parts.append(_swatch(group, x, word))
        x += 82
    parts.append(_swatch("smtp", x + 88, "mail server, or the way to it"))
    return parts


def _swatch(group: str, x: float, word: str) -> str:
    rect = f'<rect x="{x}" y="57" width="12" height="8" fill="var(--{group})" opacity=".5"/>'
    return f'{rect}<text x="{x + 16}" y="65">{word}</text>'


def _lane(lane: Lane, top: float, scale: float, most: int) -> list[str]:
    parts = [
        f'<g transform="translate({LEFT} {top})">',
        f'<rect class="lane" width="{WIDTH - LEFT - RIGHT}" height="{LANE}" rx="3"/>',
        f'<text x="-12" y="{LANE / 2 + 4}" text-anchor="end">{escape(lane.name)}</text>',
        _claims(lane.claims, scale, most),
        *_bands(lane.bands, scale),
    ]
    for kind, (y, height) in ROWS.items():
        columns = sorted({round(2 * at * scale) / 2 for at in getattr(lane, kind)})
        if columns:
            steps = "".join(f"M{x:g} {y}v{height}" for x in columns)
            parts.append(f'<path class="{kind}" d="{steps}"/>')
    parts += [f'<circle class="doubt" cx="{at * scale:.1f}" cy="56" r="2.5"/>' for at in lane.doubts]
    parts += [f'<circle class="twice" cx="{at * scale:.1f}" cy="37" r="6"/>' for at in lane.twice]
    return [*parts, "</g>"]


def _claims(claims: Sequence[tuple[float, int]], scale: float, most: int) -> str:
    if not claims:
        return ""
    steps = "".join(f"H{at * scale:.1f}V{FLOOR - 14 * count / most:.1f}" for at, count in claims)
    begins = f"{claims[0][0] * scale:.1f}"
    return f'<path class="claims" d="M{begins} {FLOOR}{steps}V{FLOOR}Z"/>'


def _bands(bands: Sequence[Band], scale: float) -> list[str]:
    parts, taken_until = [], [-100.0, -100.0]
    for band in sorted(bands, key=lambda one: one.begins_s):
        x, width = band.begins_s * scale, max((band.ends_s - band.begins_s) * scale, 1.5)
        colour = f"var(--{GROUPS[band.target]})"
        told = escape(f"{band.name}, {band.begins_s:.2f} to {band.ends_s:.2f} s {band.note}".strip())
        parts.append(
            f'<g><title>{told}</title><rect class="band" x="{x:.1f}" width="{width:.1f}" height="{LANE}"'
            f' fill="{colour}"/><path class="edge" stroke="{colour}" d="M{x:.1f} 0v{LANE}"/></g>'
        )
        row = 0 if taken_until[0] <= x else 1
        if taken_until[row] <= x:  # else the title tells it
            taken_until[row] = x + 5.2 * len(band.name) + 4
            parts.append(f'<text class="name" x="{x + 3:.1f}" y="{9 + 10 * row}">{escape(band.name)}</text>')
    return parts


def _time(height: float, ends_s: float, scale: float, notes: Iterable[tuple[float, str]]) -> list[str]:
    step = next((one for one in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600) if ends_s / one <= 16), 1200)
    floor = height - 30
    parts = [f'<path class="grid" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>']
    for second in range(0, int(ends_s) + 1, step):
        x = LEFT + second * scale
        parts.append(f'<text class="faint" x="{x:.1f}" y="{floor + 14}" text-anchor="middle">{second} s</text>')
    for at, word in notes:
        x = LEFT + at * scale
        parts.append(f'<path class="grid" stroke-dasharray="3 3" d="M{x:.1f} {TOP - 14}V{floor}"/>')
        parts.append(f'<text class="faint name" x="{x + 3:.1f}" y="{TOP - 6}">{escape(word)}</text>')
    return parts
