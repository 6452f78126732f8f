"""Bare aiosmtplib loop: no database, no marks, no retries; the baseline for a relay.

usage: python -m bench.harness.smtp_baseline HOST PORT COUNT CONNECTIONS BYTES
"""

import asyncio
import sys

import aiosmtplib
import uvloop

from bench.speed.one_relay import message_of


async def main(host: str, port: int, count: int, connections: int, size: int) -> None:
    """Send `count` messages over `connections` connections, each one kept."""
    message = message_of(size)
    numbers = iter(range(1, count + 1))

    async def worker() -> None:
        async with aiosmtplib.SMTP(hostname=host, port=port, timeout=60) as smtp:
            for number in numbers:
                await smtp.sendmail("reports@example.com", [f"p{number}@example.com"], message)

    await asyncio.gather(*(worker() for _ in range(connections)))


if __name__ == "__main__":
    place, *figures = sys.argv[1:]
    uvloop.run(main(place, *map(int, figures)))
