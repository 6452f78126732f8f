"""A Maildir as a mail server: for development, emails that lie in a directory instead of going anywhere.

It answers the connection as a server with PIPELINING does, so the same guarantees hold: the mark is committed before
the file is there, and what was not answered is in doubt. Only the socket is missing.
"""

import asyncio
import errno
import os
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from outbox.smtp.extensions import Offers
from outbox.smtp.refusal import TAKES_NOTHING

if TYPE_CHECKING:
    from outbox.smtp.connection import SmtpConnection

OFFERS: Final = Offers(pipelining=True, eight_bit=True, utf8=True)
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DOT: Final = b"\r\n.\r\n"


def prepare(directory: Path) -> None:
    """Make the Maildir if it is not there yet.

    Raises:
        OSError: it cannot be made, or not be written to.

    """
    for name in ("tmp", "cur", "new"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    for name in ("tmp", "new"):
        if not os.access(directory / name, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory / name))


def file_name(email: int, message_id: str) -> str:
    """Return the file name of an email without its attempt: stable, and different in another database."""
    return f"{email}-{blake2b(message_id.encode(), digest_size=6).hexdigest()}"


class DoubtError(Exception):
    """The file is there, and may not outlive a power cut."""


def deliver(directory: Path, name: str, *parts: bytes | bytearray) -> None:
    """Write the parts as a file in `new`, whole and on disk, or not at all; once for each name, wherever it was moved.

    Raises:
        OSError: it is not there.
        DoubtError: it is.

    """
    new, cur = directory / "new", directory / "cur"
    if any(path.exists() for path in (new / name, cur / name)) or any(cur.glob(f"{name}:*")):
        return
    handle = os.open(new, os.O_RDONLY)
    try:
        _write(directory / "tmp" / name, *parts)
        (directory / "tmp" / name).rename(new / name)
        try:
            os.fsync(handle)
        except OSError as error:
            raise DoubtError(f"{name} is in new, but perhaps not for good ({error.strerror})") from error
    finally:
        os.close(handle)


def _write(path: Path, *parts: bytes | bytearray) -> None:
    try:
        with path.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)  # a full disk needs the space
        raise


class MaildirTransport(asyncio.Transport):
    """Server's side: takes what the connection writes and answers it from the loop's next turn on."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._connection: SmtpConnection | None = None
        self._buffer = bytearray()
        self._searched = 0
        """Offset up to which the content has been searched for its final dot."""
        self._in_content = False
        self._envelope = b""
        self._busy = False
        """True while a file is being written: what is written behind the dot waits."""
        self._closed = False

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Answer to this connection (asyncio.Transport)."""
        self._connection = cast("SmtpConnection", protocol)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Ignore the limits: no kernel keeps anything waiting (asyncio.Transport)."""

    def get_extra_info(self, _name: str, default: Any = None) -> Any:
        """Return the default: there is neither socket nor cipher (asyncio.Transport)."""
        return default

    def is_closing(self) -> bool:
        """Return True if it is over (asyncio.Transport)."""
        return self._closed

    def abort(self) -> None:
        """End; a file that is being written is finished, as a server would (asyncio.Transport)."""
        self._closed = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take commands and content as they come (asyncio.Transport)."""
        self._buffer += data
        self._advance()

    def _advance(self) -> None:
        while not (self._busy or self._closed) and (self._take_content() if self._in_content else self._take_line()):
            pass

    def _take_line(self) -> bool:
        line, end, rest = bytes(self._buffer).partition(b"\r\n")
        if not end:
            return False
        command = line[:4].upper()
        self._buffer = bytearray(rest)
        if command == b"MAIL":
            self._envelope = b"Return-Path: " + _path(line) + b"\r\n"  # RFC 5321 §4.4
        elif command == b"RCPT":
            self._envelope += b"Delivered-To: " + _path(line)[1:-1] + b"\r\n"
        elif command == b"DATA":
            self._in_content = True
            self._buffer[:0] = b"\r\n"  # so that a lone dot is found like any other
        self._say({b"DATA": "354 Go ahead", b"QUIT": "221 Bye"}.get(command, "250 OK"))
        return True

    def _take_content(self) -> bool:
        end = self._buffer.find(_DOT, self._searched)
        if end < 0:
            self._searched = max(len(self._buffer) - len(_DOT) + 1, 0)
            return False
        # A message may be large: the bytes after it are copied instead of it, and it is copied once, to undo its dots.
        content, self._buffer = self._buffer, self._buffer[end + len(_DOT) :]
        del content[end + 2 :]
        content = content.replace(b"\r\n.", b"\r\n")
        del content[:2]
        self._searched = 0
        self._in_content = False
        assert self._connection is not None
        tried = self._connection.awaiting_reply
        assert tried is not None, "a dot belongs to a try whose reply is awaited"
        name = f"{file_name(tried.outgoing.email, tried.outgoing.message_id)}.{tried.attempt}"
        self._busy = True
        writing = asyncio.get_running_loop().run_in_executor(
            None, deliver, self._directory, name, self._envelope, content
        )
        writing.add_done_callback(lambda done: self._written(name, done))
        return False

    def _written(self, name: str, writing: "asyncio.Future[None]") -> None:
        self._busy = False
        if writing.cancelled() or self._closed or self._connection is None:
            return
        match writing.exception():
            case None:
                self._say(f"250 {name} is in new")
            case OSError() as error if error.errno in _FULL:
                self._say(f"452 {name} was not written: {error.strerror}")
            case OSError() as error:  # no email is to blame, and none can be written
                self._say(f"{TAKES_NOTHING} 4.3.0 {name} was not written: {error.strerror}")
            case error:
                self._connection.connection_lost(error if isinstance(error, Exception) else None)
        self._advance()

    def _say(self, reply: str) -> None:
        asyncio.get_running_loop().call_soon(self._answer, reply.encode() + b"\r\n")

    def _answer(self, reply: bytes) -> None:
        if not self._closed and self._connection is not None:
            self._connection.data_received(reply)


def _path(line: bytes) -> bytes:
    """Return the address of MAIL or RCPT in its angle brackets."""
    return line[line.index(b"<") : line.index(b">") + 1]
