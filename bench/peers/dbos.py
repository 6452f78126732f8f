"""dbos at its documented best ("Queues and concurrency", "Workflows").

Enqueued by the client in one transaction; async workflows whose one step sends, `worker_concurrency` many at once,
polled often, since a queue's next workflows are claimed at the poll only. Each process has an executor id of its own:
one that starts takes up again what its id had in hand.
"""

import os
import threading

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSConfig

from bench.peers.job import play, told
from bench.peers.kept_connections import Kept

JOB = told()
QUEUE = "mail"
POLL_S = 0.05
CONCURRENCY = 100
URL = JOB.database.replace("postgresql:", "postgresql+psycopg:")
CONFIG: DBOSConfig = {
    "executor_id": str(os.getpid()),
    "name": "mail",
    "system_database_url": URL,
    "application_version": "1",
    "sys_db_pool_size": 20,
    "log_level": "ERROR",
}
smtp: Kept | None = None


@DBOS.step()
async def deliver(number: int, message: str | None) -> None:
    global smtp  # noqa: PLW0603 - it belongs to the event loop, which dbos makes
    smtp = smtp or Kept(JOB)
    await smtp.deliver(number, message)


@DBOS.workflow(name="send")
async def send(number: int, message: str | None) -> None:
    await deliver(number, message)


def put() -> None:
    DBOS(config=CONFIG)
    DBOS.listen_queues([])
    DBOS.launch()
    DBOS.register_queue(QUEUE, worker_concurrency=CONCURRENCY, polling_interval_sec=POLL_S)
    client = DBOSClient(system_database_url=URL)
    with sa.create_engine(URL).begin() as transaction:
        for payload in JOB.payloads():
            client.enqueue_in_transaction(transaction, {"queue_name": QUEUE, "workflow_name": "send"}, **payload)
    client.destroy()
    DBOS.destroy()


def work() -> None:
    DBOS(config=CONFIG)
    DBOS.listen_queues([QUEUE])
    DBOS.launch()
    threading.Event().wait()


if __name__ == "__main__":
    play(put, work)
