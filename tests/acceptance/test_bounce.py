"""`outbox bounce`, `outbox suppress` and unsubscribing, as mail servers, crons and people use them."""

import asyncio
import json
import os
import re
import signal
import sys
import time
from email import message_from_bytes, policy
from pathlib import Path

import asyncpg
import pytest

from outbox.feedback.bounce_maildir import read_maildir
from outbox.feedback.bounces import Outcome, Policy
from outbox.mail.verp import former_token_of, tokens_in
from outbox.sandbox.smtp_sink import EXTENSIONS, Sink
from tests.support.bounce_samples import ARF, EXCHANGE, PERSON, ROWS, header_of, message_id_of, of_row, postfix
from tests.support.bounce_samples import report as reported
from tests.support.fleet import Ended, until
from tests.unit.feedback.test_dsn import HOSTILE, nested

WEEK, NEXT = "2026-W46", "2026-W47"


async def piped(fleet, raw, *words):
    """`outbox …` with something to read, as a mail server starts it."""
    fleet.write_settings()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "outbox", *words,
        cwd=fleet.directory,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")},
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate(raw)
    return Ended(process.returncode, out.decode(), err.decode())


async def row_of(fleet, key):
    return await fleet.connection.fetchrow(f"{ROWS} WHERE key = $1", key)


async def listed(fleet):
    rows = await fleet.connection.fetch("SELECT address, report, reason FROM outbox.suppression ORDER BY 1, 2")
    return [tuple(row) for row in rows]


async def bounces(fleet):
    """The trails' rows of what came back, by key."""
    rows = await fleet.connection.fetch(
        "SELECT m.key, a.reply FROM outbox.attempt a JOIN outbox.email m ON m.id = a.email"
        " WHERE a.verdict = 'bounced' ORDER BY m.id"
    )
    return [tuple(row) for row in rows]


def maildir(fleet, *messages):
    place = fleet.directory / "Maildir"
    for part in ("new", "cur", "tmp"):
        (place / part).mkdir(parents=True, exist_ok=True)
    for number, raw in enumerate(messages):
        (place / "new" / f"1700000000.M{number:03}.host").write_bytes(raw)
    return place


def flags(place):
    """What was read, by number, each with its flags."""
    return {int(path.name[12:15]): path.name.partition(":2,")[2] for path in (place / "cur").iterdir()}


async def sent(fleet, period=WEEK, people=3):
    if people:
        await fleet.hire(people)
    assert (await fleet.run("generate", "--period", period)).code == 0
    assert (await fleet.run("relay", "--until-empty")).code == 0


async def test_who_bounces_for_good_is_not_written_to_again_and_everybody_else_is(fleet):
    await sent(fleet)
    key = f"progress/{WEEK}/2"
    ended = await piped(fleet, of_row(await row_of(fleet, key)), "bounce")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == (
        f"{key}: bounced for good (5.1.1 550 5.1.1 <p2@example.com>: Recipient address rejected); "
        "p2@example.com gets no more email.\n"
    )
    shown = (await fleet.run("show", key)).out
    assert shown.startswith(f"{key} is sent, and came back.\n")
    assert "bounced for good: 5.1.1" in shown
    assert "bounced for good: 5.1.1" in (await fleet.run("list", "--to", "p2@example.com")).out
    found = await fleet.run("audit", "progress", WEEK)
    assert found.code == 0
    assert "3 sent, 0 in doubt, 0 failed, 0 waiting, 0 missing, 1 bounced." in found.out
    assert "2 <p2@example.com>: bounced, bounced for good: 5.1.1" in found.out

    ended = await fleet.run("generate", "--period", NEXT)
    assert ended.code == 0
    assert "3 made here" in ended.out
    assert "1 of 3 is on the suppression list, so no email goes to that one: `outbox suppress`." in ended.out
    assert await fleet.states() == {"sent": 3, "pending": 2, "cancelled": 1}, "it is so from the start"
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert dict(fleet.sink.addresses) == {"p1@example.com": 2, "p2@example.com": 1, "p3@example.com": 2}
    found = await fleet.run("audit", "progress", NEXT)
    assert found.code == 0
    assert f"All is well: progress {NEXT} is sent to all but 1 of its 3 recipients" in found.out
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.edition WHERE completed_at IS NULL") == 0
    status = json.loads((await fleet.run("status", "--json")).out)
    assert [(e["waiting"] + e["failed"], e["suppressed"], e["bounced"]) for e in status["editions"]] == [
        (0, 1, 0),
        (0, 0, 1),
    ]
    key = f"progress/{NEXT}/2"
    assert "since its address was on the suppression list" in (await fleet.run("show", key)).out
    (said,) = (await fleet.run("retry", key)).sentences
    assert "; `outbox suppress --remove p2@example.com` takes it off." in said
    assert await listed(fleet) == [("p2@example.com", "", "bounced")]


async def test_what_proves_to_know_no_email_of_ours_suppresses_nobody(fleet):
    await sent(fleet)
    one, two, three = [await row_of(fleet, f"progress/{WEEK}/{number}") for number in (1, 2, 3)]
    number, digest = two["token"].split("k")
    forged = [
        postfix(recipient="p2@example.com"),
        postfix(recipient="p2@example.com", token=f"{one['id']}k{digest}"),
        postfix(recipient="p2@example.com", token=f"{number}k1t0123456789abcdef"),
        postfix(recipient="p2@example.com", token="9999999999999999999k1t0123456789abcdef"),
        postfix(recipient="p2@example.com", token=f"{number}-0123456789ab"),
        postfix(recipient="p2@example.com", returned=f"Message-ID: <{two['id']}.guessed@example.com>"),
        postfix(recipient="p2@example.com", returned="Message-ID: <9999999999999999999.x@example.com>"),
        ARF.format(about="abuse", header="Message-ID: <x@example.com>").encode(),
    ]
    believed = [
        of_row(three, status="4.2.2", action="delayed"),
        postfix(recipient="p2@example.com", returned=header_of(two["message"])),
        ARF.format(about="abuse", header=header_of(one["message"])).encode(),
        b"Subject: holiday\n\nback on Monday\n",
    ]
    place = maildir(fleet, *forged, *believed, nested(5000))
    ended = await fleet.run("bounce", str(place))
    assert ended.code == 1
    assert len(ended.sentences) == len(forged) + 1
    assert all("it cannot be verified" in said for said in ended.sentences[:-1])
    assert "it cannot be read whole: parts are nested more than 16 deep" in ended.sentences[-1]
    assert ended.out.splitlines()[-1] == (
        "13 messages were read: 1 bounced for good, 1 perhaps for now, 1 complained, 1 no bounces, 8 not believed, "
        "1 not read."
    )
    assert await listed(fleet) == [("p1@example.com", "", "complained"), ("p2@example.com", "", "bounced")]
    assert [key for key, _ in await bounces(fleet)] == [one["key"], two["key"], three["key"]]
    assert not any((place / "new").iterdir())
    assert flags(place) == {number: "FS" if number < 8 or number == 12 else "S" for number in range(13)}


async def test_only_what_says_that_the_recipients_own_address_does_not_exist_suppresses(fleet):
    fleet.top = 'bounces_max = 1\nbounces_within = "30d"'
    frames = {
        1: ({}, True),
        2: ({"diagnostic": "SMTP; 550 5.7.1 IP address blacklisted by recipient"}, False),
        3: ({"status": "5.1.3", "diagnostic": "SMTP; 553 https://www.spamhaus.org/query/ip/192.0.2.1"}, False),
        4: ({"final": "rfc822; left@example.com", "original": "rfc822;p4@example.com"}, False),
        5: ({"final": "rfc822; reports@example.com"}, False),
        6: ({"final": "utf-8; p6@example.com", "kind": "message/global-delivery-status"}, True),
        7: ({"status": "5.2.1", "diagnostic": "smtp; 550-5.2.1 The user you are trying to contact is receiving mail "
             "at a rate that 550 5.2.1 https://support.google.com/mail/?p=ReceivingRatePerm"}, False),
        8: ({"final": "rfc/822;p8@example.com"}, True),
        9: ({"status": "5.4.1", "diagnostic": "smtp; 550 5.4.1 Recipient address rejected: Access denied"}, True),
    }  # fmt: skip
    await sent(fleet, people=len(frames))
    raws = []
    for number, (how, _) in frames.items():
        kind = how.pop("kind", "message/delivery-status").encode()
        token = (await row_of(fleet, f"progress/{WEEK}/{number}"))["token"]
        raw = reported(token=token, **({"final": f"rfc822; p{number}@example.com"} | how))
        raws.append(raw.replace(b"message/delivery-status", kind))
    person = await row_of(fleet, f"progress/{WEEK}/2")
    raws.append(PERSON.format(message_id=message_id_of(person["message"])).encode())
    ended = await fleet.run("bounce", str(maildir(fleet, *raws)))
    assert ended.code == 0
    assert ended.out.endswith("10 messages were read: 3 bounced for good, 6 perhaps for now, 1 no bounces.\n")
    gone = [(f"p{number}@example.com", "", "bounced") for number, (_, is_gone) in frames.items() if is_gone]
    assert await listed(fleet) == gone
    shown = (await fleet.run("suppress")).out
    assert "1 email bounced within 30d, the last one with 5.4.1 550 5.4.1 Recipient address rejected" in shown


async def test_a_bounce_of_an_email_in_doubt_settles_it(fleet):
    await sent(fleet)
    key = f"progress/{WEEK}/2"
    await fleet.connection.execute(
        "UPDATE outbox.delivery SET state = 'in_doubt', settled_at = NULL, doubted_at = now(), due_at = 'infinity'"
    )
    ended = await piped(fleet, of_row(await row_of(fleet, key), status="4.2.2"), "bounce")
    assert ended.out.endswith(
        "; the email was in doubt and is sent now, since the bounce proves that a server accepted it.\n"
    )
    assert await fleet.states() == {"sent": 1, "in_doubt": 2}
    assert (await fleet.run("show", key)).out.startswith(f"{key} is sent, and came back.\n")
    other = await fleet.connection.fetchval("SELECT id FROM outbox.email WHERE key = $1", f"progress/{WEEK}/3")
    await fleet.connection.execute(
        "INSERT INTO outbox.bounce (email, message, kind, proves) VALUES ($1, 'x', 'soft', true)", other
    )
    ended = await fleet.run("bounce", str(maildir(fleet)))
    assert ended.out == (
        "1 email in doubt is sent now, since its bounce proves that a server accepted it.\n0 messages were read.\n"
    )
    assert await fleet.states() == {"sent": 2, "in_doubt": 1}


async def test_a_bounce_that_others_who_got_a_copy_could_have_written_suppresses_nobody(fleet):
    await fleet.connection.execute(
        "SELECT outbox.enqueue(key => 'note', sender => 'app@example.com', subject => 'x', body_text => 'x',"
        " recipients => ARRAY['ann@example.com', 'bo@example.com'])"
    )
    first, second = await row_of(fleet, "note"), await row_of(fleet, "note#2")
    assert first["message_id"] == second["message_id"]
    header = header_of(first["message"])
    unnamed = EXCHANGE.format(header=header, message_id=first["message_id"]).replace("bo@", "cy@").encode()
    named = EXCHANGE.format(header=header, message_id=first["message_id"]).replace("<ex1@", "<ex2@").encode()
    ended = await fleet.run("bounce", str(maildir(fleet, unnamed, named)))
    assert ended.code == 1
    assert "bo@example.com is still written to, since others who got a copy could say this" in ended.out
    former = postfix(recipient="bo@example.com", token=former_token_of(second["id"], first["message_id"]))
    await fleet.run("bounce", str(maildir(fleet, former)))
    assert await listed(fleet) == []
    assert [key for key, _ in await bounces(fleet)] == ["note#2", "note#2"]
    assert second["token"] != first["token"]
    told = await fleet.run("bounce", str(maildir(fleet, of_row(second, number=2))))
    assert told.out.startswith("note#2: bounced for good")
    assert await listed(fleet) == [("bo@example.com", "", "bounced")], "a token is one recipient's"


async def test_an_address_that_is_suppressed_after_the_email_was_enqueued_gets_none_and_may_be_let_in_again(fleet):
    await fleet.hire(2)
    assert (await fleet.run("generate", "--period", WEEK)).code == 0
    await fleet.put_emails(2)
    ended = await fleet.run("suppress", "P1@Example.com", "--report", "progress", "--why", "she asked")
    assert ended.out == "p1@example.com gets no more email of progress.\n"
    assert (await fleet.run("suppress", "p2@example.com")).code == 0
    assert "already" in (await fleet.run("suppress", "p2@example.com")).out
    relay = await fleet.run("relay", "--until-empty")
    assert relay.code == 0
    assert "1 accepted, 3 suppressed" in relay.err
    assert await fleet.states() == {"cancelled": 3, "sent": 1}
    assert dict(fleet.sink.addresses) == {"p1@example.com": 1}, "mail1 is of no report"
    rows = json.loads((await fleet.run("suppress", "--json")).out)
    assert [(row["address"], row["report"], row["reason"], row["why"]) for row in rows] == [
        ("p2@example.com", "", "decided", ""),
        ("p1@example.com", "progress", "decided", "she asked"),
    ]
    shown = (await fleet.run("suppress")).out.splitlines()
    assert shown[0].split() == ["address", "report", "reason", "since", "who", "why"]
    assert re.match(r"p2@example\.com  all       decided  \d{4}-\d\d-\d\d ", shown[1])
    assert (await fleet.run("retry", "mail2")).code == 1
    assert (await fleet.run("suppress", "--remove", "p2@example.com")).out == (
        "p2@example.com is off the suppression list.\n"
    )
    gone = await fleet.run("suppress", "--remove", "p1@example.com")
    assert gone.sentences == ["p1@example.com is not on the suppression list."]
    assert gone.out.endswith("for progress; `outbox suppress --remove p1@example.com --report progress`.\n")
    assert (await fleet.run("retry", "mail2")).code == 0
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert fleet.sink.addresses["p2@example.com"] == 1
    assert fleet.twice == {}
    kept = await fleet.connection.fetch("SELECT what, target, why FROM outbox.operation WHERE what LIKE '%suppress'")
    assert [tuple(row) for row in kept] == [
        ("suppress", "p1@example.com --report progress", "she asked"),
        ("suppress", "p2@example.com", ""),
        ("unsuppress", "p2@example.com", ""),
    ]


async def test_one_process_at_a_time_reads_a_maildir_and_a_kill_in_the_middle_loses_none(fleet):
    await fleet.put_emails(30)
    rows = await fleet.connection.fetch(f"{ROWS} ORDER BY id")
    place = maildir(fleet, *(of_row(row, number=row["id"]) for row in rows))
    holder = await asyncpg.connect(fleet.database)
    await holder.execute("BEGIN")
    await holder.execute(  # whoever comes to the tenth waits for this transaction
        "INSERT INTO outbox.suppression (address, reason, who, why) VALUES ($1, 'decided', 'w', '')",
        rows[9]["recipient"],
    )
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND wait_event_type = 'Lock'"
    for kills in range(3):  # once more than a message may fail; a killed one's session waits on

        async def waits(kills=kills):
            return await fleet.connection.fetchval(query, "outbox bounce") == kills + 1

        killed = await fleet.start("bounce", str(place))
        await until(waits, "it has come to the tenth")
        other = await fleet.run("bounce", str(place))
        assert (other.code, other.err) == (0, "")
        assert other.out == f"{place} is being read by another process; nothing was done.\n"
        killed.send(signal.SIGKILL)
        await killed.ended()
        assert len(flags(place)) == 9
    await holder.execute("ROLLBACK")
    await holder.close()
    ends = [await fleet.run("bounce", str(place)) for _ in range(2)]
    assert [end.code for end in ends] == [0, 0], "waiting for Postgres is no fault of the message"
    assert len(await listed(fleet)) == 30
    assert [key for key, _ in await bounces(fleet)] == [row["key"] for row in rows]
    assert flags(place) == dict.fromkeys(range(30), "S")
    again = maildir(fleet, of_row(rows[0], number=rows[0]["id"]))
    assert "1 known already" in (await fleet.run("bounce", str(again))).out
    assert len(await bounces(fleet)) == 30


# Stops the process for good in the middle of the message that says so, as an endless loop of the parser would.
STUCK = """
import os, signal
from outbox.feedback import bounce_maildir
parse = bounce_maildir.parse_bounce
def parse_bounce(raw):
    if b"STUCK" in raw:
        open("stuck", "w").close()
        signal.pause()
    if b"RAISES" in raw:
        raise MemoryError("too much")
    return parse(raw)
bounce_maildir.parse_bounce = parse_bounce
from outbox.cli import app
app(prog_name="outbox")
"""


async def test_a_message_that_ends_the_process_twice_is_set_aside_and_the_others_are_read(fleet):
    await fleet.put_emails(3)
    rows = await fleet.connection.fetch(f"{ROWS} ORDER BY id")
    stuck = of_row(rows[1], number=2).replace(b"Subject:", b"X: STUCK\nSubject:")
    place = maildir(fleet, of_row(rows[0], number=1), stuck, of_row(rows[2], number=3))
    fleet.write_settings()
    for _ in range(2):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", STUCK, "bounce", str(place), cwd=fleet.directory,
            env={name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")},
        )  # fmt: skip
        await until((fleet.directory / "stuck").exists, "it reads the message")
        process.kill()
        await process.wait()
        (fleet.directory / "stuck").unlink()
        assert flags(place) == {0: "S"}
    ended = await fleet.run("bounce", str(place))
    assert ended.code == 1
    (sentence,) = ended.sentences
    assert sentence == "1700000000.M001.host: reading it failed 2 times; it is in cur, flagged: look at it."
    assert ended.out.endswith("2 messages were read: 1 bounced for good, 1 set aside.\n")
    assert flags(place) == {0: "S", 1: "F", 2: "S"}
    assert (await fleet.run("bounce", str(place))).code == 0


async def test_a_message_whose_reading_raises_is_tried_twice_and_set_aside(fleet):
    await fleet.put_emails(2)
    rows = await fleet.connection.fetch(f"{ROWS} ORDER BY id")
    place = maildir(
        fleet, of_row(rows[0], number=1).replace(b"Subject:", b"X: RAISES\nSubject:"), of_row(rows[1], number=2)
    )
    fleet.write_settings()
    for left in ({1: "S"}, {1: "S"}, {0: "F", 1: "S"}):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", STUCK, "bounce", str(place), cwd=fleet.directory,
            env={name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")},
        )  # fmt: skip
        assert await process.wait() == 1
        assert flags(place) == left


async def test_what_is_no_file_holds_up_no_bounce(fleet):
    await fleet.put_emails(1)
    (row,) = await fleet.connection.fetch(ROWS)
    place = maildir(fleet)
    os.mkfifo(place / "new/0.pipe")
    (place / "new/1.directory").mkdir()
    (place / "new/2.nobody").write_bytes(b"x")
    (place / "new/3.bounce").write_bytes(of_row(row))
    ended = await fleet.run("bounce", str(place))
    assert ended.code == 1
    assert "1 bounced for good" in ended.out
    assert await listed(fleet) == [("p1@example.com", "", "bounced")]


def files_open():
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_directories_among_the_messages_keep_no_file_open(tmp_path):
    for part in ("new", "cur"):
        (tmp_path / part).mkdir()
    for n in range(20):
        (tmp_path / f"new/{n}").mkdir()
    before = files_open()
    found = [one.outcome async for one in read_maildir(None, tmp_path, policy=Policy())]
    assert found == [Outcome.UNREADABLE] * 20
    assert files_open() == before


async def test_a_lock_that_is_no_file_is_one_sentence(fleet):
    place = maildir(fleet)
    os.mkfifo(place / "outbox-bounce.lock")
    ended = await fleet.run("bounce", str(place))
    assert ended.code == 2
    assert ended.sentences == [f"DIR: {place}/outbox-bounce.lock is not a file; remove it."]


async def test_a_lock_that_cannot_be_taken_is_one_sentence(fleet):
    place = maildir(fleet)
    (place / "outbox-bounce.lock").symlink_to(fleet.directory / "elsewhere")
    ended = await fleet.run("bounce", str(place))
    assert ended.code == 2
    assert ended.sentences[0].startswith(f"DIR: {place}/outbox-bounce.lock cannot be written (")
    assert not (fleet.directory / "elsewhere").exists()


async def test_hostile_messages_hold_up_no_bounce_behind_them(fleet):
    await fleet.put_emails(1)
    (row,) = await fleet.connection.fetch(ROWS)
    place = maildir(fleet, *(HOSTILE[name]() for name in HOSTILE), of_row(row))
    began = time.monotonic()
    await fleet.run("bounce", str(place))
    assert time.monotonic() - began < 15, "a start and a fraction of a second for each"
    assert await listed(fleet) == [("p1@example.com", "", "bounced")]
    assert not any((place / "new").iterdir())


PREDICTABLE = "<invoice-4711@example.com>"


async def test_a_message_id_that_can_be_guessed_proves_nothing_and_its_token_does(fleet):
    ids = [PREDICTABLE, "<{id}.deadbeef@example.com>", "<{id}.0123456789abcdef@example.com>", "<7.0123456789abcdef@x>"]
    for number, message_id in enumerate(ids):
        await fleet.connection.execute(
            "WITH m AS (INSERT INTO outbox.email (id, key, sender, recipient, message_id, message) SELECT n.id, $1,"
            " 'a@example.com', $2, replace($3, '{id}', n.id::text), '' FROM nextval('outbox.email_id_seq') AS n (id)"
            " RETURNING id) INSERT INTO outbox.delivery (email) SELECT id FROM m",
            f"own/{number}", f"own{number}@example.com", message_id,
        )  # fmt: skip
    rows = await fleet.connection.fetch(f"{ROWS} ORDER BY id")
    known = [
        postfix(recipient=row["recipient"], returned=f"Message-ID: {row['message_id']}", number=row["id"])
        for row in rows
    ]
    former = [
        postfix(recipient=row["recipient"], token=former_token_of(row["id"], row["message_id"]), number=100 + row["id"])
        for row in rows
    ]
    ended = await fleet.run("bounce", str(maildir(fleet, *known, *former)))
    assert ended.code == 1
    assert "6 not believed" in ended.out
    assert await listed(fleet) == [("own2@example.com", "", "bounced")], "this one nobody can guess"
    ended = await fleet.run("bounce", str(maildir(fleet, *(of_row(row, number=200 + row["id"]) for row in rows))))
    assert ended.code == 0
    assert [address for address, *_ in await listed(fleet)] == [row["recipient"] for row in rows]


async def test_a_token_of_a_former_key_is_valid_for_30_days_and_a_relay_signs_with_the_new_one_at_once(fleet):
    async with Sink(extensions=EXTENSIONS) as sink:
        fleet.smtp, fleet.top = sink.url, 'return_path = "bounces+{token}@example.com"'
        await fleet.put_emails(2)
        relay = await fleet.relay()
        await until(lambda: len(sink.accepted) == 2, "both are sent")
        ended = await fleet.run("init", "--rotate-bounce-key")
        assert ended.code == 0
        assert "A new key signs bounce tokens; tokens of the former one stay valid" in ended.out
        await fleet.put_emails(2, first=3)
        await until(lambda: len(sink.accepted) == 4, "all are sent")
        relay.send(signal.SIGTERM)
        assert (await relay.ended()).code == 0
    sent_with = {one.recipients[0]: tokens_in(one.sender)[0] for one in sink.accepted}
    assert [re.search("k([0-9]+)t", sent_with[f"p{n}@example.com"])[1] for n in (1, 2, 3, 4)] == ["1", "1", "2", "2"]

    def of(number):
        address = f"p{number}@example.com"
        return postfix(token=sent_with[address], recipient=address, number=number)

    assert (await fleet.run("bounce", str(maildir(fleet, of(1), of(3))))).code == 0
    await fleet.connection.execute(
        "UPDATE outbox.bounce_key SET retired_at = retired_at - interval '30 days' WHERE id = 1"
    )
    ended = await fleet.run("bounce", str(maildir(fleet, of(2), of(4))))
    assert "1 bounced for good, 1 not believed" in ended.out
    assert [address for address, *_ in await listed(fleet)] == ["p1@example.com", "p3@example.com", "p4@example.com"]
    assert (await fleet.run("init", "--rotate-bounce-key")).code == 0
    assert await fleet.connection.fetch("SELECT id FROM outbox.bounce_key ORDER BY 1") == [(2,), (3,)]


async def test_an_email_has_a_link_and_a_button_that_end_the_emails_and_a_preview_has_nobodys(fleet):
    fleet.report = 'unsubscribe = "https://reports.example.com/u/{token}"'
    await sent(fleet, people=1)
    mail = message_from_bytes(fleet.sink.accepted[0].message, policy=policy.default)
    token = await fleet.connection.fetchval("SELECT token FROM outbox.report")
    link = f"https://reports.example.com/u/{token}"
    assert mail["List-Unsubscribe"] == f"<{link}>"
    assert mail["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    for kind in ("plain", "html"):
        assert link in mail.get_body((kind,)).get_content()
    shown = json.loads((await fleet.run("preview", "progress", "--json")).out)
    assert "https://reports.example.com/u/PREVIEW" in shown["text"]
    assert token not in json.dumps(shown)
    assert await fleet.connection.fetchval("SELECT outbox.unsubscribe($1)", token) == "progress"
    await sent(fleet, NEXT, people=0)
    assert dict(fleet.sink.addresses) == {"p1@example.com": 1}
    assert await listed(fleet) == [("p1@example.com", "progress", "unsubscribed")]


async def test_a_digest_leaves_out_what_its_reader_has_unsubscribed_from(fleet):
    fleet.report = """deliver = "digest"
[reports.sales]
deliver = "digest"
recipients = "select id::text as key, email, name from people"
data = "select 1 as sold where :key <> ''"
link = "https://reports.example.com/r/{token}"
[digest]
link = "https://reports.example.com/d/{token}"
unsubscribe = "https://reports.example.com/u/{token}"
"""
    await fleet.hire(3)
    token = "SELECT r.token FROM outbox.report r JOIN outbox.edition e ON e.id = r.edition WHERE r.recipient_key = $1"
    assert (await fleet.run("generate", "--period", WEEK)).code == 0
    assert (
        await fleet.connection.fetchval(f"SELECT outbox.unsubscribe(({token} AND e.report = 'sales'))", "1")
    ) == "sales"
    for words in (("p2@example.com", "--report", "digest"), ("p3@example.com", "--report", "sales")):
        assert (await fleet.run("suppress", *words)).code == 0
    assert (await fleet.run("suppress", "p3@example.com", "--report", "progress")).code == 0
    ended = await fleet.run("digest", "--period", WEEK)
    assert ended.out == f"digest {WEEK}: 1 made here, 0 elsewhere, 0 failed, of 1 recipients.\n"
    assert (await fleet.run("relay", "--until-empty")).code == 0
    (kept,) = fleet.sink.accepted
    mail = message_from_bytes(kept.message, policy=policy.default)
    text = mail.get_body(("plain",)).get_content()
    assert (mail["To"].addresses[0].addr_spec, "Progress" in text, "Sales" in text) == ("p1@example.com", True, False)
    assert mail["List-Unsubscribe"].startswith("<https://reports.example.com/u/")
    for report, suppressed in (("progress", 2), ("sales", 3)):
        found = await fleet.run("audit", report, WEEK)
        assert (found.code, f"{suppressed} suppressed." in found.out) == (0, True), found.out

    async def complete():
        return not await fleet.connection.fetchval("SELECT count(*) FROM outbox.edition WHERE completed_at IS NULL")

    await until(complete, "all editions are complete")
    found = await fleet.connection.fetchval(
        f"SELECT outbox.unsubscribe(({token} AND e.report = 'digest'))", "p1@example.com"
    )
    assert found == "digest"
    assert (await fleet.run("generate", "--period", NEXT)).code == 0
    assert "of 0 recipients" in (await fleet.run("digest", "--period", NEXT)).out


async def test_under_redirect_to_nobody_is_suppressed_for_what_came_back_from_there(fleet):
    fleet.top = 'redirect_to = "staging@example.com"'
    await fleet.put_emails(1)
    ended = await piped(fleet, of_row(await row_of(fleet, "mail1")), "bounce")
    assert (ended.code, ended.out.endswith("p1@example.com is still written to.\n")) == (0, True)
    assert await listed(fleet) == []


@pytest.mark.parametrize(
    "words, code, sentence",
    [
        (("suppress", "nobody"), 2, "ADDRESS: 'nobody' is no email address"),
        (("suppress", "a@example.com", "--report", "progres"), 2, "reports.progres: is not configured"),
        (("suppress", "--import", "typo.csv"), 2, "reports.progres: is not configured"),
        (("suppress", "--remove"), 2, "--remove: name the address"),
        (("suppress", "--report", "progress"), 2, "--report: name the address"),
        (("suppress", "--import", "none.csv"), 2, "--import: none.csv cannot be read (No such file"),
        (("suppress", "--import", "x", "a@example.com"), 2, "--import: the file says who"),
        (("suppress", "a@example.com", "--json"), 2, "--json: is for the list"),
        (("bounce", "."), 2, "DIR: . is no Maildir, since it has no new; name one that is."),
        (("bounce",), 0, ""),
    ],
)
async def test_words_that_cannot_be_meant_are_one_sentence(fleet, words, code, sentence):
    (fleet.directory / "typo.csv").write_text("ann@example.com,progres\n")
    ended = await fleet.run(*words)
    assert ended.code == code
    assert "".join(ended.sentences).startswith(sentence), ended.err
    assert await listed(fleet) == []


async def test_a_message_that_comes_while_postgres_is_away_is_left_to_the_mail_server(fleet):
    fleet.database = "postgresql://nobody@127.0.0.1:1/none"
    ended = await piped(fleet, postfix(), "bounce")
    assert ended.code == 75
    assert len(ended.sentences) == 1


async def test_a_list_of_a_provider_is_imported_whole_and_only_once(fleet):
    (fleet.directory / "bounces.csv").write_text("email,reason\nann@example.com,Bounce\nBo@example.com,Bounce\n")
    for new in (2, 0):
        ended = await fleet.run("suppress", "--import", "bounces.csv")
        assert ended.out == f"{new} of 2 addresses are new on the suppression list.\n"
    assert await listed(fleet) == [("ann@example.com", "", "bounced"), ("bo@example.com", "", "bounced")]
