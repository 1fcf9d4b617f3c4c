"""The guard of the benchmarks, on numbers that are given: which ratios fail, and what is said of the others."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import figures
from figures import Figure, Measured, compared, interleaved, measure_figures, read_baseline, row, summary

BASELINE = {"scoring / a plain pass": Measured(1.1, 1.05, 1.2), "answering / plain": Measured(2.0, 1.9, 2.1)}


def now(**ratios):
    """The baseline with other medians."""
    names = {"scoring": "scoring / a plain pass", "answering": "answering / plain"}
    return BASELINE | {names[name]: Measured(ratio, ratio, ratio) for name, ratio in ratios.items()}


def test_a_ratio_worse_by_more_than_a_tenth_beyond_the_spread_fails_and_names_itself():
    verdict = compared(now(scoring=1.33), BASELINE)
    assert not verdict.holds and verdict.better == ()
    assert str(verdict) == "worse: scoring / a plain pass, 1.1 before, 1.33 now"


@pytest.mark.parametrize("ratio", [1.31, 1.2, 1.1, 0.96])
def test_a_ratio_within_the_tolerance_passes(ratio):
    verdict = compared(now(scoring=ratio), BASELINE)
    assert verdict.holds and str(verdict) == "every figure is as it was"


def test_a_better_ratio_passes_and_is_said():
    verdict = compared(now(answering=1.5), BASELINE)
    assert verdict.holds and str(verdict) == "better: answering / plain, 2 before, 1.5 now"


def test_a_figure_that_is_no_longer_measured_fails_and_is_named():
    measured = {name: BASELINE[name] for name in list(BASELINE)[:1]}
    verdict = compared(measured, BASELINE)
    assert not verdict.holds and verdict.missing == ("answering / plain",)
    assert str(verdict) == "missing: answering / plain"


def test_a_new_figure_is_said_and_fails_nothing():
    verdict = compared(BASELINE | {"disk / copy": Measured(1.0, 1.0, 1.0)}, BASELINE)
    assert verdict.holds and str(verdict) == "not in the baseline: disk / copy"


def test_both_sides_run_in_turn_and_the_first_round_does_not_count():
    calls, clock = [], iter([100.0, 1.0, 6.0, 2.0, 8.0, 4.0])

    def seconds(run):
        run()
        return next(clock)

    found = interleaved(lambda: calls.append("ours"), lambda: calls.append("plain"), repeats=2, seconds=seconds)
    assert calls == ["ours", "plain"] * 3 and found == [3.0, 2.0]
    assert summary([2.0, 5.0, 3.0]) == Measured(3.0, 2.0, 5.0)


def test_a_line_has_the_ratio_its_limit_and_the_baseline():
    figure = Figure("scoring / a plain pass", limit=1.0, bound="the plain pass", ratios=list)
    said = row(figure, Measured(1.07, 1.01, 1.1), BASELINE[figure.name])
    assert said == "scoring / a plain pass: 1.07 [1.01, 1.1]; limit 1 (the plain pass); baseline 1.1 [1.05, 1.2]"
    assert row(figure, Measured(1.07, 1.01, 1.1), None).endswith("baseline none")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Results and baseline in a folder of their own, and a program over one figure whose ratio is given."""
    for name in ("LATEST", "BASELINE"):
        monkeypatch.setattr(figures, name, tmp_path / f"{name.lower()}.json")
    monkeypatch.setattr(figures, "_commit", lambda: "abc")
    monkeypatch.setattr(figures, "show_progress", lambda shown: None)
    return tmp_path


def test_the_program_exits_with_1_where_a_ratio_got_worse(files, monkeypatch, capsys):
    import bench

    ratio = [1.0]
    figure = Figure("ours / plain", limit=1.0, bound="plain", ratios=lambda: [ratio[0]] * 3)
    monkeypatch.setattr(bench, "FILES", {"scoring": lambda: [figure]})
    monkeypatch.setattr(bench, "BASELINE", files / "baseline.json")
    assert bench.main(write_baseline=True) == 0
    assert bench.main() == 0
    ratio[0] = 1.2
    assert bench.main() == 1
    assert "worse: ours / plain, 1 before, 1.2 now" in capsys.readouterr().out


def test_one_file_holds_the_results_with_commit_and_versions(files):
    for name, value in (("first", 1.23456), ("second", 2.0)):
        figure = Figure(name, limit=1.0, bound="plain", ratios=lambda value=value: [value])
        measure_figures([figure])
    kept = read_baseline(files / "latest.json")
    assert kept.figures == {"first": Measured(1.23, 1.23, 1.23), "second": Measured(2.0, 2.0, 2.0)}
    assert kept.commit == "abc" and {"torch", "transformer_lens", "python", "threads"} <= kept.versions.keys()


def test_the_committed_baseline_holds_ratios_alone():
    kept = json.loads((Path(figures.__file__).parent / "baseline.json").read_text())
    assert set(kept) == {"commit", "versions", "figures"} and len(kept["figures"]) > 5
    for name, each in kept["figures"].items():
        assert " / " in name and set(each) == {"ratio", "low", "high"}
        assert 0 < each["low"] <= each["ratio"] <= each["high"]
