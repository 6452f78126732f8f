"""Lists of addresses as files have them: an address a line, or CSV as providers export who is not to be written to."""

import csv
import io
from collections.abc import Iterator
from typing import Final

from outbox.database.suppression_entry import Entry, Reason
from outbox.database.values import storable
from outbox.errors import ConfigurationError
from outbox.mail.mailbox import comparable

# What providers call the columns and the reasons of the lists that they export.
_ADDRESS_COLUMNS: Final = ("address", "email", "emailaddress", "email_address", "recipient")
_REASON_COLUMNS: Final = ("reason", "suppressionreason", "type")
_REASONS: Final = {
    "bounced": Reason.BOUNCED, "bounce": Reason.BOUNCED, "hardbounce": Reason.BOUNCED,
    "complained": Reason.COMPLAINED, "complaint": Reason.COMPLAINED, "spamcomplaint": Reason.COMPLAINED,
    "unsubscribed": Reason.UNSUBSCRIBED, "unsubscribe": Reason.UNSUBSCRIBED,
}  # fmt: skip
PROBLEMS_MAX: Final = 10


def entries_of(text: str, *, name: str) -> list[Entry]:
    """What a file lists: an address a line, or CSV whose columns are address, report, reason, or what its header says.

    Raises:
        ConfigurationError: a line has no address; nothing of the file is to be used then.

    """
    entries: dict[tuple[str, str], Entry] = {}
    problems: list[str] = []
    for line, fields in _read(text, name):
        try:
            address = comparable(fields.get("address", ""))
        except ValueError as error:
            problems.append(f"{name}, line {line}: {str(error).rstrip('.')}; mend the line, or take it out.")
            continue
        reason = _REASONS.get(fields.get("reason", "").lower().replace("_", "").replace(" ", ""), Reason.DECIDED)
        report = storable(fields.get("report", ""))
        entries.setdefault((address, report), Entry(address, report, reason))
    if problems:
        more = len(problems) - PROBLEMS_MAX
        raise ConfigurationError(problems[:PROBLEMS_MAX] + ([f"{name}: {more:,} more such lines."] if more > 0 else []))
    return list(entries.values())


def _read(text: str, name: str) -> list[tuple[int, dict[str, str]]]:
    try:
        return list(_rows(text))
    except csv.Error as error:
        raise ConfigurationError(f"{name}: is neither CSV nor an address a line ({error}); mend it.") from error


def _rows(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines that say something, each with its number and its fields by our names."""
    columns: list[str] = ["address", "report", "reason"]
    lines = csv.reader(io.StringIO(text.removeprefix("\ufeff").replace("\0", "")))
    for fields in lines:
        cells = [field.strip() for field in fields]
        if not any(cells) or cells[0].startswith("#"):
            continue
        if "@" not in "".join(cells):
            named = [_column(field.lower()) for field in cells]
            if "address" in named:
                columns = named
                continue
        yield lines.line_num, dict(zip(columns, cells, strict=False))


def _column(header: str) -> str:
    if header in _ADDRESS_COLUMNS:
        return "address"
    return "reason" if header in _REASON_COLUMNS else header if header == "report" else ""
