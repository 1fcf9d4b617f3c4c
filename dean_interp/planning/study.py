"""What a study would take on given devices, from the model's configuration and tokenizer alone: no weight is read.

Memory: the weights, what autograd keeps of a batch, the running sums. Time: the arithmetic, at a share of what a device
does in plain matrix products, and the way of weights that are away. docs/scaling.md says how near this comes.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import psutil
import torch

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.evaluation.measure import encoded_answers
from dean_interp.frames import Framed
from dean_interp.models.load import DTYPES, HookedModel, load_model
from dean_interp.models.matrices import shape, weight_sites
from dean_interp.models.tokens import Row, batches, row_length, trees
from dean_interp.planning.scoring import halved, site_bytes
from dean_interp.scoring.preparation import ScoringConfig, in_passes, prepare, scored_sites
from dean_interp.study.config import StudyConfig
from dean_interp.study.data import calibration_sets, test_sets

GIB = 2**30
KEPT = {"d_model": 2.5, "d_mlp": 3.7, "d_kv": 1.7, "attention": 1.13}
"""Numbers that autograd keeps for a token in a layer: multiples of each width, and of heads times the row's length. A
least-squares fit to seven small Llamas; `python benchmarks/curves.py` says how near it comes."""
SHARE_OF_PRODUCTS = {"score": 0.15, "measure": 0.1, "answer": 0.08}
"""What of a device's plain matrix products each step sustains: as in the demo study on two busy cores."""
_KEPT_BYTES = {"float32": 4.0, "float16": 3.0, "bfloat16": 3.0}  # in half precision a part is kept in float32
_LOGITS_BYTES = 12.0  # the logits, their logarithms and the gradient, in float32
_SHARE_OF_MEMORY = 0.8
_WAY = 3e9  # bytes a second from host memory or disk to the device that computes
_FETCHES = 3  # of a weight that is away, forward and back
_NO_GPU_TFLOPS = 200.0
_EQUAL_KL_TRIES = 3
_NAMED_CONTROLS = 4


@dataclass(frozen=True)
class Devices:
    """What a study would run on."""

    gpus: int = 0
    """0: the CPU."""
    gpu_gib: float = 80.0
    """Memory of each."""
    host_gib: float | None = None
    """Memory of the machine; None: this one's."""
    tflops: float | None = None
    """10^12 operations a second that one of them sustains in plain matrix products of the model's dtype. None: measured
    here, on the CPU or on a GPU where there is one; 200 for a GPU where there is none."""


@dataclass(frozen=True)
class StepCost:
    """One step of a study. Memory is the most at once: on each device that computes, and of the machine."""

    step: str
    seconds: float
    device_gib: float
    host_gib: float
    disk_gib: float


@dataclass(frozen=True)
class Forecast(Framed):
    """What a study would take."""

    model: str
    n_parameters: int
    weights_gib: float
    placement: str
    """How the model would lie on the devices, and how many processes would share the work."""
    command: str
    n_passes: int
    """Passes of scoring: more than one where the sums of all layers do not fit beside a batch."""
    tflops: float
    steps: tuple[StepCost, ...]

    def to_pandas(self) -> pd.DataFrame:
        """One row a step: seconds and GiB."""
        return pd.DataFrame([dataclasses.asdict(one) for one in self.steps])

    def __repr__(self) -> str:
        return f"Forecast({self.model!r}, {self.n_parameters / 1e9:.2f} billion parameters)"

    def __str__(self) -> str:
        head = f"{self.model}: {self.n_parameters / 1e9:.2f} billion parameters, {self.weights_gib:.1f} GiB; "
        lines = [f"{'':<10}{'time':>10}{'each device':>14}{'machine':>14}{'disk':>14}"]
        for one in self.steps:
            sizes = "".join(f"{size:>10.2f} GiB" for size in (one.device_gib, one.host_gib, one.disk_gib))
            lines.append(f"{one.step:<10}{_duration(one.seconds):>10}{sizes}")
        tail = f"time at {self.tflops:.3g} TFLOP/s a device"
        tail += f"; {self.n_passes} passes in scoring" if self.n_passes > 1 else ""
        return "\n".join([head + self.placement, *lines, tail, f"start: {self.command}"])


@dataclass(frozen=True)
class _Placed:
    """Where the weights lie."""

    n_processes: int
    n_devices: int
    """That each process uses."""
    held: float
    """GiB of weights on each device."""
    away: float
    """GiB that are fetched for every batch."""
    on_disk: float
    said: str
    start: str


def forecast(config: StudyConfig, devices: Devices = Devices()) -> Forecast:
    """What `run_study` would take with these settings.

    Raises:
        InputError: as `run_study` for settings and data, as `load_model` for the name; devices out of range, or too
            small for one batch.
    """
    config.check()
    if devices.gpus < 0 or min(devices.gpu_gib, devices.host_gib or 1, devices.tflops or 1) <= 0:
        raise InputError(f"gpus must be at least 0, memory and tflops above 0, got {devices}")
    calibration = calibration_sets(config.data, config.calibration)
    tests, _ = test_sets(config.data, calibration)
    model = load_model(config.model.name, device="meta", dtype=config.model.dtype)
    n_parameters = sum(one.numel() for one in model.parameters())
    weights = n_parameters * DTYPES[config.model.dtype].itemsize / GIB
    host = devices.host_gib or psutil.virtual_memory().total / GIB
    rows = [prepare(model, one, ScoringConfig(template=config.model.template)).rows for one in calibration]
    score_tokens = config.calibration.score_tokens
    batch = max(batch_bytes(model, some, score_tokens, config.model.dtype) for some in rows) / GIB
    most = max(devices.gpus, 1) * (devices.gpu_gib if devices.gpus else host) * _SHARE_OF_MEMORY
    if batch > most:
        raise InputError(
            f"what a batch of {score_tokens} tokens leaves for the way back is {batch:.0f} GiB, more than the "
            f"{most:.0f} that may be used: score_tokens must be {int(score_tokens * most / batch / 2)} or less"
        )
    placed = _placed(weights, batch, devices, host)
    in_host = placed.away - placed.on_disk if devices.gpus else 0.0
    room = placed.n_devices * ((devices.gpu_gib if devices.gpus else host) * _SHARE_OF_MEMORY - placed.held) - batch
    if placed.away:  # sums lie beside the weights
        room = host * _SHARE_OF_MEMORY - in_host
    layers, n_passes, sums = _passes(model, config, room)
    n_weights = sum(n_in * n_out for n_in, n_out in (shape(model, site) for site in weight_sites(model)))
    n_weights *= "weight" in config.unit
    rate = 1e12 * (devices.tflops or _products(model, config.model.dtype, gpu=devices.gpus > 0))
    per_token = 2 * (n_parameters - model.cfg.d_vocab * model.cfg.d_model)

    work = _counted(model, config, rows, tests)

    def seconds(step: str, operations: int, n_batches: int) -> float:
        computing = operations / (SHARE_OF_PRODUCTS[step] * rate * placed.n_processes)
        return computing + n_batches * _FETCHES * placed.away * GIB / _WAY

    held = placed.held + batch / placed.n_devices
    kept = 12 * config.keep * n_weights / GIB  # scores with their places, in every process
    sums_here, sums_in_host = (0.0, sums) if placed.away else (sums / placed.n_devices, 0.0)
    scoring = 2 * per_token * n_passes * work.scored + 2 * n_weights * work.scored
    measuring, answering = per_token * work.measured, per_token * work.answered
    steps = [
        StepCost("score", seconds("score", scoring, n_passes * work.score_batches),
                 held + sums_here, in_host + sums_in_host + placed.n_processes * kept,
                 3 * (8 * config.keep * n_weights + 4 * 20 * model.cfg.d_mlp * model.cfg.n_layers) / GIB),
        StepCost("measure", seconds("measure", measuring, work.measure_batches), held, in_host, work.state_bytes / GIB),
        StepCost("answer", seconds("answer", answering, work.answer_turns), held, in_host, 0.0),
        StepCost("edit", 2 * weights * GIB / _WAY, 0.0, weights / 10, weights),
    ]  # fmt: skip
    if not devices.gpus:  # the device is the machine
        steps = [dataclasses.replace(one, host_gib=one.device_gib + one.host_gib) for one in steps]
    start = placed.start + (f" --layers-per-pass {layers}" if n_passes > 1 else "")
    return Forecast(config.model.name, n_parameters, weights, placed.said, f"{start} ... --out runs/NAME", n_passes,
                    rate / 1e12, tuple(steps))  # fmt: skip


@dataclass(frozen=True)
class _Work:
    """Padded tokens of each step, over all states of the model, and in how many batches."""

    scored: int
    score_batches: int
    measured: int
    measure_batches: int
    answered: int
    answer_turns: int
    state_bytes: float
    """What the states keep on disk: reads of each, and what the original's unembedding read."""


def _counted(
    model: HookedModel, config: StudyConfig, scored: Sequence[Sequence[Row]], tests: Sequence[Behaviour]
) -> _Work:
    def tokens(some: Sequence[Sequence[Row]], size: int) -> tuple[int, int]:
        planned = [batch for one in some for batch in batches(one, batch_tokens=size)]
        return sum(len(batch) * max(map(row_length, batch)) for batch in planned), len(planned)

    how = {"template": config.model.template, "answer_tokens": config.data.answer_tokens}
    n_states = 1 + len(config.unit) * (
        1 + config.controls.n_random + _EQUAL_KL_TRIES * config.controls.n_equal_kl + _NAMED_CONTROLS
    )
    n_spoken = 1 + len(config.unit) * (1 + config.answers.n_answer_controls)
    n_new = max(config.answers.answer_lengths)
    n_answers = n_spoken * config.answers.n_answers * (3 + len(config.answers.over_refusal))
    measured, n_batches = tokens(
        [trees(encoded_answers(model, one, **how)) for one in tests], config.data.measure_tokens
    )
    reads = 2 * 3 * 4 * config.data.n_test * config.information_fraction * model.cfg.d_mlp * model.cfg.n_layers
    return _Work(
        *tokens(scored, config.calibration.score_tokens), n_states * measured, n_states * n_batches,
        n_answers * n_new, n_new * -(-n_answers // config.answers.answer_batch),
        n_states * reads + 4 * measured * model.cfg.d_model,
    )  # fmt: skip


def batch_bytes(model: HookedModel, rows: Sequence[Row], batch_tokens: int, dtype: str) -> float:
    """What autograd keeps of the largest batch: of every token in every layer, and the logits of answer tokens."""
    cfg = model.cfg
    d_kv = (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    width = KEPT["d_model"] * cfg.d_model + KEPT["d_mlp"] * cfg.d_mlp + KEPT["d_kv"] * d_kv

    def kept(batch: Sequence[Row]) -> float:
        length = max(map(row_length, batch))
        n_answer = sum(len(branch.tokens) for row in batch for branch in row if branch.answer >= 0)
        layers = cfg.n_layers * len(batch) * length * (width + KEPT["attention"] * cfg.n_heads * length)
        return _KEPT_BYTES[dtype] * layers + _LOGITS_BYTES * n_answer * cfg.d_vocab

    return max(map(kept, batches(rows, batch_tokens=batch_tokens)))


def _placed(weights: float, batch: float, devices: Devices, host: float) -> _Placed:
    """Whole on each device where it fits, else over all of them, else with the rest in host memory and on disk."""
    n, start = devices.gpus, "dean-interp run"
    each = (devices.gpu_gib if n else host) * _SHARE_OF_MEMORY
    if weights + batch <= each:
        torchrun = f"torchrun --nproc-per-node {n} --no-python " if n > 1 else ""
        where = f"whole on each of {n} GPUs, whose processes share the work" if n > 1 else "whole on the GPU"
        return _Placed(max(n, 1), 1, weights, 0.0, 0.0, where if n else "whole in memory", torchrun + start)
    start += " --device auto"
    if n and weights + batch <= n * each:
        return _Placed(1, n, weights / n, 0.0, 0.0, f"laid over {n} GPUs, one process", start)
    on_devices = max(0.0, max(n, 1) * each - batch)
    away = weights - on_devices
    on_disk = max(0.0, away - (host / 2 if n else 0.0))  # the other half is for sums
    where = f"{on_devices:.0f} GiB on {n} GPUs, the rest" if n else f"{on_devices:.0f} GiB in memory, the rest"
    where += f" fetched for every batch ({on_disk:.0f} GiB of it from disk), one process"
    return _Placed(1, max(n, 1), on_devices / max(n, 1), away, on_disk, where, start)


def _passes(model: HookedModel, config: StudyConfig, room: float) -> tuple[int, int, float]:
    """Layers a pass whose sums fit into that room (GiB), how many passes that makes, and what the sums of one hold."""
    sites = scored_sites(model, config.scored, ScoringConfig())
    for layers in halved(model.cfg.n_layers):
        passes = in_passes(sites, layers)
        largest = (
            max(sum(site_bytes(model, site, config.calibration.n_calibration) for site in some) for some in passes)
            / GIB
        )
        if largest <= room or layers == 1:
            return layers, len(passes), largest
    raise AssertionError("a model has a layer")


def _products(model: HookedModel, dtype: str, *, gpu: bool) -> float:
    """TFLOP/s of plain matrix products in the model's widths, here."""
    if gpu and not torch.cuda.is_available():
        return _NO_GPU_TFLOPS
    device = "cuda" if gpu else "cpu"
    a, b = (torch.randn(size, device=device, dtype=DTYPES[dtype])
            for size in ((512, model.cfg.d_model), (model.cfg.d_model, model.cfg.d_mlp)))  # fmt: skip
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        float((a @ b)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2 * a.numel() * b.shape[1] / best / 1e12


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
