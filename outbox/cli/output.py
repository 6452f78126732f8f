r"""Output of the commands: any text in any encoding, JSON, tables, progress bars, untrusted text on a terminal.

Characters that the locale's encoding lacks are written in another way, never with an error: punctuation and bars as
their ASCII neighbours, others as `\u4e2d`. JSON stays JSON: see `is_unicode`.
"""

import codecs
import io
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Self

import typer

if TYPE_CHECKING:
    from datetime import tzinfo

    from rich.console import Console

    from outbox.settings import Settings

NAMES_SHOWN: Final = 10
"""Keys that a command prints before it only counts the others."""
SIDE_MAX: Final = 1000  # columns or lines; no terminal has more, and a screen of millions would fill the memory
ERRORS: Final = "outbox"
"""Name of the error handler that writes what an encoding lacks."""
_ASCII: Final = "outbox_ascii"
"""ASCII under another name: click replaces an ASCII stream by one in UTF-8."""

# Control characters, which json.dumps escapes only up to U+001F, and bidirectional controls, with which a line shows
# other words than it holds.
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

_NEIGHBOURS: Final = {
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{MINUS SIGN}": "-",
    "\N{NON-BREAKING HYPHEN}": "-",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{BULLET}": "*",
    "\N{MIDDLE DOT}": ".",
    "\N{FULL BLOCK}": "#",
    "\N{MEDIUM SHADE}": "%",
    "\N{BOX DRAWINGS HEAVY HORIZONTAL}": "-",
    "\N{BOX DRAWINGS LIGHT HORIZONTAL}": "-",
    "\N{REPLACEMENT CHARACTER}": "?",
    "\N{NO-BREAK SPACE}": " ",
    "\N{NARROW NO-BREAK SPACE}": " ",
    "\N{THIN SPACE}": " ",
    # Marks of direction, which have no width.
    **dict.fromkeys("\u200b\u200e\u200f\u2066\u2067\u2068\u2069", ""),
}


def prepare() -> None:
    """Let standard output and error take any text. It is called once, before a command writes."""
    codecs.register_error(ERRORS, _write_otherwise)
    codecs.register(_find_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if it was closed; a test may have put another object there
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding=_ASCII if is_ascii else None, errors=ERRORS)


def is_unicode() -> bool:
    """Return True if standard output has every character, so that nothing in it need be escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return codecs.lookup(encoding).name in {"utf-8", "utf-16", "utf-32", "utf-8-sig"}


def _write_otherwise(error: UnicodeError) -> tuple[str, int]:
    """Replace what cannot be encoded; surrogates of undecodable bytes in arguments come here in UTF-8, too."""
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    written = "".join(_NEIGHBOURS.get(char, char.encode("ascii", "backslashreplace").decode()) for char in found)
    return written, error.end


def _find_ascii(name: str) -> codecs.CodecInfo | None:
    if name != _ASCII:
        return None
    ascii_ = codecs.lookup("ascii")
    return codecs.CodecInfo(
        name=_ASCII,
        encode=ascii_.encode,
        decode=ascii_.decode,
        incrementalencoder=ascii_.incrementalencoder,
        incrementaldecoder=ascii_.incrementaldecoder,
        streamreader=ascii_.streamreader,
        streamwriter=ascii_.streamwriter,
    )


def to_json(found: Any) -> str:
    """Return one line for scripts, with times as ISO 8601 and terminal control characters escaped.

    Where standard output is not in a Unicode encoding, the line is in ASCII: it is the same JSON in any encoding.
    """
    import json

    made = json.dumps(found, default=lambda at: at.isoformat(), ensure_ascii=not is_unicode())
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", made)


def printable(line: str) -> str:
    """Return the line without terminal control characters: keys and replies are untrusted."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", line)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with aligned columns, two spaces apart; the last column may have any width."""
    whole = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in (columns, *whole)) for at in range(len(columns) - 1)]

    def line(row: Sequence[str]) -> str:
        return "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()

    return [typer.style(line(columns), dim=True), *map(line, whole)]


def redirected(address: str) -> str:
    """Return the warning that `redirect_to` is set."""
    return f"REDIRECTED: every email goes to {address} (redirect_to), none to its recipient."


def console(**options: Any) -> "Console":
    """Return a console that is as large as its terminal, whatever COLUMNS and LINES say.

    A shell that exports them exports the size of another moment, or of another terminal. They count where a terminal
    tells no size, if they are possible sizes, and where the output is no terminal.
    """
    import os

    from rich.console import Console

    environment = dict(os.environ)
    stream = sys.stderr if options.get("stderr") else sys.stdout
    if stream.isatty():
        try:
            is_sized = all(os.get_terminal_size(stream.fileno()))
        except OSError:
            is_sized = False
        for name in ("COLUMNS", "LINES"):
            side = environment.pop(name, "")
            if not is_sized and side.isascii() and side.isdigit() and 0 < int(side[:9]) <= SIDE_MAX:
                environment[name] = side
    return Console(_environ=environment, **options)


class Bar:
    """Progress bar on a terminal, nothing elsewhere."""

    def __init__(self, title: str, *, counted: bool) -> None:
        self.title = title
        self.counted = counted
        self.bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
            )

            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(),
                MofNCompleteColumn() if self.counted else TaskProgressColumn(), TimeElapsedColumn(),
                console=console(stderr=True), transient=True,
            )  # fmt: skip
            self.bar.start()
            self.line = self.bar.add_task(self.title, total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, **progress: Any) -> None:
        """Show the progress: `completed` of `total`, and a `description`."""
        if self.bar is not None:
            self.bar.update(self.line, **progress)


def zone_of(settings: "Settings", report: str | None) -> "tzinfo | None":
    """Return the timezone of a report; None if it is not configured here, or if the email is of no report."""
    known = settings.editions.get(report or "")
    return known.zone if known is not None else None
