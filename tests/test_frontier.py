"""The comparison of arms: a planted ranking is recovered, pieces resume and are shared, curves have known answers."""

import contextlib
import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from page_figures import figures_of
from planted_gates import planted_settings

from dean_interp import Behaviour, Example, InputError, load_behaviour
from dean_interp.arms import frontier as frontier_results
from dean_interp.arms import measured_arms, pieces
from dean_interp.arms.arm import Change
from dean_interp.arms.at_kl import dose_at_kl
from dean_interp.arms.choosing_settings import best_of, tried_settings
from dean_interp.arms.comparison import RECORD, ComparisonConfig
from dean_interp.arms.frontier_curves import MarginChanges, area_under, mean_under_curve, smaller_rises
from dean_interp.arms.gate_arms import CLOSED_FORM
from dean_interp.arms.pieces import _piece
from dean_interp.errors import NothingToChangeError
from dean_interp.models.load import tokenizer_of
from dean_interp.statistics import Interval
from dean_interp.study.run_folder import locked
from dean_interp.study.store import State, file_name

sys.path.insert(0, str(Path(__file__).parents[1] / "analyses"))


@pytest.fixture(scope="module")
def config(tokenizer, tmp_path_factory):
    """Both behaviours are real: the right edit silences the neuron that hurts both, and opens the one that helps."""
    study = planted_settings(tmp_path_factory.mktemp("planted_frontier"), tokenizer, n_flips=2, n_random=1)
    return ComparisonConfig(study=study)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The quick form of the comparison, and where it is."""
    import frontier

    folder = tmp_path_factory.mktemp("frontier")
    rows = [{"prompt": f"new f{i}?", "topic": str(i), "safe": "fY", "unsafe": "fN", "split": "test"} for i in range(6)]
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    also = (str(folder / "other.jsonl"),)
    given = frontier.FrontierRun(out=folder / "run", quick=True, also=also, comparison=config)
    return given, frontier.run(given)


@pytest.mark.slow
def test_quick_comparison_recovers_the_planted_ranking(finished):
    import frontier

    given, found = finished
    assert not found.missing
    at = {arm.name: arm.point(found.chosen_at) for arm in found.arms}
    # Gates know which neuron hurts both and which helps both.
    for name in ("gates, closed form", "gates, iterated", "silencing by sign"):
        assert at[name].raises_both, name
    rise = {name: point.smaller.mean for name, point in at.items() if point}
    assert rise["gates, closed form"] > rise["random gates 1"] + 0.1
    # The paper's rule also silences what helps.
    assert rise["paper's rule, neurons"] < 0
    # A byte depends on the one before it alone: here no text has a system turn, and a prompt is left out with a reason.
    assert at["system prompt, short"] is None
    assert "template" in found["system prompt, short"].record.left_out
    assert (given.out / "table.md").is_file()
    (figure,) = figures_of((given.out / "report.html").read_text())
    for arm in found.arms:
        shown = figure.numbers("mean_nats_per_token", arm=arm.name, what="smaller rise")
        assert shown == [point.smaller.mean for point in arm.points]
    assert (given.out / "frontier.svg").is_file() and (given.out / "frontier.csv").is_file()
    # What was chosen on some prompts raises the margin on another hand's.
    (further,) = found["gates, closed form"].further
    assert further.on == "other" and further.change.low > 0
    missed = [name for name, point in at.items() if point and not point.is_reached]
    shown = [line.split(" | ")[0].removeprefix("| ") for line in (given.out / "table.md").read_text().splitlines()
             if "(missed)" in line]  # fmt: skip
    assert shown == missed
    # Nothing is left to do, and the second call finds the same.
    again = frontier.run(given)
    assert again.to_pandas().equals(found.to_pandas())


@pytest.mark.slow
def test_mutual_information_is_estimated_at_the_doses_of_a_comparison(finished, tmp_path):
    import frontier_information

    comparison, _ = finished
    arms = ("gates, closed form", "paper's rule, neurons")
    given = frontier_information.FrontierInformation(
        frontier=comparison.out, out=tmp_path / "information", arms=arms, n_nulls=2
    )
    information = frontier_information.run(given)
    assert tuple(information) == arms
    for of_arm in information.values():
        assert [each.estimand for each in of_arm] == ["downstream_mi", "awareness_mi"]
        assert all(len(shift.control_changes) == 2 for each in of_arm for shift in each.shifts)
    with pytest.raises(InputError, match="no finished arm 'steering 2'"):
        frontier_information.run(dataclasses.replace(given, arms=("steering 2",)))
    with pytest.raises(InputError, match=r"no run in .*config\.json is missing"):
        frontier_information.run(dataclasses.replace(given, frontier=tmp_path))


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """A change whose KL is its dose squared, up to a largest dose."""

    largest_dose: float
    first_dose: float = 0.3
    n_bytes: int = 0

    def at(self, dose: float) -> State:
        return State("", "arm", growth=dose)


def squared(state: State) -> Interval:
    return Interval(state.growth**2, 0.0, 0.0, 2)


def test_the_dose_at_a_kl_is_found_by_measuring():
    change = Quadratic(largest_dose=100.0)
    assert isinstance(change, Change)
    for kl in (1e-4, 0.02, 0.05, 3.0):
        found = dose_at_kl(change, squared, kl=kl)
        assert found.is_reached and kl <= found.kl.mean <= 1.1 * kl and found.kl.mean == found.dose**2


def test_a_change_that_ends_before_the_kl_is_followed_to_its_end():
    found = dose_at_kl(Quadratic(largest_dose=0.1, first_dose=0.1), squared, kl=0.05)
    assert found.dose == 0.1 and not found.is_reached and found.kl.mean == pytest.approx(0.01)


def test_a_dose_that_breaks_the_model_is_never_chosen():
    def meter(state: State) -> Interval:
        return Interval(float("nan") if state.growth > 0.1 else 0.0, 0.0, 0.0, 2)

    found = dose_at_kl(Quadratic(largest_dose=10.0), meter, kl=0.05)
    assert found.dose <= 0.1 and not found.is_reached and not np.isnan(found.kl.mean)


def test_every_point_of_a_small_grid_is_tried_once_and_kept(tmp_path):
    tried = []

    def value_of(settings):
        tried.append(tuple(settings.values()))
        if settings == {"ridge": 1.0, "cost": "alone"}:
            raise InputError("no edit")
        return settings["ridge"]

    trials = tried_settings(CLOSED_FORM, 4, tmp_path / "trials.log", value_of, seed=0)
    assert sorted(tried) == sorted([(0.1, "together"), (0.1, "alone"), (1.0, "together"), (1.0, "alone")])
    assert best_of(trials).settings == {"ridge": 1.0, "cost": "together"}
    assert [trial.fault for trial in trials if trial.value is None] == ["no edit"]
    assert tried_settings(CLOSED_FORM, 4, tmp_path / "trials.log", value_of, seed=0) == trials
    assert len(tried) == 4


def test_a_killed_search_makes_the_trial_again_that_was_cut_off(tmp_path):
    tried = []

    def killed(settings):
        tried.append(settings)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        tried_settings(CLOSED_FORM, 4, tmp_path / "trials.log", killed, seed=0)
    trials = tried_settings(CLOSED_FORM, 4, tmp_path / "trials.log", killed, seed=0)
    assert len(trials) == 4 and len(tried) == 5
    points = {(trial.settings["ridge"], trial.settings["cost"]) for trial in trials}
    assert len(points) == 4


def test_a_larger_space_is_sampled_with_as_many_trials_as_every_arm_has(tmp_path):
    wide = dataclasses.replace(CLOSED_FORM, choices={"ridge": (0.1, 1.0), "agree": (0, 1), "certainty": (0.0, 1.0)})
    trials = tried_settings(wide, 3, tmp_path / "trials.log", lambda settings: settings["ridge"], seed=0)
    assert len(trials) == 3 and all(set(trial.settings) == set(wide.choices) for trial in trials)


def test_the_area_is_the_mean_height_from_no_rise_at_no_kl():
    # A triangle up to (0.1, 1): its mean height is one half, whatever the order of the points.
    assert mean_under_curve([0.1, 0.05], np.array([[1.0, 0.5]]), 0.1) == pytest.approx([0.5])
    # An arm that ends at half of the KLs stays where it ended.
    assert mean_under_curve([0.05], np.array([[1.0]]), 0.1) == pytest.approx([0.75])
    # What lies beyond the largest KL is cut off.
    assert mean_under_curve([0.2], np.array([[1.0]]), 0.1) == pytest.approx([0.25])


@pytest.mark.parametrize("second", [math.nan, None])
def test_settings_that_break_the_model_are_worth_nothing(monkeypatch, untyped, second):
    """A search that took NaN for a value would count no trial and go on for ever."""
    rises = {"one": 0.1, "two": second}
    changes = {name: SimpleNamespace(mean=mean) for name, mean in rises.items() if mean is not None}
    monkeypatch.setattr(measured_arms, "state_results", lambda *_: SimpleNamespace(change=changes))
    behaviours = [Behaviour(name, (Example("Why?", {"response": "So."}),)) for name in ("one", "two", "general")]
    with pytest.raises(InputError, match="the change breaks the model"):
        measured_arms.smaller_rise(None, None, behaviours)
    changes["two"] = SimpleNamespace(mean=-0.2)
    assert measured_arms.smaller_rise(None, None, behaviours) == -0.2


def test_the_smaller_rise_is_that_of_the_mean_and_its_interval_covers():
    """Of 300 designs of 21 topics with known means, about 95 % of the intervals hold the smaller mean."""
    generator, n_covered = np.random.default_rng(0), 0
    topics = tuple(str(i) for i in range(21) for _ in range(2))
    for _ in range(300):
        both = []
        for mean in (0.3, 1.0):
            of_topics = np.repeat(generator.normal(mean, 0.3, 21), 2)
            both.append(MarginChanges((of_topics + generator.normal(0, 0.1, 42))[None], topics))
        (interval,) = smaller_rises(*both)
        assert interval.mean == pytest.approx(both[0].values.mean())
        n_covered += interval.low <= 0.3 <= interval.high
    assert 0.9 <= n_covered / 300 <= 0.99


def test_the_area_of_a_straight_line_has_the_interval_of_its_end():
    generator = np.random.default_rng(1)
    end = generator.normal(0.4, 0.2, 20)
    topics = tuple(map(str, range(20)))
    low, high = MarginChanges(np.stack([end / 2, end]), topics), MarginChanges(np.stack([end + 1, end + 9]), topics)
    area = area_under([0.05, 0.1], low, high, largest=0.1)
    (_, at_end) = smaller_rises(low, high)
    assert area.mean == pytest.approx(at_end.mean / 2)
    assert area.low == pytest.approx(at_end.low / 2) and area.high == pytest.approx(at_end.high / 2)


def test_a_piece_that_another_process_is_at_is_left_to_it(tmp_path):
    folder = tmp_path / "arms" / file_name(CLOSED_FORM.name)
    with locked(folder), _piece(tmp_path, CLOSED_FORM.name, RECORD) as is_mine:
        assert not is_mine
    with _piece(tmp_path, CLOSED_FORM.name, RECORD) as is_mine:
        assert is_mine
    (folder / RECORD).write_text("{}")
    with _piece(tmp_path, CLOSED_FORM.name, RECORD) as is_mine:
        assert not is_mine


def test_a_flip_that_leaves_nothing_to_change_is_a_null_and_another_fault_is_told(monkeypatch, untyped):
    monkeypatch.setattr(pieces, "state_kl_meter", lambda *_: None)
    monkeypatch.setattr(pieces, "_flips", lambda *_: [None, None])
    work = SimpleNamespace(
        config=SimpleNamespace(chosen_at=0.05),
        choose=SimpleNamespace(store=None),
        model=None,
        examples=lambda *_, **__: None,
        sealed=contextlib.nullcontext,
    )
    record = SimpleNamespace(states=[SimpleNamespace(kl=0.05, dose=1.0)], settings={})

    def nulls(fault: InputError) -> tuple:
        def fit(*_: object) -> None:
            raise fault

        return pieces.null_states(work, SimpleNamespace(name="arm", fit=fit), record)

    assert [state.chosen.dose for state in nulls(NothingToChangeError("none"))] == [0.0, 0.0]
    with pytest.raises(InputError, match="the disk is full"):
        nulls(InputError("the disk is full"))


def test_flips_that_make_the_same_change_are_one_null_and_those_that_make_none_are_not(monkeypatch, untyped):
    """A direction that is taken out is the same for a flip and its complement: ten flips are five nulls."""
    monkeypatch.setattr(frontier_results, "_null_rises", lambda plan, null, original: {"one": null.rise, "two": 0.0})
    nulls = []
    for number, fingerprint in enumerate(["a", "a", "b", "", ""]):
        nulls.append(SimpleNamespace(name=f"flip {number}", fingerprint=fingerprint, rise=0.1))
    rises = {name: Interval(0.5, 0.4, 0.6, 9) for name in ("one", "two")}
    points = (SimpleNamespace(kl_wanted=0.05, rises=rises),)
    arm = frontier_results.FrontierArm(None, points, area=None, p_holm=None, null_rises=None, null_p=None)
    found = frontier_results._with_nulls(arm, nulls, None, None, 0.05)
    assert len(found.null_rises) == 4 and found.null_p == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    "change", [{"kls": ()}, {"kls": (0.05, 0.02)}, {"kls": (0.0, 0.05)}, {"chosen_at": 0.03}, {"n_choices": 0}]
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(InputError, match=next(iter(change))):
        dataclasses.replace(ComparisonConfig(), **change).check()


def test_built_in_prompts_are_long_enough_to_be_sealed():
    """Prompts of fewer than three tokens could not be told from other text."""
    tokenizer = tokenizer_of("smollm2-135m-instruct")
    for name in ("fairness", "privacy", "general", "register"):
        prompts = load_behaviour(name, n_examples=None, split=None).prompts
        assert min(len(tokenizer(prompt).input_ids) for prompt in prompts) >= 5
