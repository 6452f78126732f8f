"""What the programs say while they run: one event name for each fact, its fields, and a sentence for people.

    log = Events("outbox.relay")
    log.info("session_opened", "relay {relay} holds its lock and relays to {route}", relay=7, route="smtp.acme.com:25")

The rooms say facts through the standard library's `logging`, so whoever embeds them hears them as usual. A relay's
process renders them with structlog (`configure`): sentences on a terminal, lines of JSON elsewhere. Mail addresses
stand in no line unless they are asked for, and no line has what a terminal would obey.
"""

import logging
import re
import sys
from collections.abc import Callable, MutableMapping
from typing import Any, Final, TextIO

# An address, its local part quoted or not, its domain a name or a literal. What stands before the @ of a database's URL
# is no mailbox.
_ADDRESS: Final = re.compile(
    r"""(?P<kept>postgres(?:ql)?(?:\+\w+)?://[^\s/@]*@)"""
    r"""|(?:"[^"\n]*"|[^\s<>@"'(),;:/\\\[\]]+)@(?:\[[^\]\s]*\]|[\w.-]*[^\W_])"""
)
HIDDEN: Final = "<address>"
_OBEYED: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_EventDict = MutableMapping[str, Any]


def redacted(text: str) -> str:
    """The text with `<address>` in the place of each mail address."""
    return _ADDRESS.sub(lambda found: found["kept"] or HIDDEN, text).replace(f"<{HIDDEN}>", HIDDEN)


class Events:
    """Says facts. The sentence is a template over the fields; nothing is formatted that nobody hears."""

    def __init__(self, name: str) -> None:
        self._log = logging.getLogger(name)

    def says(self, level: int) -> bool:
        """Whether anybody hears what is said at this level: ask before a fact that comes once per email."""
        return self._log.isEnabledFor(level)

    def debug(self, event: str, sentence: str, /, **fields: Any) -> None:
        """For who looks for a fault: what happens all the time."""
        self._say(logging.DEBUG, event, sentence, fields)

    def info(self, event: str, sentence: str, /, **fields: Any) -> None:
        """What is as it should be, or will be by itself."""
        self._say(logging.INFO, event, sentence, fields)

    def warning(self, event: str, sentence: str, /, **fields: Any) -> None:
        """What hinders, and what a person may want to know."""
        self._say(logging.WARNING, event, sentence, fields)

    def error(self, event: str, sentence: str, /, **fields: Any) -> None:
        """What should never be."""
        self._say(logging.ERROR, event, sentence, fields)

    def exception(self, event: str, sentence: str, /, **fields: Any) -> None:
        """A fault of ours that is outlived, with its traceback; for where an exception is being caught."""
        self._say(logging.ERROR, event, sentence, fields, exc_info=True)

    def _say(self, level: int, event: str, sentence: str, fields: dict[str, Any], **how: Any) -> None:
        if self._log.isEnabledFor(level):
            facts = {"event_name": event, "event_fields": fields}
            self._log.log(level, "%s", sentence.format_map(fields), extra=facts, stacklevel=3, **how)


def configure(
    form: str = "auto", level: str = "info", *, addresses: bool = False, stream: TextIO | None = None
) -> None:
    """Let this process say its facts on `stream` (stderr).

    `form` is `human`, `json`, or `auto`: human where a person looks on, else JSON. Libraries are heard from `warning`
    on. `addresses` lets mail addresses stand in the lines.
    """
    structlog = _structlog()
    stream = stream or sys.stderr
    is_human = form == "human" or (form == "auto" and stream.isatty())
    last: list[Callable[..., Any]] = [_as_sentence, _drawn(colours=stream.isatty())] if is_human else [_as_json()]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            _with_fields,
            structlog.processors.format_exc_info,
            *([] if addresses else [_without_addresses]),
        ],
        processors=last,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(LEVELS[level], logging.WARNING))
    logging.getLogger("outbox").setLevel(LEVELS[level])


def _structlog() -> Any:
    """structlog, without rich: it would import that for tracebacks of a kind that is not wanted here, in 70 ms."""
    hidden = "rich" not in sys.modules
    if hidden:
        sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog
    finally:
        if hidden:
            del sys.modules["rich"]
    return structlog


def _with_fields(_logger: object, level: str, said: _EventDict) -> _EventDict:
    """A record as an event: when, how grave, what, in words, and the rest. What knows no events is `said` by name."""
    from datetime import UTC, datetime

    record: logging.LogRecord = said["_record"]
    name: str | None = getattr(record, "event_name", None)
    of_whom = {} if name else {"logger": record.name}
    return {
        "timestamp": datetime.fromtimestamp(record.created, UTC),
        "level": level,
        "event": name or "said",
        "message": said["event"],
        **getattr(record, "event_fields", of_whom),
        **{key: said[key] for key in ("exc_info",) if key in said},
    }


def _without_addresses(_logger: object, _level: str, said: _EventDict) -> _EventDict:
    return {key: _hidden(value) for key, value in said.items()}


def _hidden(value: Any) -> Any:
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {key: _hidden(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_hidden(one) for one in value]
    return redacted(str(value)) if isinstance(value, BaseException) else value


def _as_json() -> Callable[..., Any]:
    """One line, in ASCII: whatever the locale of who writes or reads it."""
    import structlog

    def stamped(_logger: object, _level: str, said: _EventDict) -> str:
        at = said["timestamp"].isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return str(render(_logger, _level, {**said, "timestamp": at}))

    render = structlog.processors.JSONRenderer(default=str)
    return stamped


def _as_sentence(_logger: object, _level: str, said: _EventDict) -> _EventDict:
    """For people: the sentence has the fields in it already. A traceback keeps its lines."""
    lines = {"exception": said["exception"]} if "exception" in said else {}
    return {
        "timestamp": f"{said['timestamp'].astimezone():%Y-%m-%dT%H:%M:%S%z}",
        "level": said["level"],
        "message": _OBEYED.sub("\N{REPLACEMENT CHARACTER}", said["message"]),
        "event": said["event"],
        **lines,
    }


def _drawn(*, colours: bool) -> Callable[..., Any]:
    from structlog.dev import DIM, RESET_ALL, Column, ConsoleRenderer, plain_traceback

    styles = ConsoleRenderer.get_default_level_styles(colors=colours)
    dim, end = (DIM, RESET_ALL) if colours else ("", "")

    def dimmed(key: str, value: object) -> str:  # noqa: ARG001 - structlog names both
        return f"{dim}{value}{end}"

    def graded(key: str, value: object) -> str:  # noqa: ARG001 - as above
        return f"{styles.get(str(value), '')}{value!s:<7}{end}"

    def plain(key: str, value: object) -> str:  # noqa: ARG001 - as above
        return str(value)

    columns = [
        Column("timestamp", dimmed),
        Column("level", graded),
        Column("message", plain),
        Column("event", dimmed),
        Column("", plain),
    ]
    return ConsoleRenderer(columns=columns, exception_formatter=plain_traceback, sort_keys=False)
