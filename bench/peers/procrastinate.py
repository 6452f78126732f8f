"""procrastinate at its documented best.

`batch_defer_async` ("defer multiple jobs at once"), an async task, finished jobs deleted ("howto/production"), a pool
of one connection more than the concurrency ("the shorter your average job … as many connections as your concurrency
(plus one)"). The concurrency is tuned on this job: workers get in each other's way when they fetch, and 16 is slower.
"""

from procrastinate import App, PsycopgConnector

from bench.peers.job import play, told
from bench.peers.kept_connections import Kept

JOB = told()
CONCURRENCY = 2
app = App(connector=PsycopgConnector(conninfo=JOB.database, min_size=CONCURRENCY + 1, max_size=CONCURRENCY + 1))
smtp = Kept(JOB)


@app.task(name="send", queue="mail")
async def send(number: int, message: str | None) -> None:
    await smtp.deliver(number, message)


async def put() -> None:
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        await send.batch_defer_async(*JOB.payloads())


async def work() -> None:
    async with app.open_async():
        await app.run_worker_async(queues=["mail"], concurrency=CONCURRENCY, delete_jobs="always")


if __name__ == "__main__":
    play(put, work)
