"""SMTP replies out of a stream of bytes (RFC 5321 §4.2), with bounds on all that a server may send."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

LINE_BYTES_MAX: Final = 8 * 1024  # RFC 5321 §4.5.3.1.5 says 512; real servers send more
REPLY_BYTES_MAX: Final = 64 * 1024
CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")  # a reply is shown in terminals
# RFC 5321 §4.2.1; 1xx is never a server's answer here.
CODES: Final = {b"%d" % code: code for code in range(200, 600)}


class GarbageError(Exception):
    """The bytes are not an SMTP reply, so nothing that follows on this connection can be trusted."""


class Reply(NamedTuple):
    """One whole reply; `text` has its lines joined by spaces, undecodable bytes replaced."""

    code: int
    text: str


@dataclass(slots=True)
class ReplyReader:
    """Parser that takes bytes as they arrive and returns complete replies in order. `redact` removes the login."""

    redact: Callable[[str], str] | None = None
    _buffer: bytes = b""
    _lines: list[str] = field(default_factory=list)
    _size: int = 0

    def feed(self, data: bytes) -> Iterator[Reply]:
        """Yield the replies that `data` completes, one by one, so that those before garbage count.

        Raises:
            GarbageError: a line is not a reply's, or too long, or a reply has too many; the reader is useless then.

        """
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            reply = self._take(line)
            if reply is not None:
                yield reply
        if len(self._buffer) > LINE_BYTES_MAX:
            raise GarbageError(f"a reply line of more than {LINE_BYTES_MAX} bytes")

    def _take(self, line: bytes) -> Reply | None:
        code = CODES.get(line[:3])
        if code is None or len(line) > LINE_BYTES_MAX:
            raise GarbageError(f"no SMTP reply: {self._quoted(line)}")
        mark = line[3:4]
        text = line[4:].rstrip(b"\r").decode("utf-8", "replace")
        if not text.isprintable():
            text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
        if mark == b"-":
            self._size += len(line)
            if self._size > REPLY_BYTES_MAX:
                raise GarbageError(f"a reply of more than {REPLY_BYTES_MAX} bytes")
            self._lines.append(text)
            return None
        if mark not in (b" ", b"\r", b""):
            raise GarbageError(f"no SMTP reply: {self._quoted(line)}")
        if self._lines:
            text = " ".join([*self._lines, text])
            self._lines.clear()
            self._size = 0
        return Reply(code, text if self.redact is None else self.redact(text))

    def _quoted(self, line: bytes) -> str:
        """Return the beginning of a line that is not a reply, for an error."""
        if self.redact is not None:
            text = line.decode("utf-8", "replace")
            if (redacted := self.redact(text)) != text:
                return repr(redacted[:80])
        return repr(line[:80])
