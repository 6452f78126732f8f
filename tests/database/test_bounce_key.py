"""Tokens of bounces: who can make one, which one is valid for which email, and the rotation of their key."""

import asyncio
import re
from pathlib import Path

import asyncpg
import pytest

from outbox.database.schema import initialise
from outbox.errors import OutboxError
from outbox.feedback.bounce_key import rotate
from outbox.mail.verp import TOKEN_MAX, email_of, former_tokens_in, tokens_in
from outbox.relay.tick import TickRequest, tick

SHAPE = re.compile("[1-9][0-9]*k[1-9][0-9]*t[0-9a-f]{16}")
PUT = """
INSERT INTO outbox.email (id, key, sender, recipient, message_id, message)
VALUES (coalesce($1, nextval('outbox.email_id_seq')), $2, 'a@example.com', 'b@example.com', $3, '') RETURNING id
"""


async def put(connection, key="one", message_id="<1@example.com>", number=None):
    return await connection.fetchval(PUT, number, key, message_id)


async def token_of(connection, email):
    return await connection.fetchval("SELECT outbox.bounce_token($1)", email)


async def email_by(connection, token):
    return await connection.fetchval("SELECT outbox.bounce_email($1)", token)


async def test_a_token_is_valid_for_its_email_and_no_other(connection):
    one, two = await put(connection), await put(connection, "two", "<2@example.com>")
    token, other = await token_of(connection, one), await token_of(connection, two)
    assert SHAPE.fullmatch(token)
    assert (email_of(token), tokens_in(f"bounces+{token.upper()}@example.com")) == (one, [token])
    assert await email_by(connection, token) == one
    assert await email_by(connection, token.upper()) == one, "some mail servers change the case of what they forward"
    digest = token.partition("k")[2]
    for forged in (
        f"{two}k{digest}",
        f"{one}k{other.partition('k')[2]}",
        f"{token[:-1]}{'0' if token[-1] != '0' else '1'}",
    ):
        assert await email_by(connection, forged) is None


@pytest.mark.parametrize(
    "text",
    [
        None, "", "x", "1", "1k1t", "1-0123456789ab", "0k1t0123456789abcdef", "1k0t0123456789abcdef",
        "1k1t0123456789abcde", "1k1t0123456789abcdef0", " 1k1t0123456789abcdef", "1k1t0123456789abcdef\n",
        "-1k1t0123456789abcdef", "9223372036854775808k1t0123456789abcdef", "1k1000t0123456789abcdef",
        "9999999999999999999k999t0123456789abcdef", "1k1t0123456789abcdeg", "\u0661k1t0123456789abcdef", "%", "'",
        "1k1t" + "0" * 1_000_000, "9" * 1_000_000,
    ],
)  # fmt: skip
async def test_what_is_no_token_is_valid_for_nothing(connection, text):
    await put(connection, number=1)
    assert await email_by(connection, text) is None


async def test_the_longest_token_is_as_long_as_an_address_has_room_for(connection):
    await connection.execute("UPDATE outbox.bounce_key SET id = 999")
    token = await token_of(connection, await put(connection, number=2**63 - 1))
    assert len(token) == TOKEN_MAX
    assert await email_by(connection, token) == 2**63 - 1
    assert former_tokens_in(token) == []


async def test_the_token_of_a_lost_email_is_not_valid_for_one_that_got_its_id(connection):
    number = await put(connection)
    token = await token_of(connection, number)
    await connection.execute("DELETE FROM outbox.email")  # as a failover does that loses it
    assert await email_by(connection, token) is None
    await put(connection, "two", "<2@example.com>", number)
    assert await email_by(connection, token) is None


async def test_each_claim_has_the_token_of_its_email_and_what_has_none_is_claimed_all_the_same(connection):
    for n in range(3):
        number = await put(connection, f"mail{n}", f"<{n}@example.com>")
        await connection.execute("INSERT INTO outbox.delivery (email) VALUES ($1)", number)
    first = await tick(connection, 1, TickRequest(claims_max=2))
    assert len(first.claims) == 2
    for claim in first.claims:
        assert claim.token == await token_of(connection, claim.email)
    await connection.execute(
        "ALTER TABLE outbox.email DROP CONSTRAINT email_sizes;"
        "UPDATE outbox.email SET message_id = repeat('x', 1000000) WHERE id IN ("
        " SELECT email FROM outbox.delivery WHERE relay IS NULL)"
    )
    (last,) = (await tick(connection, 1, TickRequest(claims_max=2))).claims
    assert last.token == "", "its Message-ID is too long"
    await connection.execute("DELETE FROM outbox.bounce_key")
    number = await put(connection, "last", "<last@example.com>")
    await connection.execute("INSERT INTO outbox.delivery (email) VALUES ($1)", number)
    (last,) = (await tick(connection, 1, TickRequest(claims_max=2))).claims
    assert last.token == "", "there is no key"


async def test_a_rotation_leaves_tokens_valid_for_30_days_and_forgets_their_key_at_the_next(connection):
    number = await put(connection)
    tokens = []
    for _ in range(3):
        tokens.append(await token_of(connection, number))
        assert await rotate(connection) is not None
    assert len(set(tokens)) == 3
    assert [await email_by(connection, token) for token in tokens] == [number] * 3
    await connection.execute("UPDATE outbox.bounce_key SET retired_at = now() - interval '30 days' WHERE id <= 2")
    assert [await email_by(connection, token) for token in tokens] == [None, None, number]
    await rotate(connection)
    assert [row[0] for row in await connection.fetch("SELECT id FROM outbox.bounce_key ORDER BY 1")] == [3, 4, 5]
    await connection.execute("DELETE FROM outbox.bounce_key")
    assert await rotate(connection) is None, "there was none"
    assert await email_by(connection, await token_of(connection, number)) == number


async def test_numbers_of_keys_begin_again_and_none_that_is_valid_is_given_up(connection):
    number = await put(connection)
    await connection.execute("UPDATE outbox.bounce_key SET id = 999")
    former = await token_of(connection, number)
    await rotate(connection)
    assert (await token_of(connection, number)).startswith(f"{number}k1t")
    assert await email_by(connection, former) == number
    await connection.execute("UPDATE outbox.bounce_key SET id = 998 WHERE id = 1")
    with pytest.raises(OutboxError, match="999 bounce keys were made within 30 days"):
        await rotate(connection)
    assert await email_by(connection, await token_of(connection, number)) == number, "nothing was changed"


async def test_rotations_at_once_leave_one_key_that_signs(connection, database):
    others = [await asyncpg.connect(database) for _ in range(4)]
    await asyncio.gather(*(rotate(one) for one in others))
    rows = await connection.fetch("SELECT id, secret, retired_at FROM outbox.bounce_key ORDER BY id")
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["retired_at"] is None for row in rows] == [False] * 4 + [True]
    assert len({row["secret"] for row in rows}) == 5
    for one in others:
        await one.close()


async def test_who_may_only_use_the_schema_reads_no_key_makes_no_token_and_checks_none(connection):
    await put(connection, number=1)
    await connection.execute("CREATE ROLE nosy_bounces; GRANT USAGE ON SCHEMA outbox TO nosy_bounces")
    try:
        await connection.execute("SET ROLE nosy_bounces")
        for statement in (
            "SELECT secret FROM outbox.bounce_key",
            "SELECT id FROM outbox.bounce_key",
            "INSERT INTO outbox.bounce_key VALUES (2, sha256(''))",
            "SELECT outbox.bounce_token(1)",
            "SELECT outbox.bounce_tokens(ARRAY[1])",
            "SELECT outbox.bounce_tokens(ARRAY[1], 1)",
            "SELECT outbox.bounce_email('1k1t0123456789abcdef')",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
        with pytest.raises(OutboxError, match="Only the schema's owner may rotate the bounce key"):
            await rotate(connection)
    finally:
        await connection.execute("RESET ROLE; DROP OWNED BY nosy_bounces; DROP ROLE nosy_bounces")


async def test_nothing_that_the_caller_puts_on_its_path_is_called_with_the_key(connection):
    number = await put(connection)
    token = await token_of(connection, number)
    await connection.execute(
        "CREATE FUNCTION public.sha256(bytea) RETURNS bytea LANGUAGE sql AS $$ SELECT $1 $$;"
        "CREATE FUNCTION public.left(text, integer) RETURNS text LANGUAGE sql AS $$ SELECT $1 $$;"
        "CREATE FUNCTION public.encode(bytea, text) RETURNS text LANGUAGE sql AS $$ SELECT 'mine' $$;"
        "CREATE TEMPORARY TABLE email (id bigint, message_id text); SET search_path = public, pg_temp, pg_catalog"
    )
    assert await token_of(connection, number) == token
    assert await email_by(connection, token) == number


async def test_an_upgrade_makes_a_key_and_functions_that_nobody_else_may_call(postgres_server):
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute("CREATE DATABASE bounce_upgrade")
    upgraded = await asyncpg.connect(postgres_server.database_url("bounce_upgrade"))
    try:
        await upgraded.execute((Path(__file__).parent / "schema_1.sql").read_text())
        number = await put(upgraded)
        await initialise(upgraded)
        token = await token_of(upgraded, number)
        assert await email_by(upgraded, token) == number
        assert await upgraded.fetchval("SELECT octet_length(secret) FROM outbox.bounce_key") == 32
    finally:
        await upgraded.close()
        await admin.execute("DROP DATABASE bounce_upgrade WITH (FORCE)")
        await admin.close()
