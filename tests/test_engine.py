"""The scoring engine: exact on every architecture, whatever the batches, within the memory that was foreseen."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from architectures import BUILD, build
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from test_scoring import weights_one_by_one

from dean_interp import (
    Behaviour,
    Example,
    InputError,
    Scores,
    ScoringConfig,
    Selection,
    Site,
    ablate,
    couple,
    importance,
    load_model,
    load_scores,
    top_fraction,
)
from dean_interp.models.loss import answer_log_probs
from dean_interp.models.matrices import neuron_sites, weight, weight_sites
from dean_interp.models.tokens import collate, encode, paths
from dean_interp.planning.scoring import plan
from dean_interp.scoring import importance as engine
from dean_interp.scoring import sums
from dean_interp.scoring.answer_contrast import answer_contrast
from dean_interp.scoring.integrated_gradients import integrated_gradients
from dean_interp.scoring.methods import (
    activation_contrast,
    magnitude,
    random,
    wanda,
)
from dean_interp.scoring.per_example import example_scores
from dean_interp.scoring.top import thinned
from dean_interp.selection.coupling import opposite_sign, refuse_empty
from dean_interp.selection.strata import strata

BOTH = ("neuron", "weight")


@pytest.fixture(scope="module")
def pairs():
    """Prompts with both answers, of different lengths."""
    rows = [
        ("Who may rent the flat?", "Anyone who pays the rent on time.", "Only people like us."),
        ("May I?", "No.", "Yes, read all of it, she will never know."),
        ("Her diary lies open.", "Close it.", "Read."),
        ("A man of sixty applied.", "Judge his work, not his age, as with all the others who applied.", "Bin it."),
        ("x", "Leave it.", "Take it, no one looks."),
    ]
    return Behaviour("pairs", tuple(Example(p, {"safe": s, "unsafe": u}) for p, s, u in rows))


@pytest.fixture(params=list(BUILD))
def model(request, tokenizer):
    return build(request.param, tokenizer)


def close(first, second, *, rtol=2e-3, atol=1e-7):
    assert first.values.keys() == second.values.keys()
    for site in first.values:
        np.testing.assert_allclose(first[site], second[site], rtol=rtol, atol=atol, err_msg=str(site))


def mean_loss(model, behaviour, target="response"):
    """Of the whole behaviour, as scoring defines it (nats)."""
    kinds = ["safe", "unsafe"] if target == "margin" else [behaviour.response]
    encoded = [encode(model_tokenizer(model), e.prompt, [e.answers[k] for k in kinds]) for e in behaviour.examples]
    rows = paths(encoded)
    batch = collate(rows, device="cpu")
    with torch.inference_mode():
        tokens = -answer_log_probs(model, batch).log_prob.double()
    each = torch.stack([tokens[batch.answer == i].mean() for i in range(len(rows))])
    each = each.unflatten(0, (-1, len(kinds)))
    return float((each[:, 0] - each[:, 1]).mean() if target == "margin" else each.mean())


def model_tokenizer(model):
    from dean_interp.models.native_tokenizer import native_tokenizer

    return native_tokenizer(model)


# Exact on every architecture


def test_weight_scores_equal_the_definition_on_every_architecture(model, tokenizer, pairs):
    scores = importance(model, pairs, unit="weight", config=ScoringConfig(batch_tokens=100, modules="all"))
    for site, value in weights_one_by_one(model, tokenizer, pairs).items():
        np.testing.assert_allclose(scores[site], value, rtol=5e-3, atol=1e-7, err_msg=str(site))


def test_batches_padding_passes_and_order_never_change_a_score(model, pairs):
    expected = importance(model, pairs, unit=BOTH, config=ScoringConfig(batch_tokens=1))
    shuffled = dataclasses.replace(pairs, examples=pairs.examples[::-1])
    close(importance(model, pairs, unit=BOTH, config=ScoringConfig(batch_tokens=4096)), expected)
    close(importance(model, pairs, unit=BOTH, config=ScoringConfig(padding="left")), expected)
    close(importance(model, pairs, unit=BOTH, config=ScoringConfig(layers_per_pass=1)), expected)
    close(importance(model, shuffled, unit=BOTH), expected)


def test_ablating_an_attention_weight_equals_zeroing_it(model):
    site = Site(1, "v")
    matrix = weight(model, site)
    shapes = {one: tuple(weight(model, one).shape) for one in weight_sites(model, "all")}
    units = {one: torch.zeros(0, dtype=torch.int64) for one in shapes} | {site: torch.tensor([3, 50, 101])}
    tokens = torch.arange(12)[None] + 5
    with ablate(model, Selection(units, shapes)), torch.inference_mode():
        hooked = model(tokens, return_type="logits")
    kept = matrix.detach().clone()
    with torch.no_grad():
        matrix.flatten()[units[site]] = 0
        if matrix.flatten().data_ptr() != matrix.data_ptr():  # a transposed view: flatten copied
            for flat in units[site].tolist():
                matrix[flat // matrix.shape[1], flat % matrix.shape[1]] = 0
        zeroed = model(tokens, return_type="logits")
        matrix.copy_(kept)
        assert not torch.allclose(model(tokens, return_type="logits"), zeroed, atol=1e-4)
    torch.testing.assert_close(hooked, zeroed, atol=1e-4, rtol=1e-4)


# What the numbers mean


@pytest.mark.parametrize("target", ["response", "margin"])
def test_signed_scores_are_the_derivative_of_the_target(llama, pairs, target):
    """Scale one neuron by 1 - step: the loss moves by minus its signed score, times the step."""
    scores = importance(llama, pairs, config=ScoringConfig(signed=True, target=target))
    site, step, before = Site(1, "neurons"), 1e-2, mean_loss(llama, pairs, target)
    for index in scores.top(site, 4).tolist():

        def shrink(activation, hook, index=index):
            scaled = activation.clone()
            scaled[..., index] *= 1 - step
            return scaled

        with llama.hooks(fwd_hooks=[(site.hook_name, shrink)]):
            change = mean_loss(llama, pairs, target) - before
        assert change == pytest.approx(-step * float(scores[site][index]), rel=0.05)


def test_margin_losses_are_safe_minus_unsafe(llama, pairs):
    scores = importance(llama, pairs, config=ScoringConfig(target="margin", batch_tokens=60))
    assert float(scores.loss.mean()) == pytest.approx(mean_loss(llama, pairs, "margin"), abs=1e-5)


def test_absolute_scores_bound_signed_ones_and_equal_them_for_one_example(llama, pairs):
    absolute = importance(llama, pairs, unit=BOTH)
    signed = importance(llama, pairs, unit=BOTH, config=ScoringConfig(signed=True))
    for site in absolute.values:
        assert bool((signed[site].abs() <= absolute[site] + 1e-6).all())
    one = dataclasses.replace(pairs, examples=pairs.examples[:1])
    signed = importance(llama, one, unit=BOTH, config=ScoringConfig(signed=True))
    for site, value in importance(llama, one, unit=BOTH).values.items():
        torch.testing.assert_close(signed[site].abs(), value, rtol=1e-3, atol=1e-7)


def test_scores_per_example_add_up_to_the_scores(llama, pairs):
    scores = importance(llama, pairs, unit=BOTH)
    for unit in BOTH:
        chosen = top_fraction(scores.of(unit), 0.1)
        each = example_scores(llama, pairs, chosen.units, config=ScoringConfig(batch_tokens=90))
        for site, indices in chosen.units.items():
            assert each[site].shape == (len(pairs), len(indices))
            torch.testing.assert_close(each[site].abs().mean(0), scores.at(site, indices), rtol=2e-3, atol=1e-7)


def test_scores_per_example_of_no_unit_are_empty_and_of_fisher_information_refused(llama, pairs):
    site = Site(0, "neurons")
    nothing = example_scores(llama, pairs, {site: torch.zeros(0, dtype=torch.int64)})
    assert nothing[site].shape == (len(pairs), 0)
    with pytest.raises(InputError, match="target='fisher' has effects of tokens"):
        example_scores(llama, pairs, {site: torch.arange(2)}, config=ScoringConfig(target="fisher"))


def test_groups_of_examples_average_to_the_scores(llama, pairs):
    many = Behaviour(
        "many", tuple(dataclasses.replace(e, prompt=f"{e.prompt} {i}") for i in range(4) for e in pairs.examples)
    )
    scores = importance(llama, many)
    sizes = torch.bincount(torch.arange(20) % 16).float()
    for site in scores.values:
        assert scores.groups[site].shape == (16, 40)
        torch.testing.assert_close((scores.groups[site] * sizes[:, None]).sum(0) / 20, scores[site])
    few = importance(llama, dataclasses.replace(many, examples=many.examples[16:17]))
    assert few.groups[Site(0, "neurons")].shape == (1, 40)


def test_integrated_gradients_add_up_to_the_loss_that_a_silenced_layer_costs(llama, pairs):
    scores = integrated_gradients(llama, pairs, n_steps=16, config=ScoringConfig(signed=True))
    before = mean_loss(llama, pairs)
    for site in neuron_sites(llama):
        whole = Selection({site: torch.arange(40)}, {site: (40,)})
        with ablate(llama, whole):
            change = mean_loss(llama, pairs) - before
        assert float(scores[site].sum()) == pytest.approx(-change, rel=0.01, abs=1e-4)
    assert float(scores.loss.mean()) == pytest.approx(before, abs=1e-5)


def test_wanda_is_size_times_the_norm_of_the_input(llama, pairs):
    scores, gradients = wanda(llama, pairs), importance(llama, pairs, unit="weight")
    for site in weight_sites(llama):
        torch.testing.assert_close(scores.activation_norm[site], gradients.activation_norm[site], rtol=1e-4, atol=1e-6)
        expected = weight(llama, site).detach().abs() * scores.activation_norm[site][:, None]
        torch.testing.assert_close(scores[site], expected)
    strata(llama, [scores])


def test_activation_contrast_is_cohens_d_at_the_positions_that_predict_an_answer(llama, pairs):
    site, found = Site(2, "neurons"), {"safe": [], "unsafe": []}
    for example in pairs.examples:
        for kind, tokens in found.items():
            one = encode(model_tokenizer(llama), example.prompt, [example.answers[kind]])
            _, cache = llama.run_with_cache(torch.tensor([one.prompt + one.answers[0]]))
            tokens.append(cache[site.hook_name][0, len(one.prompt) - 1 : -1].detach())
    safe, unsafe = (torch.cat(tokens) for tokens in found.values())
    spread = ((safe.var(0, correction=0) + unsafe.var(0, correction=0)) / 2).sqrt()
    expected = (safe.mean(0) - unsafe.mean(0)) / spread
    signed = activation_contrast(llama, pairs, config=ScoringConfig(signed=True, batch_tokens=120))
    torch.testing.assert_close(signed[site], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(activation_contrast(llama, pairs)[site], expected.abs(), rtol=1e-3, atol=1e-4)


def planted_contrast(site, safe, unsafe):
    """The contrast of neurons with these activations where a token of a safe and of an unsafe answer is predicted."""
    sums = {"sum": [], "square": [], "slots": []}
    for columns in (safe, unsafe, [[*a, *b] for a, b in zip(safe, unsafe, strict=True)]):
        sums["sum"].append([sum(column) for column in columns])
        sums["square"].append([sum(value**2 for value in column) for column in columns])
        sums["slots"].append([len(column) for column in columns[: site.n_experts]])
    return answer_contrast([site], {f"{kind}/{site}": torch.tensor(rows).float() for kind, rows in sums.items()})


def test_a_neuron_whose_expert_saw_few_tokens_of_a_group_is_not_contrasted():
    often = [0.0, 2.0] * 5
    safe = [often, [1.0], often, often[:9], [], often]
    unsafe = [[x + 3 for x in often], often, [4.0], often, often, [7.0, 9.0]]
    contrast = planted_contrast(Site(0, "experts", 6), safe, unsafe)
    # A deviation of 1 in both groups; of one token, of none, and of nine beside ten there is no comparison.
    assert contrast.values[Site(0, "experts", 6)].tolist() == pytest.approx([-3.0, 0, 0, 0, 0, 0], rel=1e-6)
    assert contrast.means[Site(0, "experts", 6)][1] == pytest.approx(1.0)


def test_a_neuron_that_does_not_vary_beyond_rounding_has_no_contrast_of_its_rounding():
    steady, other = [0.1] * 700, [0.1] * 699 + [0.1 + 1e-7]
    contrast = planted_contrast(Site(0, "neurons"), [steady], [other]).values[Site(0, "neurons")]
    assert abs(float(contrast)) < 0.01
    # One that tells the groups apart without a spread is above every other, and finite.
    apart = planted_contrast(Site(0, "neurons"), [[1.0] * 20], [[-1.0] * 20]).values[Site(0, "neurons")]
    assert float(apart) == pytest.approx(2 / 1e-3, rel=1e-3)


def test_activation_contrast_of_a_handful_of_tokens_is_refused(llama):
    short = Behaviour("short", (Example("May I?", {"safe": "No.", "unsafe": "Yes, all of it is yours."}),))
    with pytest.raises(InputError, match=r"needs 10 tokens of safe and of unsafe answers at least; those of 'short' h"):
        activation_contrast(llama, short)


def test_magnitude_and_random_look_at_no_example(llama, pairs):
    scores = magnitude(llama, pairs, unit=BOTH)
    torch.testing.assert_close(scores[Site(0, "in")], weight(llama, Site(0, "in")).detach().abs())
    torch.testing.assert_close(scores[Site(0, "neurons")], weight(llama, Site(0, "out")).detach().norm(dim=1))
    one, again, other = (random(llama, pairs, unit=BOTH, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[site], again[site]) and not torch.equal(one[site], other[site]) for site in one.values)
    assert not scores.prompt_hashes and not one.prompt_hashes
    with pytest.raises(InputError, match="strata need activation norms"):
        strata(llama, [scores])


def test_first_order_scores_rank_neurons_by_what_silencing_them_does(llama, pairs):
    """Spearman correlation with the measured change of each example's loss, all 120 neurons; chance is 0 +- 0.09."""
    kinds = {
        "gradient": importance(llama, pairs),
        "integrated": integrated_gradients(llama, pairs),
        "magnitude": magnitude(llama, pairs),
        "random": random(llama, pairs),
    }
    before = example_losses(llama, pairs)
    measured = {}
    for site in neuron_sites(llama):
        for index in range(40):
            with ablate(llama, Selection({site: torch.tensor([index])}, {site: (40,)})):
                measured[site, index] = float((example_losses(llama, pairs) - before).abs().mean())
    rank = {
        name: spearmanr([float(scores[site][index]) for site, index in measured], list(measured.values())).statistic
        for name, scores in kinds.items()
    }
    assert rank["gradient"] > 0.9 and rank["integrated"] > 0.9
    assert rank["magnitude"] < rank["gradient"] - 0.1 and abs(rank["random"]) < 0.3


def example_losses(model, behaviour):
    one = [dataclasses.replace(behaviour, examples=(example,)) for example in behaviour.examples]
    return torch.tensor([mean_loss(model, each) for each in one])


def test_opposite_signs_are_found_among_coupled_units(llama, pairs):
    first = importance(llama, pairs, config=ScoringConfig(signed=True))
    flipped = dataclasses.replace(first, values={site: -value for site, value in first.values.items()})
    chosen = top_fraction(first, 0.2)
    assert len(opposite_sign(chosen, first, flipped)) == len(chosen) > 0
    assert len(opposite_sign(chosen, first, first)) == 0
    # However small: the product of two such effects is 0 in float32.
    tiny, opposite = (
        dataclasses.replace(scores, values={site: value * 1e-28 for site, value in scores.values.items()})
        for scores in (first, flipped)
    )
    assert len(opposite_sign(chosen, tiny, opposite)) == len(chosen)
    with pytest.raises(InputError, match="signed"):
        opposite_sign(chosen, first, importance(llama, pairs))


# Memory


class OutOfMemory:
    """An allocator with room for so many tokens a batch; it fails in the middle of a backward pass."""

    def __init__(self, room, fails_at):
        self.room, self.fails_at, self.n_failed, self.n_tokens = room, fails_at, 0, []

    def __call__(self, add):
        def limited(sums, site, x, gradient):
            if site == self.fails_at and sums.real.numel() > self.room:
                self.n_failed += 1
                raise torch.OutOfMemoryError("CUDA out of memory (in a test)")
            self.n_tokens.append(sums.real.numel())
            return add(sums, site, x, gradient)

        return limited


@pytest.mark.parametrize("target", ["response", "margin"])
def test_out_of_memory_halves_the_batch_and_loses_nothing(llama, pairs, monkeypatch, target, caplog):
    """Later layers were folded in before memory ran out: they must not be folded in twice."""
    expected = importance(llama, pairs, unit=BOTH, config=ScoringConfig(target=target))
    memory = OutOfMemory(room=200, fails_at=Site(1, "in"))
    monkeypatch.setattr(engine.Sums, "add", memory(engine.Sums.add))
    close(importance(llama, pairs, unit=BOTH, config=ScoringConfig(target=target, batch_tokens=4096)), expected)
    assert memory.n_failed >= 1 and "going on with batches of" in caplog.text


@pytest.mark.parametrize("site", [Site(1, "neurons"), Site(1, "out")])
def test_memory_that_runs_out_within_a_site_adds_nothing_twice(llama, pairs, monkeypatch, site):
    """What a site reads takes memory after its effects are made: where that fails, no effect may stay in the sums."""
    expected = importance(llama, pairs, unit=BOTH)
    summed_where, failures = sums.summed_where, []

    def limited(model, where_read, values, where):
        if where_read == site and len(where) > 1:
            failures.append(len(where))
            raise torch.OutOfMemoryError("CUDA out of memory (in a test)")
        return summed_where(model, where_read, values, where)

    monkeypatch.setattr(sums, "summed_where", limited)
    close(importance(llama, pairs, unit=BOTH, config=ScoringConfig(batch_tokens=4096)), expected)
    assert failures


def test_one_example_that_does_not_fit_is_an_error_that_names_the_ways_out(llama, pairs, monkeypatch):
    memory = OutOfMemory(room=1, fails_at=Site(1, "neurons"))
    monkeypatch.setattr(engine.Sums, "add", memory(engine.Sums.add))
    with pytest.raises(InputError, match=r"does not fit into memory.*layers_per_pass.*max_tokens"):
        importance(llama, pairs)


def test_other_runtime_errors_pass_through(llama, pairs, monkeypatch):
    def broken(*args):
        raise RuntimeError("something else")

    monkeypatch.setattr(engine.Sums, "add", broken)
    with pytest.raises(RuntimeError, match="something else"):
        importance(llama, pairs)


def test_a_plan_says_what_the_sums_take_and_fewer_layers_a_pass_where_memory_is_short(llama, pairs):
    wide = plan(llama, pairs, unit=BOTH)
    matrices, neurons = [(24, 40), (24, 40), (40, 24)], 40 * (2 + len(pairs))
    assert wide.sums_bytes == 4 * 3 * (sum(n_in * n_out + n_in for n_in, n_out in matrices) + neurons)
    assert wide.n_passes == 1 and wide.layers_per_pass == 3
    assert wide.peak_bytes == wide.held_bytes + wide.sums_bytes + wide.batch_bytes and wide.fits
    small = plan(llama, pairs, unit=BOTH, free_bytes=int((wide.sums_bytes * 0.5 + wide.batch_bytes) / 0.8))
    assert small.n_passes > 1 or small.batch_tokens < wide.batch_tokens
    assert small.sums_bytes + small.batch_bytes <= 0.8 * small.free_bytes
    close(importance(llama, pairs, unit=BOTH, config=small.apply(ScoringConfig())), importance(llama, pairs, unit=BOTH))
    with pytest.raises(InputError, match="do not fit into 80%"):
        plan(llama, pairs, unit=BOTH, free_bytes=1000)


def test_passes_over_some_layers_are_kept_when_the_next_one_is_killed(llama, pairs, tmp_path, monkeypatch):
    how, path = ScoringConfig(layers_per_pass=1, batch_tokens=100), tmp_path / "scores.unfinished"
    expected = importance(llama, pairs, unit=BOTH, config=how)
    real, n_batches = engine.stream_gradients, []

    def dies(*args, **options):
        n_batches.append(1)
        if len(n_batches) == 7:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(engine, "stream_gradients", dies)
    with pytest.raises(KeyboardInterrupt):
        importance(llama, pairs, unit=BOTH, config=how, unfinished=path)
    done = len(n_batches) - 1
    resumed = importance(llama, pairs, unit=BOTH, config=how, unfinished=path)
    assert all(torch.equal(resumed[site], expected[site]) for site in expected.values)
    total = len(n_batches) - 1
    monkeypatch.undo()
    assert done == 6 and total - done < total


def test_the_sums_of_one_pass_are_gone_before_the_next_one_begins(llama, pairs, monkeypatch):
    """Else fewer layers a pass would save no memory."""
    held, real = [], engine.Sums

    def watched(*args, **options):
        held.append(sum(one.numel() for earlier in made for name, one in earlier.sums.items() if "/" in name))
        made.append(real(*args, **options))
        return made[-1]

    made: list[engine.Sums] = []
    monkeypatch.setattr(engine, "Sums", watched)
    importance(llama, pairs, unit=BOTH, config=ScoringConfig(layers_per_pass=1))
    assert held == [0, 0, 0]


@pytest.mark.parametrize("layers", [None, 1])
def test_what_is_kept_of_each_pass_is_what_is_kept_of_the_whole(llama, pairs, layers):
    expected = importance(llama, pairs, unit=BOTH).kept(0.1)
    found = importance(llama, pairs, unit=BOTH, config=ScoringConfig(layers_per_pass=layers), keep=0.1)
    assert found.shapes == expected.shapes and found.fingerprint == expected.fingerprint
    for site, value in expected.values.items():
        if site.unit == "neuron":
            assert torch.equal(found[site], value)
        else:
            assert torch.equal(found.values[site].indices, value.indices)
            assert torch.equal(found.values[site].values, value.values)
            assert found.values[site].threshold == value.threshold


# Precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_are_scored_in_float32_sums(checkpoints, llama, pairs, dtype):
    """The top set is close to that of float32; how close on a real model, docs/performance.md says."""
    low = load_model(checkpoints["llama-gqa"], device="cpu", dtype=dtype)
    scores, expected = importance(low, pairs), importance(llama, pairs)
    assert all(value.dtype == torch.float32 for value in scores.values.values())
    assert scores.facts["dtype"] == dtype
    both = top_fraction(scores, 0.25) & top_fraction(expected, 0.25)
    assert len(both) >= 0.8 * 30


def test_an_overflow_stops_with_the_layer_and_the_example(llama, pairs, monkeypatch):
    real = engine.Sums.add

    def overflow(sums, site, x, gradient):
        if site == Site(1, "neurons"):
            gradient = gradient.clone()
            gradient[sums.examples == 3] = math.inf
        return real(sums, site, x, gradient)

    monkeypatch.setattr(engine.Sums, "add", overflow)
    with pytest.raises(InputError, match=r"gradient of example 3 is not finite in layer 1 \(L1.neurons\)"):
        importance(llama, pairs)


def test_an_overflow_stops_every_method_that_takes_gradients(llama, pairs, monkeypatch):
    real = engine.Sums.note_finite

    def overflow(sums, site, gradient):
        gradient = gradient.clone()
        gradient[sums.examples == 2] = math.nan
        real(sums, site, gradient)

    monkeypatch.setattr(engine.Sums, "note_finite", overflow)
    scored = (
        lambda: importance(llama, pairs),
        lambda: integrated_gradients(llama, pairs, n_steps=1),
        lambda: example_scores(llama, pairs, {Site(1, "out"): torch.arange(3)}),
    )
    for score in scored:
        with pytest.raises(InputError, match="gradient of example 2 is not finite"):
            score()


# Text


def test_long_answers_are_cut_on_request_and_counted(llama, pairs, caplog):
    lengths = [len(one.tokens) for row in engine.prepare(llama, pairs, ScoringConfig()).rows for one in row]
    limit = sorted(lengths[::2])[-1] + 5
    scores = importance(llama, pairs, config=ScoringConfig(max_tokens=limit))
    n_cut = sum(a + b > limit for a, b in zip(lengths[::2], lengths[1::2], strict=True))
    assert scores.facts["n_truncated"] == n_cut > 0 and f"{n_cut} answers of pairs were cut" in caplog.text
    assert scores.fingerprint != importance(llama, pairs).fingerprint
    with pytest.raises(InputError, match="which leaves none of max_tokens=3"):
        importance(llama, pairs, config=ScoringConfig(max_tokens=3))
    with pytest.raises(InputError, match=r"max_tokens must be in 1\.\.1024"):
        importance(llama, pairs, config=ScoringConfig(max_tokens=4000))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"target": "both"}, "target must be one of"),
        ({"modules": "heads"}, "modules must be one of"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        ({"layers_per_pass": 0}, "layers_per_pass must be at least 1, got 0"),
    ],
)
def test_a_wrong_setting_says_what_is_allowed(llama, pairs, how, message, untyped):
    with pytest.raises(InputError, match=message):
        importance(llama, pairs, unit="weight", config=ScoringConfig(**how))


def test_a_fraction_to_keep_that_is_none_is_refused_before_any_pass(llama, pairs, monkeypatch):
    monkeypatch.setattr(engine, "stream_gradients", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(InputError, match=r"keep must be in \(0, 1\], got 0"):
        importance(llama, pairs, unit="weight", keep=0.0)


def test_methods_that_need_pairs_say_so(llama):
    single = Behaviour("single", (Example("Why?", {"response": "Because."}),))
    with pytest.raises(InputError, match="target='margin' needs a safe and an unsafe answer"):
        importance(llama, single, config=ScoringConfig(target="margin"))
    with pytest.raises(InputError, match="activation_contrast needs a safe and an unsafe answer"):
        activation_contrast(llama, single)


# On disk


def test_a_file_holds_the_top_of_each_matrix_and_says_how_to_get_more(llama, pairs, tmp_path):
    scores = importance(llama, pairs, unit=BOTH)
    scores.save(tmp_path / "top.safetensors", keep=0.1)
    loaded, site = load_scores(tmp_path / "top.safetensors"), Site(1, "gate")
    assert loaded.values[site].indices.tolist() == scores.top(site, 96).tolist()
    assert loaded.values[site].threshold == float(scores[site].flatten()[scores.top(site, 96)].min())
    assert torch.equal(loaded[Site(1, "neurons")], scores[Site(1, "neurons")]), "neurons are whole"
    assert torch.equal(loaded.groups[Site(1, "neurons")], scores.groups[Site(1, "neurons")])
    one, other = (top_fraction(each.of("weight"), 0.05) for each in (loaded, scores))
    assert one.fingerprint == other.fingerprint
    with pytest.raises(InputError, match=r"144 weights of L0.gate were asked for.*hold its top 96.*at least 0.15"):
        top_fraction(loaded.of("weight"), 0.15)
    with pytest.raises(InputError, match="only the top 96 of 960 scores"):
        loaded[site]
    scores.save(tmp_path / "all.safetensors", keep=1.0)
    whole = load_scores(tmp_path / "all.safetensors")
    assert all(torch.equal(whole[each], value) for each, value in scores.values.items())
    assert whole.facts == scores.facts and whole.facts["method"] == "importance"
    assert set(whole.facts["versions"]) == {"dean_interp", "torch", "transformers", "transformer_lens"}


def test_coupling_from_kept_scores_is_that_from_all(llama, pairs):
    behaviours = [dataclasses.replace(pairs, name=name, response=kind) for name, kind in
                  (("a", "safe"), ("b", "unsafe"))]  # fmt: skip
    general = Behaviour("general", tuple(Example(f"What is {i}?", {"response": f"It is {i * i}."}) for i in range(5)))
    scores = [importance(llama, each, unit="weight") for each in (*behaviours, general)]
    whole = couple(*scores, fraction=0.05).coupled
    assert couple(*(each.kept(0.05) for each in scores), fraction=0.05).coupled.fingerprint == whole.fingerprint
    kept = [each.kept(0.05) for each in (*scores[:2], scores[0])]
    with pytest.raises(InputError, match="no coupled unit at fraction"):
        refuse_empty(couple(*kept, fraction=(0.004, 0.004, 0.05)), *kept)


@settings(max_examples=40)
@given(values=st.lists(st.integers(-3, 3), min_size=6, max_size=6), count=st.integers(1, 6), kept=st.integers(1, 6))
def test_the_top_of_what_was_kept_is_the_top(values, count, kept):
    site = Site(0, "gate")
    matrix = {site: torch.tensor(values, dtype=torch.float32).reshape(2, 3)}
    scores = Scores("made up", matrix, {}, {}, {}, torch.zeros(0), frozenset(), "", {})
    thinned = scores.kept(min(1.0, kept / 6 + 1e-9))
    if count <= kept:
        assert thinned.top(site, count).tolist() == scores.top(site, count).tolist()
        assert torch.equal(thinned.at(site, thinned.top(site, count)), scores.at(site, scores.top(site, count)))


@pytest.mark.parametrize("count", [101, 123, 290, 617])
def test_the_share_that_is_to_be_kept_keeps_what_was_asked_for(count):
    values = torch.rand(1000).reshape(20, 50)
    site = Site(0, "in")
    kept = thinned("pairs", site, values, 0.1)
    fields = {"activation_mean": {}, "activation_norm": {}, "groups": {}, "loss": torch.zeros(0)}
    scores = Scores("pairs", {site: kept}, **fields, prompt_hashes=frozenset(), fingerprint="", facts={})
    with pytest.raises(InputError, match=r"score again and keep at least [\d.]+ \(keep") as refused:
        scores.top(site, count)
    advised = float(re.findall(r"at least ([\d.]+)", str(refused.value))[0])
    assert count <= len(thinned("pairs", site, values, advised).indices) <= count + 1


@pytest.mark.parametrize("harm", ["nan", "order", "missing"])
def test_a_file_with_harmed_scores_is_refused(llama, pairs, tmp_path, harm):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "s.safetensors"
    importance(llama, pairs, unit="weight").save(path, keep=0.1)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if harm == "nan":
        tensors["values/L0.gate"][0] = math.nan
    elif harm == "order":
        tensors["top/L0.gate"] = tensors["top/L0.gate"].flip(0).contiguous()
    else:
        del tensors["top/L0.gate"]
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match="is damaged"):
        load_scores(path)
