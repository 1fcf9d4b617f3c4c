"""Arms of fine-tuning: what hooks apply is what peft trained, exactly undone."""

import dataclasses
import math

import pytest
import torch

from dean_interp import load_behaviour, load_model
from dean_interp.arms import peft_training
from dean_interp.arms.arm import ArmExamples
from dean_interp.arms.pair_trainer import preference_loss
from dean_interp.arms.peft_arms import ADAPTER_ARMS
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
