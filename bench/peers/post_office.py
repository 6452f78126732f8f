"""django-post_office at its documented best, on one server: on several it sends everything several times.

`send_many` (a bulk insert), `send_queued_mail --processes N` with threads, whose SMTP connections it keeps, a raised
BATCH_SIZE, since every batch makes its processes and connections anew, and a log of errors only.
"""

import os
from pathlib import Path

import django
from django.core.management import call_command

from bench.peers.job import SENDER, address, body_of, play, told

JOB = told()


def put() -> None:
    from post_office import mail

    call_command("migrate", verbosity=0)
    body = body_of(JOB.size)
    mail.send_many(
        [
            {"recipients": address(number), "sender": SENDER, "subject": "Progress", "message": body}
            for number in range(1, JOB.emails + 1)
        ]
    )


def work() -> None:
    call_command("send_queued_mail", processes=JOB.workers, lockfile=str(Path.cwd() / "post_office"))


if __name__ == "__main__":
    os.environ["DJANGO_SETTINGS_MODULE"] = "bench.peers.django_settings"
    django.setup()
    play(put, work)
