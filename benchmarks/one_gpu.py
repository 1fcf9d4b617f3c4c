"""What a 7B-shaped model takes on one GPU, as ratios to plain work beside it: scoring, memory, answering, `improve`.

    python benchmarks/one_gpu.py --out benchmarks/one_gpu.json
    python benchmarks/one_gpu.py --shape tiny --device cpu --out tiny.json      (that it runs: a minute)

Weights are random, in bfloat16: cost does not depend on them. The tokenizer and the texts are the demo model's and the
built-in ones. Each part is printed and written as soon as it is measured, `improve` last. Two sides of a ratio run in
turn, several times, in one process.

    products       the kernel that weights are scored by: its largest difference to its definition, and its time over
                   that of one plain matrix product of the same numbers
    cost           scoring both units / a plain forward and backward pass with parameter gradients over the same
                   batches: the passes alone, and the whole call with all that is done once
    behaviours     seconds for three behaviours, both units, files written
    memory         measured / planned peak of scoring both units
    answering      speed of generation with units silenced / without, and without / transformers' own with `sdpa`
    profile        shares of the time of what scoring still does, the longest first
    improve        seconds of each step from two data sets to a confirmed edit
"""

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro
from figures import interleaved  # beside this file
from passes import BOTH, forward_and_backward
from scoring import peak_bytes
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dean_interp import (
    AnswerConfig,
    ScoringConfig,
    Selection,
    ablate,
    generate,
    importance,
    load_behaviour,
    load_model,
)
from dean_interp.models.demo import demo_model_folder
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Unit
from dean_interp.models.sizes import site_shape
from dean_interp.models.tokens import encode
from dean_interp.planning.scoring import plan
from dean_interp.planning.stopwatch import timed
from dean_interp.scoring.importance import run_pass
from dean_interp.scoring.preparation import prepare, scored_sites
from dean_interp.scoring.products import add_products
from dean_interp.scoring.scores import KEPT_FRACTION
from dean_interp.study.improve import run_improve
from dean_interp.study.improvement import ImproveConfig
from dean_interp.study.settings import FRACTION, ModelConfig

SETS = ("fairness", "privacy", "general")
N_LONGEST = 15
"""Operations that the profile names."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and how much is asked of it."""

    n_layers: int
    width: int
    d_mlp: int
    d_head: int
    dtype: Literal["float32", "bfloat16"]
    n_compared: int
    """Examples that are scored beside plain passes."""
    n_scored: int
    """Examples of each of the three behaviours."""
    n_prompts: int
    n_new: int
    repeats: int
    improve: ImproveConfig


SHAPES = {
    "7b": Shape(
        n_layers=32, width=4096, d_mlp=11008, d_head=128, dtype="bfloat16", n_compared=64, n_scored=128, n_prompts=64,
        n_new=64, repeats=2, improve=ImproveConfig(score_tokens=4096, measure_tokens=8192),
    ),
    "tiny": Shape(
        n_layers=2, width=64, d_mlp=128, d_head=32, dtype="float32", n_compared=4, n_scored=4, n_prompts=4, n_new=4,
        repeats=1,
        improve=ImproveConfig(
            register=None, max_kl=0.002, n_score=12, n_choose=6, n_confirm=8, n_flips=2, n_random=0,
            answers=AnswerConfig(over_refusal=(), n_answers=4, answer_lengths=(4,), n_answer_controls=0),
        ),
    ),
}  # fmt: skip


def built(shape: Shape, device: str) -> LlamaForCausalLM:
    """A random Llama whose layers matter alike at every width."""
    torch.manual_seed(0)
    n_heads = shape.width // shape.d_head
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        vocab_size=49152,
        initializer_range=1.28 * shape.width**-0.5,
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=getattr(torch, shape.dtype)).eval()


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes, to the end of what it gave the GPU."""
    return timed(run, device="cuda" if torch.cuda.is_available() else "cpu").wall


ratios = partial(interleaved, seconds=seconds)


def products(shape: Shape, device: str) -> dict[str, float]:
    """The products of one matrix's weights over examples of 80 places."""
    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, shape.dtype)
    counts = torch.full((1, shape.n_compared), 80, device=device)
    make = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    x, gradient = make(int(counts.sum()), shape.width), make(int(counts.sum()), shape.d_mlp)
    folds = ("value", "size", "square")
    totals = {fold: torch.zeros(1, shape.width, shape.d_mlp, device=device) for fold in folds}
    add_products(totals, x, gradient, counts)
    differences = []
    expected = {fold: torch.zeros_like(total[0]) for fold, total in totals.items()}
    for read, written in zip(x.float().split(80), gradient.float().split(80), strict=True):
        product = read.T @ written
        for fold, added in (("value", product), ("size", product.abs()), ("square", product.square())):
            expected[fold] += added
    for fold, total in totals.items():
        differences.append(float((total[0] - expected[fold]).abs().max() / expected[fold].abs().max()))
    row = {"largest_difference": max(differences)}
    plain = partial(torch.mm, x.T, gradient)
    for name, chosen in (("sizes", ("size",)), ("all_three", folds)):
        run = partial(add_products, {fold: totals[fold] for fold in chosen}, x, gradient, counts)
        row[f"{name}_vs_one_product"] = median(ratios(run, plain, repeats=5))
    return row


def cost(model: HookedModel, shape: Shape, config: ScoringConfig) -> dict[str, float]:
    """Scoring beside plain passes."""
    behaviour = load_behaviour("fairness", n_examples=shape.n_compared)
    data, sites = prepare(model, behaviour, config), scored_sites(model, BOTH, config)
    assert config.batch_tokens is not None
    plain = partial(forward_and_backward, model, data.rows, parameters=True, batch_tokens=config.batch_tokens)
    alone = partial(run_pass, model, data, sites, config, label="score")
    whole = partial(importance, model, behaviour, unit=BOTH, config=config, keep=KEPT_FRACTION)
    neurons = partial(importance, model, behaviour, config=config)
    row = {}
    for name, run in (("passes", alone), ("whole_call", whole), ("whole_call_neurons", neurons)):
        row[f"{name}_vs_plain"] = median(ratios(run, plain, repeats=shape.repeats))
    return row


def behaviours(model: HookedModel, shape: Shape, config: ScoringConfig) -> dict[str, float]:
    """Three behaviours, scored and written."""

    def score_all() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name in SETS:
                examples = load_behaviour(name, n_examples=shape.n_scored)
                scores = importance(model, examples, unit=BOTH, config=config, keep=KEPT_FRACTION)
                scores.save(Path(folder) / f"{name}.safetensors")

    return {"n_examples": shape.n_scored, "seconds": seconds(score_all)}


def memory(model: HookedModel, shape: Shape) -> dict[str, float]:
    """The peak, beside what the plan said: on a GPU of what torch allocates, else of the process."""
    behaviour = load_behaviour("fairness", n_examples=shape.n_compared)
    planned = plan(model, behaviour, unit=BOTH)
    config = planned.apply(ScoringConfig())
    run = partial(importance, model, behaviour, unit=BOTH, config=config, keep=KEPT_FRACTION)
    if torch.device(model.cfg.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = peak_bytes(run)
    return {"peak_gib": peak / 2**30, "planned_gib": planned.peak_bytes / 2**30, "ratio": peak / planned.peak_bytes}


def answer_plainly(plain: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], n_new: int) -> None:  # noqa: ANN401
    """Greedy answers in batches of 32 as transformers' documentation shows them."""
    encoded = [list(encode(tokenizer, prompt, []).prompt) for prompt in prompts]
    for start in range(0, len(encoded), 32):
        rows = {"input_ids": encoded[start : start + 32]}
        given = tokenizer.pad(rows, return_tensors="pt", padding_side="left").to(plain.device)
        with torch.inference_mode():
            plain.generate(**given, max_new_tokens=n_new, do_sample=False, pad_token_id=tokenizer.pad_token_id)


def answering(model: HookedModel, plain: PreTrainedModel, shape: Shape) -> dict[str, float]:
    """Speeds of greedy answers."""
    prompts = load_behaviour("fairness", n_examples=shape.n_prompts).prompts
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    ours = partial(generate, model, prompts, max_new_tokens=shape.n_new, batch_size=32)
    theirs = partial(answer_plainly, plain, tokenizer, prompts, shape.n_new)
    row = {"vs_transformers": median(ratios(theirs, ours, repeats=shape.repeats))}
    for unit, fraction in FRACTION.items():
        silenced = some_units(model, unit, fraction)

        def ablated(silenced: Selection = silenced) -> None:
            with ablate(model, silenced):
                ours()

        row[f"{unit}s_silenced_vs_plain"] = median(ratios(ours, ablated, repeats=shape.repeats))
    return row


def some_units(model: HookedModel, unit: Unit, fraction: float) -> Selection:
    """Random units of every site."""
    generator, units, shapes = torch.Generator().manual_seed(0), {}, {}
    for site in scored_sites(model, (unit,), ScoringConfig()):
        shapes[site] = site_shape(model, site)
        n_units = math.prod(shapes[site])
        units[site] = torch.randint(n_units, (max(1, int(fraction * n_units)),), generator=generator).unique()
    return Selection(units, shapes)


def profile(model: HookedModel, shape: Shape, config: ScoringConfig) -> dict[str, Any]:
    """What one call of scoring spends its time on, and how much of the time the device works."""
    behaviour = load_behaviour("fairness", n_examples=shape.n_compared)
    is_cuda = torch.device(model.cfg.device).type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        took = seconds(partial(importance, model, behaviour, unit=BOTH, config=config, keep=KEPT_FRACTION))
    kind = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    times = {event.key: getattr(event, kind) / 1e6 for event in profiler.key_averages()}
    longest = sorted(times, key=lambda name: -times[name])[:N_LONGEST]
    return {"device_works": sum(times.values()) / took, "shares": {name: times[name] / took for name in longest}}


def improving(plain: PreTrainedModel, shape: Shape, device: str) -> dict[str, Any]:
    """`improve` from its data sets to its results, the loading of the model among them."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, run = Path(folder) / "model", Path(folder) / "run"
        plain.save_pretrained(checkpoint)
        AutoTokenizer.from_pretrained(demo_model_folder()).save_pretrained(checkpoint)
        named = ModelConfig(str(checkpoint), device=device, dtype=shape.dtype)
        took = seconds(partial(run_improve, replace(shape.improve, model=named), run))
        return {"seconds": took, "steps": json.loads((run / "times.json").read_bytes())}


def measured(shape: Shape, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every part and its row, in order."""
    yield "products", products(shape, device)
    plain = built(shape, device)
    # A bridge changes the model that it wraps, and answers are compared with the plain one.
    model = load_model(copy.deepcopy(plain), tokenizer=AutoTokenizer.from_pretrained(demo_model_folder()))
    config = ScoringConfig(batch_tokens=4096 if device == "cuda" else 512)
    yield "cost", cost(model, shape, config)
    yield "behaviours", behaviours(model, shape, config)
    yield "memory", memory(model, shape)
    yield "answering", answering(model, plain, shape)
    yield "profile", profile(model, shape, config)
    # `improve` loads the model itself, and there may be no room for three.
    del model
    yield "improve", improving(plain, shape, device)


def main(
    out: Path = Path("benchmarks/one_gpu.json"),
    shape: Literal["7b", "tiny"] = "7b",
    device: Literal["cuda", "cpu"] = "cuda",
) -> None:
    """Every part, in order."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this measures a GPU, and there is none: --shape tiny --device cpu shows that it runs")
    sizes, began = SHAPES[shape], time.perf_counter()
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    results: dict[str, Any] = {"shape": shape, "device": where, "torch": torch.__version__}
    for name, row in measured(sizes, device):
        results |= {name: row, "seconds": time.perf_counter() - began}
        print(json.dumps({name: row}), flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
