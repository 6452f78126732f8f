r"""Standard output and error of a command, which take any text in any encoding that the locale asks for.

Characters that the encoding lacks are written in another way, never with an error: punctuation and bars as their ASCII
neighbours, others as `\u4e2d`. JSON stays JSON: see `is_unicode`.
"""

import codecs
import io
import sys
from typing import Final

ERRORS: Final = "outbox"
"""Name of the error handler that writes what an encoding lacks."""
_ASCII: Final = "outbox_ascii"
"""ASCII under another name: click replaces an ASCII stream by one in UTF-8."""

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
    """Let standard output and error take any text. Called once, before a command writes."""
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
