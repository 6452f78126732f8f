"""A notification makes a relay claim at once; during a pause it also asks if the pause is over."""

from outbox.relay.claim_trigger import ClaimTrigger
from outbox.relay.timers import Outlook, Timers

FAR = 1e9


def rested():
    """Timers of a relay that has nothing to do for a long time."""
    timers = Timers(poll_max_s=FAR, lease_s=3 * FAR)
    timers.note_tick(0.0, 0.0)
    timers.note_sweep(FAR, 1)
    timers.note_claims(FAR, found=False, has_more=False, urgent_at=0.0)
    assert timers.next_turn_at(Outlook(can_claim=True)) >= FAR
    return timers


def trigger(timers, *, is_blocked=False):
    wakes = []
    return ClaimTrigger(timers, lambda: wakes.append(1), is_blocked=lambda: is_blocked), wakes


async def test_a_notification_makes_a_claim_due_and_wakes_the_main_loop():
    timers = rested()
    one, wakes = trigger(timers)
    one.on_notification()
    assert timers.is_poll_due(0.0)
    assert not timers.is_pulse_due(0.0)
    assert wakes == [1]


async def test_while_the_route_or_the_fleet_is_paused_a_notification_leads_to_a_tick():
    timers = rested()
    one, _ = trigger(timers, is_blocked=True)
    one.on_notification()
    assert timers.is_pulse_due(0.0)
