"""The schedule of a fault run: all of it from the seed."""

import json
from collections import Counter

import pytest

from bench.faults.nemesis import FAULTS
from bench.faults.schedule import ON_A_SERVER, Strike, plan, storm

SHAPES = {name: fault.shape for name, fault in FAULTS.items()}


def planned(seed, **changes):
    arguments = {"seconds": 60.0, "servers": 6, "lease_s": 2.0, "every_s": 1.5, **changes}
    return plan(seed, list(FAULTS), SHAPES, **arguments)


def test_the_same_seed_gives_the_same_schedule_and_another_one_another():
    assert planned(7) == planned(7)
    assert planned(7) != planned(8)


def test_every_kind_comes_once_before_any_comes_again():
    numbered = sorted(planned(3), key=lambda strike: strike.number)
    assert set(Counter(strike.kind for strike in numbered[: len(FAULTS)]).values()) == {1}


@pytest.mark.parametrize("seed", range(20))
def test_no_two_faults_have_hold_of_the_same_thing_at_once(seed):
    held = {}
    for strike in planned(seed, servers=2, every_s=0.3):
        target = SHAPES[strike.kind].target
        what = (target, strike.host if target in ON_A_SERVER else 0)
        assert strike.at_s >= held.get(what, 0.0)
        held[what] = strike.at_s + strike.length_s


@pytest.mark.parametrize("seed", range(5))
def test_lengths_are_leases_and_all_begin_in_time(seed):
    for strike in planned(seed):
        shape = SHAPES[strike.kind]
        assert 2 * shape.least - 1e-3 <= strike.length_s <= 2 * shape.most + 1e-3
        assert 0 <= strike.at_s < 60
        assert 0 <= strike.host < 6


def test_a_storm_kills_as_often_as_it_is_told_to_and_spares_no_server():
    strikes = storm(1, 200, seconds=120, servers=6)
    assert len(strikes) == 200
    assert {strike.kind for strike in strikes} == {"kill"}
    assert min(Counter(strike.host for strike in strikes).values()) >= 33
    assert [strike.at_s for strike in strikes] == sorted(strike.at_s for strike in strikes)


def test_a_schedule_survives_being_written_down():
    strikes = planned(5)
    assert [Strike.of(json.loads(json.dumps({**strike.as_row(), "began_at": 1.0}))) for strike in strikes] == strikes
