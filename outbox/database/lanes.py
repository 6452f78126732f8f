"""Lanes: the pairs of route and priority under which deliveries wait."""

from typing import Final

# The lanes in which anything is open, each found by one step in the index, however much waits in it.
LANES: Final = """
lane AS (
    (SELECT route, priority FROM outbox.delivery WHERE settled_at IS NULL ORDER BY route, priority LIMIT 1)
    UNION ALL
    SELECT n.route, n.priority FROM lane l CROSS JOIN LATERAL (
        SELECT route, priority FROM outbox.delivery d
         WHERE d.settled_at IS NULL AND (d.route, d.priority) > (l.route, l.priority)
         ORDER BY d.route, d.priority LIMIT 1) n
)"""
