"""Connections whose session is a lease: Postgres ends it when the client is silent for `lease_s`."""

import asyncio
from typing import Final

import asyncpg

from outbox.database.connection import Connection
from outbox.database.opening import CONNECT_TIMEOUT_S, connect, lease_settings
from outbox.database.plans import NOT_BY_INDEX
from outbox.settings.urls import DatabaseUrl

CLOSE_TIMEOUT_S: Final = 2.0

# A relay that is stopped in the middle of a transaction blocks those who need its row: not for a whole lease.
IN_TRANSACTION_S: Final = 2.0

# The `statements` are few, short and known: each is planned once per session, by index, whatever the statistics
# say. Left to itself the planner plans a tick anew each time (0.8 ms), or hashes a whole table for it.
# Tables that have doubled are planned for again: see `Session.plan_for`.
PLANS: Final = {"plan_cache_mode": "force_generic_plan", **dict.fromkeys(NOT_BY_INDEX, "off")}


async def connect_leased(url: DatabaseUrl, lease_s: float) -> Connection:
    """Open a connection whose session is a lease."""
    settings = {**PLANS, **lease_settings(lease_s, statements_too=True)}
    settings["idle_in_transaction_session_timeout"] = str(int(1000 * min(lease_s, IN_TRANSACTION_S)))
    return await connect(url, application="outbox relay", settings=settings, timeout_s=min(lease_s, CONNECT_TIMEOUT_S))


async def close_quietly(connection: Connection) -> None:
    """Close in order; end a connection that does not close within `CLOSE_TIMEOUT_S`."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await connection.close(timeout=CLOSE_TIMEOUT_S)
    except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
        connection.terminate()
