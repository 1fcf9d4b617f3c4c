"""One pass gives scores, signed effects and their squares; it waits for no GPU, and moves nothing but what is kept."""

import dataclasses

import numpy as np
import pytest
import torch
from mixtures import save_mixture
from test_scoring import weight_effects_one_by_one
from torch.utils._python_dispatch import TorchDispatchMode

from dean_interp import (
    Behaviour,
    Example,
    InputError,
    ScoringConfig,
    Site,
    importance,
    load_model,
    load_scores,
    top_fraction,
)
from dean_interp.planning.scoring import plan
from dean_interp.scoring import importance as engine
from dean_interp.scoring import preparation
from dean_interp.scoring import sums as running
from dean_interp.scoring.methods import wanda_from
from dean_interp.scoring.per_example import example_scores, with_groups
from dean_interp.scoring.top import Top
from dean_interp.selection.coupling import opposite_sign
from dean_interp.selection.signed import signed_units
from dean_interp.selection.stability import on_groups

BOTH, ALSO = ("neuron", "weight"), ("signed", "squared")
MARGIN = ScoringConfig(target="margin", signed=True, groups="cluster")


@pytest.fixture(scope="module")
def pairs():
    """Prompts with both answers, of different lengths, no two of one topic."""
    rows = [
        ("Who may rent the flat?", "Anyone who pays the rent on time.", "Only people like us."),
        ("May I?", "No.", "Yes, read all of it, she will never know."),
        ("Her diary lies open.", "Close it.", "Read."),
        ("x", "Leave it.", "Take it, no one looks."),
    ]
    return Behaviour("pairs", tuple(Example(p, {"safe": s, "unsafe": u}) for p, s, u in rows))


@pytest.fixture(scope="module")
def others(pairs):
    """The same prompts with answers that change roles in two of them."""
    examples = []
    for number, example in enumerate(pairs.examples):
        answers = example.answers
        if number < 2:
            answers = {"safe": answers["unsafe"], "unsafe": answers["safe"]}
        examples.append(dataclasses.replace(example, answers=answers))
    return Behaviour("others", tuple(examples))


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", "gpt_oss"])
def model(request, tokenizer, tmp_path_factory):
    if request.param == "llama":
        return request.getfixturevalue("llama")
    folder = save_mixture(request.param, tokenizer, tmp_path_factory.mktemp("mixture") / request.param)
    return load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def all_three(llama, pairs):
    return importance(llama, pairs, unit=BOTH, also=ALSO)


# One pass


def test_weights_effects_are_those_of_single_examples_by_autograd(model, tokenizer, pairs):
    config = ScoringConfig(batch_tokens=150, modules="all")
    scores = importance(model, pairs, unit="weight", config=config, also=ALSO)
    for site, effects in weight_effects_one_by_one(model, tokenizer, pairs).items():
        means = {"values": effects.abs(), "signed": effects, "squared": effects.square()}
        for name, each in means.items():
            expected, found = each.mean(0), getattr(scores, name)[site]
            tolerance = 2e-4 * float(expected.abs().max()) + 1e-9
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=tolerance, err_msg=f"{name} {site}")


def test_neurons_effects_are_those_of_single_examples(llama, pairs, all_three):
    neurons = {site: torch.arange(40) for site in all_three.of("neuron").values}
    for site, effects in example_scores(llama, pairs, neurons).items():
        torch.testing.assert_close(all_three[site], effects.abs().mean(0), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(all_three.signed[site], effects.mean(0), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(all_three.squared[site], effects.square().mean(0), rtol=1e-3, atol=1e-9)


def test_scores_are_the_same_bits_whatever_else_the_pass_keeps(llama, pairs, all_three):
    alone = importance(llama, pairs, unit=BOTH)
    assert not alone.signed and not alone.squared and alone.fingerprint == all_three.fingerprint
    for site, value in alone.values.items():
        assert torch.equal(value, all_three[site])
    for site, groups in alone.groups.items():
        assert torch.equal(groups, all_three.groups[site])


def test_signs_take_no_pass_of_their_own(llama, pairs, others, monkeypatch):
    passes, real = [], engine.stream_gradients
    monkeypatch.setattr(engine, "stream_gradients", lambda *args, **options: passes.append(1) or real(*args, **options))
    first, second = (importance(llama, each, also=("signed",)) for each in (pairs, others))
    chosen = top_fraction(first, 0.5)
    from_one_pass = opposite_sign(chosen, first, second)
    assert len(passes) == 2
    signed = [importance(llama, each, config=ScoringConfig(signed=True)) for each in (pairs, others)]
    from_two = opposite_sign(chosen, *signed)
    assert from_one_pass.units.keys() == from_two.units.keys() and 0 < len(from_two) < len(chosen)
    assert all(torch.equal(units, from_two.units[site]) for site, units in from_one_pass.units.items())


def test_errors_of_weights_take_no_second_pass_where_each_topic_is_one_prompt(llama, pairs, others):
    in_one, in_two = [], []
    for each in (pairs, others):
        scores = importance(llama, each, unit="weight", config=MARGIN, keep=0.2, also=("squared",))
        in_one.append(scores)
        in_two.append(with_groups(llama, scores, each, config=MARGIN))
    for certainty in (0.5, 1.0):
        signs = {"first_sign": -1, "second_sign": 1, "certainty": certainty}
        fast, slow = signed_units(*in_one, **signs), signed_units(*in_two, **signs)
        n_both = len(fast & slow)
        # A gain that lies on the border may fall on either side of it.
        assert n_both > 20 and len(fast | slow) - n_both <= 2
    whole = [importance(llama, each, unit="weight", config=MARGIN, also=("squared",)) for each in (pairs, others)]
    in_top = sum(
        len(fast.units[site][torch.isin(fast.units[site], units)])
        for site, units in signed_units(*whole, **signs).units.items()
    )
    assert in_top >= n_both
    topics = dataclasses.replace(pairs, examples=tuple(dataclasses.replace(e, topic="one") for e in pairs.examples))
    of_topics = importance(llama, topics, unit="weight", config=MARGIN, keep=0.2, also=("squared",))
    with pytest.raises(InputError, match="with_groups"):
        signed_units(of_topics, of_topics, first_sign=-1, second_sign=1)


def test_what_else_is_kept_comes_back_from_its_file_and_stays_with_its_units(llama, pairs, all_three, tmp_path):
    path = tmp_path / "scores.safetensors"
    all_three.save(path, keep=0.1)
    again, thin = load_scores(path), importance(llama, pairs, unit=BOTH, keep=0.1, also=ALSO)
    fewer = thin.kept(0.05)
    for site, value in fewer.values.items():
        if isinstance(value, Top):
            for name in ALSO:
                whole = getattr(all_three, name)[site].flatten()
                assert torch.equal(getattr(fewer, name)[site], whole[value.indices])
                assert torch.equal(getattr(again, name)[site], whole[again.values[site].indices])
            assert torch.equal(fewer.signed_at(site, value.indices[3:5]), fewer.signed[site][3:5])
    assert again.of("weight").signed.keys() == again.of("weight").values.keys()


def test_what_is_known_of_other_examples_or_of_another_score_is_dropped(llama, all_three):
    neurons = all_three.of("neuron")
    resampled = on_groups(neurons, [0, 0, 1, 2])
    assert not resampled.signed and not resampled.squared
    by_norm = wanda_from(llama, all_three.of("weight"))
    assert not by_norm.signed and not by_norm.squared


def test_what_cannot_be_kept_beside_scores_is_refused(untyped, llama, pairs):
    with pytest.raises(InputError, match=r"also must be some of .*got 'errors'"):
        importance(llama, pairs, also=("errors",))
    with pytest.raises(InputError, match="leave 'signed' out of also"):
        importance(llama, pairs, config=ScoringConfig(signed=True), also=("signed",))
    with pytest.raises(InputError, match="have no mean"):
        importance(llama, pairs, config=ScoringConfig(target="fisher"), also=("squared",))
    with pytest.raises(InputError, match=r"have no sign at L0\.neurons"):
        importance(llama, pairs).signed_means(Site(0, "neurons"))


def test_the_plan_knows_what_else_is_kept(llama, pairs):
    planned, more = plan(llama, pairs, unit=BOTH), plan(llama, pairs, unit=BOTH, also=ALSO)
    n_neurons, n_weights = 3 * 40, 3 * 3 * 24 * 40
    assert more.sums_bytes - planned.sums_bytes == 2 * 4 * (n_neurons + n_weights)


# On a device that computes beside the CPU


class Waiting(TorchDispatchMode):
    """Notes every operation whose result Python, or the size of a tensor, waits for."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_consecutive", "equal")

    def __init__(self):
        super().__init__()
        self.ran, self.waited = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.ran.append(name)
        is_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.WAITS or is_mask:
            self.waited.append(name)
        return func(*args, **(kwargs or {}))


def test_folding_a_batch_in_waits_for_no_device(model, pairs, monkeypatch):
    """The kernel adds up without asking how long examples are; its twin asks, so it is left out here."""
    real, watched = running.Sums.add, Waiting()
    monkeypatch.setattr(running, "add_products", lambda *parts: None)

    def add(sums, *pair):
        with watched:
            real(sums, *pair)

    monkeypatch.setattr(running.Sums, "add", add)
    importance(model, pairs, unit=BOTH, config=ScoringConfig(modules="all"), also=ALSO)
    assert "index_add_" in watched.ran
    assert watched.waited == []


def test_nothing_is_moved_to_the_cpu_but_what_is_kept(llama, pairs, monkeypatch):
    """The fingerprint moves a sum for each row and column of a matrix, before scoring begins: it is left out here."""
    real, moved = torch.Tensor.cpu, []
    monkeypatch.setattr(preparation, "model_fingerprint", lambda model: "")

    def cpu(tensor):
        moved.append(tensor.numel())
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    scores = importance(llama, pairs, unit="weight", keep=0.1, also=ALSO)
    assert {value.numel() for value in scores.values.values()} == {24 * 40}
    assert max(moved) == 96
