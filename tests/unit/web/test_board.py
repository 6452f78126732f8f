"""What the board says and draws, from what was seen; and a message as a browser may see it."""

import asyncio
import time
from base64 import b64encode
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage

import pytest

from outbox.database.pause_list import Pause
from outbox.operations.email_counts import Waiting
from outbox.operations.route_rules import Unserved
from outbox.operations.snapshot import (
    Attention,
    Edition,
    EditionOutcome,
    FailingRoute,
    FailingSchedule,
    LivingRelay,
    Snapshot,
)
from outbox.settings import WebSettings
from outbox.web.board.auth import _token_of
from outbox.web.board.live import Seen
from outbox.web.board.message_view import PICTURES_MAX, has_remote_pictures, mail_of, read_mail
from outbox.web.board.overview import bar, verdict
from outbox.web.board.throughput import HEIGHT, WIDTH, Hour
from outbox.web.responses import TEXT_MAX, bigint, printable

NOW = datetime(2026, 11, 23, 11, 4, 12, tzinfo=UTC)
QUIET = Snapshot(NOW, waiting=Waiting())
RELAY = LivingRelay(1, "web1", 1, "1.0", NOW, 5, None, None, 0)


def counted(kind):
    return replace(QUIET, attention=[Attention(kind, "r", "p", 2)])


@pytest.mark.parametrize(
    "snapshot, level, title",
    [
        (QUIET, "good", "All is well"),
        (replace(QUIET, waiting=Waiting(due=3), relays=[RELAY]), "good", "Sending"),
        (replace(QUIET, waiting=Waiting(due=3)), "bad", "No relay is alive"),
        (counted("in_doubt"), "bad", "2 emails are in doubt"),
        (counted("failed"), "bad", "2 emails failed"),
        (counted("missing"), "bad", "2 recipients have no report"),
        (counted("unfinished"), "bad", "An edition is not finished"),
        (counted("empty"), "bad", "An edition has no recipients"),
        (replace(QUIET, routes=[FailingRoute("mx:25", NOW, "421", 1)]), "bad", "The mail server is in trouble"),
        (replace(QUIET, unserved=[Unserved("bulk", 3, NOW)]), "bad", "No relay serves a route"),
        (replace(QUIET, oldest_due_s=100.0), "bad", "No relay is alive"),
        (replace(QUIET, relays=[replace(RELAY, trouble="421")]), "bad", "A relay makes no progress"),
        (replace(QUIET, schedules=[FailingSchedule("r", NOW, 1, NOW, "x")]), "bad", "A schedule fails"),
        (replace(QUIET, waiting=None, attention=[Attention("in_doubt", "", "", 1)]), "bad", "1 email is in doubt"),
        (replace(QUIET, pauses=[Pause("", NOW, "ann", "why")]), "warn", "Paused"),
        (replace(QUIET, waiting=None), "soft", "Not counted"),
    ],
)
def test_red_is_only_what_needs_a_person(snapshot, level, title):
    found = verdict(Seen(snapshot, 0.0, None))
    assert (found.level, found.title) == (level, title)


def test_what_is_old_is_never_said_to_be_well():
    assert verdict(Seen(QUIET, 90.0, "Postgres is away")).level == "bad"
    assert verdict(Seen(None, 0.0, None)).level == "soft"


def test_a_bar_is_full_only_when_all_is_sent_and_shows_the_one_that_is_not():
    edition = Edition(1, "r", "p", 100_000, outcome=EditionOutcome(made=100_000, sent=99_999, failed=1))
    pieces = bar(edition)
    assert [kind for kind, _, _ in pieces] == ["sent", "failed"]
    assert pieces[-1][1] + pieces[-1][2] <= 100
    assert pieces[-1][2] > 0
    all_sent = EditionOutcome(made=100_000, sent=100_000)
    assert bar(replace(edition, outcome=all_sent)) == [("sent", 0.0, 100.0)]
    assert bar(Edition(1, "r", "p", None)) == []


def test_the_hour_counts_each_email_once_whoever_comes_and_goes():
    hour = Hour()
    before = int((NOW - timedelta(minutes=5)).timestamp() // 60)
    hour.begin([{"minute": before, "n": 7}], NOW)
    hour.note(NOW, {1: 100, 2: 50})
    hour.note(NOW + timedelta(seconds=10), {1: 110, 2: 50, 3: 4})  # a relay that began meanwhile
    hour.note(NOW + timedelta(minutes=1), {1: 110, 3: 9, 4: 0})  # one is seen no more
    hour.note(NOW + timedelta(minutes=2), {1: 111, 2: 60, 3: 9, 4: 0})  # ... and is again: nobody knows since when
    plot = hour.plot(NOW + timedelta(minutes=2))
    assert (plot.total, plot.most) == (7 + 10 + 4 + 5 + 1, 14)
    assert plot.latest == 5
    assert plot.line.startswith("0.0,")
    assert plot.line.endswith(f"{WIDTH:.1f},{HEIGHT - (HEIGHT - 6) / 14:.1f}")
    assert plot.begun_at == NOW
    assert 0 < plot.seen_from < WIDTH
    later = hour.plot(NOW + timedelta(hours=2))
    assert (later.total, later.begun_at) == (0, None)


def test_a_message_shows_the_pictures_that_came_with_it_and_names_those_that_did_not():
    message = EmailMessage()
    message["Subject"] = "s"
    message.set_content("the text")
    message.add_alternative(
        "<img src=\"cid:logo@x\"><img src='cid:none'><img src=https://evil.example/x.png>", subtype="html"
    )
    message.get_payload()[1].add_related(b"PNG", "image", "png", cid="<logo@x>")
    message.get_payload()[1].add_related(b"<script>", "text", "html", cid="<none>")
    mail = mail_of(message.as_bytes())
    assert mail.text == "the text\n"
    assert f'src="data:image/png;base64,{b64encode(b"PNG").decode()}"' in mail.html
    assert "src='cid:none'" in mail.html
    assert mail.is_remote
    assert not has_remote_pictures('<a href="https://example.com">x</a><img src="data:image/png;base64,AA==">')


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff\xfe\x00",
        b"Content-Type: text/html; charset=none-such\r\n\r\n<p>\xff",
        b"Content-Type: multipart/mixed; boundary=x\r\n\r\n--x\r\n",
        b"Content-Type: text/plain\r\nContent-Transfer-Encoding: base64\r\n\r\n====",
        b'Content-Type: text/html; charset="\0"\r\n\r\nx',
        b"Subject: =?utf-8?b?====?=\r\nContent-ID: <\r\n\r\nx",
    ],
)
def test_a_message_that_is_none_is_shown_as_far_as_it_goes(message):
    assert mail_of(message).notes == []


HOSTILE = {
    "semicolons": b"Content-Type: text/html" + b";" * 40_000 + b"\r\n\r\n<p>x",
    "parentheses": b"Content-Type: text/html " + b"(" * 2_000 + b"\r\n\r\n<p>x",
    "encoded words": b"Subject: " + b" ".join([b"=?utf-8?q?=C3=A9_?="] * 20_000) + b"\r\n\r\nx",
    "parts in parts": b"".join(
        b"Content-Type: multipart/mixed; boundary=%d\r\n\r\n--%d\r\n" % (n, n) for n in range(400)
    ),
    "blanks": b"Content-Type: text/html\r\n\r\n" + b"\r\n" * 1_000_000,
    "pictures": b"Content-Type: text/html\r\n\r\n" + b"<img src=cid:a>" * 200_000,
    "src": b"Content-Type: text/html\r\n\r\n" + b"src= " * 800_000,
    "cid": b"Content-Type: text/html\r\n\r\n" + b"cid:" * 500_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_message_is_read_in_a_moment(name):
    began_at = time.perf_counter()
    mail_of(HOSTILE[name])
    assert time.perf_counter() - began_at < 3


def test_a_page_shows_no_control_characters_and_cuts_what_would_fill_it():
    assert printable("a\x1b[2Jb\x00\x9b\tc\n") == "a\ufffd[2Jb\ufffd\ufffd\tc\n"
    assert len(printable("x" * 3_000_000)) == TEXT_MAX + 1
    assert printable(5) == 5


@pytest.mark.parametrize(
    "text, number",
    [
        ("0", 0), ("-1", -1), (str(2**63 - 1), 2**63 - 1), (str(-(2**63)), -(2**63)), (str(2**63), None), ("", None),
        (str(-(2**63) - 1), None), ("1" * 5000, None), ("²", None), ("+1", None), ("1_0", None), (" 1", None),
        ("\uff11", None),
    ],
)  # fmt: skip
def test_a_number_is_read_as_far_as_postgres_can_hold_it(text, number):
    assert bigint(text) == number


def test_blanks_without_end_in_a_page_are_read_in_a_moment():
    began_at = time.perf_counter()
    assert not has_remote_pictures("<p>src=" + " " * 50_000 + "<p>url(" + "\n" * 50_000)
    assert has_remote_pictures("<img src = '  //x.example/a.png'>")
    assert time.perf_counter() - began_at < 0.25


def test_a_picture_that_is_named_many_times_does_not_make_a_page_without_end():
    message = EmailMessage()
    message.set_content("<img src=cid:icon>" * 300, subtype="html")
    message.add_related(b"x" * 200_000, "image", "png", cid="<icon>")
    html = mail_of(message.as_bytes()).html
    assert html.startswith("<img src=data:image/png;base64,")
    assert html.endswith("<img src=cid:icon>\n")
    assert len(html) < PICTURES_MAX * 1.5


async def test_the_event_loop_goes_on_while_a_message_is_read():
    raw = b"Content-Type: multipart/mixed; boundary=b\n\n" + b"--b\n\nx\n" * 100_000
    reading = [asyncio.ensure_future(read_mail(raw)) for _ in range(4)]
    turns = 0
    while not all(one.done() for one in reading):
        await asyncio.sleep(0)
        turns += 1
    assert all(one.result().notes for one in reading)
    assert turns > 20, "read on the loop they would take one turn each"


def test_a_byte_order_mark_is_no_part_of_the_token(tmp_path):
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbf" + b"x" * 32 + b"\r\n")
    assert _token_of(WebSettings(board_token_file=str(tmp_path / "token"))) == "x" * 32
