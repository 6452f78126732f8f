"""django-mailer at its documented best.

Queued by one `send_messages` of its backend (a bulk insert); `send_mail` on each server without the file lock, so that
`SELECT … FOR UPDATE NOWAIT` shares the work. Its engine has Django open an SMTP connection for every mail; the backend
here keeps it, which favours it.
"""

import os
from typing import Any

import django
from django.core.mail import EmailMessage, get_connection
from django.core.mail.backends.smtp import EmailBackend
from django.core.management import call_command

from bench.peers.job import SENDER, address, body_of, play, told

JOB = told()


class KeptBackend(EmailBackend):
    """Backend that is open before the first mail: Django closes only what `send_messages` opened."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.open()


def put() -> None:
    call_command("migrate", verbosity=0)
    body = body_of(JOB.size)
    mails = [EmailMessage("Progress", body, SENDER, [address(n)]) for n in range(1, JOB.emails + 1)]
    get_connection("mailer.backend.DbBackend").send_messages(mails)


def work() -> None:
    call_command("send_mail")


if __name__ == "__main__":
    os.environ["DJANGO_SETTINGS_MODULE"] = "bench.peers.django_settings"
    django.setup()
    play(put, work)
