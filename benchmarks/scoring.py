"""What scoring and measuring cost, as ratios measured side by side in one process on two threads.

    make bench

Each pair is run in turn, several times, and every ratio is that of two neighbouring runs, so a busy machine slows both
sides alike. The ratios (minimum, median, maximum) go to `benchmarks/latest.json` too.
"""

import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dean_interp import (
    Behaviour,
    ScoringConfig,
    Selection,
    ablate,
    generate,
    importance,
    load_behaviour,
    load_model,
    top_fraction,
)
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import answer_log_probs, answer_positions, batched, forward
from dean_interp.models.matrices import neuron_sites, parameter, weight_sites
from dean_interp.models.tokens import collate, encode, paths, trees
from dean_interp.planning.scoring import plan
from dean_interp.scoring.importance import run_pass
from dean_interp.scoring.methods import random
from dean_interp.scoring.preparation import prepare

REPEATS, BATCH_TOKENS = 3, 512
BOTH = ("neuron", "weight")


def ratios(
    numerator: Callable[[], object],
    denominator: Callable[[], object],
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Time of one over time of the other, run in turn; a first round warms up."""
    found = []
    for repeat in range(repeats + 1):
        times = []
        for run in (numerator, denominator):
            start = clock()
            run()
            times.append(clock() - start)
        if repeat:
            found.append(times[0] / times[1])
    return found


def show(what: str, found: list[float]) -> list[float]:
    """Print minimum, median and maximum, and give them back."""
    summary = [min(found), statistics.median(found), max(found)]
    print(f"{what}: {summary[1]:.2f} ({summary[0]:.2f} to {summary[2]:.2f})", flush=True)
    return summary


def forward_and_backward(model: HookedModel, rows: list, *, parameters: bool) -> None:
    """A plain pass over the same padded batches: with parameter gradients, as in training, or with none."""
    for each in model.parameters():
        each.requires_grad_(parameters)
    hook = ("hook_embed", lambda embedded, hook: embedded.requires_grad_(True))
    for batch in batched(model, rows, batch_tokens=BATCH_TOKENS, label="plain"):
        with model.hooks(fwd_hooks=[] if parameters else [hook]), answer_positions(model, batch):
            logits = forward(model, batch)[0]
            torch.nn.functional.cross_entropy(logits, batch.target).backward()
        model.zero_grad(set_to_none=True)


def score(model: HookedModel, behaviour: Behaviour, units: tuple[str, ...], batch_tokens: int = BATCH_TOKENS) -> None:
    """The passes of `importance` alone: what it does once a model (a fingerprint, a check of the hooks) left out."""
    sites = (neuron_sites(model) if "neuron" in units else []) + (weight_sites(model) if "weight" in units else [])
    how = ScoringConfig(batch_tokens=batch_tokens)
    data = prepare(model, behaviour, how)
    run_pass(model, data, sites, how, label="score")


def released_schedule(model: HookedModel, rows: list) -> None:
    """As the released code: for every layer a pass over the data, one example at a time, gradients of that layer."""
    for layer in range(model.cfg.n_layers):
        stored = [parameter(model, site)[0] for site in weight_sites(model) if site.layer == layer]
        sums = [torch.zeros_like(one) for one in stored]
        for each in model.parameters():
            each.requires_grad_(any(each is one for one in stored))
        for row in rows:
            batch = collate([row], device=model.cfg.device)
            with answer_positions(model, batch):
                loss = torch.nn.functional.cross_entropy(forward(model, batch)[0], batch.target)
            for total, gradient in zip(sums, torch.autograd.grad(loss, stored), strict=True):
                total += gradient.abs()


def peak_ratio(model: HookedModel, behaviour: Behaviour) -> float:
    """Measured over predicted peak of the process's memory."""
    planned = plan(model, behaviour, unit=BOTH)
    peak = peak_bytes(lambda: importance(model, behaviour, unit=BOTH, config=planned.apply(ScoringConfig())))
    return peak / planned.peak_bytes


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that the process held during a call."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, psutil.Process().memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak


def with_layers(model: HookedModel, n_layers: int) -> HookedModel:
    """A random model of the demo model's widths with some layers."""
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=n_layers, num_attention_heads=9,
                         num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    return load_model(LlamaForCausalLM(config).eval(), tokenizer=model.tokenizer)


def main() -> None:
    """Print every ratio; write those of scoring to a file."""
    torch.set_num_threads(2)
    model = load_model("smollm2-135m-instruct", device="cpu")
    behaviour, few = load_behaviour("fairness", n_examples=16), load_behaviour("fairness", n_examples=4)
    found = {"measured_vs_predicted_peak_memory": show("measured / predicted peak memory of scoring both units",
             [peak_ratio(model, behaviour) for _ in range(REPEATS)])}  # fmt: skip
    rows, few_rows = (prepare(model, one, ScoringConfig()).rows for one in (behaviour, few))
    for units, parameters, name in ((BOTH, True, "scoring_vs_forward_backward"), (("neuron",), False, None)):
        what = f"scoring {' and '.join(f'{unit}s' for unit in units)} / plain forward and backward"
        cost = ratios(
            lambda units=units: score(model, behaviour, units),
            lambda parameters=parameters: forward_and_backward(model, rows, parameters=parameters),
        )
        cost = show(f"{what} with{'' if parameters else 'out'} parameter gradients", cost)
        found |= {name: cost} if name else {}
    for n_layers in (4, 12, 30):
        one = model if n_layers == 30 else with_layers(model, n_layers)
        gain = ratios(lambda one=one: released_schedule(one, few_rows), lambda one=one: score(one, few, BOTH))
        gain = show(f"one pass a layer, one example at a time / scoring both units, {n_layers} layers", gain)
    found["released_schedule_vs_scoring"] = gain
    found["ablated_vs_plain_generation"] = generation_bench(model, behaviour)
    flat = {f"{name}{end}": value for name, values in found.items()
            for end, value in zip(("_min", "", "_max"), values, strict=True)}  # fmt: skip
    Path(__file__).with_name("latest.json").write_text(json.dumps(flat, indent=1) + "\n")
    show("scoring both units in batches of 2048 tokens / of 512",
         ratios(lambda: score(model, behaviour, BOTH, 2048), lambda: score(model, behaviour, BOTH)))  # fmt: skip
    margins_bench(model)
    products_bench()


def products_bench() -> None:
    """Products per example over its own positions, as scoring makes them, against one product over the padded batch."""
    lengths, generator = [85, 80, 74, 70, 66, 60], torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(len(lengths), 85, width, generator=generator) for width in (576, 1536))
    total, own = torch.zeros(576, 1536), torch.empty(576, 1536)

    def each() -> None:
        for i, n in enumerate(lengths):
            total.add_(torch.mm(x[i, :n].T, gradient[i, :n], out=own).abs_())

    def padded() -> None:
        total.add_(torch.bmm(x.transpose(1, 2), gradient).abs_().sum(0))

    show("one product over a padded batch / a product per example", ratios(padded, each, repeats=30))


def generation_bench(model: HookedModel, behaviour: Behaviour) -> list[float]:
    """Speed of generation under ablation over that of the model as it is (1: as fast), neurons and weights."""
    prompts, tokens = behaviour.prompts[:8], 24
    slowest: list[float] = []
    for unit, fraction in (("neuron", 0.01), ("weight", 1e-4)):
        chosen = top_fraction(random(model, behaviour, unit=unit), fraction)

        def ablated(chosen: Selection = chosen) -> None:
            with ablate(model, chosen):
                generate(model, prompts, max_new_tokens=tokens)

        found = ratios(lambda: generate(model, prompts, max_new_tokens=tokens), ablated, repeats=5)
        found = show(f"speed of generation with the top {fraction:g} of {unit}s silenced / without", found)
        slowest = min(slowest or found, found, key=lambda one: one[1])
    return slowest


def margins_bench(model: HookedModel) -> None:
    """What sharing prompts saves when margins are measured."""
    tests = load_behaviour("fairness", n_examples=24, split="test")
    pairs = [encode(model.tokenizer, e.prompt, list(e.answers.values()), answer_tokens=12) for e in tests.examples]

    def margins(rows: list, batch_tokens: int = 1024) -> None:
        with torch.inference_mode():
            for batch in batched(model, rows, batch_tokens=batch_tokens, label="margins"):
                answer_log_probs(model, batch)

    show("margins with every answer in a sequence of its own / with shared prompts",
         ratios(lambda: margins(paths(pairs)), lambda: margins(trees(pairs))))  # fmt: skip
    show("margins with batches of 512 tokens / of 1024",
         ratios(lambda: margins(trees(pairs), 512), lambda: margins(trees(pairs))))  # fmt: skip


if __name__ == "__main__":
    main()
