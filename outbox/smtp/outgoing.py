"""An email on its way: what the SMTP side of a relay needs of a claimed delivery.

It knows neither Postgres nor the server: `claims` makes them, a conversation sends them.
"""

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Claim:
    """A delivery that a relay holds, with all that sending it needs. It lives as long as the relay's session."""

    relay: int
    email: int
    key: str
    attempt: int
    withdrawn: int
    sender: str
    recipient: str
    message_id: str
    message: bytes
    suspect: bool = False
    urgent: bool = False
    marked: bool = False
    cuts: int = 0
    rest_s: float = 0.0
    """Seconds for which it is not claimed again, once it is given back."""
    traceparent: str | None = None
    token: str = ""
    """Token that is sent with the email and proves that a bounce is about it (`verp`)."""
    claimed_at: float = 0.0
    """When it was claimed; only where somebody looks on."""
    started_at: float = 0.0
    """When the latest try of it began."""
    handed_over_at: float = 0.0
    """When its final dot was written."""
    head: bytes | None = None
    """What its route writes before the message; None where nothing is, or not yet."""
    fault: str | None = None
    """Why its route cannot send it."""
    wire_bytes: int | None = None
    """Size of the message with CRLF line ends; None until it is checked (`letterhead.check`)."""
    size: int = 0
    """Bytes of message and envelope, for the memory budget of the process."""
    fetched: bool = True
    """False until `fetch_messages` has fetched a large message."""
