"""Pauses and log lines of a relay that has lost its session and cannot open a new one.

A server that does not answer is tried again within seconds. After a refused login the pauses grow, since a person must
act first; a changed file ends the pause. The reason is logged once a minute.
"""

import asyncio
import random
import re
import time
from collections.abc import Callable
from typing import Final

from outbox.database.refusal import DatabaseRefusedError
from outbox.log import Events
from outbox.settings.urls import DatabaseUrl

log = Events("outbox.relay")

REFUSED_FIRST_S: Final = 1.0
REFUSED_MAX_S: Final = 30.0
FILE_LOOK_S: Final = 1.0
SAME_REASON_S: Final = 60.0


class Reopening:
    """Refusals since a session was lost."""

    def __init__(self, url: DatabaseUrl) -> None:
        self._login = url.login
        self._pause_s = REFUSED_FIRST_S
        self._logged = ""
        self._logged_at = 0.0

    async def refused(self, error: BaseException, is_over: Callable[[], bool]) -> None:
        """Log the reason. After a refused login wait, at most until `is_over`."""
        now = time.monotonic()
        if not isinstance(error, DatabaseRefusedError):
            self._logged, self._pause_s = "", REFUSED_FIRST_S
            log.warning("session_refused", "no session yet: {reason}", reason=error)
            return
        reason = re.sub(r"[0-9.]+", "", str(error))  # the same reason with another number of seconds is not a new one
        if reason != self._logged or now - self._logged_at > SAME_REASON_S:
            self._logged, self._logged_at = reason, now
            log.warning("session_refused", "no session yet: {reason}", reason=error)
        until = now + self._pause_s * (0.5 + random.random())  # noqa: S311 - jitter, not a secret
        self._pause_s = min(2 * self._pause_s, REFUSED_MAX_S)
        while (left_s := until - time.monotonic()) > 0 and not is_over() and not self._has_new_login():
            await asyncio.sleep(min(FILE_LOOK_S, left_s))

    def _has_new_login(self) -> bool:
        return self._login is not None and self._login.has_changed()
