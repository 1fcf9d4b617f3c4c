import pytest
import torch
from hooked import as_hooked_transformer
from units import some_neurons

from dean_interp import (
    Behaviour,
    Example,
    InputError,
    Selection,
    Site,
    ablate,
    importance,
    load_behaviour,
    load_model,
    measure,
)
from dean_interp.models.tokens import batches, collate, encode, paths, trees

pytestmark = pytest.mark.hooks


def pairs(name, n=5, split=None):
    made = [Example(f"{name} asks {i * 'very '}much?", {"safe": f"Yes {i}, of course.", "unsafe": f"No{i * '!'}"})
            for i in range(n)]  # fmt: skip
    return Behaviour(name, tuple(made), split=split)


GENERAL = Behaviour(
    "general", (Example("2 and 2?", {"response": "Four."}), Example("Sky?", {"response": "It is blue."}))
)


def plain_log_probs(model, tokenizer, prompt, answer):
    """Log-probability of every answer token (nats), one sequence, the whole vocabulary at every position."""
    one = encode(tokenizer, prompt, [answer])
    ids, n = torch.tensor([one.prompt + one.answers[0]]), len(one.prompt)
    with torch.inference_mode():
        logits = model(ids, return_type="logits")[0, n - 1 : -1].log_softmax(-1)
    return logits, logits.gather(-1, ids[0, n:, None])[:, 0]


def test_shared_prompts_give_the_log_probabilities_of_separate_sequences(tiny, tokenizer):
    behaviour = pairs("fairness")
    measured = measure(tiny, [behaviour])["fairness"]
    for i, example in enumerate(behaviour.examples):
        for k, kind in enumerate(("safe", "unsafe")):
            _, expected = plain_log_probs(tiny, tokenizer, example.prompt, example.answers[kind])
            assert measured.n_tokens[i, k] == len(expected)
            torch.testing.assert_close(measured.log_prob[i, k], expected.double().mean(), atol=2e-5, rtol=1e-4)


def test_a_row_of_branches_shows_each_token_its_own_path_only(tokenizer):
    encoded = [encode(tokenizer, f"same start {i}", ["safe", "un"]) for i in range(3)]
    (row,) = trees(encoded, row_tokens=500)
    batch = collate([row], device="cpu")
    apart = {}
    for i, one in enumerate(encoded):
        for k, answer in enumerate(one.answers):
            apart[2 * i + k] = list(one.prompt + answer)
    for number, sequence in apart.items():
        last = int(batch.read_pos[batch.answer == number][-1])
        seen = batch.attend[0, last].nonzero()[:, 0]
        assert batch.tokens[0, seen].tolist() == sequence[:-1]
        assert batch.positions[0, seen].tolist() == list(range(len(sequence) - 1))
    assert int(batch.real.sum()) < sum(map(len, apart.values())) / 2


def test_every_answer_is_in_exactly_one_row_and_batches_keep_their_size(tokenizer):
    encoded = [encode(tokenizer, "p" * (1 + 7 * i), ["a" * (i + 1), "b"]) for i in range(9)]
    for rows in (paths(encoded), trees(encoded, row_tokens=120)):
        assert sorted(b.answer for row in rows for b in row if b.answer >= 0) == list(range(18))
        whole = list(batches(rows, batch_tokens=300))
        assert sum(map(len, whole)) == len(rows)
        for some in whole:
            assert len(some) == 1 or collate(some, device="cpu").tokens.numel() <= 300


def test_answer_tokens_measures_a_beginning(llama, tokenizer):
    behaviour = pairs("fairness")
    measured = measure(llama, [behaviour], answer_tokens=2)["fairness"]
    assert (measured.n_tokens == 2).all()
    _, expected = plain_log_probs(llama, tokenizer, behaviour.prompts[3], behaviour.examples[3].answers["safe"])
    torch.testing.assert_close(measured.log_prob[3, 0], expected[:2].double().mean(), atol=2e-5, rtol=1e-4)


def test_the_tokens_of_a_margin_are_counted_from_1(llama):
    measured = measure(llama, [pairs("fairness")])["fairness"]
    torch.testing.assert_close(measured.margin_of_tokens(1), measured.margin)
    for first, last in ((0, 3), (1, 0)):
        with pytest.raises(InputError, match="must be at least 1, got 0"):
            measured.margin_of_tokens(first, last)


def test_perplexity_and_kl_are_those_of_their_definitions(llama, tokenizer):
    selection = some_neurons(llama)
    original = measure(llama, [GENERAL])
    with ablate(llama, selection):
        ablated = measure(llama, [GENERAL], original=original)["general"]
        now = [plain_log_probs(llama, tokenizer, e.prompt, e.answers["response"]) for e in GENERAL.examples]
    then = [plain_log_probs(llama, tokenizer, e.prompt, e.answers["response"])[0] for e in GENERAL.examples]
    tokens = torch.cat([log_prob for _, log_prob in now])
    assert ablated.perplexity == pytest.approx(float((-tokens.mean()).exp()), rel=1e-4)
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, (b, _) in zip(then, now, strict=True)])
    assert ablated.mean_kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert original["general"].mean_kl == 0
    assert measure(llama, [GENERAL], original=original)["general"].mean_kl == pytest.approx(0, abs=1e-6)


def test_a_behaviour_that_was_not_measured_is_named_with_those_that_were(llama):
    examples = (Example("Hello?", {"safe": "no", "unsafe": "yes"}),)
    measured = measure(llama, [Behaviour(name, examples) for name in ("safety", "second")])
    said = r"'safty' was not measured \(did you mean 'safety'\?\): the behaviours are safety, second"
    with pytest.raises(InputError, match=said):
        measured["safty"]


def test_reads_are_the_activations_at_the_last_prompt_token(tiny, tokenizer):
    behaviours, units = [pairs("fairness", 4), pairs("privacy", 3)], some_neurons(tiny)
    reads = measure(tiny, behaviours, neurons=units).activations
    assert reads.groups == ("fairness",) * 4 + ("privacy",) * 3
    prompts = [prompt for behaviour in behaviours for prompt in behaviour.prompts]
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([encode(tokenizer, prompt, []).prompt])
        seen = []
        with tiny.hooks(fwd_hooks=[("blocks.2.mlp.hook_post", lambda a, hook, s=seen: s.append(a.detach()) or None)]):
            tiny(ids, return_type="logits")
        site = list(units.units)[2]
        torch.testing.assert_close(reads.values[site][i], seen[0][0, -1, units.units[site]], atol=1e-5, rtol=1e-4)


def test_what_was_scored_is_never_measured(checkpoints):
    model = load_model(checkpoints["llama"], device="cpu")
    scored, fresh = pairs("fairness", 3), pairs("privacy", 3)
    measure(model, [scored])  # nothing has been scored yet
    scores = importance(model, scored)
    with pytest.raises(InputError, match="3 of the 3 prompts of 'fairness' were scored"):
        measure(model, [scored])
    measure(model, [fresh])
    # nor what differs from it by a blank, a case, or how its letters are encoded
    for other in ("fairness asks much? ", "Fairness asks\u00a0much", "fairn\u200bess asks much?"):
        with pytest.raises(InputError, match="1 of the 1 prompts of 'alike' were scored"):
            measure(model, [Behaviour("alike", (Example(other, {"response": "Yes."}),))])
    # an edit brings what it was scored on into any model, for as long as it is in place
    from dean_interp import top_fraction

    other = load_model(checkpoints["llama"], device="cpu")
    with ablate(other, top_fraction(scores, 0.1)), pytest.raises(InputError, match="were scored"):
        measure(other, [scored])
    measure(other, [scored])


def test_a_calibration_split_two_of_one_name_and_a_foreign_original_are_refused(llama):
    with pytest.raises(InputError, match="'x' is a calibration split"):
        measure(llama, [pairs("x", split="calibration")])
    with pytest.raises(InputError, match="a name of its own"):
        measure(llama, [pairs("x"), pairs("x")])
    with pytest.raises(InputError, match="other examples"):
        measure(llama, [pairs("x", 3)], original=measure(llama, [pairs("x", 2)]))
    with pytest.raises(InputError, match="the same template and answer_tokens"):
        measure(llama, [pairs("x", 3)], original=measure(llama, [pairs("x", 3)]), answer_tokens=2)
    with pytest.raises(InputError, match="has no margin"):
        _ = measure(llama, [GENERAL])["general"].margin


def test_neurons_of_another_model_are_refused(llama):
    one = load_behaviour("privacy", split="test", n_examples=2)
    site = Site(0, "neurons")
    with pytest.raises(InputError, match="the selection is not of this model"):
        measure(llama, [one], neurons=Selection({site: torch.tensor([1])}, {site: (400,)}))


def test_a_model_with_positions_of_its_own_is_measured_apart(checkpoints, caplog, monkeypatch):
    expected = measure(load_model(checkpoints["llama"], device="cpu"), [pairs("fairness")])["fairness"].log_prob
    model = load_model(checkpoints["llama"], device="cpu")
    real = type(model).forward

    def deaf(self, *args, **options):
        options.pop("position_ids", None)
        return real(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", deaf)
    caplog.set_level("INFO")
    torch.testing.assert_close(measure(model, [pairs("fairness")])["fairness"].log_prob, expected, atol=2e-5, rtol=1e-4)
    assert "in a sequence of its own" in caplog.text


def test_the_first_measurement_of_a_model_keeps_the_activations_of_its_own_passes_alone(checkpoints):
    """Before it, checks of the model run passes of other texts."""
    model = load_model(checkpoints["llama-gqa"], device="cpu")
    units = some_neurons(model)
    first, again = (measure(model, [pairs("fairness")], neurons=units) for _ in range(2))
    for site in units.units:
        torch.testing.assert_close(first.activations.values[site], again.activations.values[site], atol=0, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_a_hooked_transformer_of_the_same_weights_measures_alike(checkpoints, tokenizer, name):
    hooked, bridge = as_hooked_transformer(checkpoints[name], tokenizer), load_model(checkpoints[name], device="cpu")
    units = some_neurons(bridge)
    ours, theirs = (measure(model, [pairs("fairness")], neurons=units) for model in (bridge, hooked))
    torch.testing.assert_close(ours["fairness"].margin, theirs["fairness"].margin, atol=1e-4, rtol=1e-3)
    for site in units.units:
        torch.testing.assert_close(ours.activations.values[site], theirs.activations.values[site], atol=1e-4, rtol=1e-3)
