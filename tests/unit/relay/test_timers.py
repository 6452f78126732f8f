"""Due times of a relay: nothing is looked for all the time, and nothing waits for longer than its law says."""

import pytest

from outbox.relay.timers import (
    EXPIRE_MAX_S,
    GATHER_MAX_S,
    POLL_FIRST_S,
    REPEAT_REST,
    STRANDED_FIRST_S,
    STRANDED_SOON_S,
    SWEEP_MAX_S,
    SWEEP_MIN_S,
    Outlook,
    Timers,
)

NOW = 1000.0
LEASE_S = 9.0


def timers(poll_max_s=5.0):
    """Timers without jitter (a factor of 1), right after a tick that took no time."""
    made = Timers(poll_max_s=poll_max_s, lease_s=LEASE_S, uniform=lambda: 0.5)
    made.restart(NOW)
    made.note_tick(NOW, NOW)
    return made


def look(made, now, **how):
    made.note_claims(now, **{"found": False, "has_more": False, "urgent_at": now} | how)


def pauses(made, looks, **how):
    """How long the relay waits after each of so many looks."""
    now, found = NOW, []
    for _ in range(looks):
        look(made, now, **how)
        made.note_tick(now, now)
        made.note_sweep(now, 1000)
        at = made.next_turn_at(Outlook(can_claim=True))
        found.append(round(at - now, 3))
        now = at
    return found


def test_a_new_session_claims_and_sweeps_at_once():
    made = timers()
    look(made, NOW)
    made.note_sweep(NOW, 1)
    assert not made.is_poll_due(NOW)
    made.restart(NOW)
    assert made.is_poll_due(NOW)
    assert made.is_sweep_due(NOW)


def test_looks_that_find_nothing_become_rare_but_not_rarer_than_a_third_of_a_lease():
    made = timers()
    assert pauses(made, 8) == [0.09, 0.18, 0.36, 0.72, 1.44, 2.7, 2.7, 2.7]


def test_the_setting_for_the_longest_pause_is_kept():
    assert max(pauses(timers(poll_max_s=1.0), 8)) == 0.9


def test_the_first_email_makes_the_pauses_short_again():
    made = timers()
    pauses(made, 6)
    assert pauses(made, 1, found=True) == [round(0.9 * POLL_FIRST_S, 3)]


def test_while_more_is_due_the_next_claim_is_due_at_once():
    made = timers()
    look(made, NOW, found=True, has_more=True)
    assert made.is_poll_due(NOW)


def test_an_urgent_email_behind_its_cursor_does_not_wait_for_the_longest_pause():
    made = timers()
    pauses(made, 6)
    look(made, NOW, urgent_at=NOW + 0.5)
    assert made.is_poll_due(NOW + 0.5)
    assert not made.is_poll_due(NOW + 0.4)


def test_an_idle_relay_ticks_three_times_in_a_lease():
    made = timers()
    made.note_sweep(NOW, 1000)
    assert made.next_turn_at(Outlook()) == NOW + LEASE_S / 3
    made.pulse_now()
    assert made.is_pulse_due(NOW)


def test_a_relay_without_room_does_not_wake_up_to_claim():
    made = timers()
    made.note_sweep(NOW, 1000)
    assert made.next_turn_at(Outlook(can_claim=True)) <= NOW
    assert made.next_turn_at(Outlook(can_claim=False)) > NOW


@pytest.mark.parametrize("which", ["starts_at", "resumes_at"])
def test_it_wakes_up_when_the_rate_or_the_breaker_lets_it(which):
    made = timers()
    made.note_sweep(NOW, 1000)
    assert made.next_turn_at(Outlook(**{which: NOW + 0.25})) == NOW + 0.25


def test_behind_the_barrier_it_looks_at_the_barrier_and_ticks_alone():
    made = timers()
    assert made.next_turn_at(Outlook(can_claim=True, starts_at=NOW, barrier_look_at=NOW + 0.2)) == NOW + 0.2
    assert made.next_turn_at(Outlook(barrier_look_at=NOW + 99)) == NOW + LEASE_S / 3


def test_while_it_drains_it_waits_for_nothing_but_the_end():
    made = timers()
    made.begin_drain(NOW, 2.0)
    assert made.is_stopping
    assert made.next_turn_at(Outlook(can_claim=True, starts_at=NOW)) == NOW + 2.0
    assert not made.is_drained(NOW + 2.0)
    assert made.is_drained(NOW + 2.1)


@pytest.mark.parametrize(("relays", "pause_s"), [(1, SWEEP_MIN_S), (10, 2.0), (1000, SWEEP_MAX_S)])
def test_the_fleet_sweeps_together_as_often_whatever_its_size(relays, pause_s):
    made = timers()
    made.note_sweep(NOW, relays)
    assert made.is_sweep_due(NOW + pause_s + 0.001)
    assert not made.is_sweep_due(NOW + pause_s - 0.001)


def test_the_fleet_looks_for_expired_emails_together_once_a_second():
    made = timers()
    for relays, pause_s in ((1, 1.0), (5, 5.0), (1000, EXPIRE_MAX_S)):
        made.note_expire(NOW, relays)
        assert made.is_expire_due(NOW + pause_s + 0.001)
        assert not made.is_expire_due(NOW + pause_s - 0.001)


def test_resuming_many_emails_leaves_most_of_the_time_to_other_work():
    made = timers()
    made.repeat_expire(NOW, 0.1)
    assert not made.is_sweep_due(NOW + REPEAT_REST * 0.1 - 0.001)
    assert made.is_expire_due(NOW + REPEAT_REST * 0.1 + 0.001)


def test_after_a_slow_tick_a_relay_rests_but_never_long():
    made = timers()
    made.note_tick(NOW, NOW + 0.004)
    assert made.rest_until == pytest.approx(NOW + 0.012)
    made.note_tick(NOW, NOW + 1.0)
    assert made.rest_until == pytest.approx(NOW + 1.0 + GATHER_MAX_S)


def test_stranded_rows_are_looked_for_late_and_then_rarely():
    made = timers()
    assert not made.is_stranded_due(NOW + STRANDED_FIRST_S - 1)
    assert made.is_stranded_due(NOW + STRANDED_FIRST_S)
    made.note_stranded(NOW + STRANDED_FIRST_S)
    assert not made.is_stranded_due(NOW + STRANDED_FIRST_S + 500)


def test_a_relay_that_waits_for_stranded_rows_alone_looks_for_them_once_a_second():
    """It reads all open rows, so each turn of the main loop would be too often."""
    made = timers()
    assert not made.is_stranded_due(NOW, soon=True)
    now = NOW + STRANDED_SOON_S
    assert made.is_stranded_due(now, soon=True)
    made.note_stranded(now, soon=True)
    assert not made.is_stranded_due(now + 0.5, soon=True)
    assert made.is_stranded_due(now + STRANDED_SOON_S, soon=True)
