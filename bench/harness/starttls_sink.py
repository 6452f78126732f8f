"""The sink as a process of its own with what `outbox.sink` does not offer on its command line: STARTTLS.

usage: python -m bench.harness.starttls_sink --journal FILE [--no-pipelining] [--starttls]

It speaks as `python -m outbox.sandbox.smtp_sink` does: where it listens on stdout, a line per acceptance in the
journal.
"""

import argparse
import asyncio
import signal
import ssl
import sys
from pathlib import Path
from typing import BinaryIO, Final

import trustme
import uvloop

from outbox.sandbox.smtp_sink import Accepted, Sink

FLUSH_S: Final = 0.05


class Journal:
    """The lines of what was accepted, written a few times per second."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines: list[str] = []

    def note(self, accepted: Accepted) -> None:
        """Take the lines of a message."""
        if not self._lines:
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
        self._lines += [
            f"{accepted.at:.6f}\t{accepted.peer_port}\t{recipient}\t{accepted.message_id}\n"
            for recipient in accepted.recipients
        ]

    def flush(self) -> None:
        """Write what is waiting, in one write."""
        self._file.write("".join(self._lines).encode())
        self._lines.clear()


def certificate() -> ssl.SSLContext:
    """The server's side of TLS, with a certificate that is made here and that nobody knows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    return context


async def serve(options: argparse.Namespace) -> None:
    """Until SIGTERM."""
    told_to_stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_stop.set)
    with options.journal.open("ab", buffering=0) as file:
        journal = Journal(file)
        async with Sink(
            pipelining=options.pipelining,
            tls=certificate() if options.starttls else None,
            keep_messages=False,
            keep_accepted=False,
            on_accepted=journal.note,
        ) as sink:
            sys.stdout.write(f"listening {sink.host}:{sink.port}\n")
            sys.stdout.flush()
            await told_to_stop.wait()
        journal.flush()


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(prog="python -m bench.harness.starttls_sink")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--no-pipelining", dest="pipelining", action="store_false")
    parser.add_argument("--starttls", action="store_true")
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
