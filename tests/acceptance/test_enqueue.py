"""`outbox.enqueue` as an application uses it: each driver for real, relays as processes, SMTP over sockets."""

import asyncio
import inspect
import re
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.header import decode_header, make_header
from email.policy import compat32, default

import asyncpg
import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outbox import Attachment, Email, enqueue
from outbox.errors import OutboxError, SchemaError
from outbox.mail.stored_message import read_message
from outbox.sandbox.smtp_sink import Reply, Stage


def welcome(key="welcome/1", **more):
    said = {"sender": "Shop <shop@example.com>", "to": "ada@example.com", "subject": "Welcome", "text": "Hello Ada"}
    return Email(**{"key": key, **said, **more})


async def put(session, email):
    found = enqueue(session, email)
    return await found if inspect.isawaitable(found) else found


@asynccontextmanager
async def sa_session(url):
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with Session(engine) as session:
        yield session, session.commit, session.rollback
    engine.dispose()


@asynccontextmanager
async def sa_connection(url):
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        yield connection, connection.commit, connection.rollback
    engine.dispose()


@asynccontextmanager
async def sa_async_session(url):
    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"))
    async with AsyncSession(engine) as session:
        yield session, session.commit, session.rollback
    await engine.dispose()


@asynccontextmanager
async def sa_async_connection(url):
    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"))
    async with engine.connect() as connection:
        yield connection, connection.commit, connection.rollback
    await engine.dispose()


@asynccontextmanager
async def raw_asyncpg(url):
    async with asyncpg.create_pool(url, min_size=1, max_size=1) as pool, pool.acquire() as connection:
        await connection.execute("BEGIN")

        async def end(word):
            await connection.execute(word)
            await connection.execute("BEGIN")

        yield connection, lambda: end("COMMIT"), lambda: end("ROLLBACK")
        await connection.execute("ROLLBACK")


@asynccontextmanager
async def raw_psycopg(url):
    with psycopg.connect(url, row_factory=psycopg.rows.dict_row) as connection:
        yield connection, connection.commit, connection.rollback


@asynccontextmanager
async def raw_async_psycopg(url):
    async with await psycopg.AsyncConnection.connect(url) as connection:
        yield connection, connection.commit, connection.rollback


DRIVERS = [
    sa_session, sa_connection, sa_async_session, sa_async_connection, raw_asyncpg, raw_psycopg, raw_async_psycopg,
]  # fmt: skip


async def done(step):
    found = step()
    if inspect.isawaitable(found):
        await found


@pytest.mark.parametrize("driver", DRIVERS)
async def test_what_is_committed_is_there_once_and_what_is_rolled_back_never_was(database, connection, driver):
    async def keys():
        return [row["key"] for row in await connection.fetch("SELECT key FROM outbox.email ORDER BY id")]

    async with driver(database) as (session, commit, rollback):
        assert await put(session, welcome()) is True
        assert await put(session, welcome()) is False, "within one transaction, too"
        await done(rollback)
        assert await keys() == []
        assert await put(session, welcome(priority="urgent", route="bulk")) is True
        assert await keys() == [], "it never commits"
        await done(commit)
        assert await put(session, welcome(subject="another")) is False
        await done(commit)
    (row,) = await connection.fetch("SELECT key, recipient, message, made_by FROM outbox.email")
    assert (row["key"], row["recipient"]) == ("welcome/1", "ada@example.com")
    assert b"Subject: Welcome\r\n" in row["message"]
    assert "pid" in row["made_by"]
    assert tuple(await connection.fetchrow("SELECT priority, route FROM outbox.delivery")) == (1, "bulk")


class Base(DeclarativeBase):
    pass


class Person(Base):
    __tablename__ = "people"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]


async def test_nothing_is_flushed_for_it_and_a_savepoint_takes_it_back(database):
    async with sa_session(database) as (session, _, _):
        session.add(Person(id=1, email="ada@example.com"))
        enqueue(session, welcome())
        assert session.new, "what waits to be flushed still does"
        session.flush()
        savepoint = session.begin_nested()
        assert enqueue(session, welcome("welcome/2")) is True
        savepoint.rollback()
        session.commit()
        found = session.execute(text("SELECT key FROM outbox.email")).scalars().all()
        assert (found, session.get(Person, 1).email) == (["welcome/1"], "ada@example.com")


async def test_of_two_transactions_with_one_key_the_later_waits_and_finds_it_there(database):
    one, other = await asyncpg.connect(database), await asyncpg.connect(database)
    try:
        for ending, later in (("ROLLBACK", True), ("COMMIT", False)):
            await one.execute("BEGIN")
            assert await enqueue(one, welcome(ending)) is True
            second = asyncio.create_task(enqueue(other, welcome(ending)))
            assert not (await asyncio.wait({second}, timeout=0.2))[0], "it waits for the first"
            await one.execute(ending)
            assert await second is later
    finally:
        await one.close()
        await other.close()


async def test_each_recipient_is_sent_to_by_itself(fleet):
    """One is refused for good, one at first, two are not: nobody gets it twice, and nobody is left out."""
    deferred = []

    def moody(stage, visit):
        if stage is Stage.RCPT and visit.recipients[-1:] == ["bob@example.com"] and not deferred:
            deferred.append(visit)
            return Reply("451 4.3.0 later")
        if stage is Stage.RCPT and visit.recipients[-1:] == ["eve@example.com"]:
            return Reply("550 5.1.1 no such user")
        return None

    fleet.sink.script = moody
    email = welcome(
        to=["Ada <ada@example.com>", "bob@example.com"],
        cc="eve@example.com",
        bcc=["joe@example.com", "ada@EXAMPLE.com"],
    )
    assert await enqueue(fleet.connection, email) is True
    await fleet.relay()
    assert await fleet.settled() == {"sent": 3, "dead": 1}
    assert fleet.sink.addresses == {"ada@example.com": 1, "bob@example.com": 1, "joe@example.com": 1}
    told = {one.message for one in fleet.sink.accepted}
    (message,) = told
    assert b"joe" not in message, "a bcc is in nobody's copy"
    assert b"To: Ada <ada@example.com>, bob@example.com\r\nCc: eve@example.com\r\n" in message
    shown = await fleet.run("show", "welcome/1#3")
    assert "550 5.1.1 no such user" in shown.out


async def test_a_mail_of_many_parts_arrives_as_it_was_meant(fleet):
    logo, pdf = Attachment("logo.png", b"\x89PNG\r\n" * 500, "image/png", cid="logo"), b"%PDF \r\n.\r\nFrom \n" * 400
    email = welcome(
        to="Zoë Müller <zoe@bücher.example>",
        reply_to=["Help <help@example.com>", "more@example.com"],
        subject="Ihre Rechnung ✓ " + "sehr " * 30 + "lang",
        html='<p>Grüße <img src="cid:logo" alt="Logo"></p>',
        text="Grüße\n.\n",
        attachments=[logo, Attachment("Rechnung für " + "Müller " * 20 + ".pdf", pdf, "application/pdf")],
        headers={"X-Order": "4711"},
    )
    assert await enqueue(fleet.connection, email) is True
    await fleet.relay("--until-empty")
    await fleet.settled()
    (kept,) = fleet.sink.accepted
    assert kept.recipients == ("zoe@xn--bcher-kva.example",)
    assert kept.message.isascii()
    assert max(map(len, kept.message.split(b"\r\n"))) <= 78
    got = message_from_bytes(kept.message, policy=default)
    assert not [part.defects for part in got.walk() if part.defects]
    assert got["subject"] == email.subject.strip()
    assert (got["x-order"], got["reply-to"].addresses[1].addr_spec) == ("4711", "more@example.com")
    assert got.get_body(("plain",)).get_content().splitlines() == ["Grüße", "."]
    assert "cid:logo" in got.get_body(("html",)).get_content()
    assert [part.get_content_type() for part in got.walk()] == [
        *("multipart/mixed", "multipart/alternative", "text/plain"),
        *("multipart/related", "text/html", "image/png", "application/pdf"),
    ]
    parts = {
        part["content-id"] or part.get_filename(): part.get_content() for part in got.walk() if part.get_filename()
    }
    assert parts == {"<logo>": logo.content, email.attachments[1].name: pdf}
    assert got["message-id"] == await fleet.connection.fetchval("SELECT message_id FROM outbox.email")


async def test_a_template_is_rendered_and_only_its_html_is_escaped(tmp_path, connection):
    files = {"subject.txt.j2": "Order {{ order }}\n for {{ name }}", "email.txt.j2": "Hi {{ name }}"}
    files["calendar.ics.j2"] = "BEGIN:VCALENDAR\nMETHOD:PUBLISH\nX-ORDER:{{ order }}\nEND:VCALENDAR\n"
    for name, said in {**files, "email.html.j2": "<p>{{ name }}</p>"}.items():
        path = tmp_path / "receipt" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(said)
    given = {"template": "receipt", "templates": tmp_path, "subject": None, "text": None}
    await enqueue(connection, welcome(context={"order": 7, "name": "A & B"}, **given))
    got = message_from_bytes(await connection.fetchval("SELECT message FROM outbox.email"), policy=default)
    assert got["subject"] == "Order 7 for A & B"
    assert [got.get_body((kind,)).get_content().strip() for kind in ("plain", "html")] == [
        "Hi A & B",
        "<p>A &amp; B</p>",
    ]
    assert "X-ORDER:7" in got.get_payload()[-1].get_content()
    with pytest.raises(
        ValueError,
        match=r"receipt failed: .*email\.html\.j2, line 1: 'name' is undefined; the names that exist here are order\.",
    ):
        welcome(template="receipt", templates=tmp_path, context={"order": 7}, subject="x")
    with pytest.raises(ValueError, match="There is no template nothing in"):
        welcome(template="nothing", templates=tmp_path)


async def test_times_are_kept(connection):
    at = datetime(2030, 1, 1, tzinfo=UTC)
    later = at + timedelta(days=1)
    await enqueue(connection, welcome(send_at=at, send_before=later))
    row = await connection.fetchrow("SELECT due_at, send_before FROM outbox.delivery")
    assert tuple(row) == (at, later)


@pytest.mark.parametrize(
    "fault, sentence",
    [
        ({"to": ()}, "needs a recipient"),
        ({"to": None}, "to is None; give an address"),
        ({"to": "nobody"}, "'nobody' is no email address"),
        ({"key": " "}, "needs a key"),
        ({"key": "order#2"}, "ends in # and digits"),
        ({"subject": None}, "needs a subject"),
        ({"text": None}, "needs a text or an html body"),
        ({"sender": "Shop"}, "'Shop' is no email address"),
        ({"headers": {"Bcc": "spy@example.com"}}, "Bcc is written by outbox itself"),
        ({"send_at": datetime(2030, 1, 1)}, "send_at has no timezone"),  # noqa: DTZ001 - that is the fault
        ({"priority": "high"}, "'high' is unknown; write normal or urgent"),
        ({"route": "mail:25"}, "'mail:25' is not a valid name"),
        ({"attachments": [Attachment("a", b"", "image/png", "x")]}, "no html to be shown in"),
    ],
)
def test_what_cannot_be_sent_is_refused_with_a_sentence_when_it_is_made(fault, sentence):
    with pytest.raises(ValueError, match=sentence):
        welcome(**fault)


INVITE = """BEGIN:VCALENDAR
VERSION:2.0
PRODID:-//example.com//shop//EN
METHOD:REQUEST
BEGIN:VEVENT
UID:4711@example.com
DTSTAMP:20261123T060000Z
DTSTART:20261201T090000Z
DTEND:20261201T100000Z
ORGANIZER:mailto:shop@example.com
ATTENDEE;RSVP=TRUE:mailto:ada@example.com
SUMMARY:Übergabe 🙂
END:VEVENT
END:VCALENDAR
""".replace("\n", "\r\n")
NAMES = [
    ("report.pdf", "report.pdf"), ("Übersicht März.pdf", "Übersicht März.pdf"), ("報告書.pdf", "報告書.pdf"),
    ("🙂.png", "🙂.png"), ("x" * 120 + ".csv", "x" * 120 + ".csv"), ("é" * 120 + ".csv", "é" * 120 + ".csv"),
    ("=?utf-8?q?x?=", "=?utf-8?q?x?="), ('a "quoted"; name=b.txt', 'a "quoted"; name=b.txt'),
    ("2026/11 Zahlen.pdf", "2026_11 Zahlen.pdf"), ("../../etc/passwd", ".._.._etc_passwd"),
    ("C:\\Users\\Ada\\x.doc", "C:_Users_Ada_x.doc"), ("a\r\nb\x00c.txt", "a b c.txt"),
    ("invoice\u202efdp.exe", "invoicefdp.exe"), ("it's 50%.pdf", "it's 50%.pdf"),
]  # fmt: skip
ENQUEUE = """SELECT outbox.enqueue(key => 'k', sender => 's@example.com', recipient => 'ada@example.com',
                                   body_text => 't', body_html => 'h', calendar => $1)"""


@pytest.mark.parametrize(("name", "read"), NAMES)
def test_a_files_name_is_read_by_new_and_by_old_mail_programs_and_is_no_path(name, read):
    pieces = welcome(attachments=[Attachment(name, b"x", "text/csv; charset=utf-8")]).pieces
    whole = pieces.head + b"1@example.com" + pieces.tail
    assert whole.isascii()
    assert max(map(len, whole.split(b"\r\n"))) <= 78
    assert [file.name for file in read_message(whole).attachments] == [read]
    for policy in (default, compat32):
        (part,) = [
            one for one in message_from_bytes(whole, policy=policy).walk() if one.get_content_type() == "text/csv"
        ]
        assert part.get_filename() == read
        assert part.get_content_charset() == "utf-8"
    # Outlook knows no RFC 2231: it reads a parameter as if it were text (RFC 2047).
    plain = re.search(r'name="((?:[^"\\]|\\.)*)"', part["Content-Type"].replace("\r\n", ""))[1]
    assert str(make_header(decode_header(re.sub(r"\\(.)", r"\1", plain)))) == read
    if not read.isascii() or len(read) > 66:
        assert re.search(r"filename(\*0)?\*=utf-8''", part["Content-Disposition"])


@pytest.mark.parametrize("name", ["", " ", "\r\n", ".", "..", "\u202e", "x" * 256])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(ValueError, match="needs a name"):
        Attachment(name, b"")


def structure(part):
    kind = part.get_content_type()
    return [kind, *map(structure, part.iter_parts())] if part.is_multipart() else kind


def test_an_invitation_is_the_last_alternative_and_files_come_after_all():
    given = {"html": "<img src='cid:logo'>", "calendar": INVITE}
    logo, invoice = (
        Attachment("logo.png", b"x", "image/png", "logo"),
        Attachment("invoice.pdf", b"x", "application/pdf"),
    )
    both = ["multipart/alternative", "text/plain", "text/html", "text/calendar"]
    for more, wanted in (
        ({"calendar": INVITE}, ["multipart/alternative", "text/plain", "text/calendar"]),
        ({"html": "<p>x", "calendar": INVITE.encode()}, both),
        ({"html": "<p>x", "calendar": "\ufeff" + INVITE.replace("\r\n", "\n")}, both),
        ({"html": "<p>x", "calendar": INVITE, "attachments": [invoice]}, ["multipart/mixed", both, "application/pdf"]),
        (
            {**given, "attachments": [logo, invoice]},
            ["multipart/mixed", ["multipart/alternative", "text/plain", ["multipart/related", "text/html", "image/png"],
             "text/calendar"], "application/pdf"],
        ),
    ):  # fmt: skip
        pieces = welcome(**more).pieces
        whole = pieces.head + b"1@example.com" + pieces.tail
        message = message_from_bytes(whole, policy=default)
        assert structure(message) == wanted
        (part,) = [one for one in message.walk() if one.get_content_type() == "text/calendar"]
        assert part["Content-Type"].params == {"charset": "utf-8", "method": "REQUEST"}
        assert part.get_payload(decode=True).decode() == INVITE
        assert "invite.ics" in [file.name for file in read_message(whole).attachments]


async def test_sql_writes_the_same_invitation(connection):
    await connection.fetchval(ENQUEUE, INVITE.replace("\r\n", "\n"))
    message = message_from_bytes(await connection.fetchval("SELECT message FROM outbox.email"), policy=default)
    assert structure(message) == ["multipart/alternative", "text/plain", "text/html", "text/calendar"]
    part = message.get_payload()[-1]
    assert part["Content-Type"].params == {"charset": "utf-8", "method": "REQUEST"}
    assert part.get_payload(decode=True).decode() == INVITE


@pytest.mark.parametrize(
    "calendar",
    [
        "",
        "hello",
        INVITE.replace("METHOD:REQUEST\r\n", ""),
        INVITE.replace("VERSION:2.0", "METHOD:CANCEL"),
        f"x{INVITE}",
    ],
)
async def test_what_is_no_invitation_is_refused(connection, calendar):
    with pytest.raises(ValueError, match="no iCalendar object with one METHOD"):
        welcome(calendar=calendar)
    with pytest.raises(asyncpg.InvalidParameterValueError, match="no iCalendar object with one METHOD"):
        await connection.fetchval(ENQUEUE, calendar)


@pytest.mark.parametrize(
    "hostile", ["x\r\nBcc: spy@example.com", "x\ny", "x\ry", "x\0y", "x\x85y", "x\u2028y", "x\x7f"]
)
def test_no_value_begins_a_header_of_its_own(hostile):
    named = f"{hostile} <ada@example.com>"
    for fault in (
        {"subject": hostile}, {"headers": {"X-A": hostile}}, {"headers": {"References": hostile}}, {"key": hostile},
        {"sender": named}, {"to": named}, {"cc": [named]}, {"bcc": named}, {"reply_to": named}, {"to": hostile},
        {"to": f"ada@example.com{hostile[1:]}"}, {"headers": {f"X-A{hostile}": "b"}},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"control character|cannot be a header's name|no email address"):
            welcome(**fault)
    pieces = welcome(attachments=[Attachment(hostile, b"")]).pieces
    assert b"\nBcc" not in pieces.head + pieces.tail


async def test_another_database_and_a_missing_schema_are_told(postgres_server, tmp_path):
    with (
        create_engine(f"sqlite:///{tmp_path}/db").connect() as session,
        pytest.raises(OutboxError, match="leads to sqlite"),
    ):
        enqueue(session, welcome())
    with pytest.raises(OutboxError, match="cannot use a str"):
        enqueue("postgresql://", welcome())
    bare = await asyncpg.connect(postgres_server.url)
    try:
        with pytest.raises(SchemaError, match="run `outbox init`"):
            await enqueue(bare, welcome())
    finally:
        await bare.close()
