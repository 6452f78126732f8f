from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from outbox.relay.backoff import full_jitter_s

tries = st.integers(1, 40_000)
bases_s = st.floats(0.001, 3600)
ceilings_s = st.floats(0.001, 86_400)
dice = st.floats(0, 1, exclude_max=True)


@given(tries, bases_s, ceilings_s, dice)
def test_a_wait_lies_between_nothing_and_its_ceiling(n, base_s, max_s, uniform):
    wait_s = full_jitter_s(n, base_s=base_s, max_s=max_s, uniform=uniform)
    assert 0 <= wait_s <= max_s
    assert wait_s <= base_s * 2.0 ** min(n - 1, 100)


@given(tries, bases_s, ceilings_s)
def test_real_dice_keep_the_same_bounds(n, base_s, max_s):
    assert 0 <= full_jitter_s(n, base_s=base_s, max_s=max_s) <= max_s


@given(bases_s, ceilings_s, dice)
def test_a_later_try_never_waits_less_by_the_same_dice(base_s, max_s, uniform):
    waits_s = [full_jitter_s(n, base_s=base_s, max_s=max_s, uniform=uniform) for n in range(1, 40)]
    assert all(earlier <= later for earlier, later in pairwise(waits_s))


@given(dice)
def test_the_ceiling_doubles_with_each_try_until_the_greatest(uniform):
    waits_s = [full_jitter_s(n, base_s=30, max_s=200, uniform=uniform) for n in (1, 2, 3, 4, 5)]
    assert waits_s == [30 * uniform, 60 * uniform, 120 * uniform, 200 * uniform, 200 * uniform]


@given(st.integers(1, 12))
def test_two_servers_do_not_return_in_step(n):
    waits_s = {full_jitter_s(n, base_s=30, max_s=3600) for _ in range(20)}
    assert len(waits_s) == 20


def test_a_great_many_tries_overflow_nothing():
    assert full_jitter_s(10**9, base_s=30, max_s=3600, uniform=0.5) == 1800
