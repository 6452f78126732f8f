"""Recipients of an edition, in windows that memory can hold: keys and addresses are checked, repeated keys dropped."""

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from outbox.database.values import storable
from outbox.errors import SourceError
from outbox.log import Events
from outbox.mail.mailbox import check_address

log = Events("outbox.generate")

WINDOW_MAX: Final = 10_000  # recipients in memory at once
REPEATED_MAX: Final = 10  # rows with a repeated key that are named in the log


@dataclass(frozen=True, slots=True)
class Recipient:
    """Person who is owed a report. `key` is permanent and unique within a report; `columns` reach the templates."""

    key: str
    email: str
    name: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


def recipient_of(given: Recipient | Mapping[str, Any], where: str) -> Recipient:
    """Return a row of the recipients query as a `Recipient`, or one that a class of the user's made; with text only.

    A null is an empty text.

    Raises:
        SourceError: the row lacks the columns key and email.

    """
    if isinstance(given, Recipient):
        return Recipient(_text(given.key), _text(given.email), _text(given.name), given.columns)
    missing = [column for column in ("key", "email") if column not in given]
    if missing:
        raise SourceError(
            f"{where}: the query returns no column {' and no column '.join(missing)}; "
            "name them, as in: select id::text as key, email, name from people."
        )
    rest = {column: value for column, value in given.items() if column not in ("key", "email", "name")}
    return Recipient(_text(given["key"]), _text(given["email"]), _text(given.get("name")), rest)


def _text(value: object) -> str:
    return "" if value is None else str(value)


def checked(recipient: Recipient) -> Recipient:
    """Return the recipient with its address in the form that SMTP takes.

    Raises:
        ValueError: one sentence that says what is wrong with key or address.

    """
    if not recipient.key or storable(recipient.key) != recipient.key:
        raise ValueError("the key is empty or no text that Postgres can hold; give every recipient a key of its own.")
    if not recipient.email.strip():
        raise ValueError(
            "there is no email address (it is NULL or empty); enter one, or leave such rows out of the recipients."
        )
    address = check_address(recipient.email)
    return Recipient(recipient.key, address, recipient.name, recipient.columns)


def label_of(recipient: Recipient) -> str:
    """Return the name under which a recipient is reported: the key.

    It is the address of one without a key, and the escaped form of a key that Postgres cannot hold, so that no two
    recipients share a name.
    """
    if not recipient.key:
        return f"(no key, {storable(recipient.email).strip() or 'no email address'})"
    return recipient.key if storable(recipient.key) == recipient.key else ascii(recipient.key)


@dataclass(slots=True)
class SharedAddresses:
    """Recipients whose address an earlier one has, under another key. Memory holds a number for each address."""

    count: int = 0
    first: str = ""
    _seen: set[int] = field(default_factory=set)

    def note(self, recipient: Recipient) -> None:
        """Count a recipient, whose address is checked and whose key has not come before."""
        seen_before = len(self._seen)
        self._seen.add(hash(recipient.email.lower()))
        if len(self._seen) == seen_before:
            self.count += 1
            self.first = self.first or recipient.email

    def log(self) -> None:
        """Log a warning if there are any."""
        if self.count:
            log.warning(
                "address_shared",
                "{count} recipients have an address that another key has, too, such as {address}: "
                "it gets an email for each key; return one row per person if that is not meant",
                count=self.count,
                address=self.first,
            )


@dataclass(slots=True)
class RepeatedKeys:
    """Rows of the source whose key came before. The first few are logged one by one, and the rest is counted."""

    count: int = 0

    def note(self, recipient: Recipient) -> None:
        """Count a row."""
        self.count += 1
        if self.count <= REPEATED_MAX:
            label = label_of(recipient)
            log.warning("recipient_twice", "recipient {key} comes twice; the first row counts", key=label)

    def log_rest(self) -> None:
        """Log the number of rows that were not logged one by one."""
        if self.count > REPEATED_MAX:
            log.warning("recipient_twice", "{count} further rows repeat a key", count=self.count - REPEATED_MAX)


@dataclass(slots=True)
class Window:
    """Some recipients of an edition: those who can have a report, by key, and the labels of the others.

    `failed` says what is wrong with key or address; `waived` are those to whom nothing is owed.
    """

    wanted: dict[str, Recipient] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    waived: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, recipients: Iterable[Recipient], waived: Collection[str], addresses: SharedAddresses) -> "Window":
        """Return the window of these recipients, whose keys differ; `addresses` counts the shared ones."""
        window = cls()
        for recipient in recipients:
            label = label_of(recipient)
            if label in waived:
                window.waived.add(label)
                continue
            try:
                owed = checked(recipient)
            except ValueError as error:
                window.failed[label] = str(error)
            else:
                window.wanted[owed.key] = owed
                addresses.note(owed)
        return window

    def withdraw(self, keys: Iterable[str]) -> None:
        """Remove recipients to whom nothing is owed any more."""
        for key in keys:
            del self.wanted[key]


async def windows(
    recipients: AsyncIterator[Recipient], size: int, on_repeat: Callable[[Recipient], None] = lambda _: None
) -> AsyncIterator[list[Recipient]]:
    """Yield the distinct recipients of the stream in windows of at most `size`; the last may be empty.

    Of rows with the same key the first counts, however far apart they are; the others go to `on_repeat`. So memory
    holds a window, and every key.
    """
    seen: set[str] = set()
    window: list[Recipient] = []
    async for recipient in recipients:
        seen_before = len(seen)
        seen.add(label_of(recipient))
        if len(seen) == seen_before:
            on_repeat(recipient)
            continue
        window.append(recipient)
        if len(window) == size:
            yield window
            window = []
    yield window
