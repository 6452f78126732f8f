"""The page of the benchmarks: what is measured is drawn, what is not is left out."""

import json

import pytest

from bench.harness.figures import Spread, Target
from bench.harness.plots import Bar, Bars, Line, Lines, panels
from bench.harness.svg import draw

RATES = {"found": {"outbox relay": [{"per_s": 3.0}, {"per_s": 1.0}, {"per_s": 2.0}], "other": [{"per_s": 9.0}]}}


def keep(directory, **results):
    for name, result in results.items():
        (directory / f"{name}.json").write_text(json.dumps(result))
    return directory


def test_without_results_there_are_no_panels(tmp_path):
    assert panels(tmp_path) == []


def test_a_result_that_is_missing_or_of_another_shape_is_left_out(tmp_path):
    results = keep(tmp_path, relay=RATES, growth={"found": [1, 2]}, peers={"found": {"who": []}}, takeover={})
    assert [panel.title for panel in panels(results)] == ["One relay process, 2 KB emails"]


def test_bars_have_the_median_and_the_spread_and_others_are_told_apart(tmp_path):
    (panel,) = panels(keep(tmp_path, peers=RATES))
    assert panel.bars == [Bar("outbox relay", Spread(2.0, 1.0, 3.0)), Bar("other", Spread(9.0, 9.0, 9.0), ours=False)]


def test_a_commands_target_is_so_many_times_its_own_baseline(tmp_path):
    startup = {
        "found": {
            "outbox --help": [{"wall_s": 0.2}],
            "import typer": [{"wall_s": 0.1}],
            "outbox generate": [{"wall_s": 0.9}],
            "import all": [{"wall_s": 0.5}],
        },
        "targets": [
            Target("outbox --help: wall time", 2.0, 1.3, "times").as_row(),
            Target("outbox generate: wall time", 1.8, 1.5, "times").as_row(),
        ],
    }
    (panel,) = panels(keep(tmp_path, startup=startup))
    assert [bar.target for bar in panel.bars] == [pytest.approx(130.0), None, pytest.approx(750.0), None]


def test_a_target_is_met_on_its_own_side_of_the_limit():
    assert Target("share", 0.9, 0.9, "", at_least=True).met
    assert not Target("share", 0.89, 0.9, "", at_least=True).met
    assert Target("wait", 1.0, 1.0, "s").met
    assert not Target("wait", 1.1, 1.0, "s").met
    assert Target.of(Target("wait", 1.1, 1.0, "s").as_row()) == Target("wait", 1.1, 1.0, "s")


def test_the_same_panels_give_the_same_bytes(tmp_path):
    some = [
        Bars("bars", "ms", [Bar("a", Spread(2.0, 1.0, 3.0), target=2.5), Bar("b", Spread(200.0, 200.0, 200.0))]),
        Lines("lines", "connections", [Line("a", [(0.0, 1.0), (0.5, 2.0), (1.0, 0.0)])]),
    ]
    for name in ("one", "two"):
        draw(some, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert b"dc:date" not in (tmp_path / "one").read_bytes()
