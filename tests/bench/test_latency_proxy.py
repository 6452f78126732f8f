"""The slow network of the benchmarks: it delays, and limits nothing."""

import asyncio
import time
from pathlib import Path

import pytest

from bench.harness.environment import Environment
from bench.harness.latency_proxy import Opened, opened, slowed

ROUND_TRIP_S = 0.1


@pytest.fixture
async def echo():
    """A server that says everything again."""

    async def serve(reader, writer):
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield f"smtp://{host}:{port}"


def near(directory: Path, smtp: str) -> Environment:
    return Environment(directory, "", smtp, directory / "journal", None, 1)


async def connect(environment: Environment):
    host, port = environment.smtp.removeprefix("smtp://").split(":")
    return await asyncio.open_connection(host, int(port))


async def test_portions_do_not_wait_for_each_other_and_keep_their_order(tmp_path, echo):
    async with slowed(near(tmp_path, echo), ROUND_TRIP_S) as (environment, _):
        reader, writer = await connect(environment)
        began = time.monotonic()
        for number in range(100):
            writer.write(b"%4d\n" % number)
            await writer.drain()
        first = await reader.readline()
        assert time.monotonic() - began >= ROUND_TRIP_S
        assert [int(first), *[int(await reader.readline()) for _ in range(99)]] == list(range(100))
        assert time.monotonic() - began < 20 * ROUND_TRIP_S  # one after the other they would take a hundred
        writer.close()


async def test_an_end_goes_through_and_the_journal_knows_how_many_connections_stood(tmp_path, echo):
    async with slowed(near(tmp_path, echo), ROUND_TRIP_S) as (environment, journal):
        ways = [await connect(environment) for _ in range(3)]
        for reader, writer in ways:
            writer.write(b"last words")
            writer.write_eof()
            assert await reader.read() == b"last words"
            writer.close()
        while len(opened(journal).changes) < 6:
            await asyncio.sleep(0.01)
    assert opened(journal).total == 3
    assert opened(journal).over_time()[-1][1] == 0


def test_connections_over_time_are_counted_from_the_first():
    found = Opened([(10.0, 1), (10.5, 1), (12.0, -1)])
    assert found.total == 2
    assert found.over_time() == [(0.0, 1), (0.5, 2), (2.0, 1)]
