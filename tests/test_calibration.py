"""Forecasts of time: what is counted, what is fitted to timed passes, and how a calibration is remembered."""

import dataclasses
import json
import re
import shlex
from statistics import median

import numpy as np
import pytest
import torch

from dean_interp import AnswerConfig, InputError, importance, load_behaviour, load_model, measure
from dean_interp.cli.arguments import parsed
from dean_interp.cli.main import main
from dean_interp.models.loss import batched
from dean_interp.models.tokens import encode, paths
from dean_interp.planning import remembered
from dean_interp.planning.amounts import Amount, amount_of
from dean_interp.planning.beside_actual import beside_actual, finished_beside_forecast
from dean_interp.planning.calibration import Calibration, calibrated, load_of_machine
from dean_interp.planning.comparison_forecast import forecast_comparison
from dean_interp.planning.costs import arithmetic_pace
from dean_interp.planning.improve_forecast import forecast_improve
from dean_interp.planning.placement import Devices
from dean_interp.planning.rates import Pace, Rates, TimedPass, fitted
from dean_interp.planning.shallow import has_layers_alike, shallow_bytes, shallow_model
from dean_interp.planning.stopwatch import Took, timed
from dean_interp.planning.study import forecast
from dean_interp.planning.work import WorkCounter
from dean_interp.study.improvement import ImproveConfig
from dean_interp.study.settings import DataConfig, ModelConfig

pytestmark = pytest.mark.usefixtures("estimates_untimed")
SHAPES = [(2, 32, 4), (8, 64, 16), (2, 256, 16), (4, 256, 8)]


def passes(rates, shapes=SHAPES):
    """Exact times of passes through models of one layer and of three, by the rates of one layer and of the rest."""
    found = []
    for n_layers in (1, 3):
        for n_rows, length, n_answer in shapes:
            n_tokens = n_rows * length
            amount = Amount(1, n_rows, n_tokens, n_tokens * length, n_rows * n_answer)
            layer, rest = rates
            found.append(TimedPass(n_layers, amount, n_layers * layer.seconds(amount) + rest.seconds(amount)))
    return found


def test_the_fit_finds_the_rates_of_a_model_that_is_deeper_than_what_was_timed():
    layer, rest = Rates(call=0.01, token=2e-4, pair=3e-7), Rates(call=0.05, logit=1e-3)
    found = fitted(passes((layer, rest)), n_layers=30)
    assert found.call == pytest.approx(0.35) and found.token == pytest.approx(6e-3)
    assert found.pair == pytest.approx(9e-6) and found.logit == pytest.approx(1e-3)


def test_no_rate_is_negative_where_times_are_noisy():
    generator = np.random.default_rng(0)
    exact = passes((Rates(call=0.01, row=0.02, token=2e-4), Rates(call=0.05, logit=1e-3)))
    noisy = [dataclasses.replace(one, seconds=one.seconds * generator.uniform(0.9, 1.15)) for one in exact]
    found = fitted(noisy, n_layers=30, by_row=True)
    assert min(dataclasses.astuple(found)) >= 0
    amount = Amount(3, 24, 1500, 90_000, 300)
    want = fitted(exact, n_layers=30, by_row=True).seconds(amount)
    assert found.seconds(amount) == pytest.approx(want, rel=0.3)


def test_a_range_is_that_of_the_rounds_and_without_rounds_a_factor_of_three():
    amounts = {"forward": Amount(n_tokens=100)}
    rounds = tuple({"forward": Rates(token=token)} for token in (0.9, 1.0, 1.3))
    span = Pace({"forward": Rates(token=1.0)}, rounds).span(amounts)
    assert (span.seconds, span.low, span.high) == pytest.approx((100, 90, 130))
    span = Pace({"forward": Rates(token=1.0)}).span(amounts)
    assert (span.seconds, span.low, span.high) == pytest.approx((100, 100 / 3, 300))


def test_the_better_clock_is_the_smaller():
    assert Took(wall=3.0, cpu=1.0).better == 1.0 and Took(wall=1.0, cpu=1.9).better == 1.0
    took = timed(lambda: sum(range(200_000)))
    assert 0 < took.better <= took.wall


@pytest.fixture(scope="module")
def counter(llama):
    answers = AnswerConfig(answer_lengths=(4, 6), answer_batch=3)
    return WorkCounter(llama, "raw", 128, DataConfig(answer_tokens=5, measure_tokens=300), answers)


def test_what_is_counted_is_what_runs(llama, counter):
    """Tokens, batches and answer tokens of a scoring pass are those of its batches."""
    behaviour = load_behaviour("fairness", n_examples=5)
    rows = paths([encode(llama.tokenizer, e.prompt, [e.answers["safe"]], template="raw") for e in behaviour.examples])
    n_batches = n_tokens = n_logits = 0
    for batch in batched(llama, rows, batch_tokens=128, label="counted"):
        n_batches += 1
        n_tokens += batch.tokens.numel()
        n_logits += len(batch.target)
    amount = amount_of(rows, batch_tokens=128)
    assert (amount.n_calls, amount.n_tokens, amount.n_logits) == (n_batches, n_tokens, n_logits)
    # The check of the hooks comes on top: one row.
    scored = counter.scored([behaviour], "neurons")["neurons"]
    assert 0 < scored.n_tokens - n_tokens < 2 * n_tokens / 5 * 1.5


def test_a_kl_unembeds_twice_and_answers_take_a_step_for_each_new_token(counter):
    general = load_behaviour("general", n_examples=4, split="test")
    plain, with_kl = counter.measured([general]), counter.measured([general], with_kl=True)
    assert with_kl["forward"].n_logits == 2 * plain["forward"].n_logits
    assert with_kl["forward"].n_tokens == plain["forward"].n_tokens
    answered = counter.answered([general])
    assert answered["answer"].n_calls == 2 * 6 and answered["answer"].n_tokens == 4 * 6
    assert answered["forward"].n_calls == 2


def test_the_load_of_the_machine_is_known_where_os_does_not_tell_it(monkeypatch):
    monkeypatch.delattr("os.getloadavg")
    load, n_cores = load_of_machine()
    assert load >= 0 and n_cores >= 1


def test_a_shallow_model_has_the_layers_of_the_real_one(tiny):
    shallow = shallow_model(tiny, 1, device="cpu")
    assert len(shallow.blocks) == 1 and has_layers_alike(tiny)
    one, two = (sum(p.numel() for p in model.blocks[0].parameters()) for model in (shallow, tiny))
    assert one == two
    held = sum(parameter.nbytes for parameter in shallow.parameters())
    assert shallow_bytes(tiny, 1) == pytest.approx(held, rel=0.01)


def test_random_numbers_of_the_caller_stay_as_they_are(llama, monkeypatch):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    seeds_of_gpus = []
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeds_of_gpus.append)
    shallow_model(llama, 1, device="cpu")
    assert torch.equal(torch.get_rng_state(), before) and not seeds_of_gpus


@pytest.mark.parametrize("kind", ["forward", "neurons", "weights", "answer"])
def test_every_kind_of_pass_is_calibrated(llama, kind, one_thread):
    found = calibrated(llama, kind, device="cpu")
    assert len(found.rounds) == 3 and found.n_cores >= 1 and found.spread >= 0
    amount = Amount(1, 4, 200, 10_000, 20)
    assert 0 < found.rates.seconds(amount) < 60


CALM = Calibration(Rates(token=1.0), (Rates(token=1.0),) * 3, load=0.1, n_cores=2, spread=0.05, made="2026-11-28")


def test_a_busy_machine_is_said():
    assert CALM.busy == ""
    assert dataclasses.replace(CALM, load=7.9).busy == "7.9 processes wanted its 2 cores"
    assert dataclasses.replace(CALM, spread=0.4).busy == "times of 3 rounds differed by 40%"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A cache of its own; calibrations that are given and counted; a load that is given."""
    state = {"found": CALM, "load": (0.1, 2), "n": 0}

    def found(shape, kind, *, device):
        state["n"] += 1
        return state["found"]

    monkeypatch.setenv("DEAN_INTERP_CACHE", str(tmp_path))
    monkeypatch.setattr(remembered, "calibrated", found)
    monkeypatch.setattr(remembered, "load_of_machine", lambda: state["load"])
    return state


def test_a_calibration_is_remembered_for_its_shape_and_threads(llama, checkpoints, machine, one_thread):
    for _ in range(2):
        pace = remembered.pace_here(llama, ["forward"], device="cpu")
    assert machine["n"] == 1 and pace.said == "calibrated on this machine, 1 thread, 2026-11-28" and pace.busy == ""
    remembered.pace_here(llama, ["forward", "answer"], device="cpu")
    assert machine["n"] == 2, "another kind"
    remembered.pace_here(load_model(checkpoints["qwen2"], device="cpu"), ["forward"], device="cpu")
    assert machine["n"] == 3, "another architecture"
    torch.set_num_threads(2)
    remembered.pace_here(llama, ["forward"], device="cpu")
    torch.set_num_threads(1)
    assert machine["n"] == 4, "other threads"


def test_what_a_busy_machine_gave_is_found_anew_once_it_is_idle(llama, machine):
    machine |= {"found": dataclasses.replace(CALM, load=9.0), "load": (9.0, 2)}
    for _ in range(2):
        assert "9.0 processes" in remembered.pace_here(llama, ["forward"], device="cpu").busy
    assert machine["n"] == 1
    machine |= {"found": CALM, "load": (0.1, 2)}
    assert remembered.pace_here(llama, ["forward"], device="cpu").busy == "" and machine["n"] == 2


def test_a_damaged_or_unwritable_cache_is_no_reason_not_to_plan(llama, machine, tmp_path, caplog):
    remembered.pace_here(llama, ["forward"], device="cpu")
    (file,) = (tmp_path / "calibrations").glob("*.json")
    file.write_text("{")
    remembered.pace_here(llama, ["forward"], device="cpu")
    assert machine["n"] == 2 and "calibrating anew" in caplog.text
    (tmp_path / "blocked").write_text("a file")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEAN_INTERP_CACHE", str(tmp_path / "blocked"))
        assert remembered.pace_here(llama, ["forward"], device="cpu").rates["forward"] == CALM.rates
    assert "is not remembered" in caplog.text


def small(folder):
    model = ModelConfig(str(folder), device="cpu")
    return ImproveConfig(model=model, n_score=12, n_choose=4, n_confirm=6, n_flips=2, n_random=1, register=None)


def test_improve_is_forecast_by_the_steps_of_its_clock(checkpoints):
    config, devices = small(checkpoints["llama-gqa"]), Devices(tflops=0.01)
    found = forecast_improve(config, devices)
    names = ["gains, damage and gates", "dose", "margins by dose, and predictions", "doses of nulls", "edit file"]
    assert [step.step for step in found.steps] == [*names, "confirming", "edit"]
    assert found.command.startswith("dean-interp improve")
    more = forecast_improve(dataclasses.replace(config, n_flips=6), devices)
    seconds = {name: [f.steps[i].seconds for f in (found, more)] for i, name in enumerate([*names, "confirming"])}
    before, after = seconds["doses of nulls"]
    assert after == pytest.approx(before * 7 / 3), "each null is measured once on general text"
    assert seconds["confirming"][0] < seconds["confirming"][1] < 2.2 * seconds["confirming"][0]
    assert seconds["dose"][0] == seconds["dose"][1]


def test_a_dry_run_of_improve_writes_nothing_and_says_what_is_left_out(checkpoints, machine, tmp_path, capsys):
    given = ["improve", "--dry-run", "--model", str(checkpoints["llama-gqa"]), "--device", "cpu", "--register", "None"]
    given += ["--n-score", "12", "--n-choose", "4", "--n-confirm", "6", "--out", str(tmp_path / "run")]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "confirming" in said and "in all" in said and "gates, judges" in said
    start = re.search("start: dean-interp (.*)", said)[1]
    asked = parsed(given).step
    assert parsed(shlex.split(start)).step == dataclasses.replace(asked, dry_run=False)
    assert not (tmp_path / "run").exists()


def test_a_comparison_is_forecast_from_its_arms(checkpoints):
    from dean_interp.arms.all_arms import all_arms
    from dean_interp.arms.comparison import ComparisonConfig

    config = ComparisonConfig(n_choices=2, study=small(checkpoints["llama-gqa"]))
    arms = all_arms(1)
    few, all_of_them = (forecast_comparison(config, part, Devices(tflops=0.01)) for part in (arms[:2], arms))
    assert [step.step for step in few.steps] == ["original and shared scores", "arms"]
    assert few.steps[0].seconds == all_of_them.steps[0].seconds
    assert few.steps[1].seconds < all_of_them.steps[1].seconds


def test_each_step_stands_beside_what_it_took(tmp_path, planned):
    (tmp_path / "times.json").write_text('{"load": 4.0, "score": 10.0, "neurons: edit and controls": 40.0}')
    score, edit = (planned.steps[i].seconds for i in (0, 1))
    beside = beside_actual(planned, tmp_path)
    assert [(step.step, step.actual) for step in beside.steps] == [
        ("score", 10.0),
        ("neurons: edit and controls", 40.0),
    ]
    assert [step.ratio for step in beside.steps] == pytest.approx([score / 10, edit / 40])
    assert beside.in_all.ratio == pytest.approx((score + edit) / 50)
    assert "not forecast: load 4 s" in str(beside) and list(beside.to_pandas()["actual"]) == [10.0, 40.0]


@pytest.mark.slow
def test_a_finished_study_is_forecast_from_its_own_settings(finished_study, machine, capsys):
    folder, _ = finished_study
    beside = finished_beside_forecast(folder)
    names = ["score", "neurons: edit and controls", "weights: edit and controls", "mutual information"]
    actual = json.loads((folder / "times.json").read_text())
    assert [(step.step, step.actual) for step in beside.steps] == [(name, actual[name]) for name in names]
    assert main(["plan", "--finished", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "forecast" in said and "actual" in said and "not forecast: load" in said


def test_a_folder_without_times_is_refused(tmp_path, planned):
    with pytest.raises(InputError, match=r"has no times\.json: name the folder of a run"):
        beside_actual(planned, tmp_path)
    (tmp_path / "times.json").write_text('{"sweep": 3.0}')
    with pytest.raises(InputError, match="has no step of the forecast: sweep"):
        beside_actual(planned, tmp_path)


@pytest.fixture
def planned(study_config):
    return forecast(study_config, Devices(tflops=0.01))


def test_the_arithmetic_counts_going_back_twice_and_a_product_for_each_weight(llama):
    rates = arithmetic_pace(llama, 1.0).rates
    assert rates["neurons"].token * 0.15 == pytest.approx(2 * rates["forward"].token * 0.1)
    assert rates["weights"].token > rates["neurons"].token


@pytest.mark.timing
@pytest.mark.parametrize("kind", ["forward", "neurons"])
def test_a_forecast_comes_within_a_factor_of_one_and_a_half(
    checkpoints, kind, tmp_path, monkeypatch, one_thread, untyped
):
    """A tiny model is measured or scored; CPU time, so that other work does not count.

    Medians of three calibrations and of three calls count, since one of each is off by as much once in a while.
    """
    model = load_model(checkpoints["llama-gqa"], device="cpu")
    counter = WorkCounter(model, "raw", 512, DataConfig(answer_tokens=None), AnswerConfig())
    test, scored = load_behaviour("general", n_examples=24, split="test"), load_behaviour("privacy", n_examples=24)
    measure(model, [load_behaviour("fairness", n_examples=2, split="test")], template="raw")
    if kind == "forward":
        amounts = counter.measured([test])

        def work() -> object:
            return measure(model, [test], template="raw")
    else:
        from dean_interp import ScoringConfig

        config = ScoringConfig(template="raw", batch_tokens=512)
        amounts = counter.scored([scored], "neurons")

        def work() -> object:
            return importance(model, scored, config=config)

    taken, forecasts = [], []
    for number in range(3):
        monkeypatch.setenv("DEAN_INTERP_CACHE", str(tmp_path / str(number)))
        taken.append(timed(work).better)
        forecasts.append(remembered.pace_here(model, [kind], device="cpu").span(amounts).seconds)
    assert 1 / 1.5 < median(forecasts) / median(taken) < 1.5
