"""What only serves hooks that nobody has is left out, and numbers are normalised in pieces: both change no result."""

import pytest
import torch
from transformer_lens.hook_points import HookPoint

from dean_interp import generate, load_behaviour, load_model, measure
from dean_interp.models.loss import answer_log_probs, kl_divergence, target_log_probs
from dean_interp.models.tokens import Encoded, collate, trees
from dean_interp.models.unhooked import unhooked

pytestmark = pytest.mark.hooks


def logits_of(model, ids):
    with torch.inference_mode():
        return model(ids, return_type="logits")


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "qwen2"])
def test_what_no_hook_looks_at_runs_as_transformers_has_it_and_is_put_back(checkpoints, monkeypatch, name):
    model = load_model(checkpoints[name], device="cpu")
    kind, tokens = model.original_model.config._attn_implementation, torch.arange(3, 40)[None]
    calls = []
    forward = HookPoint.forward
    monkeypatch.setattr(HookPoint, "forward", lambda point, x: calls.append(point.name) or forward(point, x))
    before, modules = logits_of(model, tokens), list(model.original_model.modules())
    n_hooked = len(calls)
    with unhooked(model):
        assert model.original_model.config._attn_implementation == "sdpa"
        calls.clear()
        torch.testing.assert_close(logits_of(model, tokens), before, atol=1e-4, rtol=1e-4)
        assert len(calls) < n_hooked / 2
    assert model.original_model.config._attn_implementation == kind
    assert list(model.original_model.modules()) == modules
    assert not any("forward" in block.__dict__ for block in model.blocks)
    assert torch.equal(logits_of(model, tokens), before)


@pytest.mark.parametrize(
    "point",
    ["hook_resid_pre", "hook_resid_post", "ln1.hook_normalized", "ln2.hook_scale", "attn.hook_pattern", "attn.hook_q",
     "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out"],
)  # fmt: skip
def test_a_hook_is_called_at_every_pass_of_measuring_and_generating(checkpoints, point):
    model = load_model(checkpoints["llama-gqa"], device="cpu")
    general = load_behaviour("general", n_examples=3, split="test")
    # a model's first answers and measurements come with checks
    generate(model, ["hi"], max_new_tokens=1)
    measure(model, [general], template="raw")
    seen = []
    with model.hooks(fwd_hooks=[(f"blocks.1.{point}", lambda value, hook: seen.append(hook.name))]):
        generate(model, ["hi"], max_new_tokens=3)
        assert len(seen) == 3
        measure(model, [general], template="raw")
        assert len(seen) > 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_of_half_precision_does_not_count_as_a_difference(checkpoints, dtype):
    model = load_model(checkpoints["llama-gqa"], device="cpu", dtype=dtype)
    with unhooked(model):
        assert model.original_model.config._attn_implementation == "sdpa"


def test_a_model_of_few_positions_is_compared_on_as_many_tokens(checkpoints, monkeypatch):
    model = load_model(checkpoints["gpt2"], device="cpu")
    monkeypatch.setattr(model.cfg, "n_ctx", 8)
    lengths = []
    hook = ("hook_embed", lambda embedded, hook: lengths.append(embedded.shape[1]))
    with model.hooks(fwd_hooks=[hook]), unhooked(model):
        assert model.original_model.config._attn_implementation == "sdpa"
    assert set(lengths) == {8}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_that_differs_without_its_hook_points_keeps_them(checkpoints, monkeypatch, dtype):
    model = load_model(checkpoints["llama-gqa"], device="cpu", dtype=dtype)
    attention = type(model.blocks[0].attn.original_component)
    monkeypatch.setattr(attention, "forward", lambda self, hidden_states, **_: (hidden_states, None))
    modules = list(model.original_model.modules())
    with unhooked(model):
        assert model.original_model.config._attn_implementation == "eager"
        assert list(model.original_model.modules()) == modules


def test_unhooked_branches_see_what_hooked_ones_see(checkpoints):
    """Prompts that share a row are told apart by a mask, which `sdpa` must keep to as well."""
    model = load_model(checkpoints["llama-gqa"], device="cpu")
    texts = [Encoded((3, 4, 5, 6), ((7, 8), (9,))), Encoded((3, 4, 9), ((5, 6, 7), (8, 8)))]
    batch = collate(trees(texts), device="cpu")
    assert batch.attend is not None
    with torch.inference_mode():
        hooked = answer_log_probs(model, batch).log_prob
        with unhooked(model):
            assert model.original_model.config._attn_implementation == "sdpa"
            torch.testing.assert_close(answer_log_probs(model, batch).log_prob, hooked, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n_tokens", [0, 1, 8, 21])
def test_logits_in_pieces_give_the_numbers_of_the_whole_to_the_bit(n_tokens):
    generator = torch.Generator().manual_seed(0)
    before, now = 5 * torch.randn(2, n_tokens, 997, generator=generator)
    target = torch.randint(997, (n_tokens,), generator=generator)
    log_probs = now.gather(-1, target[:, None])[:, 0] - now.logsumexp(-1)
    assert torch.equal(target_log_probs(now, target), log_probs)
    log_before, log_now = before.log_softmax(-1), now.log_softmax(-1)
    assert torch.equal(kl_divergence(before, now), (log_before.exp() * (log_before - log_now)).sum(-1))
