"""Redaction of a login in the replies of a mail server. Servers echo what they received, mostly in AUTH errors.

A reply is kept in the database and shown in logs, so it is redacted where it enters. Recognised are user and password
as they are, percent-encoded, as entities and escapes of HTML, JSON, quoted-printable, SMTP (xtext) and C, in
hexadecimal, and in any base64 text that contains four bytes of them, at each of its three alignments and cut off
anywhere; of a password eight characters are enough. A gap of white space, also with the enhanced status code that each
line of a reply may repeat, does not hide them.
"""

import html.entities
import re
from base64 import b64encode
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final

STARS: Final = "***"
WINDOW: Final = 4  # base64 characters; fewer look like any other text
WINDOW_ANY_CASE: Final = 6  # of base64 that was written in capitals or small letters
PREFIX_MIN: Final = 6  # characters of a password that was cut off
PART_MIN: Final = 8  # ... of one whose beginning is missing
LOOKED_AT_MAX: Final = 5000  # characters; of a longer text KEPT_MAX are kept, so what is cut in two is not shown
KEPT_MAX: Final = 4000
CACHED_MAX: Final = 200  # characters of a reply that is cached: most replies are one of a few

Patterns = Sequence[re.Pattern[str]]

# Between two lines of a reply, which are joined; RFC 2034 §4 asks for the enhanced code on each of them.
_GAP: Final = re.compile(r"\s+(?:[245]\.\d{1,3}\.\d{1,3}\s+)?")
_TOKEN: Final = re.compile(r"[A-Za-z0-9+/=_%-]")
_ESCAPES: Final = frozenset("%&\\=+\ufffd")
_URLSAFE: Final = str.maketrans("-_", "+/")
_TO_LOWER: Final = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}  # str.lower() may change the length


class Redactor:
    """Redactor of one login."""

    def __init__(self, username: str, password: str) -> None:
        user, secret = username.encode(), password.encode()
        # Texts that mechanisms encode in base64: LOGIN, PLAIN with and without an authorization identity (RFC 4616),
        # CRAM-MD5, and HTTP Basic.
        composed = [
            user,
            secret,
            b"\0" + user + b"\0" + secret,
            user + b"\0" + user + b"\0" + secret,
            user + b":" + secret,
            user + b" ",
        ]
        self._windows = frozenset(window for data in composed for window in _windows(data, WINDOW))
        self._windows_any_case = frozenset(
            window.translate(_TO_LOWER) for data in composed for window in _windows(data, WINDOW_ANY_CASE)
        )
        short = [data for data in composed if 0 < len(data) < len(b"abc")]
        tokens = "|".join(re.escape(b64encode(data).decode().rstrip("=")) for data in short)
        self._tokens = re.compile(rf"(?<![A-Za-z0-9+/])(?:{tokens})={{0,2}}(?![A-Za-z0-9+/=])") if short else None
        secrets = [text for text in (username, password) if text]
        self._plain = [re.compile(pattern, re.IGNORECASE) for text in secrets for pattern in _plain(text)]
        self._escaped = [re.compile(_escaped(text), re.IGNORECASE) for text in secrets]
        split = [text for text in secrets if len("".join(text.split())) >= WINDOW]
        self._split = [
            re.compile(pattern, re.IGNORECASE) for text in split for pattern in _plain("".join(text.split()))
        ]
        self._split_escaped = [re.compile(_escaped(text, is_squeezed=True), re.IGNORECASE) for text in split]
        self._password = password.translate(_TO_LOWER)
        viewed = self._password.translate(_URLSAFE)
        self._parts = frozenset(viewed[at : at + PART_MIN] for at in range(len(viewed) - PART_MIN + 1))
        self._cached = lru_cache(256)(self._redact)

    def __call__(self, text: str) -> str:
        """Return the text with three stars in place of each part that reveals something of the login."""
        if len(text) <= CACHED_MAX:
            return self._cached(text)
        return self._redact(text) if len(text) <= LOOKED_AT_MAX else self._redact(text[:LOOKED_AT_MAX])[:KEPT_MAX]

    def _redact(self, text: str) -> str:
        squeezed = _GAP.sub("", text)
        is_plain, is_split = self._reveals(text, self._plain, self._escaped), False
        if len(squeezed) < len(text):
            is_split = self._reveals(squeezed, self._split, self._split_escaped)
        if not (is_plain or is_split):
            return text
        hidden = bytearray(len(text))
        self._hide(text, range(len(text)), text, hidden, self._plain, self._escaped)
        self._hide_prefixes(text, hidden)
        if self._tokens is not None:
            for found in self._tokens.finditer(text):
                hidden[found.start() : found.end()] = b"\1" * len(found[0])
        if is_split:
            self._hide(squeezed, _places(text), text, hidden, self._split, self._split_escaped)
        return "".join(STARS if is_secret else part for part, is_secret in _parts(text, hidden))

    def _reveals(self, view: str, plain: Patterns, escaped: Patterns) -> bool:
        """Return True if the view contains anything to hide."""
        if any(pattern.search(view) for pattern in plain):
            return True
        if not _ESCAPES.isdisjoint(view) and any(pattern.search(view) for pattern in escaped):
            return True
        if self._tokens is not None and self._tokens.search(view):
            return True
        base64 = view.translate(_URLSAFE)
        lower = base64.translate(_TO_LOWER)
        return (
            (len(self._password) > PREFIX_MIN and self._password[:PREFIX_MIN] in lower)
            or not self._windows.isdisjoint(base64[at : at + WINDOW] for at in range(len(base64)))
            or not self._windows_any_case.isdisjoint(lower[at : at + WINDOW_ANY_CASE] for at in range(len(lower)))
            or not self._parts.isdisjoint(lower[at : at + PART_MIN] for at in range(len(lower)))
        )

    def _hide(
        self, view: str, places: Sequence[int], text: str, hidden: bytearray, plain: Patterns, escaped: Patterns
    ) -> None:
        """Mark in `hidden` what a view of the text reveals; `places` maps its characters to positions in the text."""
        for pattern in (*plain, *escaped):
            for found in pattern.finditer(view):
                for at in range(found.start(), found.end()):
                    hidden[places[at]] = 1
        base64 = view.translate(_URLSAFE)
        lower = base64.translate(_TO_LOWER)
        hits: set[int] = set()
        for where, windows, size in (
            (base64, self._windows, WINDOW),
            (lower, self._windows_any_case, WINDOW_ANY_CASE),
        ):
            for begin in range(len(where) - size + 1):
                if where[begin : begin + size] in windows:
                    hits.update(places[begin : begin + size])
        _hide_tokens(text, sorted(hits), hidden)
        for begin in range(len(lower) - PART_MIN + 1):
            if lower[begin : begin + PART_MIN] in self._parts:
                for at in places[begin : begin + PART_MIN]:
                    hidden[at] = 1

    def _hide_prefixes(self, text: str, hidden: bytearray) -> None:
        """Mark the beginning of a truncated password."""
        prefix, lower = self._password[:PREFIX_MIN], text.translate(_TO_LOWER)
        if len(self._password) <= PREFIX_MIN:
            return
        at = lower.find(prefix)
        while at >= 0:
            end = at
            while end < len(lower) and end - at < len(self._password) and lower[end] == self._password[end - at]:
                hidden[end] = 1
                end += 1
            at = lower.find(prefix, max(at, end - PREFIX_MIN) + 1)


def _windows(data: bytes, size: int) -> Iterator[str]:
    """Yield the runs of base64 characters that depend on `data` alone, at each alignment in a longer text."""
    for shift in range(3):
        encoded = b64encode(b"\0" * shift + data).decode()
        begin, end = -(-shift * 8 // 6), (shift + len(data)) * 8 // 6
        for at in range(begin, end - size + 1):
            yield encoded[at : at + size]


def _plain(text: str) -> Iterator[str]:
    """Yield patterns without escape characters: the text itself, and its bytes in hexadecimal."""
    yield re.escape(text)
    if len(data := text.encode()) > 2:  # noqa: PLR2004 - two bytes in hexadecimal occur in many numbers
        yield "[ :-]?".join(f"{byte:02x}" for byte in data)


# No two unbounded repeats are adjacent: a server must not be able to make the search slow.
_RUNS: Final = re.compile(r"\\+|[^\x20-\x7e]+|[\x20-\x5b\x5d-\x7e]")


def _escaped(text: str, *, is_squeezed: bool = False) -> str:
    """Return a pattern for the text with any of its characters escaped in any of the usual ways.

    In a squeezed view white space may be missing.
    """
    return "".join(_escaped_run(found[0], is_squeezed=is_squeezed) for found in _RUNS.finditer(text))


def _escaped_run(run: str, *, is_squeezed: bool) -> str:
    count = len(run)
    if run[0] == "\\":
        spelled = "".join(f"(?:{'|'.join(_spellings(character))})" for character in run)
        return rf"(?:\\{{{count},{4 * count}}}|{spelled})"
    spelled = "".join(
        f"(?:{'|'.join(_spellings(character))}){'?' if is_squeezed and character.isspace() else ''}"
        for character in run
    )
    if run[0].isascii() and run[0].isprintable():
        return spelled
    return rf"(?:{spelled}|\ufffd{{{count},{4 * count}}})"  # U+FFFD of a decoder


def _spellings(character: str) -> Iterator[str]:
    code, data = ord(character), character.encode()
    if character != "\\":
        yield r"\\{0,4}" + re.escape(character)
    yield "".join(f"%(?:25){{0,3}}{byte:02x}" for byte in data)
    yield "".join(f"={byte:02x}" for byte in data)
    yield "".join(rf"\+{byte:02x}" for byte in data)
    yield "".join(rf"\\{{1,4}}x{byte:02x}" for byte in data)
    yield "".join(rf"\\{{1,4}}{byte:03o}" for byte in data)
    yield rf"\\{{1,4}}u{{?0{{0,4}}{code:x}}}?"
    yield rf"&(?:amp;){{0,3}}#0{{0,6}}(?:{code}|x0{{0,6}}{code:x});?"
    if name := html.entities.codepoint2name.get(code):
        yield rf"&(?:amp;){{0,3}}{name};?"
    if character == "'":
        yield "&(?:amp;){0,3}apos;?"
    if character == " ":
        yield r"\+"


def _places(text: str) -> list[int]:
    """Return the position in the text of each character of the text without its gaps."""
    places: list[int] = []
    at = 0
    for gap in _GAP.finditer(text):
        places.extend(range(at, gap.start()))
        at = gap.end()
    return [*places, *range(at, len(text))]


def _hide_tokens(text: str, hits: Sequence[int], hidden: bytearray) -> None:
    """Mark the whole run of base64 characters around each of these sorted positions."""
    end = 0
    for place in hits:
        if place < end:
            continue
        begin = end = place
        while begin > 0 and _TOKEN.match(text[begin - 1]):
            begin -= 1
        while end < len(text) and _TOKEN.match(text[end]):
            end += 1
        hidden[begin:end] = b"\1" * (end - begin)


def _parts(text: str, hidden: bytearray) -> Iterator[tuple[str, bool]]:
    """Yield the text in parts, each with whether it is hidden."""
    begin = 0
    for at in range(1, len(text) + 1):
        if at == len(text) or hidden[at] != hidden[begin]:
            yield text[begin:at], bool(hidden[begin])
            begin = at
