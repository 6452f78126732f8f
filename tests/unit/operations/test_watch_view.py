"""The screen of `outbox watch`, drawn from what was seen without a terminal."""

import io
import re
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from outbox.operations.attention import Concern, Kind
from outbox.operations.deferrals import Deferral
from outbox.operations.watch import EditionSeen, Look, Open, PauseSeen, Rates, RelaySeen, open_of
from outbox.operations.watch_view import DECIDED, FAILED, MISSING, SENT, WAITING, Frame, bar, draw, spoken_s

NOW = datetime(2026, 11, 23, 11, 4, 12, tzinfo=UTC)
NEW_YORK = ZoneInfo("America/New_York")
FRAME = Frame({"progress": NEW_YORK})


def shown(look, *, rates=None, frame=FRAME, width=180, **when):
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(draw(look, rates or Rates(), frame, **when))
    return out.getvalue()


def edition(expected=100, completed_at=None, **counts):
    return EditionSeen(1, "progress", "2026-W47", expected, completed_at, **counts)


def test_routes_are_shown_where_there_are_several_and_named_where_nobody_serves_them():
    one, two = (RelaySeen(n, "web1", 4711, 0, None, None, route) for n, route in ((3, ""), (4, "bulk")))
    assert "route" not in shown(Look(NOW, [one]))
    several = shown(Look(NOW, [one, two]))
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
    look = Look(
        NOW,
        [
            RelaySeen(3, "web1", 4711, 1203, "250 2.0.0 OK\x1b[2J", None),
            RelaySeen(4, "web2", 5, 0, None, "SMTP: 421 go"),
        ],
        [],
        [PauseSeen("progress", NOW - timedelta(hours=2), "alice", "bad data"), PauseSeen("", NOW, "bob", "")],
        [
            edition(made=80, sent=50, waiting=24, in_doubt=2, failed=3, cancelled=1, missing=4, waived=1, expected=100),
            EditionSeen(2, "weekly", "2026-W46", None, None),
            EditionSeen(3, "daily", "2026-11-23", 9, None, made=9, sent=2, in_doubt=0, failed=0, collected=6),
            edition(made=100, sent=100, in_doubt=0, failed=0, completed_at=NOW - timedelta(days=7)),
        ],
        ["progress/2026-W47/7"],
        Open(2797, NOW - timedelta(seconds=42), {3: 16}, 13, NOW + timedelta(minutes=1), 2, {"progress": 400}),
        {"sent": 12_345, "dead": 3, "expired": 1},
        NOW - timedelta(seconds=30),
        50,
        concerns=[
            Concern(Kind.IN_DOUBT, "", 2, "2 emails are in doubt: some may have arrived.", "see `outbox status`"),
            Concern(Kind.RELAY, "4", 0, "Relay 4 on web2 makes no progress: SMTP: 421 go\x1b.", "see its log"),
        ],
        deferrals=[Deferral(55, "451 4.3.5 Server configuration error (to RCPT)")],
    )
    rates = Rates()
    rates.note(0.0, {3: 1000})
    rates.note(10.0, {3: 1203, 4: 0})
    text = shown(look, rates=rates, frame=Frame({"progress": NEW_YORK}, "14/s", 50_000, "staging@example.com"))
    for words in (
        "2026-11-23 11:04:12 UTC",
        "REDIRECTED: every email goes to staging@example.com",
        "50 of 100 sent, 80 made, 24 waiting, 2 in doubt, 3 failed, 4 without a report, 1 cancelled, 1 waived",
        "? expected, not counted",
        "complete 2026-11-16 06:04:12 EST (11:04 UTC)",
        "progress is paused since 2026-11-23 04:04:12 EST (09:04 UTC) by alice: bad data",
        "Everything is paused since 2026-11-23 06:04:12 EST (11:04 UTC) by bob",
        "Needs a person: 2 emails are in doubt; a relay makes no progress.",
        "2 emails are in doubt: some may have arrived. Fix: see `outbox status`.",
        "Relay 4 on web2 makes no progress: SMTP: 421 go\N{REPLACEMENT CHARACTER}. Fix: see its log.",
        "55 deferred: 451 4.3.5 Server configuration error (to RCPT)",
        "2,797 due, the oldest for 42 s, the rate is 14/s; at 20/s about 2 min more",
        "13 put off, to be tried again, the next until 2026-11-23 06:05:12 EST (11:05 UTC)",
        "400 held back by the pause of progress",
        "In doubt (see `outbox show KEY`): progress/2026-W47/7",
        "daily_max: 50 of 50,000 in 24 hours",
        "12,345 sent, 3 dead, 1 expired (counted 30 s ago)",
    ):
        assert words in text, text
    (relay,) = [line.split() for line in text.splitlines() if "web1" in line]
    assert relay[:6] == ["3", "web1", "4711", "1,203", "20", "16"]
    assert "\x1b" not in text


def test_an_empty_fleet_an_outage_and_an_old_look_say_so():
    empty = shown(Look(NOW, open=Open()))
    assert "editions: none yet" in empty
    assert "Start `outbox relay`" in empty
    assert "nothing waits" in empty
    assert "Nothing needs a person." in empty
    outage = shown(Look(NOW, open=Open()), age_s=125, trouble="Postgres at db does not answer (refused);\nstart it.")
    assert "No answer: Postgres at db does not answer (refused)" in outage
    assert "What follows is 2 min old." in outage
    assert "No answer: lost" in shown(None, trouble="lost.")
    assert "Postgres is slow to answer; this is 6 s old." in shown(Look(NOW), age_s=6, waited_s=6)
    assert "slow" not in shown(Look(NOW), age_s=60), "nobody has asked since"


def test_a_rate_is_that_of_the_last_seconds_and_unknown_at_first():
    rates = Rates()
    rates.note(0.0, {1: 0})
    assert rates.per_s(1) is None
    for second in range(1, 31):
        rates.note(float(second), {1: 100 * min(second, 20)})
    assert rates.per_s(1) == 0.0
    assert rates.per_s(2) is None
    assert len(rates.seen) < 20


def test_rows_become_reasons_and_hands():
    rows = [
        {"why": "due", "relay": None, "paused": None, "n": 5, "first_at": NOW},
        {"why": "held", "relay": 3, "paused": None, "n": 2, "first_at": NOW},
        {"why": "sending", "relay": 3, "paused": None, "n": 1, "first_at": NOW},
        {"why": "paused", "relay": None, "paused": "progress", "n": 9, "first_at": None},
        {"why": "in_doubt", "relay": None, "paused": None, "n": 4, "first_at": None},
    ]
    assert open_of(rows) == Open(5, NOW, {3: 3}, 0, None, 4, {"progress": 9})


@pytest.mark.parametrize(
    ("seconds", "said"), [(-1, "0 s"), (59.6, "60 s"), (100, "2 min"), (3660, "1 h 1 min"), (7200, "2 h"), (2e5, "2 d")]
)
def test_a_while_is_said_in_a_few_words(seconds, said):
    assert spoken_s(seconds) == said
