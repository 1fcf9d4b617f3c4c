"""Mixtures of experts: effects on single examples are those whose sizes make up the scores."""

import pytest
import torch

from dean_interp import ScoringConfig, importance, load_behaviour, load_model
from dean_interp.scoring.per_example import example_scores, with_groups
from dean_interp.scoring.preparation import grouped as kept_groups
from tests.mixtures import FAMILIES, mixture

MARGIN = ScoringConfig(template="raw", target="margin", batch_tokens=512)
RESPONSE = ScoringConfig(template="raw", batch_tokens=512)


@pytest.fixture(scope="module", params=FAMILIES)
def sparse(request, tokenizer):
    return load_model(mixture(request.param, len(tokenizer)), tokenizer=tokenizer)


@pytest.mark.parametrize("config", [RESPONSE, MARGIN])
def test_sizes_of_effects_on_examples_average_to_the_scores(sparse, config, one_thread):
    behaviour = load_behaviour("fairness", n_examples=5)
    scores = importance(sparse, behaviour, unit=("neuron", "weight"), config=config)
    generator = torch.Generator().manual_seed(0)
    units = {}
    for site, values in scores.values.items():
        units[site] = torch.randperm(values.numel(), generator=generator)[:40].sort().values
    effects = example_scores(sparse, behaviour, units, config=config)
    assert {site.unit for site in effects} == {"neuron", "weight"}
    assert any(site.is_of_experts for site in effects)
    for site, effect in effects.items():
        expected = scores.values[site].flatten()[units[site]]
        torch.testing.assert_close(effect.abs().mean(0), expected, atol=1e-6, rtol=1e-3, msg=str(site))


def test_groups_of_kept_weights_of_experts_average_to_their_scores(sparse, one_thread):
    behaviour = load_behaviour("fairness", n_examples=5)
    scores = importance(sparse, behaviour, unit="weight", config=RESPONSE).kept(0.05)
    grouped = with_groups(sparse, scores, behaviour, config=RESPONSE)
    groups, _ = kept_groups(behaviour, RESPONSE)
    sizes = torch.bincount(groups)
    for site, top in scores.values.items():
        mean = (grouped.groups[site] * sizes[:, None]).sum(0) / len(behaviour)
        torch.testing.assert_close(mean, top.values, atol=1e-6, rtol=1e-3, msg=str(site))
