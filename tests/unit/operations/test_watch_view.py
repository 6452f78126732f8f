"""The screen of `outbox watch`, drawn from what was seen without a terminal."""

import io
import re
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from outbox.database.pause_list import Pause
from outbox.operations.deferrals import Deferral
from outbox.operations.email_counts import Waiting
from outbox.operations.snapshot import (
    Attention,
    Edition,
    EditionOutcome,
    LivingRelay,
    Snapshot,
)
from outbox.operations.watch import Rates
from outbox.operations.watch_view import DECIDED, FAILED, MISSING, SENT, WAITING, bar, draw
from outbox.operations.wording import Frame

NOW = datetime(2026, 11, 23, 11, 4, 12, tzinfo=UTC)
NEW_YORK = ZoneInfo("America/New_York")
FRAME = Frame({"progress": NEW_YORK})


def shown(snapshot, *, rates=None, frame=FRAME, width=180, **when):
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(draw(snapshot, rates or Rates(), frame, **when))
    return out.getvalue()


def edition(expected=100, completed_at=None, **counts):
    return Edition(1, "progress", "2026-W47", expected, completed_at, outcome=EditionOutcome(**counts))


def relay(number, host="web1", pid=4711, *, sent=0, last_reply=None, trouble=None, route=""):
    return LivingRelay(number, host, pid, "1.0", NOW, sent, last_reply, trouble, 0, route)


def test_routes_are_shown_where_there_are_several_and_named_where_nobody_serves_them():
    one, two = (relay(n, route=route) for n, route in ((3, ""), (4, "bulk")))
    assert "route" not in shown(Snapshot(NOW, [one]))
    several = shown(Snapshot(NOW, [one, two]))
    assert re.search(r"relay +route +host[^\n]*\n +3 +usual +web1[^\n]*\n +4 +bulk +web1", several)


@given(
    st.integers(0, 400), st.integers(0, 300), st.integers(0, 300), st.integers(0, 30), st.integers(0, 30),
    st.integers(1, 60),
)  # fmt: skip
def test_a_bar_is_full_only_of_what_is_sent_and_shows_every_failure(expected, sent, waiting, failed, waived, width):
    seen = edition(
        expected=expected, made=sent + waiting + failed, sent=sent, waiting=waiting, failed=failed, waived=waived
    )
    drawn = bar(seen, width).plain
    assert len(drawn) == width
    assert (drawn == SENT * width) == (0 < sent >= expected and not waiting and not failed and not waived)
    assert (FAILED in drawn) == (failed > 0)
    assert (drawn != MISSING * width) or sent + waiting + waived == failed == 0 or sent + waiting + waived < expected


def test_a_bar_shows_what_is_decided_apart_from_what_failed():
    seen = edition(made=9, expected=12, sent=3, waiting=1, failed=2, cancelled=1, suppressed=2, waived=2)
    assert bar(seen, 12).plain == SENT * 3 + FAILED * 2 + DECIDED * 5 + WAITING + MISSING


def test_everything_that_waits_is_shown_with_its_reason_and_times_in_the_reports_zone():
    snapshot = Snapshot(
        NOW,
        relays=[
            relay(3, sent=1203, last_reply="250 2.0.0 OK\x1b[2J"),
            relay(4, "web2", 5, trouble="SMTP: 421 go\x1b"),
        ],
        pauses=[
            Pause("progress", NOW - timedelta(hours=2), "alice", "bad data"),
            Pause("", NOW, "bob", ""),
        ],
        editions=[
            edition(made=80, sent=50, waiting=24, in_doubt=2, failed=3, cancelled=1, missing=4, waived=1, expected=100),
            Edition(2, "weekly", "2026-W46", None),
            Edition(3, "daily", "2026-11-23", 9, outcome=EditionOutcome(made=9, sent=2, collected=6)),
            edition(made=100, sent=100, completed_at=NOW - timedelta(days=7)),
        ],
        attention=[Attention("in_doubt", "", "", 2)],
        in_doubt=["progress/2026-W47/7"],
        waiting=Waiting(
            2797, NOW - timedelta(seconds=42), {3: 16}, 13, NOW + timedelta(minutes=1), 2, {"progress": 400}
        ),
        deferrals=[Deferral(55, "451 4.3.5 Server configuration error (to RCPT)")],
        settled={"sent": 12_345, "dead": 3, "expired": 1},
        settled_at=NOW - timedelta(seconds=30),
        given_today=50,
    )
    rates = Rates()
    rates.note(0.0, {3: 1000})
    rates.note(10.0, {3: 1203, 4: 0})
    text = shown(snapshot, rates=rates, frame=Frame({"progress": NEW_YORK}, "14/s", 50_000, "staging@example.com"))
    for words in (
        "2026-11-23 11:04:12 UTC",
        "REDIRECTED: every email goes to staging@example.com",
        "50 of 100 sent, 80 made, 24 waiting, 2 in doubt, 3 failed, 4 without a report, 1 cancelled, 1 waived",
        "? expected, not counted",
        "complete 2026-11-16 06:04:12 EST (11:04 UTC)",
        "progress is paused since 2026-11-23 04:04:12 EST (09:04 UTC) by alice: bad data",
        "Everything is paused since 2026-11-23 06:04:12 EST (11:04 UTC) by bob",
        "Needs a person: 2 emails are in doubt; a relay makes no progress.",
        "2 emails are in doubt: some of them may have arrived. Fix: `outbox list --state in_doubt` lists all",
        "Relay 4 on web2 makes no progress: SMTP: 421 go\N{REPLACEMENT CHARACTER}. Fix: correct that; its log",
        "55 deferred: 451 4.3.5 Server configuration error (to RCPT)",
        "2,797 due, the oldest for 42 s, the rate is 14/s; at 20/s about 2 min more",
        "13 put off, to be tried again, the next until 2026-11-23 06:05:12 EST (11:05 UTC)",
        "400 held back by the pause of progress",
        "In doubt (see `outbox show KEY`): progress/2026-W47/7",
        "daily_max: 50 of 50,000 in 24 hours",
        "12,345 sent, 3 dead, 1 expired (counted 30 s ago)",
    ):
        assert words in text, text
    (row,) = [line.split() for line in text.splitlines() if "web1" in line]
    assert row[:6] == ["3", "web1", "4711", "1,203", "20", "16"]
    assert "\x1b" not in text


def test_an_empty_fleet_an_outage_and_an_old_look_say_so():
    empty = shown(Snapshot(NOW, waiting=Waiting()))
    assert "editions: none yet" in empty
    assert "Start `outbox relay`" in empty
    assert "nothing waits" in empty
    assert "Nothing needs a person." in empty
    outage = shown(
        Snapshot(NOW, waiting=Waiting()), age_s=125, trouble="Postgres at db does not answer (refused);\nstart it."
    )
    assert "No answer: Postgres at db does not answer (refused)" in outage
    assert "What follows is 2 min old." in outage
    assert "No answer: lost" in shown(None, trouble="lost.")
    assert "Postgres is slow to answer; this is 6 s old." in shown(Snapshot(NOW), age_s=6, waited_s=6)
    assert "slow" not in shown(Snapshot(NOW), age_s=60), "nobody has asked since"
