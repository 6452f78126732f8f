"""Faults of the networks between a server and Postgres or the mail server, and of the mail server itself."""

import asyncio
from typing import Final

from bench.faults.environment import Environment
from bench.faults.registry import Struck, fault
from bench.harness.fault_proxy import Link, Proxy

TROUBLE: Final = 0.15  # share of the messages that are mistreated


async def _black_hole(proxy: Proxy, struck: Struck) -> str:
    proxy.black_hole = True
    await asyncio.sleep(struck.strike.length_s)
    proxy.heal()
    return ""


async def _cut(proxy: Proxy, struck: Struck) -> str:
    proxy.refuse = struck.strike.length_s > 0
    proxy.cut(reset=struck.strike.coin < 0.5)
    await asyncio.sleep(struck.strike.length_s)
    proxy.heal()
    return ""


async def _delay(proxy: Proxy, struck: Struck) -> str:
    proxy.delay_s = 0.02 + 0.2 * struck.strike.coin
    note = f"{1000 * proxy.delay_s:.0f} ms each way"
    await asyncio.sleep(struck.strike.length_s)
    proxy.heal()
    return note


def _silence(_: Link) -> None:
    """Stop forwarding without ending the connection."""


async def _bytes(proxy: Proxy, struck: Struck, most: int) -> str:
    """Forward the first k bytes of each connection, then end it: FIN, RST or silence."""
    coin = struck.strike.coin
    count = int(most * (coin * 7 % 1) ** 2)
    proxy.at_limit = (Link.cut, lambda link: link.cut(reset=True), _silence)[int(3 * coin)]
    setattr(proxy, "up_max" if int(coin * 1000) % 2 else "down_max", count)
    await asyncio.sleep(struck.strike.length_s)
    proxy.heal()
    proxy.cut()
    return f"{count} bytes"


@fault("partition-db", "db", 0.5, 2.0)
async def _partition_db(environment: Environment, struck: Struck) -> str:
    """A black hole between a server and Postgres."""
    return await _black_hole(environment.hosts[struck.strike.host].database, struck)


@fault("cut-db", "db", 0.0, 0.5)
async def _cut_db(environment: Environment, struck: Struck) -> str:
    """A server's connections to Postgres are cut, and new ones refused for a while."""
    return await _cut(environment.hosts[struck.strike.host].database, struck)


@fault("delay-db", "db", 0.5, 2.0)
async def _delay_db(environment: Environment, struck: Struck) -> str:
    """A slow network between a server and Postgres."""
    return await _delay(environment.hosts[struck.strike.host].database, struck)


@fault("bytes-db", "db", 0.3, 1.0)
async def _bytes_db(environment: Environment, struck: Struck) -> str:
    """Only the first k bytes of a server's connections to Postgres arrive."""
    return await _bytes(environment.hosts[struck.strike.host].database, struck, 12_000)


@fault("partition-smtp", "smtp", 0.5, 2.0)
async def _partition_smtp(environment: Environment, struck: Struck) -> str:
    """A black hole between a server and the mail server."""
    return await _black_hole(environment.hosts[struck.strike.host].smtp, struck)


@fault("cut-smtp", "smtp", 0.0, 0.5)
async def _cut_smtp(environment: Environment, struck: Struck) -> str:
    """A server's connections to the mail server are cut, and new ones refused for a while."""
    return await _cut(environment.hosts[struck.strike.host].smtp, struck)


@fault("delay-smtp", "smtp", 0.5, 2.0)
async def _delay_smtp(environment: Environment, struck: Struck) -> str:
    """A slow network between a server and the mail server."""
    return await _delay(environment.hosts[struck.strike.host].smtp, struck)


@fault("bytes-smtp", "smtp", 0.3, 1.0)
async def _bytes_smtp(environment: Environment, struck: Struck) -> str:
    """Only the first k bytes of a server's connections to the mail server arrive."""
    return await _bytes(environment.hosts[struck.strike.host].smtp, struck, 15_000)


@fault("smtp", "mail", 0.5, 2.0)
async def _smtp(environment: Environment, struck: Struck) -> str:
    """The mail server misbehaves at every stage: ends, hangs, 421, 4xx, 5xx, garbage, split and late replies."""
    before = sum(environment.mail.met.values())
    environment.mail.trouble = TROUBLE
    await asyncio.sleep(struck.strike.length_s)
    environment.mail.trouble = 0.0
    return f"{sum(environment.mail.met.values()) - before} met"
