"""Passes that several benchmarks time, and models that they time them on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dean_interp import Behaviour, ScoringConfig, load_model
from dean_interp.models.demo import demo_model_folder
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import answer_positions, batched, forward
from dean_interp.models.matrices import neuron_sites, parameter, weight_sites
from dean_interp.models.tokens import Row, collate
from dean_interp.scoring.importance import run_pass
from dean_interp.scoring.preparation import prepare

BOTH = ("neuron", "weight")
BATCH_TOKENS = 512
N_LAYERS = 6
"""Layers of the model that most figures are measured on: each costs what it costs in a deeper model."""
N_LAYERS_OF_DEMO = 30


def random_llama(
    *, n_layers: int, width: int, d_mlp: int, heads: int, kv_heads: int | None = None, tied: bool = True
) -> LlamaForCausalLM:
    """A random Llama with the demo model's vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=d_mlp,
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        vocab_size=49152,
        tie_word_embeddings=tied,
    )
    config.architectures = ["LlamaForCausalLM"]
    return LlamaForCausalLM(config).eval()


def like_demo(n_layers: int = N_LAYERS) -> LlamaForCausalLM:
    """Random layers of the demo model's widths."""
    return random_llama(n_layers=n_layers, width=576, d_mlp=1536, heads=9, kv_heads=3)


def hooked(plain: LlamaForCausalLM) -> HookedModel:
    """A random model behind hook points, with the demo model's tokenizer."""
    return load_model(plain, tokenizer=AutoTokenizer.from_pretrained(demo_model_folder()))


def forward_and_backward(
    model: HookedModel, rows: list[Row], *, parameters: bool, batch_tokens: int = BATCH_TOKENS
) -> None:
    """A plain pass over the same padded batches: with parameter gradients, as in training, or with none."""
    for each in model.parameters():
        each.requires_grad_(parameters)
    hook = ("hook_embed", lambda embedded, hook: embedded.requires_grad_(True))
    for batch in batched(model, rows, batch_tokens=batch_tokens, label="plain"):
        with model.hooks(fwd_hooks=[] if parameters else [hook]), answer_positions(model, batch):
            logits = forward(model, batch)[0]
            torch.nn.functional.cross_entropy(logits, batch.target).backward()
        model.zero_grad(set_to_none=True)


def score(model: HookedModel, behaviour: Behaviour, units: tuple[str, ...], batch_tokens: int = BATCH_TOKENS) -> None:
    """The passes of `importance` alone: what it does once a model (a fingerprint, a check of the hooks) left out."""
    sites = (neuron_sites(model) if "neuron" in units else []) + (weight_sites(model) if "weight" in units else [])
    config = ScoringConfig(batch_tokens=batch_tokens)
    run_pass(model, prepare(model, behaviour, config), sites, config, label="score")


def released_schedule(model: HookedModel, rows: list[Row]) -> None:
    """As the released code: for every layer a pass over the data, one example at a time, gradients of that layer."""
    for layer in range(model.cfg.n_layers):
        stored = [parameter(model, site)[0] for site in weight_sites(model) if site.layer == layer]
        sums = [torch.zeros_like(matrix) for matrix in stored]
        for each in model.parameters():
            each.requires_grad_(any(each is matrix for matrix in stored))
        for row in rows:
            batch = collate([row], device=model.cfg.device)
            with answer_positions(model, batch):
                loss = torch.nn.functional.cross_entropy(forward(model, batch)[0], batch.target)
            for total, gradient in zip(sums, torch.autograd.grad(loss, stored), strict=True):
                total += gradient.abs()


@contextmanager
def laps_in_cpu_time() -> Iterator[None]:
    """While open, the steps of a run are timed by the CPU time of the process: other work does not count."""
    with patch("dean_interp.study.run_folder.time.monotonic", time.process_time):
        yield
