"""SMTP server that keeps what it accepts and delivers nothing: the mailbox of the demo, the tests and the benchmarks.

With a script it shows every fault of a real server.

    python -m outbox.sandbox.smtp_sink --port 2525 --journal mail.tsv

server        `Sink`: starts, listens, can be gone for a while, stops
protocol      one connection: its bytes, its replies and its end
client_input  bytes of a client, cut into command lines and contents
commands      SMTP commands of one connection and their usual replies
auth          the AUTH dialogue
replies       texts of the usual replies
script        stages of a connection, and the actions by which a script replaces the usual reply
record        visits, stages and accepted messages of a sink
journal       file with a line for each accepted message and recipient
__main__      the program
"""

from outbox.sandbox.smtp_sink.commands import EXTENSIONS
from outbox.sandbox.smtp_sink.record import Accepted
from outbox.sandbox.smtp_sink.script import (
    Accept,
    Action,
    Cut,
    Flood,
    Hold,
    Reply,
    Reset,
    Script,
    Stage,
    Stall,
    Trickle,
    Visit,
)
from outbox.sandbox.smtp_sink.server import Sink

__all__ = [
    "EXTENSIONS",
    "Accept",
    "Accepted",
    "Action",
    "Cut",
    "Flood",
    "Hold",
    "Reply",
    "Reset",
    "Script",
    "Sink",
    "Stage",
    "Stall",
    "Trickle",
    "Visit",
]
