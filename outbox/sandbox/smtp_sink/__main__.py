"""Program that runs a sink: `python -m outbox.sandbox.smtp_sink`."""

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path

from outbox.sandbox.smtp_sink.journal import Journal
from outbox.sandbox.smtp_sink.server import Sink


async def _serve(options: argparse.Namespace) -> None:
    journal = Journal(options.journal) if options.journal else None
    sink = Sink(
        pipelining=options.pipelining,
        keep_messages=False,
        keep_accepted=False,
        on_accepted=journal.note if journal else None,
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await sink.start(options.host, options.port)
    sys.stdout.write(f"listening {sink.host}:{sink.port}\n")
    sys.stdout.flush()
    await stop.wait()
    await sink.stop()
    if journal:
        journal.close()
    counts = {
        "accepted": sink.messages,
        "addresses": len(sink.addresses),
        "duplicates": sink.addresses.total() - len(sink.addresses),
    }
    sys.stdout.write(json.dumps(counts) + "\n")


def _new_loop() -> asyncio.AbstractEventLoop:
    """Return a loop of uvloop where that is installed: three times as fast here."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def main() -> None:
    """Serve until SIGTERM or SIGINT, then print the counts of what came in as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m outbox.sandbox.smtp_sink", description="An SMTP server that keeps mail."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    parser.add_argument("--journal", type=Path, help="append time, port, recipient and Message-ID to this file")
    parser.add_argument("--no-pipelining", dest="pipelining", action="store_false")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(_serve(options))


if __name__ == "__main__":
    main()
