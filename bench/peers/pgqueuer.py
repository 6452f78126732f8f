"""pgqueuer at its documented best ("Performance Tuning").

The asyncpg pool driver on uvloop, one `enqueue` of lists, `batch_size` raised because the jobs are short, the
recommended autovacuum settings, and tables that are logged ("durable", the default: the others lose jobs in a crash).
"""

import json

import asyncpg
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgPoolDriver
from pgqueuer.models import Job as Queued
from pgqueuer.queries import Queries

from bench.peers.job import play, told, until_told_to_stop
from bench.peers.kept_connections import Kept

JOB = told()
BATCH = 300


async def put() -> None:
    async with asyncpg.create_pool(JOB.database) as pool:
        queries = Queries(AsyncpgPoolDriver(pool))
        await queries.install()
        await queries.optimize_autovacuum()
        rows = [json.dumps(payload).encode() for payload in JOB.payloads()]
        await queries.enqueue(["send"] * len(rows), rows, [0] * len(rows))


async def work() -> None:
    smtp = Kept(JOB)
    async with asyncpg.create_pool(JOB.database, min_size=5, max_size=20) as pool:
        queue = PgQueuer(AsyncpgPoolDriver(pool))

        @queue.entrypoint("send")
        async def send(queued: Queued) -> None:
            await smtp.deliver(**json.loads(queued.payload or b""))

        until_told_to_stop(queue.shutdown.set)
        await queue.run(batch_size=BATCH)


if __name__ == "__main__":
    play(put, work)
