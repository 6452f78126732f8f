"""faststream-outbox at its documented best ("Performance", "Subscriber").

`publish_batch` in one transaction, asyncpg (so that NOTIFY wakes), `max_workers` for parallel handlers with a pool of
one connection more for each, large fetches, terminal deletes in batches, the autovacuum settings, no log per message.
"""

import asyncio
from typing import Any

from faststream_outbox import OutboxBroker, make_outbox_table
from faststream_outbox.autovacuum import outbox_autovacuum_ddl
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from bench.peers.job import play, told, until_told_to_stop
from bench.peers.kept_connections import Kept

JOB = told()
BATCH = 100
metadata = MetaData()
table = make_outbox_table(metadata, table_name="mail_outbox")
engine = create_async_engine(
    JOB.database.replace("postgresql:", "postgresql+asyncpg:"), pool_size=JOB.connections + 2, max_overflow=0
)
broker = OutboxBroker(engine, outbox_table=table, logger=None)


async def put() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        await connection.execute(text(outbox_autovacuum_ddl(table.name)))
    async with AsyncSession(engine) as session, session.begin():
        await broker.publish_batch(*JOB.payloads(), queue="mail", session=session)
    await engine.dispose()


async def work() -> None:
    smtp = Kept(JOB)
    stop = asyncio.Event()

    @broker.subscriber(
        "mail",
        max_workers=JOB.connections,
        fetch_batch_size=BATCH,
        min_fetch_interval=0.01,
        max_fetch_interval=1.0,
        terminal_flush_batch_size=BATCH,
    )
    async def send(body: dict[str, Any]) -> None:
        await smtp.deliver(**body)

    until_told_to_stop(stop.set)
    await broker.start()
    await stop.wait()
    await broker.stop()
    await engine.dispose()


if __name__ == "__main__":
    play(put, work)
