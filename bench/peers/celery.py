"""celery with redis (appendonly yes) at its documented best ("Optimizing", "Tasks", "Workers").

N workers with a few threads each, which was as fast as one of N prefork processes or faster; an SMTP connection per
thread, a high prefetch multiplier ("many short-duration tasks"), no results, no gossip, mingle or heartbeat, one
producer kept for all the calls. Tasks are acknowledged when they are done (`acks_late`): with the default a killed
worker loses what it holds, and no other peer does.
"""

import os

from celery import Celery

from bench.peers.job import play, told
from bench.peers.kept_connections import KeptPerThread

JOB = told()
PREFETCH = 25
THREADS = 4
app = Celery("mail", broker=JOB.redis)
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,
    worker_prefetch_multiplier=PREFETCH,
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
)
smtp = KeptPerThread(JOB)


@app.task(name="send")
def send(number: int, message: str | None) -> None:
    smtp.deliver(number, message)


def put() -> None:
    with app.producer_pool.acquire(block=True) as producer:
        for payload in JOB.payloads():
            send.apply_async(kwargs=payload, producer=producer)


def work() -> None:
    mine = ["--pool=threads", f"--concurrency={THREADS}", f"--hostname=worker-{os.getpid()}@localhost"]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=ERROR"]
    app.worker_main(["worker", *mine, *quiet])


if __name__ == "__main__":
    play(put, work)
