"""Mail servers as they come, with their defaults and ours."""

from tests.faults.levers import status
from tests.fleet import until
from tests.neighbours.mail import assert_once_and_whole, post

DEFAULTS = """
database_url = "{database}"
smtp_url = "{smtp}"
sender = "Progress reports <reports@example.com>"
{more}
"""


def defaults(fleet, server, more=""):
    fleet.settings = DEFAULTS.format(database=fleet.database, smtp=server.url, more=more)


async def settled(fleet, server, deadline_s):
    """Wait until every email is sent or in doubt; on the way there is no dead letter."""

    async def is_so():
        states = await fleet.states()
        assert "dead" not in states, await trouble(fleet)
        return not {"pending", "sending"} & set(states)

    try:
        await until(is_so, "every email is sent or in doubt", deadline_s)
    except AssertionError as late:
        raise AssertionError(f"{late}: {await trouble(fleet)}\n{server.log()}") from late


async def trouble(fleet):
    """Return what the database knows of emails that are not sent, and the relays' logs."""
    replies = await fleet.connection.fetch(
        "SELECT verdict, reply, count(*) AS n FROM outbox.attempt WHERE verdict <> 'accepted' GROUP BY 1, 2 ORDER BY 3"
    )
    logs = "".join(line for process in fleet.processes for line in process.log[-10:])
    return f"{await fleet.states()}\n{[tuple(row) for row in replies]}\n{logs}"


async def test_each_email_arrives_once_with_its_bytes_and_at_the_first_try(fleet, kind):
    count = 300
    async with kind.running() as server:
        defaults(fleet, server)
        await post(fleet, count)
        for _ in range(2):
            await fleet.start("relay")
        await settled(fleet, server, 60)
        assert await assert_once_and_whole(fleet, await server.delivered(), count) == 0
    assert await fleet.connection.fetch("SELECT FROM outbox.attempt WHERE verdict <> 'accepted'") == []
    assert (await status(fleet))["troubles"] == []
