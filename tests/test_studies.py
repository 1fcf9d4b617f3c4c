"""Every study of `analyses/` in its quick form, on planted models or data whose answer is known."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import tyro
from page_figures import figures_of
from planted_coupling import LAYER, ONLY_G, SHARED, behaviour, planted_model

from dean_interp import InputError, load_behaviour
from dean_interp.evaluation.outcomes import LOSS, MARGIN
from dean_interp.fine_tuning import FineTuningConfig
from dean_interp.study.config import StudyConfig
from dean_interp.study.settings import AnswerConfig, CalibrationConfig, ControlConfig, DataConfig, ModelConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "analyses"))
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the trainer and its packages

TUNING = FineTuningConfig(n_steps=24, every=4, batch_size=8, learning_rate=3e-3)


def answered(folder, name, safe, unsafe):
    """A built-in set's prompts with other answers."""
    rows = [
        {"prompt": one.prompt, "safe": safe, "unsafe": unsafe, "topic": one.topic, "split": split}
        for split in ("calibration", "test") for one in load_behaviour(name, n_examples=30, split=split).examples
    ]  # fmt: skip
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("conflict", [True, False])
def test_fine_tuning_lowers_the_other_behaviour_where_their_answers_conflict_and_not_where_they_agree(
    checkpoints, tmp_path, conflict
):
    import tradeoff_under_finetuning as study

    yes, no = "yes yes", "no no no"
    first = answered(tmp_path, "fairness", yes, no)
    second = answered(tmp_path, "privacy", *((no, yes) if conflict else (yes, no)))
    config = StudyConfig(
        model=ModelConfig(str(checkpoints["llama"]), device="cpu"),
        data=DataConfig(first=first, second=second, n_test=12, n_general_test=8, answer_tokens=None),
        calibration=CalibrationConfig(n_calibration=24),
        answers=AnswerConfig(n_answers=3, answer_lengths=(8,)),
    )
    given = study.Tradeoff(tmp_path / "run", methods=("full", "lora"), quick=True, tuning=TUNING, study=config)
    results = study.run(given)
    assert list(results.arms) == [f"{method} on {on}" for method in ("full", "lora")
                                  for on in ("privacy", "fairness", "both")]  # fmt: skip
    for on, other in (("privacy", "fairness"), ("fairness", "privacy")):
        own, theirs = (results.line(f"full on {on}", MARGIN, name).change for name in (on, other))
        assert own.low > 0
        assert theirs.high < 0 if conflict else theirs.low > 0
    kind = "the trade-off appears" if conflict else "no trade-off"
    full = [text for text in results.conclusions if "Full" in text]
    assert len(results.conclusions) == 4 and len(full) == 2 and all(kind in text for text in full)
    assert not (given.out / "tuned" / "full_on_both__seed_0").exists(), "checkpoints do not pile up"
    page = (given.out / "report.html").read_text()
    assert kind in page and LOSS in page and "Qwen2-7B-Instruct FFT -13/+5" in page
    (figure,) = figures_of(page)
    shown = figure.numbers("mean_nats_per_token", panel="privacy margin", arm="full on both")
    assert shown[-1] == results.line("full on both", MARGIN, "privacy").change.mean, "the last step"
    assert study.run(given) == results, "a finished study is read from its files"


@pytest.fixture(scope="module")
def planted(tokenizer, tmp_path_factory):
    """Settings of a study on a model in which one neuron takes from both behaviours: silenced, both margins rise."""
    folder = tmp_path_factory.mktemp("planted")
    planted_model(tokenizer, shared=-2.0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for letter in "fpg":
        rows = [{"prompt": one.prompt, **one.answers, "split": split} for split, start in
                (("calibration", 0), ("test", 500)) for one in behaviour(letter, start, 24).examples]  # fmt: skip
        (folder / f"{NAMES[letter]}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, general = (str(folder / f"{name}.jsonl") for name in NAMES.values())
    return StudyConfig(
        model=ModelConfig(str(folder / "model"), template="raw", device="cpu"),
        data=DataConfig(first=first, second=second, general=general, n_test=12, n_general_test=8, answer_tokens=None),
        calibration=CalibrationConfig(n_calibration=24),
        unit=("neuron",),
        neuron_fraction=0.075,
        weight_fraction=0.01,
        controls=ControlConfig(n_random=4),
        answers=AnswerConfig(n_answers=0),
    )


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("tradeoff_under_finetuning", "Tradeoff", ["--tuning.n-steps", "16"]),
        ("dean_against_finetuning", "Table", ["--response", "unsafe", "--tuning.seed", "3"]),
        ("malicious_only", "Table", ["--methods", "full"]),
        ("limited_data", "Limited", ["--sizes", "4", "8"]),
        ("mediation", "Mediation", ["--tuning.method", "lora"]),
        ("where_coupling_lives", "Where", ["--n-neurons", "2"]),
        ("released_code_effect", "ReleasedEffect", ["--n-draws", "2"]),
        ("durability", "Durability", ["--tuning.n-steps", "16"]),
    ],
)
def test_every_study_takes_its_own_settings_and_those_of_a_study_from_the_command_line(name, settings, options):
    study = importlib.import_module(name)
    given = tyro.cli(getattr(study, settings), args=[*options, "--seed", "7", "--quick"], description=study.__doc__)
    assert given.study.data.seed == 7 and given.quick
    (flag, value, *_), read = options, vars(given) | vars(given.study.calibration)
    *outer, last = flag.removeprefix("--").replace("-", "_").split(".")
    found = getattr(given.tuning, last) if outer else read[last]
    assert value in str(found)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("tradeoff_under_finetuning", "Tradeoff"), ("dean_against_finetuning", "Table"), ("mediation", "Mediation"),
     ("durability", "Durability")],
)  # fmt: skip
def test_a_wrong_dose_is_refused_before_anything_is_loaded(name, settings, tmp_path):
    study = importlib.import_module(name)
    given = getattr(study, settings)(tmp_path / "run", tuning=FineTuningConfig(n_steps=7))
    with pytest.raises(InputError, match="n_steps must be a multiple of every"):
        study.run(given)
    assert not (tmp_path / "run").exists()


NAMES = {"f": "fairness", "p": "privacy", "g": "general"}
SHORT = dataclasses.replace(TUNING, n_steps=8, learning_rate=1e-3)


def test_the_table_finds_that_silencing_the_planted_neuron_raises_both(planted, tmp_path):
    import dean_against_finetuning as study

    both = dataclasses.replace(planted, unit=("neuron", "weight"))
    results = study.run(study.Table(tmp_path, quick=True, tuning=SHORT, study=both))
    assert list(results.arms) == ["DEAN, neurons", "DEAN, weights", "released selection, weights", "fine-tuned, full"]
    for name in ("fairness", "privacy"):
        line = results.line("DEAN, neurons", MARGIN, name)
        assert line.change.low > 0.3 and line.rank == 1 / 5
        assert results.line("fine-tuned, full", MARGIN, name).change.mean != 0
    (said,) = (text for text in results.conclusions if text.startswith("DEAN, neurons"))
    assert "Raised beyond the interval: fairness and privacy; lowered: neither" in said
    assert "DEAN +8/+10" in results.facts["published"]


def test_unsafe_answers_alone_find_the_planted_neuron_too(planted, tmp_path):
    import malicious_only as study

    results = study.run_malicious(study.Table(tmp_path, quick=True, tuning=SHORT, study=planted))
    assert "unsafe answers only" in results.title and "unsafe answers" in results.facts["fine-tuning"]
    assert all(results.line("DEAN, neurons", MARGIN, name).change.low > 0.3 for name in ("fairness", "privacy"))


def test_four_examples_are_enough_where_every_example_shows_the_planted_neuron(planted, tmp_path):
    import limited_data as study

    results = study.run(study.Limited(tmp_path, sizes=(4, 8, 16, 999), quick=True, study=planted))
    assert list(results.arms) == ["neurons, 4 examples", "neurons, 16 examples"]
    for arm in results.arms:
        assert all(results.line(arm, MARGIN, name).change.low > 0.3 for name in ("fairness", "privacy"))
    assert "both margins rise beyond their intervals with 4 examples, 16 examples" in results.conclusions[0]


def test_mediation_finds_what_only_the_coupled_neuron_carries(planted, tokenizer, tmp_path, monkeypatch):
    import mediation as study

    changed = planted_model(tokenizer, shared=-2.0)
    with torch.no_grad():  # "fine-tuning" that turned one neuron round, and one that serves no behaviour
        changed.model.layers[LAYER].mlp.down_proj.weight[:, SHARED] *= -1
        changed.model.layers[LAYER].mlp.down_proj.weight[:, ONLY_G + 3] *= 1.5
    changed.save_pretrained(tmp_path / "changed")
    tokenizer.save_pretrained(tmp_path / "changed")
    monkeypatch.setattr(study, "fine_tune", lambda *_, **__: tmp_path / "changed")
    results = study.run(study.Mediation(tmp_path / "run", quick=True, study=planted))
    against, moved = f"{study.restored('neuron')} (against fine-tuned)", study.moved("neuron")
    for name in ("fairness", "privacy"):
        total, back, there = (results.line(arm, MARGIN, name) for arm in (study.TUNED, against, moved))
        assert total.change.low > 0.5 and back.change.mean == pytest.approx(-total.change.mean, rel=0.05)
        assert there.change.mean == pytest.approx(total.change.mean, rel=0.05)
        assert max(map(abs, there.control_changes)) < 0.1 * total.change.mean
        assert results.line(f"{study.ITSELF} (against fine-tuned)", MARGIN, name).change.mean == 0
        whole = results.line(f"{study.EVERY} (against fine-tuned)", MARGIN, name).change.mean
        assert whole == pytest.approx(-total.change.mean, rel=1e-3)


def test_the_planted_neuron_is_where_the_coupling_lives(planted, tmp_path):
    import where_coupling_lives as study

    few = dataclasses.replace(planted, calibration=CalibrationConfig(n_calibration=12))
    results = study.run(study.Where(tmp_path, n_neurons=1, quick=True, study=few))
    text = "\n".join(results.conclusions)
    assert f"L{LAYER}.{SHARED} raises 'N'" in text and "lowers 'Y'" in text
    assert "It fires most at the end of" in text and (tmp_path / "coupled_units_by_layer.csv").is_file()
    with pytest.raises(InputError, match="3 draws of 12 examples are 36"):
        study.run(study.Where(tmp_path / "b", study=few))


def test_the_set_intersection_moves_the_planted_behaviours_more_than_random_weights_do(planted, tmp_path):
    import released_code_effect as study

    results = study.run(
        study.ReleasedEffect(tmp_path, quick=True, study=dataclasses.replace(planted, unit=("weight",)))
    )
    assert [name.split(",")[0] for name in results.arms] == ["coupled", "released", "released"]
    assert results.line("coupled", MARGIN, "fairness").change.mean > 0.1
    assert results.line("coupled", MARGIN, "fairness").rank == 1 / 5
    assert "the coupled set does not change" in results.conclusions[0]


def test_the_planted_edit_survives_quantisation_and_other_words(planted, tmp_path):
    import durability as study

    config = dataclasses.replace(planted, model=dataclasses.replace(planted.model, template="chat"))
    light = dataclasses.replace(SHORT, learning_rate=1e-4)
    results = study.run(study.Durability(tmp_path, quick=True, tuning=light, study=config))
    assert results.facts["could not run"] == "nothing"
    plain = results.line("neuron edit, as it is", MARGIN, "fairness").change.mean
    for condition in ("8-bit weights", "4-bit weights", "prompts in other words", "after benign fine-tuning"):
        kept = results.line(f"neuron edit, {condition}", MARGIN, "fairness").change.mean
        assert kept == pytest.approx(plain, rel=0.3), condition
