"""`select outbox.enqueue(…)`: what goes in comes out, whatever it is, and what cannot be sent is an exception."""

import asyncio
from email import message_from_bytes
from email.policy import default

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outbox.mail.header_fields import one_line
from outbox.mail.mailbox import check_address

ENQUEUE = """select outbox.enqueue(key => $1, sender => 'Shop <shop@example.com>', recipient => $2, subject => $3,
                                   body_text => $4, body_html => $5)"""
MANY = """select outbox.enqueue(key => k, sender => s, recipient => r, subject => j, body_text => t, body_html => h)
            from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
              as e (k, s, r, j, t, h)"""

# What Postgres can hold.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=998)
LINE = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=998),
    st.sampled_from(["", ".", "a" * 998, "a\tb", "🙂" * 40, "שלום", "=?utf-8?q?x?=", "\u00a0a \u00a0 b\u3000"]),
)
TRICKY = st.sampled_from(
    ["", ".", "\r\n.\r\n", "From me\nFrom you", "a" * 998, "a\rb\r\nc\n", "🙂" * 40, "שלום", "=?utf-8?q?x?="]
)
NAMES = st.one_of(
    st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters='<>\\"'), max_size=60), st.just("")
)
EXAMPLES = st.lists(
    st.tuples(NAMES, LINE, st.one_of(TEXT, TRICKY), st.one_of(st.none(), TEXT, TRICKY)),
    min_size=10, max_size=40,
)  # fmt: skip


def lines(text):
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


async def check(connection, examples):
    await connection.execute("TRUNCATE outbox.email CASCADE")
    columns = zip(
        *(
            (f"k{n}", f"{name} <from@example.com>", f"{name} <to@example.com>", *rest)
            for n, (name, *rest) in enumerate(examples)
        ),
        strict=True,
    )
    assert all(row[0] for row in await connection.fetch(MANY, *columns))
    rows = await connection.fetch("SELECT key, message_id, message FROM outbox.email ORDER BY id")
    for row, (name, subject, text, html) in zip(rows, examples, strict=True):
        message = row["message"]
        assert message.isascii()
        assert max(map(len, message.split(b"\r\n"))) <= 78
        assert b"\r" not in message.replace(b"\r\n", b"")
        assert b"\n" not in message.replace(b"\r\n", b"")
        got = message_from_bytes(message, policy=default)
        assert not [part.defects for part in got.walk() if part.defects]
        assert sorted(got.keys()) == sorted(
            [
                "From",
                "To",
                "Subject",
                "Date",
                "Message-ID",
                "Auto-Submitted",
                "X-Auto-Response-Suppress",
                "MIME-Version",
                "Content-Type",
            ]
            + (["Content-Transfer-Encoding"] if html is None else [])
        )
        said = " ".join(one_line(subject).split())
        assert " ".join(got["subject"].split()) == said
        assert got["message-id"] == row["message_id"]
        (sender,), (recipient,) = got["from"].addresses, got["to"].addresses
        assert (sender.addr_spec, recipient.addr_spec) == ("from@example.com", "to@example.com")
        # The parser puts a space between encoded words of a name, which it should not (RFC 2047 §6.2).
        assert "".join(sender.display_name.split()) == "".join(name.split())
        assert lines(got.get_body(("plain",)).get_payload(decode=True).decode()) == lines(text)
        if html is not None:
            assert lines(got.get_body(("html",)).get_payload(decode=True).decode()) == lines(html)


def test_what_goes_in_comes_out(database):
    async def run(examples):
        connection = await asyncpg.connect(database)
        try:
            await check(connection, examples)
        finally:
            await connection.close()

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(EXAMPLES)
    def law(examples):
        asyncio.run(run(examples))

    law()


async def test_it_is_new_once_and_what_is_rolled_back_never_was(connection, database):
    transaction = connection.transaction()
    await transaction.start()
    assert await connection.fetchval(ENQUEUE, "a", "ada@example.com", "s", "t", None) is True
    await transaction.rollback()
    assert await connection.fetchval("SELECT count(*) FROM outbox.delivery") == 0
    assert await connection.fetchval(ENQUEUE, "a", "ada@example.com", "s", "t", None) is True
    assert await connection.fetchval(ENQUEUE, "a", "bob@example.com", "s2", "t", None) is False
    other = await asyncpg.connect(database)
    try:
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await connection.fetchval("SELECT count(*) FROM outbox.email")
        assert await other.fetchval(ENQUEUE, "b", "ada@example.com", "s", "t", None) is True
        with pytest.raises(asyncpg.SerializationError):  # as that isolation says of any key that came meanwhile
            await connection.fetchval(ENQUEUE, "b", "ada@example.com", "s", "t", None)
        await connection.execute("ROLLBACK")
    finally:
        await other.close()


@pytest.mark.parametrize(
    "headers, written",
    [
        (None, ["Auto-Submitted: auto-generated", "X-Auto-Response-Suppress: OOF, AutoReply"]),
        ("null", ["Auto-Submitted: auto-generated", "X-Auto-Response-Suppress: OOF, AutoReply"]),
        ('{"auto-submitted": null}', ["Auto-Submitted: auto-generated", "X-Auto-Response-Suppress: OOF, AutoReply"]),
        ('{"auto-submitted": "no"}', ["X-Auto-Response-Suppress: OOF, AutoReply", "auto-submitted: no"]),
        ('{"X-Auto-Response-Suppress": "None"}', ["Auto-Submitted: auto-generated", "X-Auto-Response-Suppress: None"]),
    ],
)
async def test_headers_give_the_default_fields_another_value(connection, headers, written):
    await connection.execute(
        "SELECT outbox.enqueue('k', 'a@b.example', recipient => 'a@b.example', subject => 's', body_text => 't',"
        " headers => $1::jsonb)",
        headers,
    )
    message = await connection.fetchval("SELECT message FROM outbox.email WHERE key = 'k'")
    head = message.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    assert sorted(line for line in head if "auto" in line.lower()) == sorted(written)


async def test_each_of_several_recipients_has_a_delivery_and_none_sees_the_hidden(connection):
    await connection.fetchval("""
        select outbox.enqueue(key => 'a', sender => 's@example.com',
            recipients => array['Ada <a@EXAMPLE.com>', 'b@b.example'],
            cc => array['"Doe, Jo" <c@b.example>'], bcc => array['d@b.example', 'a@example.com'], body_text => 't',
            reply_to => array['r@b.example'],
            headers => '{"X-Order": "4711", "X-None": null, "List-Unsubscribe": "<https://b.example/u>"}',
            send_at => '2030-01-01T00:00Z', send_before => '2030-01-02T00:00Z')""")
    rows = await connection.fetch("""
        SELECT e.key, e.recipient, extract(year from d.due_at) AS due, d.send_before
          FROM outbox.email e JOIN outbox.delivery d ON d.email = e.id ORDER BY e.id""")
    assert {(row["key"], row["recipient"]) for row in rows} == {
        ("a", "a@example.com"), ("a#2", "b@b.example"), ("a#3", "c@b.example"), ("a#4", "d@b.example"),
    }  # fmt: skip
    assert {row["due"] for row in rows} == {2030}
    message = message_from_bytes(await connection.fetchval("SELECT message FROM outbox.email LIMIT 1"), policy=default)
    assert [one.addr_spec for one in message["to"].addresses] == ["a@example.com", "b@b.example"]
    assert message["cc"].addresses[0].display_name == "Doe, Jo"
    assert (message["reply-to"], message["x-order"], message["bcc"]) == ("r@b.example", "4711", None)
    assert message["list-unsubscribe"] == "<https://b.example/u>"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("recipient => 'nobody'", "recipient is not an email address: nobody"),
        ("recipient => 'a@bücher.example'", "the domain of recipient is not ASCII: a@bücher.example"),
        ("recipient => E'a@b.example\\r\\nX: y'", "recipient is missing or has a control character"),
        ("recipient => 'a@b.example', key => 'k#2'", "does not end in # and digits"),
        ("recipient => 'a@b.example', body_text => null", "needs body_text or body_html"),
        ("recipient => 'a@b.example', headers => '{\"Bcc\": \"x@y\"}'", "the header Bcc cannot be given"),
        ("recipient => 'a@b.example', headers => '{\"A B\": \"x\"}'", "the header A B cannot be given"),
        ("recipient => repeat('ü', 33) || '@b.example'", "recipient is not an email address"),
        ("subject => 's'", "needs a recipient"),
        ("recipient => 'a@b.example', subject => E'a\\r\\nBcc: x@y.example'", "the subject has a line break"),
        ("recipient => 'a@b.example', subject => U&'a\\2028b'", "the subject has a line break"),
        ("recipient => 'a@b.example', headers => '{\"X-A\": \"a\\nb\"}'", "the header X-A has a line break"),
        ("recipient => E'A\\nb <a@b.example>'", "recipient is missing or has a control character"),
        ("recipient => 'a@b.example', cc => array[E'a@b.example\\n']", "recipient is missing or has a control"),
        (
            "recipient => 'a@b.example', reply_to => array[E'A\\rb <a@b.example>']",
            "Reply-To is missing or has a control",
        ),
        ("recipient => 'a@b.example', sender => E'A\\tb <a@b.example>'", "sender is missing or has a control"),
        ("recipient => 'a@b.example', priority => 'high'", "the priority high is unknown"),
        ("recipient => 'a@b.example', route => 'Bulk'", "the route Bulk is not a valid name"),
    ],
)
async def test_what_cannot_be_sent_is_an_exception_that_says_why(connection, arguments, said):
    given = {"key": "'k'", "sender": "'s@example.com'", "body_text": "'t'"}
    rest = ", ".join(f"{name} => {value}" for name, value in given.items() if f"{name} =>" not in arguments)
    with pytest.raises(asyncpg.InvalidParameterValueError, match=said):
        await connection.fetchval(f"select outbox.enqueue({rest}, {arguments})")


async def test_a_local_part_in_any_letters_has_the_spelling_that_python_gives_it(connection):
    said = "ju\u0308rgen@B.example"
    assert await connection.fetchval(ENQUEUE, "a", said, "s", "t", None)
    row = await connection.fetchrow("SELECT recipient, message FROM outbox.email")
    assert row["recipient"] == check_address(said) == "jürgen@b.example"
    assert "\r\nTo: jürgen@b.example\r\n".encode() in row["message"]


async def test_every_search_path_will_do(connection):
    await connection.execute("SET search_path = ''")
    assert await connection.fetchval(ENQUEUE, "a", "ada@b.example", "s", "t", None)


async def test_the_role_for_it_can_do_no_more(connection, database):
    from outbox.database.roles import grant_roles

    await grant_roles(connection)
    other = await asyncpg.connect(database)
    try:
        await other.execute("SET ROLE outbox_enqueue")
        assert await other.fetchval(ENQUEUE, "a", "ada@example.com", "s", "t", None) is True
        read = ("SELECT id FROM outbox.email", "SELECT message FROM outbox.email", "SELECT html FROM outbox.report")
        for forbidden in (*read, "DELETE FROM outbox.email", "UPDATE outbox.delivery SET state = 'sent'"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await other.execute(forbidden)
    finally:
        await other.close()
