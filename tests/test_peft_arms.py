"""Arms of fine-tuning: what hooks apply is what peft trained, exactly undone."""

import dataclasses
import math

import pytest
import torch
from planted_gates import planted_model, write_data

from dean_interp import InputError, generate, load_behaviour, load_model, measure
from dean_interp.arms import peft_training
from dean_interp.arms.arm import ArmExamples
from dean_interp.arms.pair_trainer import preference_loss
from dean_interp.arms.peft_arms import ADAPTER_ARMS
from dean_interp.editing.ablation import gated
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.sites import Site
from dean_interp.selection.gates import Gates
from dean_interp.study.improvement import ImproveConfig
from dean_interp.study.settings import ModelConfig

N_STEPS = 4
SETTINGS = {"learning_rate": 3e-2, "where": "all", "rank": 4, "beta": 0.2}
FAMILIES = ["llama-gqa", "qwen2", "gpt2"]
ARMS = [dataclasses.replace(arm, n_steps=N_STEPS, batch_size=2) for arm in ADAPTER_ARMS]
by_name = pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)


def settings_of(arm):
    return {name: SETTINGS[name] for name in arm.choices}


@pytest.fixture(scope="module")
def pairs():
    return [load_behaviour(name, n_examples=6) for name in ("fairness", "privacy")]


@pytest.fixture
def examples_of(pairs, checkpoints, tmp_path):
    def make(family, **changed):
        model = load_model(checkpoints[family], device="cpu")
        config = ImproveConfig(model=ModelConfig(str(checkpoints[family]), device="cpu"))
        given = {"model": model, "config": config, "scoring": pairs, "folder": tmp_path, "own_folder": tmp_path / "own"}
        return ArmExamples(**(given | changed))

    return make


@pytest.fixture
def trained(monkeypatch):
    """The models of peft that were trained."""
    models = []

    def train(adapted, *given, **options):
        models.append(adapted)
        train_on_pairs(adapted, *given, **options)

    train_on_pairs = peft_training.train_on_pairs
    monkeypatch.setattr(peft_training, "train_on_pairs", train)
    return models


TOKENS = torch.arange(4, 64).reshape(3, 20)


@by_name
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_compute_what_peft_trained_and_are_undone_to_the_bit(examples_of, trained, arm, family):
    examples = examples_of(family)
    model = examples.model
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = logits(model)
    change = arm.fit(examples, settings_of(arm))
    with torch.no_grad():
        wanted = trained[0](input_ids=TOKENS).logits
    assert change.largest_dose == N_STEPS and 0 < change.first_dose < N_STEPS
    with change.at(float(N_STEPS)).applied(model):
        torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(wanted, before, atol=1e-3), "training changed something"
    assert torch.equal(logits(model), before)
    with change.at(0.0).applied(model):
        assert torch.equal(logits(model), before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def logits(model):
    with torch.inference_mode():
        return model(TOKENS, return_type="logits").clone()


def test_the_preference_loss_is_that_of_a_hand_computed_example():
    """Two pairs, safe then unsafe. In the first the ratio rose by 3 nats, in the second it fell by 1."""
    now = torch.tensor([-4.0, -6.0, -7.0, -2.0])
    reference = torch.tensor([-5.0, -4.0, -8.0, -4.0])
    wanted = (math.log1p(math.exp(-0.2 * 3)) + math.log1p(math.exp(0.2 * 1))) / 2
    assert float(preference_loss(now, reference, beta=0.2)) == pytest.approx(wanted, rel=1e-6)


@by_name
def test_the_same_seed_gives_the_same_numbers_and_a_finished_training_is_not_repeated(
    examples_of, trained, tmp_path, arm
):
    made = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1), ("a", 0)):
        change = arm.fit(examples_of("llama-gqa", own_folder=tmp_path / folder, seed=seed), settings_of(arm))
        made.append(change.at(float(N_STEPS)).fingerprint)
    assert made[0] == made[1] == made[3] != made[2]
    assert len(trained) == 3


def test_a_dose_between_two_kept_steps_lies_between_them_and_none_lies_beyond(examples_of):
    change = ARMS[0].fit(examples_of("llama-gqa"), settings_of(ARMS[0]))
    assert change.steps == (0, 2, 4)
    kept, middle = [change.at(float(step)).change.numbers for step in (2, 4)], change.at(2.5).change.numbers
    for site, tensors in middle.items():
        for number, tensor in enumerate(tensors):
            before, after = kept[0][site][number], kept[1][site][number]
            torch.testing.assert_close(tensor, before + 0.25 * (after - before))
    assert change.at(0.0).fingerprint == "" and change.at(2.5).fingerprint != change.at(2.0).fingerprint
    for dose in (-0.1, 4.1):
        with pytest.raises(InputError, match="dose must be from 0 to 4"):
            change.at(dose)


def test_flipped_labels_train_on_the_flipped_answers(examples_of, monkeypatch):
    """Topics that keep their labels, topics that change them, topics that are left out."""
    seen = []

    def note(adapted, pairs, training, keep, *, branched):
        seen.extend(pairs)

    monkeypatch.setattr(peft_training, "train_on_pairs", note)
    examples = examples_of("llama-gqa")
    topics = [sorted({one.cluster for one in behaviour.examples}) for behaviour in examples.scoring]
    flip = tuple({names[0]: 1, names[1]: -1} for names in topics)
    decode = native_tokenizer(examples.model).decode
    ARMS[1].fit(dataclasses.replace(examples, flip=flip), settings_of(ARMS[1]))
    wanted = []
    for behaviour, signs in zip(examples.scoring, flip, strict=True):
        for one in behaviour.examples:
            order = {1: ("safe", "unsafe"), -1: ("unsafe", "safe")}.get(signs.get(one.cluster), ())
            wanted += [tuple(one.answers[kind] for kind in order)] if order else []
    assert [tuple(decode(answer) for answer in pair.answers) for pair in seen] == wanted
    assert len(wanted) >= 4


@by_name
def test_generation_under_the_change_is_that_of_the_merged_model(examples_of, trained, arm):
    examples = examples_of("llama-gqa")
    change = arm.fit(examples, settings_of(arm))
    prompts = [one.prompt for one in examples.scoring[0].examples[:3]]
    before = generate(examples.model, prompts, max_new_tokens=12)
    with change.at(float(N_STEPS)).applied(examples.model):
        under = generate(examples.model, prompts, max_new_tokens=12)
    merged = load_model(trained[0].merge_and_unload().requires_grad_(False), tokenizer=native_tokenizer(examples.model))
    assert under == generate(merged, prompts, max_new_tokens=12) != before
    assert generate(examples.model, prompts, max_new_tokens=12) == before


def test_prompts_that_were_trained_on_are_not_measured_under_the_change(examples_of):
    examples = examples_of("llama-gqa")
    test = dataclasses.replace(examples.scoring[0], split="test")
    change = ARMS[2].fit(examples, settings_of(ARMS[2]))
    with change.at(2.0).applied(examples.model), pytest.raises(InputError, match="were scored"):
        measure(examples.model, [test])
    measure(examples.model, [test])


def test_ia3_at_the_neurons_is_gates(examples_of):
    """What `out` reads is rescaled: a multiplier for every neuron."""
    arm = ARMS[2]
    change = arm.fit(examples_of("llama-gqa"), settings_of(arm) | {"where": "mlp"})
    model = examples_of("llama-gqa").model
    state = change.at(float(N_STEPS))
    multipliers = {Site(site.layer, "neurons"): tensors[0] for site, tensors in state.change.numbers.items()}
    with gated(model, Gates(multipliers)):
        wanted = logits(model)
    with state.applied(model):
        assert torch.equal(logits(model), wanted)
    assert change.n_bytes == 4 * sum(map(len, multipliers.values()))


def test_what_an_arm_cannot_train_on_is_said_in_one_line(examples_of, checkpoints, monkeypatch):
    arm, settings = ARMS[0], settings_of(ARMS[0])
    unnamed = ImproveConfig(model=ModelConfig("no-such-model", device="cpu"))
    other = ImproveConfig(model=ModelConfig(str(checkpoints["llama"]), device="cpu"))
    general = load_behaviour("general", n_examples=4)
    faults = [
        ({"config": unnamed}, "loaded by its name: cannot load the model 'no-such-model'"),
        ({"config": other}, "is another one than that in memory"),
        ({"scoring": [general, general]}, "trained on pairs, and 'general' has prompts without two answers"),
    ]
    for changed, said in faults:
        with pytest.raises(InputError, match=said) as told:
            arm.fit(examples_of("llama-gqa", **changed), settings)
        assert "\n" not in str(told.value)
    with pytest.raises(InputError, match="takes the settings learning_rate, where, rank, got rate"):
        arm.fit(examples_of("llama-gqa"), {"rate": 1})
    monkeypatch.setattr(peft_training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'dean_interp\[tuning\]'"):
        arm.fit(examples_of("llama-gqa"), settings)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.loss == "preference"], ids=lambda arm: arm.name)
def test_preferences_raise_both_margins_of_the_planted_model(tokenizer, tmp_path, arm):
    model_folder = tmp_path / "model"
    planted_model(tokenizer).save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    paths = write_data(tmp_path, n_topics=12, n_each=2, real=(True, True))
    scoring = [load_behaviour(paths[name], n_examples=None) for name in ("first", "second")]
    model = load_model(model_folder, device="cpu")
    config = ImproveConfig(model=ModelConfig(str(model_folder), device="cpu"))
    examples = ArmExamples(model, config, scoring, tmp_path, tmp_path / "own")
    whole = dataclasses.replace(arm, n_steps=12, batch_size=4)
    change = whole.fit(examples, settings_of(arm) | {"where": "mlp"})
    tests = [load_behaviour(paths[name], n_examples=None, split="test") for name in ("first", "second")]
    before = measure(model, tests)
    with change.at(12.0).applied(model):
        after = measure(model, tests)
    for test in tests:
        rise = margins(after[test.name]) - margins(before[test.name])
        assert float(rise.mean()) > 0.1, test.name


def margins(measured):
    """Per token, safe minus unsafe."""
    return measured.log_prob[:, 0] - measured.log_prob[:, 1]
