"""The mail as the mail server receives it, parsed by the standard library."""

import re
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from email.header import decode_header, make_header
from email.utils import parsedate_to_datetime


async def received(fleet):
    """Each mail that the server accepted, parsed, by envelope recipient."""
    ended = await fleet.run("relay", "--until-empty")
    assert ended.code == 0, ended
    return {mail.recipients[0]: message_from_bytes(mail.message, policy=policy.default) for mail in fleet.sink.accepted}


async def test_a_mail_says_who_when_and_what_for_people_and_for_robots(fleet):
    fleet.top = ""
    await fleet.hire(2)
    await fleet.run("generate", "--period", "2026-W47")
    found = await received(fleet)
    assert set(found) == {"p1@example.com", "p2@example.com"}
    assert {mail.sender for mail in fleet.sink.accepted} == {"reports@example.com"}
    assert [len(mail.recipients) for mail in fleet.sink.accepted] == [1, 1]

    mail = found["p2@example.com"]
    assert not mail.defects
    assert mail["From"] == "Progress reports <reports@example.com>"
    assert mail["To"] == "Person 2 <p2@example.com>"
    assert mail["Subject"] == "Progress: 16 \u2013 22 November 2026"
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail["List-Id"] == "<progress.example.com>"
    age = datetime.now(UTC) - parsedate_to_datetime(mail["Date"])
    assert timedelta(seconds=-2) < age < timedelta(minutes=1)

    row = await fleet.connection.fetchrow(
        "SELECT e.id, e.message_id, r.token FROM outbox.email e JOIN outbox.report r ON r.id = e.report"
        " WHERE e.recipient = 'p2@example.com'"
    )
    assert mail["Message-ID"] == row["message_id"]
    assert re.fullmatch(rf"<{row['id']}\.\w+@example\.com>", mail["Message-ID"])
    assert len({mail["Message-ID"] for mail in found.values()}) == 2

    assert mail.get_content_type() == "multipart/alternative"
    assert [part.get_content_type() for part in mail.iter_parts()] == ["text/plain", "text/html"]
    link = f"https://reports.example.com/r/{row['token']}"
    for kind in ("plain", "html"):
        content = mail.get_body((kind,)).get_content()
        assert link in content
        assert "Person 2" in content
    assert "reports.example.com" not in mail.get_body(("plain",)).get_content().replace(link, "")


NAMES = (
    "Jürgen Müßig",
    'Ann "The Boss" O\'Neil, PhD <ceo>',
    "山田 太郎 🎉",
    "back\\slash; semi, comma (comment) @ home",
    "=?utf-8?q?not=20encoded?=",
)
LONG_NAMES = ("x" * 300, " ".join(["Ünï"] * 60), "🎉" * 60)
NEWLINES = ("\r\n", "\n", "\r", "\u2028", "\x85", "\x0b", "\r\n ")
FIELDS = {
    "From", "To", "Subject", "Date", "Message-ID", "List-Id", "Auto-Submitted", "X-Auto-Response-Suppress",
    "MIME-Version", "Content-Type",
}  # fmt: skip


async def mails_to(fleet, names):
    """What people of these names are sent, in this order."""
    people = [(n, f"p{n}@example.com", name) for n, name in enumerate(names)]
    await fleet.connection.executemany("INSERT INTO people VALUES ($1, $2, $3)", people)
    assert (await fleet.run("generate")).code == 0
    found = await received(fleet)
    assert set(found) == {address for _, address, _ in people}
    assert fleet.sink.messages == len(names)
    return [found[address] for _, address, _ in people]


async def test_names_arrive_as_they_are_written(fleet):
    for name, mail in zip(NAMES, await mails_to(fleet, NAMES), strict=True):
        (address,) = mail["To"].addresses
        assert address.display_name == name
        assert not mail.defects
    assert all(mail.message.isascii() for mail in fleet.sink.accepted)


async def test_long_names_are_folded_and_arrive_whole(fleet):
    """Read with the older parser: the newer one leaves a space where an encoded word ends inside a name."""
    await mails_to(fleet, LONG_NAMES)
    read = {str(make_header(decode_header(message_from_bytes(mail.message)["To"]))) for mail in fleet.sink.accepted}
    assert read == {f"{name} <p{n}@example.com>" for n, name in enumerate(LONG_NAMES)}
    for mail in fleet.sink.accepted:
        head = mail.message.partition(b"\r\n\r\n")[0]
        assert max(map(len, head.split(b"\r\n"))) <= 78


async def test_no_name_can_add_a_header_or_a_recipient(fleet):
    names = [f"Eve{nl}Bcc: all@example.com{nl}{nl}<b>body</b>{nl}.{nl}MAIL FROM:<eve@example.com>" for nl in NEWLINES]
    for mail in await mails_to(fleet, names):
        assert set(mail.keys()) == FIELDS
        assert len(mail["To"].addresses) == 1
        assert [part.get_content_type() for part in mail.iter_parts()] == ["text/plain", "text/html"]


async def test_a_subject_with_line_breaks_is_one_line(fleet):
    path = fleet.directory / "templates" / "progress" / "subject.txt.j2"
    path.parent.mkdir(parents=True)
    path.write_text("Für {{ recipient.name }}\nBcc: all@example.com\n")
    await fleet.connection.execute("INSERT INTO people VALUES (1, 'p1@example.com', E'Eve\\r\\nX-Evil: yes')")
    await fleet.run("generate")
    mail = (await received(fleet))["p1@example.com"]
    assert mail["Subject"] == "Für Eve X-Evil: yes Bcc: all@example.com"
    assert mail["Bcc"] is mail["X-Evil"] is None


async def test_lines_of_dots_and_from_in_the_rows_arrive_as_they_are(fleet):
    fleet.data = r"select E'.\n..\nFrom here\n.\r\n' as said, :key as key"
    path = fleet.directory / "templates" / "progress" / "email.txt.j2"
    path.parent.mkdir(parents=True)
    path.write_text("{{ rows[0].said }}end\n")
    await fleet.hire(1)
    await fleet.run("generate")
    mail = (await received(fleet))["p1@example.com"]
    assert mail.get_body(("plain",)).get_content().replace("\r\n", "\n") == ".\n..\nFrom here\n.\nend\n"
    assert fleet.sink.messages == 1


async def test_an_international_domain_is_written_to_in_ascii(fleet):
    await fleet.connection.execute("INSERT INTO people VALUES (1, 'info@Bücher.example', 'Bücher')")
    await fleet.run("generate")
    assert list(await received(fleet)) == ["info@xn--bcher-kva.example"]
