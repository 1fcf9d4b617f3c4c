"""Arms that change activations: steering, directional ablation, affine maps, AUROC damping; one reading for all."""

import dataclasses

import numpy as np
import pytest
import torch
from architectures import build
from hooked import as_hooked_transformer
from planted_coupling import WORDS
from planted_gates import HELPS_BOTH, LAYER, planted_model
from sklearn.metrics import roc_auc_score
from units import logits_of

from dean_interp import Behaviour, Example, InputError, ModelConfig, Site, generate, load_model
from dean_interp.arms.affine_maps import LinearTransport, displacement
from dean_interp.arms.answer_statistics import DEPTHS, answer_statistics, layer_at
from dean_interp.arms.arm import ArmExamples
from dean_interp.arms.auroc_damping import AurocDamping, auroc
from dean_interp.arms.directional_ablation import AblatedDirections, DirectionalAblation, span
from dean_interp.arms.mean_differences import mean_differences
from dean_interp.arms.steering import Steering
from dean_interp.evaluation.measure import measure
from dean_interp.models.loss import answer_log_probs
from dean_interp.models.matrices import neuron_sites
from dean_interp.models.notes import notes
from dean_interp.models.scored_prompts import scored_prompts
from dean_interp.models.sites import residual_hook
from dean_interp.models.tokens import collate, encode, paths, trees
from dean_interp.study.improvement import ImproveConfig

pytestmark = pytest.mark.hooks

CASES = [
    (Steering(), {"depth": 0.4}, 0.3),
    (DirectionalAblation(), {"depth": 0.4}, 0.7),
    (LinearTransport(), {"layers": "all"}, 0.5),
    (AurocDamping(), {"pooling": "max", "share": 1.0}, 0.8),
]
every_arm = pytest.mark.parametrize(("arm", "settings", "dose"), CASES, ids=[arm.name for arm, _, _ in CASES])


def pairs(name, letter, *, n=12, split="calibration"):
    """Prompts in six topics, with answers of several lengths."""
    generator, examples = np.random.default_rng(ord(letter)), []
    for i in range(n):
        words = " ".join(generator.choice(WORDS, size=2 + i % 3))
        ends = ["".join(generator.choice([*"abcdehijklm"], size=2 + i % 4)) for _ in range(2)]
        answers = {"safe": f"{letter}Y{ends[0]}", "unsafe": f"{letter}N{ends[1]}"}
        examples.append(Example(f"{words} {split} {letter}{i}?", answers, f"{letter}-{i // 2}"))
    return Behaviour(name, tuple(examples), split=split)


SCORING = (pairs("first", "f"), pairs("second", "p"))


def given(model, folder, **changes):
    """What an arm gets: the pairs above, in text as it is."""
    model_config = ModelConfig("a folder", template="raw", device="cpu")
    config = ImproveConfig(model=model_config, score_tokens=changes.pop("score_tokens", 512))
    kept = {"scoring": SCORING, "folder": folder, "own_folder": folder / "own"}
    return ArmExamples(model=model, config=config, **(kept | changes))


def flip_of(sign):
    """A flip that gives all topics one sign."""
    return tuple({example.cluster: sign for example in behaviour.examples} for behaviour in SCORING)


def seen_at(model, names):
    """What hook points hold in one pass, behind every other hook."""
    held = {}

    def keeper(name):
        return lambda activation, hook: held.update({name: activation.detach().clone()})

    with model.hooks(fwd_hooks=[(name, keeper(name)) for name in names]):
        logits_of(model)
    return held


def residual_names(model):
    return ["blocks.0.hook_resid_pre", *(residual_hook(layer) for layer in range(len(model.blocks)))]


# All arms


@every_arm
def test_an_arm_changes_the_model_and_undoes_itself_to_the_bit(tiny, tmp_path, arm, settings, dose):
    before = logits_of(tiny)
    change = arm.fit(given(tiny, tmp_path), settings)
    assert 0 < change.first_dose <= change.largest_dose and change.n_bytes > 0
    with change.at(dose).applied(tiny):
        changed = logits_of(tiny)
    assert changed.isfinite().all() and (changed - before).abs().max() > 1e-4
    with pytest.raises(KeyError), change.at(dose).applied(tiny):
        raise KeyError
    assert torch.equal(logits_of(tiny), before)


@every_arm
def test_dose_0_is_the_original_state(llama, tmp_path, arm, settings, dose):
    state = arm.fit(given(llama, tmp_path), settings).at(0.0)
    assert not state.fingerprint
    before = logits_of(llama)
    with state.applied(llama):
        assert torch.equal(logits_of(llama), before)


@every_arm
def test_equal_changes_share_a_fingerprint_and_others_do_not(llama, tmp_path, arm, settings, dose):
    examples = given(llama, tmp_path)
    prints = {arm.fit(examples, settings).at(dose).fingerprint for _ in range(2)}
    assert len(prints) == 1
    other = dataclasses.replace(examples, flip=({"f-0": 1, "f-1": -1}, {"p-0": 1, "p-1": -1}))
    prints |= {arm.fit(examples, settings).at(dose / 2).fingerprint, arm.fit(other, settings).at(dose).fingerprint}
    assert len(prints) == 3


@every_arm
def test_a_change_is_the_same_whatever_the_batch_size(llama, tmp_path, arm, settings, dose):
    logits = []
    for tokens in (1, 4096):
        change = arm.fit(given(llama, tmp_path / str(tokens), score_tokens=tokens), settings)
        with change.at(dose).applied(llama):
            logits.append(logits_of(llama))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


@every_arm
def test_trees_of_shared_prompts_and_the_cache_change_nothing(llama, tmp_path, arm, settings, dose):
    state = arm.fit(given(llama, tmp_path), settings).at(dose)
    texts = [("hello there", ["well", "no"]), ("hello you", ["a", "b c d"])]
    encoded = [encode(llama.tokenizer, prompt, answers, template="raw") for prompt, answers in texts]
    log_probs = []
    with state.applied(llama), torch.inference_mode():
        for rows in (paths(encoded), trees(encoded)):
            batch = collate(rows, device="cpu")
            log_probs.append(answer_log_probs(llama, batch).log_prob[batch.answer.argsort(stable=True)])
    torch.testing.assert_close(log_probs[0], log_probs[1], atol=1e-4, rtol=1e-4)
    answers = {}
    before = notes(llama).cache_is_right
    for cached in (True, False):
        notes(llama).cache_is_right = cached
        with state.applied(llama):
            answers[cached] = generate(llama, ["hello there", "one"], max_new_tokens=12, template="raw")
    notes(llama).cache_is_right = before
    assert answers[True] == answers[False] != generate(llama, ["hello there", "one"], max_new_tokens=12, template="raw")


@every_arm
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_hooked_transformer_is_changed_as_a_bridge_is(checkpoints, tokenizer, tmp_path, name, arm, settings, dose):
    bridge = load_model(checkpoints[name], device="cpu")
    hooked = as_hooked_transformer(checkpoints[name], tokenizer)
    change = arm.fit(given(bridge, tmp_path / "bridge"), settings)
    own = arm.fit(given(hooked, tmp_path / "hooked"), settings)
    with change.at(dose).applied(bridge), change.at(dose).applied(hooked):
        torch.testing.assert_close(logits_of(hooked), logits_of(bridge), atol=1e-3, rtol=1e-3)
        expected = logits_of(bridge)
    with own.at(dose).applied(hooked):
        torch.testing.assert_close(logits_of(hooked), expected, atol=1e-3, rtol=1e-3)


@every_arm
def test_what_is_not_paired_or_too_long_is_refused_in_one_line(llama, tmp_path, arm, settings, dose):
    plain = Behaviour("plain", (Example("a prompt", {"response": "an answer"}),))
    with pytest.raises(InputError, match=r"every prompt of 'plain' needs a safe and an unsafe answer"):
        arm.fit(given(llama, tmp_path, scoring=(SCORING[0], plain)), settings)
    long = Behaviour("long", (Example("a prompt", {"safe": "y" * 2000, "unsafe": "n"}),))
    with pytest.raises(InputError, match="the model takes 1024"):
        arm.fit(given(llama, tmp_path, scoring=(long, SCORING[1])), settings)


# Reading


def test_statistics_are_those_of_each_answers_own_tokens(llama, tmp_path):
    first, _ = answer_statistics(given(llama, tmp_path), "neurons")
    residual, _ = answer_statistics(given(llama, tmp_path), "residual")
    example, site = SCORING[0].examples[3], Site(1, "neurons")
    name = residual_hook(layer_at(llama, DEPTHS[1]))
    for column, kind in enumerate(("safe", "unsafe")):
        text = encode(llama.tokenizer, example.prompt, [example.answers[kind]], template="raw")
        held = {}

        def keeper(point, held=held):
            return lambda activation, hook: held.update({point: activation.detach().clone()})

        with llama.hooks(fwd_hooks=[(point, keeper(point)) for point in (site.hook_name, name)]):
            logits_of(llama, torch.tensor([[*text.prompt, *text.answers[0]]]))
        neurons, stream = (held[point][0, len(text.prompt) :] for point in (site.hook_name, name))
        for summary, expected in (("mean", neurons.mean(0)), ("largest", neurons.amax(0))):
            torch.testing.assert_close(first.of(summary, site.hook_name)[3, column], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(residual.of("mean", name)[3, column], stream.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(residual.of("norm", name)[3, column], stream.norm(dim=-1).mean()[None])


def test_nulls_read_no_answer_again_and_what_was_read_may_not_be_measured(llama, tmp_path, monkeypatch):
    examples = given(llama, tmp_path)
    answer_statistics(examples, "neurons")
    monkeypatch.setattr("dean_interp.arms.answer_statistics.forward", None)
    flip = ({"f-0": 1, "f-4": -1}, flip_of(1)[1])
    notes(llama).scored_prompts.clear()
    flipped, second = answer_statistics(dataclasses.replace(examples, flip=flip), "neurons")
    plain, _ = answer_statistics(examples, "neurons")
    name = Site(0, "neurons").hook_name
    assert torch.equal(flipped.of("mean", name)[:2], plain.of("mean", name)[:2])
    assert torch.equal(flipped.of("mean", name)[2:], plain.of("mean", name)[8:10].flip(1))
    assert len(flipped.rows) == 4 and len(second.rows) == 12
    assert SCORING[0].prompt_hashes | SCORING[1].prompt_hashes <= scored_prompts(llama)
    with pytest.raises(InputError, match="the flip leaves no topic of 'first'"):
        answer_statistics(dataclasses.replace(examples, flip=({}, flip[1])), "neurons")


def test_statistics_of_other_data_are_refused(llama, tmp_path):
    answer_statistics(given(llama, tmp_path), "residual")
    other = dataclasses.replace(SCORING[0], examples=SCORING[0].examples[:4])
    with pytest.raises(InputError, match="was made with another model or other data"):
        answer_statistics(given(llama, tmp_path, scoring=(other, SCORING[1])), "residual")


# Steering


def test_steering_adds_its_vector_at_every_position_and_labels_turn_it_round(llama, tmp_path):
    examples = given(llama, tmp_path)
    change = Steering().fit(examples, {"depth": 0.4})
    name = residual_hook(change.layer)
    plain = seen_at(llama, [name])[name]
    with change.at(0.3).applied(llama):
        steered = seen_at(llama, [name])[name]
    torch.testing.assert_close(steered, plain + 0.3 * change.vector)
    norm = mean_differences(examples, 0.4).norm
    torch.testing.assert_close(float(change.vector.norm()), norm, rtol=1e-5, atol=1e-5)
    turned = Steering().fit(dataclasses.replace(examples, flip=flip_of(-1)), {"depth": 0.4})
    torch.testing.assert_close(turned.vector, -change.vector)


def test_the_vector_is_the_sum_of_both_directions_and_opposed_ones_are_refused(llama, tmp_path):
    examples = given(llama, tmp_path)
    directions = mean_differences(examples, 0.4)
    torch.testing.assert_close(directions.units.norm(dim=1), torch.ones(2).double())
    vector = Steering().fit(examples, {"depth": 0.4}).vector.double()
    cosine = torch.nn.functional.cosine_similarity
    assert float(cosine(vector, directions.units.sum(0), dim=0)) > 0.9999
    swapped = []
    for example in SCORING[0].examples:
        answers = {"safe": example.answers["unsafe"], "unsafe": example.answers["safe"]}
        swapped.append(dataclasses.replace(example, answers=answers))
    opposite = Behaviour("opposite", tuple(swapped))
    with pytest.raises(InputError, match="the directions of the two behaviours oppose each other after layer 1"):
        Steering().fit(given(llama, tmp_path, scoring=(SCORING[0], opposite)), {"depth": 0.4})
    same = Behaviour("same", (Example("a prompt", {"safe": "yes", "unsafe": "yes"}),))
    with pytest.raises(InputError, match="answers of 'same' do not differ after layer 1"):
        Steering().fit(given(llama, tmp_path, scoring=(SCORING[0], same)), {"depth": 0.4})


# Directional ablation


def test_at_dose_1_nothing_reads_anything_along_the_directions(tiny, tmp_path):
    examples = given(tiny, tmp_path)
    change = DirectionalAblation().fit(examples, {"depth": 0.4})
    torch.testing.assert_close(change.basis @ change.basis.T, torch.eye(2), atol=1e-5, rtol=1e-5)
    units = mean_differences(examples, 0.4).units.float()
    names = residual_names(tiny)
    # What the MLP reads is the stream and what attention wrote.
    attention = [f"blocks.{layer}.hook_attn_out" for layer in range(len(tiny.blocks))]
    plain = seen_at(tiny, [*names, *attention])
    with change.at(1.0).applied(tiny):
        seen = seen_at(tiny, [*names, *attention])
    for name in (*names, *attention):
        assert (plain[name] @ units.T).abs().max() > 1e-3
        assert (seen[name] @ units.T).abs().max() < 1e-5
    first = names[0]
    with change.at(0.25).applied(tiny):
        some = seen_at(tiny, [first])[first]
    torch.testing.assert_close(some @ units.T, 0.75 * plain[first] @ units.T, atol=1e-5, rtol=1e-4)
    across = torch.linalg.svd(units)[2][2:]
    torch.testing.assert_close(some @ across.T, plain[first] @ across.T, atol=1e-5, rtol=1e-4)


def test_labels_that_are_all_flipped_leave_a_directional_ablation_as_it_is(llama, tmp_path):
    examples = given(llama, tmp_path)
    changes = []
    for flip in (None, flip_of(-1)):
        changes.append(DirectionalAblation().fit(dataclasses.replace(examples, flip=flip), {"depth": 0.7}))
    assert torch.equal(changes[0].basis, changes[1].basis)
    assert changes[0].at(0.3).fingerprint == changes[1].at(0.3).fingerprint


def test_two_parallel_directions_are_one_axis(llama):
    axis = torch.zeros(1, llama.cfg.d_model, dtype=torch.float64)
    axis[0, 3] = 1
    basis = span(torch.cat([axis, -axis]))
    assert basis.shape[0] == 1 and AblatedDirections(3, basis).n_bytes == 4 * llama.cfg.d_model
    torch.testing.assert_close(basis.abs(), axis.float())


def test_a_model_with_layers_that_have_no_attention_is_refused_before_a_prompt_is_read(tokenizer, tmp_path):
    hybrid = build("lfm 2 (a width that is rounded)", tokenizer)
    with pytest.raises(InputError, match=r"directional ablation needs .*: blocks\.0\.hook_attn_out is missing, the f"):
        DirectionalAblation().fit(given(hybrid, tmp_path), {"depth": 0.4})
    assert not list(tmp_path.iterdir())
    # What needs no attention works.
    assert Steering().fit(given(hybrid, tmp_path), {"depth": 0.4}).n_bytes > 0


# Affine maps


def test_the_map_carries_unsafe_answers_mean_and_deviation_to_the_safe_ones(llama, tmp_path):
    examples = given(llama, tmp_path)
    both = answer_statistics(examples, "neurons")
    change = LinearTransport().fit(examples, {"layers": "all"})
    for site in neuron_sites(llama):
        parts = [displacement(statistics, site) for statistics in both]
        for statistics, (slope, shift) in zip(both, parts, strict=True):
            means = statistics.of("mean", site.hook_name).double()
            moved = means[:, 1] + slope * means[:, 1] + shift
            torch.testing.assert_close(moved.mean(0), means[:, 0].mean(0))
            torch.testing.assert_close(moved.std(0), means[:, 0].std(0))
        torch.testing.assert_close(change.slopes[site].double(), (parts[0][0] + parts[1][0]) / 2)
        torch.testing.assert_close(change.shifts[site].double(), (parts[0][1] + parts[1][1]) / 2)
    first = Site(0, "neurons")
    plain = seen_at(llama, [first.hook_name])[first.hook_name]
    with change.at(0.5).applied(llama):
        moved = seen_at(llama, [first.hook_name])[first.hook_name]
    torch.testing.assert_close(moved, plain + 0.5 * (change.slopes[first] * plain + change.shifts[first]))


def test_a_neuron_that_unsafe_answers_leave_steady_is_only_shifted(llama, tmp_path):
    statistics, _ = answer_statistics(given(llama, tmp_path), "neurons")
    site = Site(0, "neurons")
    key = f"mean/{site.hook_name}"
    steady = statistics.tensors[key].clone()
    steady[:, 1, 5] = 2.0
    slope, shift = displacement(dataclasses.replace(statistics, tensors={key: steady}), site)
    assert slope[5] == 0 and bool(slope.isfinite().all())
    torch.testing.assert_close(shift[5], steady[:, 0, 5].double().mean() - 2)


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", 3), ("first half", 2), ("second half", 2), ("middle half", 3)]
)
def test_layers_are_chosen_by_name(llama, tmp_path, layers, expected):
    change = LinearTransport().fit(given(llama, tmp_path), {"layers": layers})
    assert len(change.slopes) == expected and change.n_bytes == 8 * expected * llama.cfg.d_mlp


def test_unknown_settings_are_refused(llama, tmp_path):
    with pytest.raises(InputError, match="layers must be one of"):
        LinearTransport().fit(given(llama, tmp_path), {"layers": "some"})
    with pytest.raises(InputError, match="pooling must be one of"):
        AurocDamping().fit(given(llama, tmp_path), {"pooling": "last", "share": 1.0})


# AUROC damping


def test_auroc_is_that_of_scikit_learn_for_each_neuron_with_ties():
    generator = torch.Generator().manual_seed(0)
    unsafe, safe = (torch.randn(n, 30, generator=generator).mul(2).round() for n in (11, 17))
    labels = [1] * len(unsafe) + [0] * len(safe)
    expected = [roc_auc_score(labels, column) for column in torch.cat([unsafe, safe]).T.numpy()]
    np.testing.assert_allclose(auroc(unsafe, safe).numpy(), expected)


def test_experts_of_unsafe_answers_are_damped_by_the_mean_of_both_aurocs(llama, tmp_path):
    examples = given(llama, tmp_path)
    both = answer_statistics(examples, "neurons")
    all_experts = AurocDamping().fit(examples, {"pooling": "max", "share": 1.0}).direction
    best = AurocDamping().fit(examples, {"pooling": "max", "share": 0.1}).direction
    for site, multiplier in all_experts.multipliers.items():
        mean = torch.zeros(len(multiplier))
        for statistics in both:
            largest = statistics.of("largest", site.hook_name)
            columns = torch.cat([largest[:, 1], largest[:, 0]]).T.numpy()
            labels = [1] * len(largest) + [0] * len(largest)
            mean += torch.tensor([roc_auc_score(labels, column) / 2 for column in columns])
        expected = torch.where(mean > 0.5, 1 - 2 * (mean - 0.5), torch.ones_like(mean))
        torch.testing.assert_close(multiplier, expected)
    assert len(best) == round(0.1 * len(all_experts))
    assert best.largest_change == all_experts.largest_change
    assert best.prompt_hashes == SCORING[0].prompt_hashes | SCORING[1].prompt_hashes


# What they do


@pytest.fixture(scope="module")
def planted(tokenizer, tmp_path_factory):
    """The planted model, in which the tokens Y and N also stand on the axis that a later Y or N is told by, and one
    planted neuron is larger at Y.
    """
    folder = tmp_path_factory.mktemp("planted_directions") / "model"
    model = planted_model(tokenizer)
    y, n = (tokenizer(letter).input_ids[0] for letter in "YN")
    with torch.no_grad():
        embed = model.model.embed_tokens.weight
        embed[y, 3], embed[n, 3] = 1.0, -1.0
        model.model.layers[LAYER].mlp.up_proj.weight[HELPS_BOTH, 3] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder, device="cpu")


@pytest.mark.parametrize(("arm", "settings", "dose"), [CASES[0], CASES[2]], ids=["steering", "affine maps"])
@pytest.mark.parametrize("sign", [1, -1])
def test_planted_margins_move_the_way_that_labels_say(planted, tmp_path, arm, settings, dose, sign):
    tests = [pairs("first", "f", split="test"), pairs("second", "p", split="test")]
    before = measure(planted, tests, template="raw")
    change = arm.fit(given(planted, tmp_path, flip=None if sign == 1 else flip_of(-1)), settings)
    with change.at(change.first_dose).applied(planted):
        after = measure(planted, tests, template="raw")
    for name in ("first", "second"):
        assert sign * float((after[name].margin - before[name].margin).mean()) > 0
