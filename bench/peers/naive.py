"""The cron script of the question: no queue, a loop over people on each server, smtplib on a kept connection."""

import psycopg

from bench.peers.job import play, told
from bench.peers.kept_connections import KeptPerThread

JOB = told()


def put() -> None:
    with psycopg.connect(JOB.database) as database:
        database.execute("CREATE TABLE people (id int PRIMARY KEY)")
        database.execute("INSERT INTO people SELECT generate_series(1, %s)", (JOB.emails,))


def work() -> None:
    smtp = KeptPerThread(JOB)
    with psycopg.connect(JOB.database) as database:
        people = database.execute("SELECT id FROM people ORDER BY id").fetchall()
    for (number,) in people:
        smtp.deliver(number, None)


if __name__ == "__main__":
    play(put, work)
