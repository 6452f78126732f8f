"""The role that may enqueue: it puts in emails that are whole, under keys of its own, and can do nothing else."""

import asyncio
import datetime as dt

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outbox import Email, enqueue
from outbox.database.roles import ROLES, grant_roles
from outbox.database.schema import limit_messages
from outbox.mail.email import KEY_MAX
from outbox.mail.mailbox import check_address

HEAD = b"From: shop@example.com\r\nTo: ada@example.com\r\nSubject: s\r\nMessage-ID: <"
TAIL = b">\r\n\r\nHello\r\n"
GIVEN = {
    "key": "k", "sender": "shop@example.com", "recipients": ["ada@example.com"], "head": HEAD, "domain": "example.com",
    "tail": TAIL,
}  # fmt: skip
TYPES = {
    "key": "text", "sender": "text", "recipients": "text[]", "head": "bytea", "domain": "text", "tail": "bytea",
    "send_at": "timestamptz", "send_before": "timestamptz", "priority": "integer", "route": "text",
    "traceparent": "text", "made_by": "text",
}  # fmt: skip
REFUSED = asyncpg.InvalidParameterValueError  # 22023


@pytest.fixture
async def app(connection, database):
    """A login that is in outbox_enqueue and in nothing else."""
    await grant_roles(connection)
    await connection.execute(
        "DO $$ BEGIN CREATE ROLE app_boundary LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$;"
        " GRANT outbox_enqueue TO app_boundary"
    )
    connected = await asyncpg.connect(database, user="app_boundary")
    yield connected
    await connected.close()


async def put(connection, **more):
    given = {**GIVEN, **more}
    arguments = ", ".join(f"{name} => ${n}::{TYPES[name]}" for n, name in enumerate(given, 1))
    return await connection.fetchval(f"SELECT outbox.put({arguments})", *given.values())


async def refused(connection, **more):
    """Return the error of `put` for these arguments."""
    with pytest.raises(REFUSED) as error:
        await put(connection, **more)
    assert error.value.sqlstate == "22023"
    assert error.value.hint, "the caller is told what to do"
    return str(error.value)


async def stored(connection):
    return await connection.fetch("SELECT * FROM outbox.email ORDER BY id")


async def test_a_caller_in_the_group_puts_emails_in_and_is_named(app, connection):
    assert await put(app, made_by="owner, pid 1") is True
    assert await put(app) is False
    assert await app.fetchval(
        "SELECT outbox.enqueue(key => 'e', sender => 'Shop <shop@example.com>', recipient => 'ada@example.com',"
        " subject => 's', body_text => 't')"
    )
    assert await enqueue(app, Email(key="p", sender="s@example.com", to=["a@example.com", "b@example.com"],
                                    subject="s", text="t"))  # fmt: skip
    rows = await stored(connection)
    assert [row["key"] for row in rows] == ["k", "e", "p", "p#2"]
    assert {row["made_by"].rpartition(", ")[2] for row in rows} == {"app_boundary"}
    assert await connection.fetchval("SELECT count(*) FROM outbox.delivery WHERE state = 'pending'") == 4


async def test_a_caller_in_the_group_has_no_right_on_any_table_or_sequence(app, connection):
    relations = await connection.fetch(
        "SELECT relname, relkind FROM pg_class WHERE relnamespace = 'outbox'::regnamespace AND relkind IN ('r', 'S')"
    )
    assert len(relations) > 20
    for name, kind in relations:
        for privilege in ("SELECT", "UPDATE", *(("INSERT", "REFERENCES") if kind == b"r" else ("USAGE",))):
            held = "has_any_column_privilege" if kind == b"r" else "has_sequence_privilege"
            assert not await app.fetchval(f"SELECT {held}('outbox.{name}', $1)", privilege), (name, privilege)
    for statement in (
        "INSERT INTO outbox.email (id, key) VALUES (9223372036854775807, 'k')",
        "INSERT INTO outbox.delivery (email) VALUES (1)",
        "SELECT nextval('outbox.email_id_seq')",
        "SELECT setval('outbox.email_id_seq', 1)",
        "SELECT outbox.unsubscribe('x')",
        "SELECT outbox.resubscribe('x')",
        "SELECT outbox.suppressed('ada@example.com', '')",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await app.execute(statement)


async def test_a_login_without_a_group_may_call_no_function(connection, database):
    await grant_roles(connection)
    await connection.execute(
        "DO $$ BEGIN CREATE ROLE app_nobody LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$;"
        " GRANT USAGE ON SCHEMA outbox TO app_nobody"
    )
    may = await connection.fetch(
        "SELECT proname FROM pg_proc WHERE pronamespace = 'outbox'::regnamespace"
        " AND has_function_privilege('app_nobody', oid, 'EXECUTE')"
    )
    assert may == []
    other = await asyncpg.connect(database, user="app_nobody")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await put(other)
    await other.close()


@pytest.mark.parametrize("reader", sorted(ROLES))
async def test_only_two_groups_and_the_owner_may_answer_an_unsubscribe_link(connection, reader):
    await grant_roles(connection)
    for function in ("unsubscribe", "resubscribe"):
        may = await connection.fetchval(
            f"SELECT has_function_privilege($1, 'outbox.{function}(text)', 'EXECUTE')", reader
        )
        assert may is (reader in ("outbox_web", "outbox_unsubscribe"))


@pytest.mark.parametrize(
    "key",
    [
        "progress/2026-W43/1", "progress/2026-11-24/1", "progress/2026-11/1", "progress/2026-Q3/1",
        "digest/2026-W43/a@b",
        "progress/2026-W43/", "progress/2026-W43/1/2", "progress/2026-W43/1#x", " progress/2026-W43/1",
        "progress/2026-W43/1 ", "PROGRESS/2026-w43/1", "/2026-W43/1", "né/2026-W43/1",
    ],
)  # fmt: skip
async def test_no_caller_may_use_the_key_of_a_reports_email(app, key):
    said = await refused(app, key=key)
    assert "one of a report's email" in said
    with pytest.raises(REFUSED, match="one of a report's email"):
        await app.fetchval(
            "SELECT outbox.enqueue(key => $1, sender => 's@example.com', recipient => 'a@b.example', body_text => 't')",
            key,
        )
    with pytest.raises(ValueError, match="one of a report's email"):
        Email(key=key, sender="s@example.com", to="a@example.com", subject="s", text="t")


async def test_a_year_is_a_period_only_behind_the_name_of_a_report(app, connection):
    assert await put(app, key="invoice/2026/4711") is True
    await connection.execute("INSERT INTO outbox.definition VALUES ('progress', 'monthly', 'previous', 'UTC')")
    assert "one of a report's email" in await refused(app, key="progress/2026/1")


@pytest.mark.parametrize(
    "key", ["order-4711/receipt", "a/b/2026-W43/c", "invoice/4711/2026-11", "2026-W43/1", "x/2026-W431/1", "k#", "#k"]
)
async def test_any_other_key_may_be_used(app, key):
    assert await put(app, key=key) is True
    assert Email(key=key, sender="s@example.com", to="a@example.com", subject="s", text="t").key == key


FAR = dt.datetime(3000, 1, 1, tzinfo=dt.UTC)
TIMES = ["4000-01-01 BC", "20000-01-01", "-infinity", "infinity", "1969-12-31 23:59:59+00", "3000-01-01 00:00:00+00"]


@pytest.mark.parametrize("name", ["send_at", "send_before"])
@pytest.mark.parametrize("at", TIMES)
async def test_a_time_that_no_client_can_read_is_refused(app, connection, name, at):
    message = "recipients => '{a@example.com}', head => 'x', domain => 'example.com', tail => 'x'"
    for function, rest in (("put", message), ("enqueue", "recipient => 'a@example.com', body_text => ''")):
        with pytest.raises(REFUSED, match="1970 to 2999"):
            await app.fetchval(
                f"SELECT outbox.{function}(key => 'k', sender => 's@example.com', {rest}, {name} => '{at}')"
            )
    assert await put(app) is True
    column = "due_at" if name == "send_at" else name
    if (column, at) != ("due_at", "infinity"):  # which is a pause, or a doubt that is held
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute(f"UPDATE outbox.delivery SET {column} = '{at}'")


@pytest.mark.parametrize("at", ["1970-01-01 00:00:00+00", "2999-12-31 23:59:59.999999+00"])
async def test_the_times_at_the_bounds_are_taken(app, connection, at):
    when = dt.datetime.fromisoformat(at)
    assert await put(app, send_at=when) is True
    assert await put(app, key="e", send_before=when) is True
    rows = await connection.fetch("SELECT due_at, send_before FROM outbox.delivery ORDER BY email")
    assert (rows[0]["due_at"], rows[1]["send_before"]) == (when, when)


@pytest.mark.parametrize(
    "more",
    [
        *({name: None} for name in ("key", "sender", "recipients", "head", "domain", "tail", "priority")),
        {"key": ""}, {"key": "  "}, {"key": "k" * (KEY_MAX + 1)}, {"key": "🙂" * 248}, {"key": "a\nb"},
        {"key": "a\x7f"},
        {"key": "a\u0085b"}, {"key": "a\u2028b"}, {"key": "k#2"},
        {"sender": ""}, {"sender": "a b@example.com"}, {"sender": "a@example.com>\r\nRCPT TO:<x@example.com"},
        {"sender": "Shop <shop@example.com>"}, {"sender": "a" * 3_000_000}, {"sender": "a" * 65 + "@example.com"},
        {"recipients": []}, {"recipients": [None]}, {"recipients": ["a@example.com", None]}, {"recipients": [""]},
        {"recipients": [["a@example.com", "b@example.com"], ["c@example.com", "d@example.com"]]},
        {"recipients": ["a@example.com", "a@example.com"]}, {"recipients": ["a@Example.com", "a@example.com"]},
        {"recipients": [f"a{n}@example.com" for n in range(101)]},
        {"recipients": ["a@" + "b" * 64 + ".example"]}, {"recipients": ["a@127.0.0.1"]},
        {"recipients": ["a@bücher.example"]},
        {"recipients": ["a..b@example.com"]}, {"recipients": ["a@example.com\n"]},
        {"recipients": ["a\u0085@example.com"]},
        {"recipients": ["a@-example.com"]}, {"recipients": ["a@example..com"]},
        {"recipients": ["a@" + ("b." * 130) + "com"]},
        {"recipients": ["postmaster"]}, {"recipients": ['"a b"@example.com']}, {"recipients": ["a@[127.0.0.1]"]},
        {"domain": ""}, {"domain": "a>b"}, {"domain": "a b"}, {"domain": "a\r\nBcc: x@example.com"}, {"domain": "a@b"},
        {"domain": "b" * 300},
        {"priority": 2}, {"priority": -1}, {"priority": 2**31 - 1},
        {"route": "Bulk"}, {"route": "a b"}, {"route": "x" * 101}, {"route": "\n"}, {"route": "a'b"},
        {"traceparent": ""}, {"traceparent": "x"}, {"traceparent": "00-" + "0" * 32 + "-" + "0" * 16 + "-01\r\nX: y"},
        {"traceparent": "00-" + "0" * 32 + "-" + "0" * 16 + "-01-" + "x" * 200},
        {"made_by": "a\nb"}, {"made_by": "x" * 301},
        {"send_at": dt.datetime(2030, 1, 2, tzinfo=dt.UTC), "send_before": dt.datetime(2030, 1, 1, tzinfo=dt.UTC)},
    ],
)  # fmt: skip
async def test_an_argument_that_cannot_be_used_is_refused_and_nothing_is_written(app, connection, more):
    await refused(app, **more)
    assert await stored(connection) == []
    assert await app.fetchval("SELECT 1") == 1


async def test_an_array_whose_first_place_is_not_one_is_read_from_its_beginning(app, connection):
    given = "key => 'k', sender => 's@example.com', head => 'x', domain => 'example.com', tail => 'x'"
    await app.fetchval(f"SELECT outbox.put({given}, recipients => '[5:6]={{a@example.com,b@example.com}}')")
    assert [(row["key"], row["recipient"]) for row in await stored(connection)] == [
        ("k", "a@example.com"), ("k#2", "b@example.com"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "address",
    [
        "Ada.Lovelace+tag@example.com", "o'hara@example.co.uk", "a@localhost", "A@EXAMPLE.com", "a@x--y.example",
        "ju\u0308rgen@b.example", "δοκιμή@b.example", "a_b-c%d@a-b.c1.example", "a@1and1.example", "a@b.c2",
        "a" * 64 + "@example.com", "a@" + "b" * 63 + ".example",
    ],
)  # fmt: skip
async def test_an_address_is_stored_as_python_writes_it(app, connection, address):
    assert await put(app, recipients=[address], sender=address) is True
    (row,) = await stored(connection)
    assert (row["recipient"], row["sender"]) == (check_address(address),) * 2


ENQUEUE = "key => 'k', sender => 's@example.com', recipient => 'a@example.com', body_text => 't'"


@pytest.mark.parametrize(
    "more",
    [
        "subject => repeat('é ', 500)", "subject => repeat('x', 10000000)",
        "headers => '[]'", "headers => '1'", "headers => jsonb_build_object('X-A', repeat('x ', 40000))",
        "headers => (SELECT jsonb_object_agg('X-' || n, '') FROM generate_series(1, 9000) n)",
        "recipients => array[['a@example.com'], ['b@example.com']]",
        "cc => array[['a@example.com'], ['b@example.com']]",
        "bcc => array[null]", "reply_to => array[null]", "reply_to => array[['a@example.com'], ['b@example.com']]",
        "recipients => (SELECT array_agg(n || '@example.com') FROM generate_series(1, 100) n)",
        "cc => (SELECT array_agg(n || '@a.example') FROM generate_series(1, 101) n)",
        "reply_to => (SELECT array_agg(n || '@example.com') FROM generate_series(1, 101) n)",
        "cc => array[repeat('x', 3000) || ' <a@example.com>']", "priority => null", "priority => repeat('x', 100000)",
        "route => E'a\\nb'",
        "body_html => repeat(repeat('x', 1000000), 110)",
        "body_html => repeat(repeat('x', 1000000), 21)",
    ],
)  # fmt: skip
async def test_what_enqueue_cannot_send_is_refused_and_never_an_internal_error(app, connection, more):
    with pytest.raises(REFUSED) as error:
        await app.fetchval(f"SELECT outbox.enqueue({ENQUEUE}, {more})")
    assert error.value.hint
    assert await stored(connection) == []


# Ends of a message as servers disagree about them (CVE-2023-51764 to 51766), in the middle of a body.
SMUGGLING = [
    b"\n.\n", b"\n.\r\n", b"\r.\r", b"\r.\r\n", b"\r\n.\n", b"\r\n.\r", b"\r.\n", b"\n.\r", b"\n\n.\r\r",
    b"\r\r\n.\r\r\n",
    b"\r\n\r.\r\n", b"\n", b"\r", b"\n\n", b"\r\n\n", b"\n\r\n", b"\r\r\n", b"\n\r",
    b"\x85.\x85", b"\x0b.\x0b", b"\x0c.\x0c",
]  # fmt: skip


@pytest.mark.parametrize("end", SMUGGLING)
async def test_every_line_end_is_stored_as_crlf(app, connection, end):
    more = b"MAIL FROM:<a@example.com>\r\n"
    for key, parts in (("tail", {"tail": TAIL + end + more}), ("head", {"head": b"X-A: " + end + HEAD})):
        assert await put(app, key=key, **parts) is True
    for row in await stored(connection):
        whole = row["message"].replace(b"\r\n", b"")
        assert b"\r" not in whole
        assert b"\n" not in whole
        lines = end.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
        assert lines in row["message"], "nothing else is changed"


def test_a_message_is_stored_as_python_would_normalise_it(database):
    async def run(messages):
        connection = await asyncpg.connect(database)
        query = "SELECT outbox.wire_lines(m) FROM unnest($1::bytea[]) WITH ORDINALITY AS e (m, n) ORDER BY n"
        found = [row[0] for row in await connection.fetch(query, messages)]
        await connection.close()
        for message, normal in zip(messages, found, strict=True):
            assert normal == message.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n"), message

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b".", b"a" * 99, b"\xff"]), min_size=1, max_size=9)
                    .map(b"".join), min_size=20, max_size=200))  # fmt: skip
    def law(messages):
        asyncio.run(run(messages))

    law()


async def test_a_message_in_order_is_stored_octet_for_octet(app, connection):
    body = bytes(octet for octet in range(1, 256) if octet not in b"\r\n") + b"\r\n\r\n" + b"x" * 998 + b"\r\nlast"
    assert await put(app, tail=b">\r\n\r\n" + body) is True
    (row,) = await stored(connection)
    assert row["message"] == HEAD + row["message_id"][1:-1].encode() + b">\r\n\r\n" + body


@pytest.mark.parametrize(
    "more",
    [
        {"tail": TAIL + b"a\0b"}, {"head": b"X: \0\r\n" + HEAD}, {"tail": TAIL + b"\0"}, {"tail": b"\0"},
        {"tail": TAIL + b"x" * 999}, {"tail": TAIL + b"x" * 999 + b"\r\n"}, {"tail": TAIL + b"x" * 999 + b"\ny"},
        {"tail": TAIL + b"\xff" * 999 + b"\r\n"}, {"head": b"X: " + b" " * 996 + b"\r\n" + HEAD},
        {"tail": b">\r\nX-Blank: " + b" " * 3_000_000 + b"\r\n\r\n"}, {"head": b"X" * 1000 + HEAD},
    ],
)  # fmt: skip
async def test_a_nul_and_a_line_over_998_octets_are_refused(app, connection, more):
    said = await refused(app, **more)
    assert "NUL" in said or "998" in said
    assert await stored(connection) == []


@pytest.mark.parametrize("body", [b"x" * 998 + b"\r\n", b"x" * 998, b"\xff" * 998 + b"\r\n", b"x" * 998 + b"\ny", b""])
async def test_a_line_of_998_octets_is_taken(app, body):
    assert await put(app, tail=TAIL + body) is True


@pytest.mark.parametrize(
    "email",
    [
        {"headers": {"X-A": "x" * 2000 + " é" * 40_000}}, {"headers": {f"X-{n}": "x" * 60 for n in range(2000)}},
        {"subject": "é " * 500}, {"subject": "x" * 999},
    ],
)  # fmt: skip
def test_python_refuses_a_header_that_the_database_would_refuse(email):
    with pytest.raises(ValueError, match=r"998|65,536"):
        Email(**{"key": "k", "sender": "s@example.com", "to": "a@example.com", "subject": "s", "text": "t", **email})


async def test_what_python_lets_pass_the_database_takes(app, connection):
    email = Email(
        key="🙂" * 247,
        sender="é" * 400 + " <s@example.com>",
        to=[f"{'🙂' * 60} <a{n}@example.com>" for n in range(100)],
        subject="🙂" * 998,
        text="x" * 5000 + "\0\r\n.\r\n" + "é" * 2000,
        headers={"X-A": "x" * 990, "X-B": "é" * 900},
        send_at=dt.datetime(1970, 1, 1, tzinfo=dt.UTC),
        send_before=dt.datetime(2999, 12, 31, tzinfo=dt.UTC),
    )
    assert await enqueue(app, email) is True
    assert await connection.fetchval("SELECT count(*) FROM outbox.delivery") == 100


@pytest.mark.parametrize("field", [b"Subject: ", b"SUBJECT : "])
async def test_a_subject_beyond_998_characters_is_refused_in_a_raw_header_too(app, field):
    folded = b"\r\n ".join([b"=?utf-8?b?w6nDqcOpw6nDqcOpw6nDqcOp?="] * 600)
    assert "subject" in await refused(app, head=field + folded + b"\r\n" + HEAD)
    assert await put(app, head=b"X-Long: " + folded + b"\r\n" + HEAD) is True


async def test_a_header_of_more_than_64_kib_is_refused_by_function_and_check(app, connection):
    long = b"X-A: y\r\n" * 8192
    assert "header" in await refused(app, head=long + HEAD)
    assert "header" in await refused(app, tail=b">\r\n" + long + b"\r\nbody")
    assert "header" in await refused(app, tail=b">\r\n" + long)
    assert await put(app, tail=b">\r\n\r\n" + long) is True, "a body may be as long"
    for message in (long + b"X-A: y\r\n\r\n", long + b"x"):
        with pytest.raises(asyncpg.CheckViolationError, match="email_sizes"):
            await connection.execute("UPDATE outbox.email SET message = $1", message)
    await connection.execute("UPDATE outbox.email SET message = $1", long[:-2] + b"yy\r\n\r\n" + long)


@pytest.mark.parametrize(
    "column, value",
    [
        ("key", "k" * 1001), ("sender", "s" * 321), ("recipient", "r" * 321), ("message_id", "m" * 999),
        ("traceparent", "t" * 201), ("made_by", "m" * 501), ("recipient", "é" * 161),
    ],
)  # fmt: skip
async def test_no_row_is_larger_than_its_bounds_whoever_writes_it(app, connection, column, value):
    await put(app)
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(f"UPDATE outbox.email SET {column} = $1", value)


async def test_a_message_has_at_most_as_many_octets_as_init_was_told(app, connection):
    assert await limit_messages(connection, 20_971_520) is None, "as it was"
    assert await limit_messages(connection, 100_000) == 20_971_520
    body = b">\r\n\r\n" + b"x" * 900 + b"\r\n"
    assert await put(app, tail=body + (b"x" * 900 + b"\r\n") * 108) is True
    large = {"key": "l", "tail": body + (b"x" * 900 + b"\r\n") * 111}
    assert "at most 100000" in await refused(app, **large)
    assert "at most 100000" in await refused(app, key="n", tail=body + b"\n" * 51_000), "counted as it is stored"
    with pytest.raises(asyncpg.CheckViolationError, match="email_message_size"):
        await connection.execute("UPDATE outbox.email SET message = $1", b"\r\n\r\n" + b"x" * 99_997)
    assert await limit_messages(connection, 200_000) == 100_000
    assert await put(app, **large) is True
    assert await limit_messages(connection, 100_000) == 200_000
    assert len(await stored(connection)) == 2, "what is there already stays"
    assert "at most 100000" in await refused(app, **{**large, "key": "m"})


async def test_one_call_writes_no_more_than_100_mib(app):
    many = [f"a{n}@example.com" for n in range(100)]
    large = TAIL + (b"x" * 998 + b"\r\n") * 1049
    assert "100 recipients" in await refused(app, recipients=many, tail=large)
    assert await put(app, recipients=many[:2], tail=large) is True


async def test_a_transaction_that_waits_for_a_key_waits_for_that_key_only(app, database):
    other = await asyncpg.connect(database, user="app_boundary")
    try:
        async with app.transaction():
            await put(app, key="one")
            assert await put(other, key="two") is True
    finally:
        await other.close()


# With this off a backslash in a literal escapes what follows it, so that `\.` of a pattern is any character.
@pytest.mark.parametrize(
    "of_session", ["standard_conforming_strings = off", "search_path = pg_temp, public, pg_catalog"]
)
async def test_no_setting_of_the_callers_session_makes_a_check_weaker(app, connection, of_session):
    await app.execute("SET escape_string_warning = off; CREATE TEMP TABLE email (key text)")
    await app.execute(f"SET {of_session}")
    for helper in ("address_of('a@example.com', 'x')", "mailbox('A <a@example.com>', 'x')", "one_line('x')"):
        await app.fetchval(f"SELECT outbox.{helper}")
    for more in (
        {"recipients": ["a!b@example.com "]}, {"recipients": ["a\nb@example.com"]}, {"recipients": ["a b@example.com"]},
        {"recipients": ["a@b!example.com"]}, {"sender": "a..b@example.com"}, {"key": "a\u0085b"}, {"key": "k#2"},
        {"key": "progress/2026-W43/1"}, {"tail": TAIL + b"\0"}, {"tail": TAIL + b"x" * 999}, {"domain": "a>b.c"},
        {"head": b"X-A: y\r\n" * 9000 + HEAD},
    ):  # fmt: skip
        await refused(app, **more)
    assert await put(app, tail=TAIL + b"\n.\r") is True
    ((message, recipient),) = await connection.fetch("SELECT message, recipient FROM outbox.email")
    assert message.endswith(b"\r\n.\r\n")
    assert recipient == "ada@example.com"
    assert await app.fetchval(f"SELECT outbox.enqueue({ENQUEUE.replace(chr(39) + 'k', chr(39) + 'e')}, subject => 'x')")


async def test_an_argument_of_hundreds_of_megabytes_is_no_internal_error(app):
    texts = {"key": "k", "sender": "s@example.com", "recipients": "{a@example.com}", "domain": "example.com"}
    given = {**texts, "head": "x", "tail": "x"}
    for name in ("key", "sender", "domain", "route", "traceparent", "made_by"):
        rest = ", ".join(f"{other} => '{value}'" for other, value in given.items() if other != name)
        with pytest.raises(REFUSED):
            await app.fetchval(f"SELECT outbox.put({rest}, {name} => repeat(repeat('k', 1000000), 300))")
