"""Suggestions to people: names for misspelt ones, and commands quoted for a POSIX shell; and counts in words.

Keys and addresses are untrusted. They may look like an option, or hold blanks, quotes, `$(…)` or control characters
that a terminal would interpret. Every suggested command with such a word is built here.
"""

import difflib
import shlex
from collections.abc import Iterable, Sequence
from typing import Final

_ALIKE: Final = 0.75  # as `difflib.get_close_matches` measures it: one typing error in four letters or more

_PRINTF = "$(printf %b {})"  # POSIX; $'…' is not known to every sh
_LAST_LF = "${lf%.}"  # $(…) drops line feeds at the end
_SET_LF = "lf=$(printf %b '\\0012.') && "


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like this one, without regard to capitals; None if none is like it."""
    by_folded = {one.casefold(): one for one in sorted(known)}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=_ALIKE)
    return by_folded[near[0]] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean NAME?)` for the most similar known name; "" if none is like it."""
    near = nearest(name, known)
    return "" if near is None else f" (did you mean {near}?)"


def command(name: str, *options: str, keys: Sequence[str] = (), after: Sequence[str] = ()) -> str:
    """Return `outbox NAME OPTIONS KEYS AFTER`, where `after` are options that read better after the keys.

    Options are given as they are typed (see `option`). With a key that begins with a hyphen all options come first,
    then `--`.
    """
    words = [word(key) for key in keys]
    if any(key.startswith("-") for key in keys):
        parts = ["outbox", name, *options, *after, "--", *words]
    else:
        parts = ["outbox", name, *options, *words, *after]
    line = " ".join(parts)
    return f"{_SET_LF}{line}" if _LAST_LF in line and any(key.endswith("\n") for key in keys) else line


def option(name: str, value: str) -> str:
    """Return an option with its value."""
    return f"{name}={word(value)}" if value.startswith("-") else f"{name} {word(value)}"


def word(text: str) -> str:
    """Return the text as one word of a POSIX shell, on one line and without terminal control characters.

    A word that ends in a line feed needs the variable that `command` sets before it.
    """
    if text.isprintable():
        return shlex.quote(text)
    body = text.rstrip("\n")
    lines_at_the_end = len(text) - len(body)
    escaped = "".join(_escaped(character) for character in body)
    return '"' + _PRINTF.format(shlex.quote(escaped)) + _LAST_LF * lines_at_the_end + '"'


def _escaped(character: str) -> str:
    """Return the character as an escape of `printf %b`."""
    if character == "\\":
        return "\\\\"
    return character if character.isprintable() else "".join(f"\\0{byte:03o}" for byte in character.encode())


def times(count: int) -> str:
    """Return the count as `once`, `twice`, `3 times`."""
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")
