"""Bytes of an SMTP client, cut into command lines and message contents."""

from typing import Final

LINE_MAX: Final = 8192
"""Bytes of a command line; a longer one ends the connection (RFC 5321 §4.5.3.1.4 asks for 512)."""
_DOT: Final = b"\r\n.\r\n"


class LineTooLongError(Exception):
    """A command line is longer than `LINE_MAX`."""


class ContentTooBigError(Exception):
    """A content is larger than the maximum; raised when its final dot has arrived."""


class ClientInput:
    """Buffer of one connection: what the client pipelined waits here until it is taken, in order.

    The lines of a content are never looked at one by one: only what is new is searched for the final dot.
    """

    def __init__(self, content_max: int) -> None:
        self._content_max = content_max
        self._buffer = bytearray()
        self._at = 0
        """Start of the next command; in a content, the CRLF before its first byte."""
        self._scanned = 0
        """End of what has been searched for the dot of a content."""
        self._too_big = False

    def feed(self, data: bytes) -> None:
        """Add what has arrived."""
        self._buffer += data

    def take_line(self) -> bytes | None:
        """Take a command line, without its CRLF; None until it is complete.

        Raises:
            LineTooLongError: it has more than `LINE_MAX` bytes.

        """
        begin = self._at
        end = self._buffer.find(b"\r\n", begin)
        if (len(self._buffer) if end < 0 else end) - begin > LINE_MAX:
            raise LineTooLongError
        if end < 0:
            return None
        self._at = end + 2
        return bytes(self._buffer[begin:end])

    def begin_content(self) -> None:
        """Begin a content at the CRLF of the DATA line, so that a lone dot is found like any other."""
        if self._at >= len(b"\r\n"):
            self._at -= len(b"\r\n")
        else:  # DATA had to wait, and its line is gone from the buffer
            self._buffer[:0] = b"\r\n"
        self._scanned = self._at
        self._too_big = False

    def has_content(self) -> bool:
        """Return True once the first byte of the content has arrived."""
        return len(self._buffer) > self._at + len(b"\r\n")

    def take_content(self) -> bytes | None:
        """Take a content: a CRLF, its lines with their dots stuffed, the final CRLF; None until its dot has arrived.

        Raises:
            ContentTooBigError: it has more bytes than the maximum. It is taken, and gone.

        """
        end = self._buffer.find(_DOT, self._scanned)
        if end < 0:
            self._scanned = max(self._scanned, len(self._buffer) - len(_DOT) + 1)
            self._skip_if_too_big(self._scanned)
            return None
        self._skip_if_too_big(end)
        content = bytes(self._buffer[self._at : end + 2])
        self._at = end + len(_DOT)
        if self._too_big:
            raise ContentTooBigError
        return content

    def _skip_if_too_big(self, end: int) -> None:
        if self._too_big or end - self._at > self._content_max:
            self._too_big = True
            self._at = end

    def peek(self) -> bytes:
        """Return the first bytes of what has not been taken, at most `LINE_MAX`."""
        return bytes(self._buffer[self._at : self._at + LINE_MAX])

    def compact(self) -> None:
        """Free what has been taken."""
        if self._at == len(self._buffer):
            self._buffer.clear()
        elif self._at:
            del self._buffer[: self._at]
        self._scanned -= self._at
        self._at = 0

    def clear(self) -> None:
        """Drop what has not been taken."""
        self._buffer.clear()
        self._at = 0
