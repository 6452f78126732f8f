"""Page of panels as SVG, drawn by matplotlib; the same panels give the same bytes."""

import math
import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from bench.harness.plots import Bar, Bars, Line, Lines, Panel

# A card of its own colour, so that it is as readable on a dark page as on a light one.
CARD: Final = "#fbfcfd"
INK: Final = "#24292f"
FAINT: Final = "#6e7781"
OURS: Final = "#2f6fb5"
OTHER: Final = "#b4bfca"
TARGET: Final = "#c4432b"
LINES: Final = ("#2f6fb5", "#8fb4dc", "#c98a1b", "#e3c286")

WIDTH: Final = 8.6  # inches of 96 pixels: the width of a README
BAR_HEIGHT: Final = 0.27
AROUND: Final = 0.88  # above and below the axes of a panel
BELOW: Final = 0.5
LABELS: Final = 1.55
RIGHT: Final = 0.2
FOOT: Final = 0.25
LEGEND: Final = "bar: median · thin line: least to most · red: target"
LABELS_SHARE: Final = (LABELS - RIGHT) / (WIDTH / 2 - LABELS - RIGHT)  # of the axes' width
LABEL_CHARACTERS: Final = 25
LINES_HEIGHT: Final = 1.9
STYLE: Final = {
    "svg.hashsalt": "outbox", "svg.fonttype": "path", "font.size": 7.5, "font.family": "DejaVu Sans",
    "axes.edgecolor": OTHER, "axes.labelcolor": FAINT, "axes.titlecolor": INK, "text.color": INK,
    "xtick.color": FAINT, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 8.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
}  # fmt: skip


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draw two columns of panels, each added to the shorter one."""
    columns: tuple[list[Panel], list[Panel]] = ([], [])
    for panel in panels:
        min(columns, key=_height_of).append(panel)
    tall = max(map(_height_of, columns)) + FOOT
    with mpl.rc_context(STYLE):
        figure = plt.figure(figsize=(WIDTH, tall), facecolor=CARD)
        for left, column in zip((0.0, 0.5), columns, strict=True):
            top = tall
            for panel in column:
                top -= _height(panel)
                _draw_panel(figure, panel, left, top / tall, _height(panel) / tall)
        figure.text(0.98, 0.1 / tall, LEGEND, ha="right", va="bottom", color=FAINT)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None}, facecolor=CARD)
        plt.close(figure)
    path.write_text(re.sub(r"[ \t]+$", "", path.read_text(), flags=re.MULTILINE))


def _draw_panel(figure: Any, panel: Panel, left: float, bottom: float, height: float) -> None:
    """Draw a panel in its part of the page, all in shares of it."""
    inch = height / _height(panel)
    place = (left + LABELS / WIDTH, bottom + BELOW * inch, 0.5 - (LABELS + RIGHT) / WIDTH, height - AROUND * inch)
    axes = figure.add_axes(place, facecolor=CARD)
    axes.set_title(panel.title, x=-LABELS_SHARE)
    if isinstance(panel, Bars):
        _draw_bars(axes, panel)
    else:
        _draw_lines(axes, panel)


def _height_of(column: Sequence[Panel]) -> float:
    return sum(map(_height, column))


def _height(panel: Panel) -> float:
    return AROUND + (BAR_HEIGHT * len(panel.bars) if isinstance(panel, Bars) else LINES_HEIGHT)


def _draw_bars(axes: Any, panel: Bars) -> None:
    places = range(len(panel.bars))
    medians = [bar.spread.median for bar in panel.bars]
    spreads = [
        [bar.spread.median - bar.spread.least for bar in panel.bars],
        [bar.spread.most - bar.spread.median for bar in panel.bars],
    ]
    axes.barh(
        places, medians, height=0.68, xerr=spreads, color=[OURS if bar.ours else OTHER for bar in panel.bars],
        error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2.2},
    )  # fmt: skip
    axes.set_yticks(places, [fill(bar.label, LABEL_CHARACTERS) for bar in panel.bars])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    ends = [max(bar.spread.most, bar.target or 0.0) for bar in panel.bars]
    for place, bar, end in zip(places, panel.bars, ends, strict=True):
        _mark_target(axes, place, bar)
        axes.annotate(
            figure_of(bar.spread.median), (end, place), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axes.margins(x=0.2)
    if panel.logarithmic:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel(panel.unit)


def _mark_target(axes: Any, place: int, bar: Bar) -> None:
    if bar.target is not None:
        axes.plot([bar.target, bar.target], [place - 0.45, place + 0.45], color=TARGET, linewidth=1.8)


def _draw_lines(axes: Any, panel: Lines) -> None:
    risen = max(next(at for at, value in line.points if value == _most(line)) for line in panel.lines)
    for color, line in zip(cycle(LINES), panel.lines, strict=False):
        axes.step(*zip(*line.points, strict=True), where="post", label=line.label, color=color, linewidth=1.6)
    axes.set_xlabel("seconds from the first one")
    axes.set_ylabel(panel.unit)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, 2 * risen)
    axes.legend(frameon=False, loc="center right")


def _most(line: Line) -> float:
    return max(value for _, value in line.points)


def figure_of(value: float) -> str:
    """Return a figure with as many digits as it deserves."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{digits}f}"
