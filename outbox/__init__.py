"""outbox: one report and one email per recipient and period, however many servers run it.

The row is the truth, the lock shows who is alive, the mark records what was about to be sent. A newcomer who follows
one report opens the packages in this order:

    settings     what the user configures
    reports      what a report is: periods, schedules, languages, templates
    mail         what an email is: addresses, header fields, messages; the API for an application's own emails
    generate     reports are made: `outbox generate`, and the scheduler that starts it
    database     access to Postgres: sessions, schema, roles
    relay        emails are sent: `outbox relay`
    smtp         the SMTP client, which knows no Postgres
    feedback     what comes back after a server has accepted an email
    operations   what operators read and decide: status, show, audit, retry, resolve, prune
    doctor       `outbox doctor`
    monitoring   what machines ask: HTTP endpoints, metrics, completion
    cli          the commands: read settings, wire, print, set the exit code
    web          report pages and the operators' board

    testing      pytest fixtures for applications that use outbox
    sandbox      embedded Postgres, SMTP sink, demo

    errors       exceptions, each with its exit code
    log          structured log events
    tracing      OpenTelemetry, from generate to the send
    user_code    loads and runs the user's own code
    trust        refuses files that others can write
    suggestions  names for misspelt ones, and commands quoted for a shell

`generate` and `relay` meet only in the database. Imports point down only (`lint-imports`); see docs/architecture.md.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outbox.generate.recipients import Recipient
    from outbox.generate.source import ReportSource
    from outbox.mail.attachment import Attachment
    from outbox.mail.email import Email
    from outbox.mail.enqueue import enqueue

__version__ = "0.1.0"
__all__ = ["Attachment", "Email", "Recipient", "ReportSource", "enqueue"]

_API = {
    "Attachment": "outbox.mail.attachment",
    "Email": "outbox.mail.email",
    "enqueue": "outbox.mail.enqueue",
    "Recipient": "outbox.generate.recipients",
    "ReportSource": "outbox.generate.source",
}


def __getattr__(name: str) -> object:
    """The names of the Python API, from their rooms once asked for: who runs commands loads no drivers."""
    from importlib import import_module

    room = _API.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(room), name)
