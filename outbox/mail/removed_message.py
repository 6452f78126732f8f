"""Messages that were removed: what stands in their place in the database, and is never sent."""

from typing import Final

LOST: Final = b"The database lost this message in a failover after it was settled; only its envelope is known.\r\n"
PRUNED: Final = b"This message was pruned by age.\r\n"
REMOVED: Final = (LOST, PRUNED)
