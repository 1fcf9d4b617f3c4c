"""What an edit must not do is found: super weights, perplexity, incoherent answers."""

import dataclasses

import pytest
import torch

from dean_interp import Selection, Site, ablate, load_behaviour, load_model, measure
from dean_interp.evaluation.guard import held_super_weights, super_weights
from dean_interp.evaluation.outcomes import INCOHERENT
from dean_interp.models.matrices import neuron_sites, weight, weight_sites
from dean_interp.report.html import write_report
from dean_interp.statistics import Interval
from dean_interp.study.conclusions import faults


def one_weight(model, layer, neuron, channel):
    shapes = {site: tuple(weight(model, site).shape) for site in weight_sites(model)}
    flat = torch.tensor([neuron * shapes[Site(layer, "out")][1] + channel])
    none = torch.zeros(0, dtype=torch.int64)
    return Selection({site: flat if site == Site(layer, "out") else none for site in shapes}, shapes)


def one_neuron(model, layer, neuron):
    none = torch.zeros(0, dtype=torch.int64)
    units = {site: torch.tensor([neuron]) if site.layer == layer else none for site in neuron_sites(model)}
    return Selection(units, {site: (model.cfg.d_mlp,) for site in units})


def test_a_planted_super_weight_is_found_and_a_plain_model_has_none(checkpoints):
    model = load_model(checkpoints["llama"], device="cpu")
    assert super_weights(model) == []
    with torch.no_grad():
        weight(model, Site(1, "gate"))[:, 7] = 40 * torch.sign(torch.randn(model.cfg.d_model))
        weight(model, Site(1, "in"))[:, 7] = weight(model, Site(1, "gate"))[:, 7]
        weight(model, Site(1, "out"))[7, 5] = 30
    (found,) = super_weights(model)
    assert str(found) == "L1.out[7, 5]" and abs(found.output) > abs(found.activation) > 0
    assert held_super_weights(one_weight(model, 1, 7, 5), [found]) == [found]
    assert held_super_weights(one_neuron(model, 1, 7), [found]) == [found]
    for other in (one_weight(model, 1, 7, 6), one_weight(model, 2, 7, 5), one_neuron(model, 1, 8)):
        assert held_super_weights(other, [found]) == []


@pytest.mark.slow
def test_one_weight_of_the_demo_model_breaks_it_and_is_among_those_found(demo_model):
    found = {str(one): one for one in super_weights(demo_model)}
    assert "L11.out[1229, 507]" in found and len(found) < 6
    tests = [load_behaviour("general", n_examples=12, split="test")]
    before = measure(demo_model, tests)["general"].perplexity
    with ablate(demo_model, one_weight(demo_model, 11, 1229, 507)):
        assert measure(demo_model, tests)["general"].perplexity > 3 * before


@pytest.mark.slow
def test_faults_name_what_was_measured_and_stand_in_the_report(finished_study, tmp_path):
    results = finished_study[1]
    unit = results.units[0]
    # Answers that do not change, so that what is found is what is planted.
    still = [line for line in unit.edit.lines if not line.metric.startswith(INCOHERENT)]
    edit = dataclasses.replace(unit.edit, lines=tuple(still), perplexity=results.original.perplexity)
    broken = dataclasses.replace(edit, perplexity=2 * results.original.perplexity)
    assert "rises 2.00 times" in faults(broken, results.original, [])[0]
    assert not faults(dataclasses.replace(edit, perplexity=1.19 * results.original.perplexity), results.original, [])
    line = next(line for line in unit.edit.lines if line.metric.startswith(INCOHERENT))
    rising = dataclasses.replace(line, change=Interval(0.3, 0.1, 0.5, 4))
    (found,) = faults(dataclasses.replace(edit, lines=(*still, rising)), results.original, [])
    assert found == f"incoherent answers to {line.on.replace('_', ' ')} prompts rise by 30 points [10, 50]"
    shown = dataclasses.replace(results, units=(dataclasses.replace(unit, faults=(found,)), *results.units[1:]))
    text = write_report(shown, tmp_path).read_text()
    assert f"Do not ship the {unit.unit} edit:" in text and found in text
    faultless = tuple(dataclasses.replace(one, faults=()) for one in results.units)
    assert "Do not ship" not in write_report(dataclasses.replace(results, units=faultless), tmp_path).read_text()
