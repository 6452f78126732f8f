"""The schema refuses impossible rows."""

import asyncpg
import pytest

from tests.support.living_relays import made_once, put


@pytest.fixture(scope="module")
def one_email(postgres_server):
    return made_once(postgres_server, "ledger_one_email", lambda connected: put(connected, 1))


@pytest.fixture
async def spoiled(one_email):
    """A connection to a database with one email; what a test does to it is rolled back."""
    connected = await asyncpg.connect(one_email)
    await connected.execute("BEGIN")
    yield connected
    await connected.close()


@pytest.mark.parametrize(
    "change",
    [
        "state = 'sending', attempt = 1, marked_at = now()",
        "state = 'sending', attempt = 1, relay = 1",
        "state = 'sending', relay = 1, marked_at = now()",
        "state = 'sending', relay = 1, marked_at = now(), attempt = 2, withdrawn = 2",
        "state = 'sending', relay = 1, marked_at = now(), attempt = 1, settled_at = now()",
        "state = 'in_doubt', attempt = 1, marked_at = now()",
        "state = 'in_doubt', attempt = 1, relay = 1",
        "state = 'in_doubt', relay = 1, marked_at = now()",
        "state = 'in_doubt', relay = 1, marked_at = now(), attempt = 1, settled_at = now()",
        "state = 'sent', relay = 1, marked_at = now(), attempt = 1",
        "state = 'sent', relay = 1, marked_at = now(), settled_at = now()",
        "state = 'sent', relay = 1, marked_at = now(), settled_at = now(), attempt = 1, withdrawn = 1",
        "state = 'dead', attempt = 1",
        "state = 'dead', settled_at = now()",
        "state = 'cancelled'",
        "state = 'expired'",
        "settled_at = now()",
        "attempt = -1",
        "withdrawn = -1",
        "withdrawn = 1",
        "state = 'failed'",
        "state = NULL",
        "due_at = NULL",
        "attempt = NULL",
        "withdrawn = NULL",
        "email = 10 ^ 9",
    ],
)
async def test_an_impossible_delivery_is_refused(spoiled, change):
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await spoiled.execute(f"UPDATE outbox.delivery SET {change}")


@pytest.mark.parametrize("column", ["sender", "recipient"])
@pytest.mark.parametrize(
    "address",
    [
        "a\r\nRCPT TO:<x@y>",
        "a\r@x",
        "a\n@x",
        "a b@x",
        "a\t@x",
        "<a@x>",
        "a@x>",
        "a<b@x",
        "a@x ",
        " a@x",
        "a\x7f@x",
        "\x01",
    ],
)
async def test_an_address_that_could_say_another_command_is_refused(spoiled, column, address):
    with pytest.raises(asyncpg.CheckViolationError):
        await spoiled.execute(f"UPDATE outbox.email SET {column} = $1", address)


async def test_only_the_sender_may_be_empty(spoiled):
    await spoiled.execute("UPDATE outbox.email SET sender = ''")
    with pytest.raises(asyncpg.CheckViolationError):
        await spoiled.execute("UPDATE outbox.email SET recipient = ''")


async def test_one_key_is_one_email(spoiled):
    with pytest.raises(asyncpg.UniqueViolationError):
        await spoiled.execute("""
            INSERT INTO outbox.email (key, sender, recipient, message_id, message)
            SELECT key, sender, recipient, message_id, message FROM outbox.email""")
