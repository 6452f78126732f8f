"""Commands: read the settings, wire the parts, print, set the exit code. No other package does any of these four.

Exit codes: 0 done, 1 not (all) done, 2 the settings or the arguments are wrong. Heavy imports stand inside the
commands that need them, so that cron pays for what it uses. Modules are named by their commands:

    app             the application, settings, connection and event loop of a command
    output          any text in any encoding, JSON, tables, progress bars
    email_options   options by which emails are selected
    init            init
    generate        generate, digest
    schedule        schedule
    mark_done       mark-done
    relay           relay
    relay_services  services beside a relay: metrics, health, traces
    prune           prune
    status          status
    audit           audit
    doctor          doctor
    list            list
    show            show
    watch           watch
    retry           retry, cancel
    resolve         resolve
    waive           waive
    pause           pause, resume
    suppress        suppress
    bounce          bounce
    preview         preview
    test_send       test-send
    demo            demo
    web             web
"""

import contextlib
import errno
import gc

gc.set_threshold(20_000)  # before all else: imports make many objects and no garbage, and collecting at 700 costs 50 ms

import logging
import os
import signal
import sys
import threading


def _end_at_once(signum: int, _frame: object) -> None:
    """End the process as the signal itself would, with the exit code that a shell gives it."""
    os._exit(128 + signum)


# The first process of a container (PID 1) ignores every signal that it has no handler for (pid_namespaces(7)), so that
# `docker stop` and Kubernetes would wait for their whole grace period before they kill it. Commands that finish
# something first, such as the relay, replace these handlers. A command that ends by a signal leaves nothing half done:
# what a transaction has not committed never was. The handlers come before the imports below, which take long.
if os.getpid() == 1 and threading.current_thread() is threading.main_thread():
    for _signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(_signum) is signal.SIG_DFL:
            signal.signal(_signum, _end_at_once)

from outbox.cli import (
    audit,
    bounce,
    demo,
    doctor,
    generate,
    init,
    mark_done,
    output,
    pause,
    preview,
    prune,
    relay,
    resolve,
    retry,
    schedule,
    show,
    status,
    suppress,
    test_send,
    waive,
    watch,
    web,
)
from outbox.cli import (
    list as list_,
)
from outbox.cli.app import app
from outbox.errors import OutboxError

__all__ = [
    "app",
    "audit",
    "bounce",
    "demo",
    "doctor",
    "generate",
    "init",
    "list_",
    "main",
    "mark_done",
    "pause",
    "preview",
    "prune",
    "relay",
    "resolve",
    "retry",
    "schedule",
    "show",
    "status",
    "suppress",
    "test_send",
    "waive",
    "watch",
    "web",
]


def main() -> None:
    """Run a command. An error that a user can meet is one sentence on standard error."""
    output.prepare()
    if logging.lastResort is not None:  # of commands that configure no log: a warning is a sentence of outbox, too
        logging.lastResort.setFormatter(logging.Formatter("outbox: %(message)s"))
    try:
        app(prog_name="outbox")
    except OutboxError as error:
        for sentence in str(error).splitlines():
            print(f"outbox: {sentence}", file=sys.stderr)  # noqa: T201 - errors go to standard error
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        _discard_output()  # the reader has closed the pipe
        sys.exit(1)
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            raise
        _discard_output()
        path = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        print(f"outbox: {path}{os.strerror(error.errno)}.", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("asyncpg", "sqlalchemy"):
            raise  # a bug of outbox, to be shown with its traceback
        print(f"outbox: Postgres refuses: {_describe(error)}{_fix(error)}.", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    finally:
        gc.freeze()  # else the interpreter's last collections walk through all that was imported: 100 ms


# Errors of the machine that a command runs on: a disk that is full or read-only, a missing right, too many open files.
_OF_THE_SYSTEM = {
    errno.EACCES, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EPERM, errno.EROFS,
}  # fmt: skip


def _discard_output() -> None:
    """Discard the buffer of standard output: Python would try again at exit, and report the error a second time."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _describe(error: BaseException) -> str:
    """Return the message of Postgres, without the statement: it may hold people's data."""
    from outbox.database.refusal import original_of

    return str(original_of(error)).splitlines()[0].rstrip(".")


def _fix(error: BaseException) -> str:
    """Return the fix for sessions that clients of a pooler share; empty for another error."""
    from outbox.database.refusal import SESSION_MODE, original_of, shows_shared_session

    is_shared = shows_shared_session(original_of(error))
    return f", since a pooler in transaction mode or statement mode is in between; {SESSION_MODE}" if is_shared else ""
