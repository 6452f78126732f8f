"""The table of targets: it tells of runs that came to their end, and of no other."""

import json

import pytest
import typer

from bench.__main__ import NO_BENCHMARKS, app
from bench.harness import run_all as everything
from bench.harness.figures import Target
from bench.harness.run_all import QUICK, Benchmark, run_all


def keep(directory, name, *targets):
    (directory / f"{name}.json").write_text(json.dumps({"targets": [one.as_row() for one in targets]}))


def test_results_of_an_earlier_run_are_not_taken_for_those_of_one_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "RESULTS", tmp_path)
    kept = Target("wait", 1.0, 2.0, "s")
    keep(tmp_path, "latency", kept)
    assert list(Benchmark("latency", (), done=True).targets()) == [kept]
    assert list(Benchmark("latency", (), done=False).targets()) == []


def test_all_is_well_only_if_all_ran_and_kept_what_they_promise(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(everything, "RESULTS", tmp_path)
    keep(tmp_path, "good", Target("wait", 1.0, 2.0, "s"))
    keep(tmp_path, "bad", Target("share", 0.5, 0.9, "", at_least=True))
    monkeypatch.setattr(everything, "_run", lambda name, arguments: Benchmark(name, arguments, name != "broken"))
    assert run_all(["good"], runs=3, quick=False)
    assert "scripts/bench good --runs 3" in capsys.readouterr().out
    assert not run_all(["good", "bad"], runs=None, quick=False)
    assert not run_all(["good", "broken"], runs=None, quick=False)


def options_of(name):
    command = typer.main.get_command(app).commands[name]
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("name", [*QUICK, "plots"])
@pytest.mark.parametrize("how", [{"runs": 3, "quick": False}, {"runs": None, "quick": True}], ids=["runs", "quick"])
def test_every_benchmark_has_the_options_that_it_is_run_with(name, how):
    assert {word for word in everything._arguments(name, **how) if word.startswith("--")} <= options_of(name)


def test_every_benchmark_has_a_quick_way():
    assert set(QUICK) == set(typer.main.get_command(app).commands) - set(NO_BENCHMARKS)
