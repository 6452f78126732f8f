"""Bounded MIME reader (RFC 5322, RFC 2045 to 2047, RFC 2231) for untrusted messages.

The standard library's parser has quadratic and recursive steps: 40,000 semicolons in a Content-Type take it a minute,
and 2,000 parentheses raise RecursionError. This one reads each byte a bounded number of times, does not recurse, and
stops at its own limits. It never raises: what exceeds a limit is left out and named in `Message.notes`.

`stored_message` reads the emails of the outbox with it, `feedback` the messages that come back.
"""

import re
from binascii import a2b_base64, a2b_qp
from codecs import charmap_decode
from collections.abc import Iterator
from dataclasses import dataclass, field
from encodings.aliases import aliases
from functools import cache
from typing import Final
from urllib.parse import unquote_to_bytes

HEAD_MAX: Final = 256 * 1024  # bytes of one part's header
HEADS_MAX: Final = 1024 * 1024  # bytes of all headers together
FIELDS_MAX: Final = 1000  # of one part's header
VALUE_MAX: Final = 64 * 1024  # bytes of one field
PARAMETERS_MAX: Final = 8 * 1024  # characters of a field that has parameters
DEPTH_MAX: Final = 16  # of multiparts within multiparts
PARTS_MAX: Final = 500
LINES_MAX: Final = 20_000  # of one multipart that begin like its boundary
BOUNDARY_MAX: Final = 200  # bytes; RFC 2046 §5.1.1 allows 70

# Character sets of mail, all with decoders that take linear time. Not idna and punycode (quadratic), utf-7 (which hides
# markup), or the codecs that are no character sets. There is no part 12 of ISO 8859.
_EIGHT_BIT: Final = frozenset({
    *(f"iso8859_{n}" for n in (*range(1, 12), *range(13, 17))), *(f"cp{n}" for n in (437, 850, 852, 866, 874)),
    *(f"cp{n}" for n in range(1250, 1259)), "koi8_r", "koi8_u", "latin_1", "mac_roman", "tis_620",
})  # fmt: skip
_CHARSETS: Final = _EIGHT_BIT | {
    "utf_8", "utf_8_sig", "utf_16", "utf_16_le", "utf_16_be", "utf_32", "gb2312", "gbk", "gb18030", "big5", "big5hkscs",
    "shift_jis", "cp932", "cp949", "cp950", "euc_jp", "euc_kr", "iso2022_jp", "iso2022_jp_2", "iso2022_kr",
}  # fmt: skip

_HEAD_END: Final = re.compile(rb"\n\r?\n")
_FIELD: Final = re.compile(rb"([!-9;-~]{1,200})[ \t]*:")
_BOUNDARY_END: Final = re.compile(rb"(--)?[ \t]{0,200}\r?(?:\n|\Z)")
_BREAKS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# Possessive quantifiers: none of these goes back over what it has read.
_WORD: Final = re.compile(r"=\?([\w.:-]{1,40}+)(?:\*[A-Za-z0-9-]{0,20}+)?\?([BbQq])\?([^?\s]*+)\?=", re.ASCII)
_SEMICOLONS: Final = re.compile(r"[\s;]++")
_PARAMETER: Final = re.compile(r"([^\s;=\"]{1,80}+)\s*+=\s*+(?:\"((?:[^\"\\]++|\\.)*+)\"?|([^\s;\"]*+))", re.DOTALL)
_IN_PARENTHESES: Final = re.compile(r"[()\"]|\\.", re.DOTALL)
_TYPE: Final = re.compile(r"[\w.+-]{1,80}/[\w.+-]{1,80}", re.ASCII)
_SECTION: Final = re.compile(r"([^*]+)\*(?:([0-9]{1,3})(\*)?)?", re.ASCII)
_NOT_BASE64: Final = bytes(set(range(256)) - set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="))


@dataclass(frozen=True, slots=True)
class Field:
    """Header field: its name as written, and its value as bytes, still folded and encoded."""

    name: str
    raw: bytes

    @property
    def text(self) -> str:
        """Return the value on one line, encoded words decoded (RFC 2047)."""
        return one_line(decoded_words(_unfolded(self.raw)))


@dataclass(frozen=True, slots=True)
class Head:
    """Header of a message or a part."""

    fields: tuple[Field, ...] = ()

    def values(self, name: str, *, at_most: int = 20) -> list[str]:
        """Return the decoded values of the fields of that name, the first `at_most`."""
        wanted = name.lower()
        return [one.text for one in [one for one in self.fields if one.name.lower() == wanted][:at_most]]

    def value(self, name: str) -> str:
        """Return the decoded value of the first field of that name; "" if there is none."""
        return next(iter(self.values(name, at_most=1)), "")

    def parameters(self, name: str) -> tuple[str, dict[str, str]]:
        """Return a field's value in lower case and its parameters, as in Content-Type."""
        wanted = name.lower()
        found = next((one for one in self.fields if one.name.lower() == wanted), None)
        return parsed_parameters(_unfolded(found.raw)) if found is not None else ("", {})


@dataclass(frozen=True, slots=True)
class Part:
    """Part without further parts: its header, and the range of its content in the message."""

    head: Head
    type: str
    """Media type in lower case, such as `text/plain`."""
    parameters: dict[str, str]
    """Parameters of its Content-Type."""
    message: bytes = field(repr=False)
    start: int
    end: int

    @property
    def encoding(self) -> str:
        """Return the Content-Transfer-Encoding in lower case."""
        return self.head.parameters("Content-Transfer-Encoding")[0]

    def content(self, size_max: int | None = None) -> bytes:
        """Return the decoded bytes, at most `size_max`; malformed input is skipped."""
        encoding = self.encoding
        end = self.end
        if size_max is not None:
            end = min(end, self.start + size_max * {"base64": 2, "quoted-printable": 3}.get(encoding, 1))
        data = self.message[self.start : end]
        if encoding == "base64":
            data = _base64(data)
        elif encoding == "quoted-printable":
            data = a2b_qp(data)
        return data if size_max is None else data[:size_max]

    def text(self, size_max: int) -> str:
        """Return the first `size_max` bytes as text, with U+FFFD for bytes that cannot be decoded."""
        return decoded(self.content(size_max), self.parameters.get("charset", ""))


@dataclass(slots=True)
class Message:
    """Header and parts of a message in their order; `notes` says what was left out."""

    head: Head = field(default_factory=Head)
    parts: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        """Add a note once."""
        if what not in self.notes:
            self.notes.append(what)


def parse(raw: bytes) -> Message:
    """Parse a message, in time linear in its size and the limits of this module. Never raises."""
    message = Message()
    heads_left = HEADS_MAX
    waiting = [(0, len(raw), 0, "text/plain")]
    is_first = True
    while waiting:
        start, end, depth, default_type = waiting.pop()
        head, body, size = _read_head(raw, start, end, min(HEAD_MAX, heads_left), message)
        heads_left -= size
        if is_first:
            message.head, is_first = head, False
        kind, parameters = head.parameters("Content-Type")
        if not _TYPE.fullmatch(kind):
            kind = default_type
        boundary = parameters.get("boundary", "").encode("utf-8", "replace")[:BOUNDARY_MAX]
        if kind.startswith("multipart/") and boundary:
            if depth == DEPTH_MAX:
                message.note(f"parts are nested more than {DEPTH_MAX} deep")
                continue
            room = PARTS_MAX - len(message.parts) - len(waiting)
            inner = "message/rfc822" if kind == "multipart/digest" else "text/plain"
            ranges = list(_split(raw, body, end, boundary, room, message))
            waiting += [(first, last, depth + 1, inner) for first, last in reversed(ranges)]
            if ranges:
                continue
            message.note("a multipart does not contain its boundary")
        message.parts.append(Part(head, kind, parameters, raw, body, end))
    return message


def read_head(raw: bytes) -> Head:
    """Return the header at the beginning of `raw`, as in a part that holds a returned message."""
    return _read_head(raw, 0, len(raw), HEAD_MAX, Message())[0]


def _read_head(raw: bytes, start: int, end: int, size_max: int, message: Message) -> tuple[Head, int, int]:
    """Return a part's header, where its content begins, and how many bytes of header were read."""
    if raw.startswith((b"\n", b"\r\n"), start, end):
        return Head(), start + (1 if raw[start] == ord("\n") else 2), 0
    found = _HEAD_END.search(raw, start, end)
    head_end, body = (found.start(), found.end()) if found else (end, end)
    if head_end - start > size_max:
        message.note(f"a header is longer than {HEAD_MAX} bytes, or all headers together are longer than {HEADS_MAX}")
        head_end = start + size_max
    fields: list[Field] = []
    name, value, room = "", bytearray(), 0
    for line in raw[start:head_end].split(b"\n"):
        if line[:1] in (b" ", b"\t"):
            piece = b"\n" + line
        elif (named := _FIELD.match(line)) is not None:
            if name:
                fields.append(Field(name, bytes(value)))
            if len(fields) == FIELDS_MAX:
                message.note(f"a header has more than {FIELDS_MAX} fields")
                name = ""
                break
            name, value, room = named[1].decode("ascii"), bytearray(), VALUE_MAX
            piece = line[named.end() :]
        else:
            continue  # such as the "From " line of an mbox
        if len(piece) > room:
            message.note(f"a header field is longer than {VALUE_MAX} bytes")
        value += piece[:room]
        room -= min(room, len(piece))
    if name:
        fields.append(Field(name, bytes(value)))
    return Head(tuple(fields)), body, head_end - start


def _split(raw: bytes, start: int, end: int, boundary: bytes, room: int, message: Message) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each part of a multipart (RFC 2046 §5.1.1). The closing boundary may be missing."""
    opening = b"--" + boundary
    part, at = -1, start
    for _ in range(LINES_MAX):
        at = raw.find(opening, at, end)
        if at < 0:
            if part >= 0:
                yield part, end
            return
        found = _BOUNDARY_END.match(raw, at + len(opening), end)
        if found is None or (at > start and raw[at - 1] != ord("\n")):
            at += len(opening)
            continue
        if part >= 0:
            if room <= 0:
                message.note(f"it has more than {PARTS_MAX} parts")
                return
            room -= 1
            yield part, max(part, at - (2 if raw[at - 2 : at] == b"\r\n" else 1))
        if found[1]:
            return
        part = at = found.end()
    message.note(f"more than {LINES_MAX} lines begin like a boundary")


def one_line(text: str) -> str:
    """Return the text with a space for each run of control characters and line breaks."""
    return _BREAKS.sub(" ", text).strip()


def _unfolded(raw: bytes) -> str:
    return raw.replace(b"\r\n", b"").replace(b"\n", b"").decode("utf-8", "replace").strip()


def decoded_words(text: str) -> str:
    """Return the text with its encoded words decoded; malformed ones stay as they are."""
    if "=?" not in text:
        return text
    made: list[str] = []
    charset, pending, last = "", bytearray(), 0
    for found in _WORD.finditer(text):
        between = text[last : found.start()]
        adjacent = last > 0 and not between.strip()  # white space between two of them is not shown (RFC 2047 §6.2)
        if not adjacent or found[1].lower() != charset:
            made.append(decoded(bytes(pending), charset))
            pending = bytearray()
        if not adjacent:
            made.append(between)
        charset = found[1].lower()
        data = found[3].encode("ascii", "replace")
        pending += _base64(data) if found[2] in "Bb" else a2b_qp(data, header=True)
        last = found.end()
    return "".join([*made, decoded(bytes(pending), charset), text[last:]])


def decoded(data: bytes, charset: str) -> str:
    """Return bytes as text. ASCII, no charset and an unknown one are read as UTF-8, its superset."""
    name = charset.strip().lower().replace("-", "_").replace(" ", "_")
    name = aliases.get(name, name)
    if name in _EIGHT_BIT:
        return charmap_decode(data, "strict", _characters(name))[0]
    # Not by `codecs.lookup`, which remembers each name that it is ever asked for.
    return data.decode(name if name in _CHARSETS else "utf_8", "replace")


@cache
def _characters(charset: str) -> str:
    """Return the characters of the 256 bytes, U+FFFD for those that have none.

    With this table they cost no more than others; as errors, which hold the interpreter, megabytes take a second.
    """
    return bytes(range(256)).decode(charset, "replace")


def _base64(data: bytes) -> bytes:
    """Decode leniently: characters outside the alphabet are skipped, and a truncated end is dropped."""
    kept = data.translate(None, _NOT_BASE64).partition(b"=")[0]
    kept = kept[: len(kept) - (len(kept) % 4 == 1)]
    return a2b_base64(kept + b"=" * (-len(kept) % 4))


def parsed_parameters(value: str) -> tuple[str, dict[str, str]]:
    """Return the text before the first semicolon, in lower case, and the parameters by lower-case name.

    Continuations and character sets of RFC 2231 are joined and decoded. The first of two of the same name counts.
    """
    value = _without_comments(value[:PARAMETERS_MAX])
    found: dict[str, str] = {}
    sections: dict[str, dict[int, tuple[str, bool]]] = {}
    for one in _each_parameter(value):
        name = one[1].lower()
        text = re.sub(r"\\(.)", r"\1", one[2], flags=re.DOTALL) if one[2] is not None else one[3]
        if "*" not in name:
            found.setdefault(name, decoded_words(text))
        elif (section := _SECTION.fullmatch(name)) is not None:
            is_encoded = section[2] is None or section[3] is not None
            sections.setdefault(section[1], {}).setdefault(int(section[2] or 0), (text, is_encoded))
    for name, pieces in sections.items():
        found[name] = _continued(pieces)
    return value.partition(";")[0].strip().lower(), found


def _each_parameter(value: str) -> Iterator[re.Match[str]]:
    at = value.find(";")
    while at >= 0 and (run := _SEMICOLONS.match(value, at)) is not None:
        found = _PARAMETER.match(value, run.end())
        if found is not None:
            yield found
        at = value.find(";", (found or run).end())


def _continued(pieces: dict[int, tuple[str, bool]]) -> str:
    """Join the sections of a parameter, numbered from 0 without a gap (RFC 2231 §3 and §4)."""
    made, charset = bytearray(), ""
    for number in range(len(pieces)):
        if number not in pieces:
            break
        text, is_encoded = pieces[number]
        if number == 0 and is_encoded and text.count("'") >= len("''"):
            charset, _, text = text.split("'", 2)
        made += unquote_to_bytes(text) if is_encoded else text.encode("utf-8", "replace")
    return decoded(bytes(made), charset)


def _without_comments(value: str) -> str:
    """Return the value without its comments in parentheses, however deep they are nested (RFC 5322 §3.2.2)."""
    if "(" not in value:
        return value
    kept: list[str] = []
    depth, is_quoted, last = 0, False, 0
    for found in _IN_PARENTHESES.finditer(value):
        mark = found[0]
        if mark == '"' and not depth:
            is_quoted = not is_quoted
        elif mark == "(" and not is_quoted:
            if not depth:
                kept.append(value[last : found.start()])
            depth += 1
        elif mark == ")" and depth:
            depth -= 1
            last = found.end()
    return "".join([*kept, value[last:]]) if not depth else "".join(kept)
