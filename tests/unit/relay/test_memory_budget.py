"""Shares of a process's relays in the memory budget for large messages."""

from outbox.relay.memory_budget import IN_FLIGHT_BYTES, Budget


class Holder:
    """A relay, as far as a budget knows it."""

    def __init__(self, budget):
        self.bytes = 0
        self.woken = 0
        self.share = budget.share(lambda: self.bytes, self.wake)

    def wake(self):
        self.woken += 1


def test_a_budget_has_room_for_the_largest_message():
    assert Budget.of(1000).bytes_max == IN_FLIGHT_BYTES
    assert Budget.of(10 * IN_FLIGHT_BYTES).bytes_max == 10 * IN_FLIGHT_BYTES


def test_one_relay_may_have_all_that_is_not_in_hand():
    one = Holder(Budget(100))
    assert one.share.ask() == 100
    one.share.asked, one.bytes = 0, 70
    assert one.share.ask() == 30
    one.share.asked, one.bytes = 0, 130
    assert one.share.ask() == 0


def test_several_ask_for_an_equal_part_each_so_that_a_slow_one_keeps_no_other_waiting():
    budget = Budget(100)
    one, other = Holder(budget), Holder(budget)
    assert one.share.ask() == 50
    assert other.share.ask() == 25
    assert one.share.left() + one.share.asked == 100 - 25


def test_who_needs_more_for_its_next_email_gets_it_in_the_order_of_waiting():
    budget = Budget(100)
    one, other = Holder(budget), Holder(budget)
    other.bytes = 60
    one.share.note_wanted(80, 1.0)
    assert not one.share.has_enough_now
    assert other.share.ask() == 0, "what it lets go of is for the one that waits"
    other.share.note_wanted(30, 2.0)
    assert not other.share.has_enough_now
    other.bytes = 10
    other.share.wake_others()
    assert one.woken == 1
    assert one.share.has_enough_now
    assert one.share.ask() == 80
    one.share.asked, one.bytes = 0, 80
    one.share.note_wanted(0, 3.0)
    assert not other.share.has_enough_now
    one.bytes = 0
    assert other.share.has_enough_now


def test_who_waits_keeps_its_place():
    budget = Budget(100)
    one, other = Holder(budget), Holder(budget)
    one.share.note_wanted(80, 1.0)
    other.share.note_wanted(80, 2.0)
    one.share.note_wanted(90, 3.0)
    assert one.share.has_enough_now
    assert not other.share.has_enough_now
