"""States of a delivery, as the column `outbox.delivery.state` has them."""

from enum import StrEnum
from typing import Final


class DeliveryState(StrEnum):
    """State of an email on its way; docs/architecture.md has the picture and who may change it."""

    PENDING = "pending"
    SENDING = "sending"
    SENT = "sent"
    IN_DOUBT = "in_doubt"
    DEAD = "dead"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


OPEN: Final = frozenset((DeliveryState.PENDING, DeliveryState.SENDING, DeliveryState.IN_DOUBT))
"""States of a delivery that is not settled."""
