"""Workload of a fault run: people to whom reports are owed, hired in waves, and the settings of the servers."""

from pathlib import Path
from typing import Final

import asyncpg

from bench.faults.server import Host
from bench.harness.environment import PEOPLE
from outbox.database import schema
from outbox.operations.route_rules import write_rules
from outbox.settings import load

GUARD_S: Final = 1.0
DOUBT_GRACE_S: Final = 6.0
FAILOVER_GRACE_S: Final = 8.0
REPLY_S: Final = 3.0  # how long relays wait for any reply
RETRY_MAX_S: Final = 2.0
DRAIN_S: Final = 4.0

SETTINGS: Final = """
database_url = "postgresql://postgres@127.0.0.1:{database}/postgres"
smtp_url = "smtp://127.0.0.1:{smtp}"
sender = "Progress reports <reports@example.com>"
in_doubt = "{in_doubt}"
{resolver}
doubt_grace_s = {doubt_grace_s}
failover_grace_s = {failover_grace_s}
connections_max = {connections}
lease_s = {lease_s}
guard_s = {guard_s}
drain_s = {drain_s}
poll_max_s = 1
idle_s = 2
connect_timeout_s = {reply_s}
command_timeout_s = {reply_s}
data_done_timeout_s = {reply_s}
[retry]
base_s = 0.2
max_s = {retry_max_s}
attempts_max = 1000
[reports.progress]
recipients = "select id::text as key, email, name from people where wave <= (select wave from hired)"
data = '''select person_id::text as key, day::date as day, done from progress
           where person_id = any (cast(:keys as int[])) and day >= :starts_at and day < :ends_at order by day'''
link = "https://reports.example.com/r/{{token}}"
"""

# Each further route leads to the same server, and takes the people whose addresses have its domain.
ROUTE: Final = """
[routes.r{number}]
smtp_url = "smtp://127.0.0.1:{smtp}"
domains = ["r{number}.example.com"]
"""

# The servers' own: it looks into the mail server's log.
RESOLVER: Final = """
from pathlib import Path

LOG = Path(__file__).parent.parent / "accepted"


def was_accepted(doubt):
    return doubt.message_id in LOG.read_text().split()
"""


def settings_of(host: Host, lease_s: float, connections: int, in_doubt: str, reply_s: float, *, routes: int = 1) -> str:
    """Return outbox.toml of a server."""
    further = "".join(ROUTE.format(number=number, smtp=host.smtp.port) for number in range(1, routes))
    usual = SETTINGS.format(
        database=host.database.port,
        smtp=host.smtp.port,
        in_doubt=in_doubt,
        resolver='resolver = "mailserver:was_accepted"' if in_doubt == "ask" else "",
        doubt_grace_s=DOUBT_GRACE_S,
        failover_grace_s=FAILOVER_GRACE_S,
        connections=connections,
        lease_s=lease_s,
        guard_s=GUARD_S,
        drain_s=DRAIN_S,
        reply_s=reply_s,
        retry_max_s=RETRY_MAX_S,
    )
    return usual + further


HIRED: Final = """
ALTER TABLE people ADD wave int NOT NULL DEFAULT 0;
DROP TABLE IF EXISTS hired;
CREATE TABLE hired (wave int NOT NULL);
INSERT INTO hired VALUES (0);
"""


async def prepare(url: str, people: int, settings: Path, *, waves: int, routes: int) -> None:
    """Make an empty outbox, and people who are hired in waves: half of them are there from the first."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(PEOPLE)
        await connection.execute(HIRED)
        await schema.initialise(connection)
        await write_rules(connection, load(settings))
        await connection.execute(
            "INSERT INTO people SELECT n, 'p' || n || coalesce('@r' || nullif(n % $3, 0) || '.', '@') || 'example.com',"
            " 'Person ' || n, greatest(2 * (n - 1) * $2::int / $1 - $2, 0) FROM generate_series(1, $1::int) n",
            people,
            waves,
            routes,
        )
        await connection.execute(
            "INSERT INTO progress SELECT n, now() - d * interval '1 day', d"
            " FROM generate_series(1, $1::int) n, generate_series(1, 7) d",
            people,
        )
        await connection.execute("CREATE INDEX ON progress (person_id, day)")
        await connection.execute("ANALYZE")
    finally:
        await connection.close()
