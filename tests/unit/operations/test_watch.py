from outbox.operations.watch import Rates


def test_a_rate_is_that_of_the_last_seconds_and_unknown_at_first():
    rates = Rates()
    rates.note(0.0, {1: 0})
    assert rates.per_s(1) is None
    for second in range(1, 31):
        rates.note(float(second), {1: 100 * min(second, 20)})
    assert rates.per_s(1) == 0.0
    assert rates.per_s(2) is None
    assert len(rates.seen) < 20


def test_the_speed_of_the_fleet_is_that_of_the_relays_alive_at_the_last_look():
    rates = Rates()
    assert rates.total_per_s() == 0.0
    rates.note(0.0, {1: 0, 2: 0})
    rates.note(1.0, {1: 10, 3: 0})
    assert rates.total_per_s() == 10.0
