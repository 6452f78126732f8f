"""Loop written by hand: MAIL, RCPT and DATA of the same bytes, and nothing else. Prints messages per second.

`aiosmtplib.SMTP.sendmail` in bench/harness/smtp_baseline.py does more for each email: it composes options, and builds
its result.

usage: python -m bench.harness.smtp_by_hand HOST PORT COUNT CONNECTIONS BYTES
"""

import asyncio
import sys
import time

import aiosmtplib
import uvloop

from bench.speed.one_relay import message_of


async def main(host: str, port: int, count: int, connections: int, size: int) -> float:
    """Send `count` messages over `connections` connections, each one kept; return messages per second."""
    message = message_of(size)
    numbers = iter(range(1, count + 1))
    open_ = [aiosmtplib.SMTP(hostname=host, port=port, timeout=60) for _ in range(connections)]
    for smtp in open_:
        await smtp.connect()
        await smtp.ehlo()

    async def worker(smtp: aiosmtplib.SMTP) -> None:
        for number in numbers:
            await smtp.mail("reports@example.com")
            await smtp.rcpt(f"p{number}@example.com")
            await smtp.data(message)

    began_at = time.perf_counter()
    await asyncio.gather(*map(worker, open_))
    took_s = time.perf_counter() - began_at
    for smtp in open_:
        smtp.close()
    return count / took_s


if __name__ == "__main__":
    place, *figures = sys.argv[1:]
    print(uvloop.run(main(place, *map(int, figures))))
