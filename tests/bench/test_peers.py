import pytest

from bench.harness.environment import Line
from bench.peers.entrants import PEERS, entrants
from bench.peers.result import result_of
from bench.peers.venv import HOUSE, versions


def lines(*addresses, every_s=0.1):
    return [Line(1000 + number * every_s, 1, address, "") for number, address in enumerate(addresses)]


def test_the_rate_is_of_people_from_the_first_acceptance_to_the_last():
    assert result_of(lines("a", "b", "c", "d", "e"), 5, []).per_s == pytest.approx(5 / 0.4)


def test_a_second_mail_to_somebody_counts_as_too_many_and_not_for_the_rate():
    result = result_of(lines("a", "a", "a", "b", "c"), 3, [])
    assert (result.too_many, result.lost) == (2, 0)
    assert result.per_s == pytest.approx(3 / 0.4)


def test_whoever_has_no_mail_is_lost_though_another_has_two():
    result = result_of(lines("a", "a"), 2, [])
    assert (result.too_many, result.lost) == (1, 1)


def test_a_run_in_which_nothing_came_has_lost_all():
    result = result_of([], 7, [1])
    assert (result.per_s, result.middle_per_s, result.lost, result.bad_exits) == (0, 0, 7, [1])


def test_every_entrant_has_a_module_and_every_requirement_is_pinned():
    pinned = {name.lower() for name in versions()}
    for peer in PEERS:
        assert (HOUSE / "bench" / "peers" / f"{peer.module}.py").is_file()
        assert {requirement.partition("[")[0].lower().replace("_", "-") for requirement in peer.requirements} <= pinned
    assert len({entrant.title for entrant in entrants(list(PEERS))}) == 2 * len(PEERS) - 4
