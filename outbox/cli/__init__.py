"""The command line: reads the settings, wires, prints and sets the exit code. Nothing else does any of these four.

Exit codes: 0 done, 1 not (all) done, 2 the settings or the arguments are wrong. Heavy imports stand inside the
commands that need them, so that cron pays for what it uses. The commands sit by what a person wants of them:

    making     init, generate, digest    reports come to be
    scheduling schedule, mark-done       which editions are started when, and which are not
    sending    relay, prune              emails go out, and grow old
    looking    status, audit, doctor     nothing is changed
    reading    list, show                ... email by email
    watching   watch                     ... live
    serving    web                       ... in a browser
    deciding   retry, cancel, resolve,   a person decides, and is asked before much is touched
               waive
    holding    pause, resume             a person holds back a report, or all mail
    refusing   suppress, bounce          who gets no more email
    trying     preview, test-send, demo  nothing of it comes into the outbox
    selecting  what those share that pick emails
    attending  what runs beside a relay: measures, health, traces
    frame      what every command shares
"""

import gc

gc.set_threshold(20_000)  # before all else: imports make many objects and no garbage, and collecting at 700 costs 50 ms

import os
import sys

from outbox.cli import (
    deciding,
    holding,
    looking,
    making,
    reading,
    refusing,
    scheduling,
    sending,
    serving,
    trying,
    watching,
)
from outbox.cli.frame import app
from outbox.errors import OutboxError

__all__ = [
    "app",
    "deciding",
    "holding",
    "looking",
    "main",
    "making",
    "reading",
    "refusing",
    "scheduling",
    "sending",
    "serving",
    "trying",
    "watching",
]


def main() -> None:
    """Run a command; every fault that a user can meet is one sentence on stderr."""
    try:
        app(prog_name="outbox")
    except OutboxError as error:
        for sentence in str(error).splitlines():
            print(f"outbox: {sentence}", file=sys.stderr)  # noqa: T201 - this room prints
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has seen enough
        sys.exit(1)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("asyncpg", "sqlalchemy"):
            raise  # a fault of ours, to be seen whole
        print(f"outbox: Postgres refuses: {_said(error)}{_fix(error)}.", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    finally:
        gc.freeze()  # else the interpreter's last collections walk through all that was imported: 100 ms


def _said(error: BaseException) -> str:
    """What Postgres said, without the statement: it may hold people's data."""
    from outbox.database_refusal import original_of

    return str(original_of(error)).splitlines()[0].rstrip(".")


def _fix(error: BaseException) -> str:
    """Return what to do about sessions that clients of a pooler share; empty for another error."""
    from outbox.database_refusal import SESSION_MODE, original_of, shows_shared_session

    is_shared = shows_shared_session(original_of(error))
    return f", since a pooler in transaction mode or statement mode is in between; {SESSION_MODE}" if is_shared else ""
