"""Sink as a process of its own, with an option that `python -m outbox.sandbox.smtp_sink` lacks: STARTTLS.

usage: python -m bench.harness.starttls_sink --journal FILE [--no-pipelining] [--starttls]

Like that program, it prints its address on stdout and writes a line per accepted recipient to the journal.
"""

import argparse
import asyncio
import signal
import ssl
import sys
from pathlib import Path

import trustme
import uvloop

from outbox.sandbox.smtp_sink import Sink
from outbox.sandbox.smtp_sink.journal import Journal


def certificate() -> ssl.SSLContext:
    """Return a server's TLS context with a new certificate, which no client trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    return context


async def serve(options: argparse.Namespace) -> None:
    """Run the sink until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    journal = Journal(options.journal)
    async with Sink(
        pipelining=options.pipelining,
        tls=certificate() if options.starttls else None,
        keep_messages=False,
        keep_accepted=False,
        on_accepted=journal.note,
    ) as sink:
        sys.stdout.write(f"listening {sink.host}:{sink.port}\n")
        sys.stdout.flush()
        await stop.wait()
    journal.close()


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(prog="python -m bench.harness.starttls_sink")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--no-pipelining", dest="pipelining", action="store_false")
    parser.add_argument("--starttls", action="store_true")
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
