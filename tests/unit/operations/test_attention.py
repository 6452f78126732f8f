from datetime import UTC, datetime

from outbox.operations.attention import Kind, choices_of, concerns_of, counts_of, headline
from outbox.operations.snapshot import (
    ATTENTION_MAX,
    Attention,
    FailingRoute,
    FailingSchedule,
    LivingRelay,
    Snapshot,
)

NOW = datetime(2026, 11, 23, 11, 4, 12, tzinfo=UTC)
RELAY = LivingRelay(1, "web1", 1, "1.0", NOW, 0, None, None, 0)


def test_a_quiet_fleet_needs_no_person():
    assert concerns_of(Snapshot(NOW, relays=[RELAY])) == []
    assert headline([]) == "Nothing needs a person."


def test_the_gravest_comes_first_and_each_is_counted_by_its_kind():
    seen = Snapshot(
        NOW,
        routes=[FailingRoute("mx:25", NOW, "mx:25: 421 go away", 3)],
        schedules=[FailingSchedule("progress", NOW, 2, NOW, "no recipients.")],
        attention=[Attention("missing", "progress", "2026-W47", 2), Attention("in_doubt", "", "", 1)],
    )
    found = concerns_of(seen)
    assert [one.kind for one in found] == [Kind.IN_DOUBT, Kind.MISSING, Kind.ROUTE, Kind.SCHEDULE]
    assert headline(found).startswith("Needs a person: 1 email is in doubt; 2 recipients have no report; the mail")
    counts = counts_of(found)
    assert (counts["missing"], counts["route"], counts["failed"]) == (2, 1, 0)
    assert set(counts) == set(map(str, Kind))


def test_an_email_that_is_due_needs_a_person_only_without_a_relay_and_after_a_while():
    assert concerns_of(Snapshot(NOW, oldest_due_s=60.0)) == []
    assert concerns_of(Snapshot(NOW, relays=[RELAY], oldest_due_s=600.0)) == []
    (one,) = concerns_of(Snapshot(NOW, oldest_due_s=61.0))
    assert (one.kind, one.sentence) == (Kind.NO_RELAY, "No relay is alive, and an email has been due for 61 s.")


def test_a_count_that_reached_its_limit_says_so():
    (one,) = concerns_of(Snapshot(NOW, attention=[Attention("failed", "", "", ATTENTION_MAX)]))
    assert one.title == "10,000+ emails failed"


def test_what_cannot_be_sent_again_is_not_offered():
    assert [one.name for one in choices_of("k", "dead")] == ["retry", "--discard"]
    assert [one.name for one in choices_of("k", "dead", is_gone=True)] == ["--discard"]
    assert [one.name for one in choices_of("k", "expired", is_of_report=False)] == ["retry"]
