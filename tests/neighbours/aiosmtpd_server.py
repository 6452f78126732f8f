"""aiosmtpd, which keeps each message in a file of its own; usage: PORT DIRECTORY OPTIONS-AS-JSON."""

import asyncio
import itertools
import json
import os
import signal
import sys
from pathlib import Path

from aiosmtpd.smtp import SMTP

NUMBERS = itertools.count(1)


class Keeper:
    """Take every message, and keep it before the reply."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    async def handle_RCPT(self, _server, _session, envelope, address, _options) -> str:  # noqa: N802 - aiosmtpd's name
        if address.startswith("unknown"):
            return "550 5.1.1 unknown user"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 OK"

    async def handle_DATA(self, _server, _session, envelope) -> str:  # noqa: N802 - aiosmtpd's name
        name = f"{os.getpid()}-{next(NUMBERS)}"
        hidden = self.directory / f".{name}"
        hidden.write_bytes(",".join(envelope.rcpt_tos).encode() + b"\n" + envelope.original_content)
        hidden.rename(self.directory / name)
        return "250 OK"


async def main(port: str, directory: str, options: str) -> None:
    keeper = Keeper(Path(directory))
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)

    def visit() -> SMTP:
        return SMTP(keeper, enable_SMTPUTF8=True, hostname="mail.example.net", **json.loads(options))

    async with await loop.create_server(visit, "127.0.0.1", int(port)):
        await ended.wait()
    # The connections are closed by the kernel, without a word.
    os._exit(0)


asyncio.run(main(*sys.argv[1:]))
