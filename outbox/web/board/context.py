"""Common parts of the board's pages: the settings, the store, the sign-in, the frame, and the name for decisions."""

from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Any, Final

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response

from outbox.mail.delivery_state import DeliveryState
from outbox.operations.wording import Frame, duration_label, progress_of
from outbox.reports.period import spoken_time
from outbox.settings import Settings
from outbox.web.board.auth import Authenticator, User
from outbox.web.board.live import Live
from outbox.web.queries import Store
from outbox.web.responses import page

SECTIONS: Final = (
    ("/", "Overview"),
    ("/editions", "Editions"),
    ("/emails", "Emails"),
    ("/pauses", "Pauses"),
    ("/decisions", "Decisions"),
)
# In the order in which the board shows them.
STATES: Final = (
    DeliveryState.PENDING, DeliveryState.SENDING, DeliveryState.IN_DOUBT, DeliveryState.SENT, DeliveryState.DEAD,
    DeliveryState.EXPIRED, DeliveryState.CANCELLED,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BoardContext:
    """Settings, database, sign-in and live state, which all pages share."""

    settings: Settings
    store: Store
    authenticator: Authenticator
    live: Live

    def page(self, request: Request, template: str, user: User, *, section: str, **context: Any) -> Response:
        """Return a page of the board in its frame."""
        return page(request, template, user=user, section=section, **self.words, **context)

    @property
    def words(self) -> dict[str, Any]:
        """Return the texts and functions that all templates use."""
        frame = Frame.of(self.settings)
        zone = frame.zone("")
        return {
            "sections": SECTIONS,
            "states": STATES,
            "read_only": self.settings.web.read_only,
            "zone": getattr(zone, "key", None) or "UTC",
            "when": lambda at, report="": when(at, frame.zone(report) or zone),
            "duration_label": duration_label,
            "progress_of": progress_of,
        }

    def who(self, request: Request, user: User) -> str:
        """Return who decides, as it is recorded: the proxy's user, or the name given with the token and the address."""
        if user.session is None:
            return user.name
        return f"{user.name} ({self.authenticator.callers.address(request)})"


def when(at: datetime | None, zone: tzinfo | None) -> Markup:
    """Return a moment in the reports' timezone as HTML, with UTC in an attribute."""
    if at is None:
        return Markup("-")
    there = at.astimezone(zone or UTC)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        at.astimezone(UTC).isoformat(timespec="seconds"), spoken_time(at, zone), f"{there:%Y-%m-%d %H:%M:%S}"
    )
