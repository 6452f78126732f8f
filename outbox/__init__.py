"""outbox: one report and one email per recipient and period, however many servers run it.

The row is the truth, the lock is the pulse, the mark is the memory. A report walks through these rooms, and a
newcomer who follows it meets them in this order:

    settings → period → edition → source → report → message → record       the corridor of making: generate
    session → ledger (claim, mark, settle, sweep) ⇄ conversation → verdict the corridor of sending: relay
    schedule → agenda → starter                                            the relay's cron: generate is started
    status, watch, list, show, audit, doctor                               what people see
    retry, cancel, resolve, pause, resume                                  what people decide

    settings          what the user decides, checked whole
    errors            the ways in which outbox cannot go on, each with its exit code
    trust             files that others can write are refused
    plugin            the user's own code: found by its name, run where it may block
    redaction         removes a login from the replies of a mail server
    secret_files      logins that come from files, read again once a server refuses them
    address           where Postgres and the mail server are, shown without their secrets
    postgres_hosts    hosts and addresses of a database URL: which are asked, in which order, for how long
    postgres_parameters  parameters of a database URL: those of libpq, in other spellings, of other tools
    postgres_local    files of TLS and the name of the user, which a connection takes from this machine
    database_refusal  reasons why Postgres or a pooler gives no session, and what to do about each
    database          the way to Postgres; whose advisory locks are whose
    schema            schema.sql applied, upgraded, told apart
    roles             who may do what in it, granted
    period            which stretch of time a report covers; calendars and civil time
    timezones         names of time zones: which mean the same zone, and which is current
    edition           one report for one period, and the definition that the fleet shares
    source            who is owed a report and what it says: two queries, or a class of the user's
    language          how a reader's language writes dates, numbers and our words; phrases: these words
    spelling          suggestions for misspelt names; template_files: templates that are not used because of their names
    table             rows made ready to be shown: numbers, sums, bars
    jinja             environments of Jinja: which files, what is escaped, errors with file and line
    report            rows become a subject, a mail and a page (templates/)
    message           the RFC 5322 bytes; fields: any text as a header field can hold it; mailbox: addresses and names;
                      structured: further fields, each in its own syntax
    record            the one transaction: report, email and delivery
    parameters        what is a parameter of a query, and what is a colon otherwise
    user_query        the user's queries: prepared once; errors of the query and of one row told apart
    generate_session  generate's connection: our statements, the user's queries, the pulse
    lock_wait         bounded waits for locks of other sessions, and who holds them
    buckets           advisory locks by which the servers share an edition's recipients
    batch_writer      commits batches of reports; a blocked recipient does not stop the others
    edition_lock      shared by the generates of an edition, exclusive for who removes it or declares it done
    no_recipients     why an edition may have no recipients
    mark_done         editions that another system made
    waiver            recipients without a report, and decisions that nothing is owed to them
    generate          the corridor: buckets, what is missing, made here or elsewhere
    email             an application's own email, whole and checked; enqueuing: put in, in the application's transaction
    digest            a report over reports: what waits for an address, told of in one email
    preview           one recipient's report and email from real rows, and nothing written

    verdict           what a try ended in, and what follows
    backoff           how long until the next try
    replies           SMTP replies out of bytes; reply_class: table of what a refusal is about
    esmtp             what a server offers beyond the least, and what is said because of it
    verp              tokens by which a bounce proves which email it is about; bounce_key: rotation of their key
    suppression       who gets no more email, and since when: the list that generate and relays obey
    ledger            what a relay writes for every email, as SQL; what is rare is in failover, doubt and breaker
    failover          verdicts that a relay tells again to a server that lacks them
    barrier           the wait after a change of servers, until the relays have said what they sent
    doubt             what happens by itself to what is in doubt: sent again, or asked about
    letterhead        last checks, and what a route adds to every email; content: mail data; signature: DKIM
    outgoing          what the SMTP side needs of a claimed email
    quarantine        rows that cannot be read or written; isolate: a tick in parts, to find them
    budget            memory for large messages; notified: rests after notifications that lead to nothing
    conversation      one SMTP connection: content, mark, guard, dot
    breaker           when the server is the trouble: the pause of a route, for a relay and for the fleet
    refusals          judgement of refusals that may be about the sender or this host, and how it is undone
    pause             what people hold back: a report, or the fleet
    pace              the rate that the fleet shares: moments at which a relay may start an email
    throttle          rate and number of connections that a mail server takes, found from what it refuses
    routing           which email takes which of several routes, and what waits where nobody relays
    dialing           connections to a host name with several addresses; helo: name of this host in EHLO;
                      host_name: host names and address literals
    smtp_opening      greeting, EHLO and TLS on one address; smtp_login: AUTH
    route             opens connections to one mail server; lmtp: by LMTP; maildir: a directory in place of a server
    pool              the relay's connections, and what waits for one
    session           one relay = one Postgres session = one lock = one identity
    reopening         pauses and log lines of a relay that gets no session
    relay             the corridor: claims to connections, verdicts to the next tick; relays: one for each route

    attention         the one rule that decides what needs a person; deferrals: what waits after a try, by the reply
    status            what is going on, in one look; watch: the same again and again, with rates; screen: its looks
    audit             whether all of an edition is sent, by name
    selection         which emails a person means: by key, edition, state or address
    operate           what a person does to them: retry, cancel
    resolve           what a person decides about what is in doubt, or dead
    exported          lists of addresses that providers export, read for the suppression list
    show              the whole story of one
    mime              bounded reader of MIME messages; stored_mail: a stored email's headers, text, page and files
    suggested         commands that are suggested to people, quoted for a shell
    bounce            parser of bounces and complaints; bounce_class: how they weigh against an address
    returned          verification and recording of bounces and complaints

    schedule          the ticks of a cron expression in civil time
    agenda            how the schedules stand: the latest tick, its edition, what became of it
    starter           beside the relay: starts generate when a schedule ticks, and again until it is done

    trial             one email past the outbox, to see whether it can be sent

    log               facts with names, fields and a sentence; observer: what a relay tells who looks on
    metrics, fleet    what this relay measures; what the database says of the fleet
    health            whether it lives, and is ready; notify: systemd is told; endpoints: who asks over HTTP
    http_server       small HTTP server for the endpoints, which slow clients cannot block
    completion        when an edition is complete, and the dead man's switch
    tracing, spans    OpenTelemetry, from generate to the send

    prune             what is old is made small: messages, trails and pages; the unique keys stay

    web               what people see in a browser: the report behind the link, the operators' board

    finding           what a look gave: ok, note, fault or unknown, and the mend
    doctor            the looks at what users get wrong, in the order in which a report travels: doctor_database
                      (doctor_rights, doctor_access), doctor_reports, doctor_smtp (doctor_local where it is none), and
                      who relays

    embedded, sink, demo   a real Postgres and a real SMTP server for trying it out and for the tests
    testing                both as pytest fixtures, for the tests of who uses outbox

`generate` and `relay` meet only in the database. `cli` reads settings, wires, prints and sets the exit code; no other
room does. Imports go down only (`lint-imports`).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outbox.email import Email
    from outbox.enqueuing import enqueue
    from outbox.message import Attachment
    from outbox.source import Recipient, ReportSource

__version__ = "0.1.0"
__all__ = ["Attachment", "Email", "Recipient", "ReportSource", "enqueue"]

_API = {
    "Attachment": "outbox.message",
    "Email": "outbox.email",
    "enqueue": "outbox.enqueuing",
    "Recipient": "outbox.source",
    "ReportSource": "outbox.source",
}


def __getattr__(name: str) -> object:
    """The names of the Python API, from their rooms once asked for: who runs commands loads no drivers."""
    from importlib import import_module

    room = _API.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(room), name)
