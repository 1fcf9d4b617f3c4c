"""What a study would take on given devices, from the model's configuration and tokenizer alone: no weight is read.

Memory: the weights, what autograd keeps of a batch, the running sums. Time: the arithmetic, at a share of what a device
does in plain matrix products, and the way of offloaded weights. docs/scaling.md says how near this comes.
`planning.scoring` says the same of one scoring pass, of a model that is there and can be watched.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import psutil
import torch

from dean_interp.errors import InputError
from dean_interp.frames import Framed
from dean_interp.models.load import DTYPES, HookedModel
from dean_interp.models.sizes import neuron_counts, neuron_shapes, residual_width
from dean_interp.models.tokens import Row
from dean_interp.planning.memory import GIB, batch_bytes
from dean_interp.planning.parameters import (
    experts_in_words,
    n_parameters,
    n_used_weights,
    n_weights,
    operations_per_token,
)
from dean_interp.planning.placement import (
    Devices,
    Placement,
    ScoringPasses,
    passes_that_fit,
    place_weights,
    room_for_sums,
    usable_memory,
    weights_in_host,
)
from dean_interp.planning.work import Work, work_of
from dean_interp.scoring.preparation import ScoringConfig, prepare
from dean_interp.study.config import StudyConfig
from dean_interp.study.study_data import study_data

SHARE_OF_PRODUCTS = {"score": 0.15, "measure": 0.1, "answer": 0.08}
"""Share of a device's plain matrix products that each step sustains: as in the demo study on two busy cores."""
_BYTES_A_SECOND = 3e9
"""From host memory or disk to the device that computes."""
_FETCHES = 3
"""How often an offloaded weight is fetched for a batch, forward and back."""
_NO_GPU_TFLOPS = 200.0


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
    experts: str = ""
    """How many experts and neurons a mixture has, and what a token uses of it; empty for a dense model."""

    def to_pandas(self) -> pd.DataFrame:
        """One row a step: seconds and GiB."""
        return pd.DataFrame([dataclasses.asdict(step) for step in self.steps])

    def __repr__(self) -> str:
        return f"Forecast({self.model!r}, {self.n_parameters / 1e9:.2f} billion parameters)"

    def __str__(self) -> str:
        head = f"{self.model}: {self.n_parameters / 1e9:.2f} billion parameters, {self.weights_gib:.1f} GiB; "
        lines = [f"{'':<10}{'time':>10}{'each device':>14}{'machine':>14}{'disk':>14}"]
        for step in self.steps:
            sizes = "".join(f"{size:>10.2f} GiB" for size in (step.device_gib, step.host_gib, step.disk_gib))
            lines.append(f"{step.step:<10}{_duration(step.seconds):>10}{sizes}")
        tail = f"time at {self.tflops:.3g} TFLOP/s a device"
        tail += f"; {self.n_passes} passes in scoring" if self.n_passes > 1 else ""
        experts = [self.experts] if self.experts else []
        return "\n".join([head + self.placement, *experts, *lines, tail, f"start: {self.command}"])


def forecast(config: StudyConfig, devices: Devices = Devices()) -> Forecast:  # noqa: B008 - frozen
    """What `run_study` would take with these settings, but for windows of text and tasks.

    Raises:
        InputError: as `run_study` for settings and data, as `load_model` for the name; devices out of range, or too
            small for one batch.
    """
    config.check()
    given = [devices.gpu_gib, devices.host_gib, devices.tflops]
    if devices.gpus < 0 or not all(value > 0 for value in given if value is not None):
        raise InputError(f"gpus must be at least 0, memory and tflops above 0, got {devices}")
    data = study_data(config)
    model = config.model.shape()
    scored_rows = []
    for behaviour in data.calibration:
        scored_rows.append(prepare(model, behaviour, ScoringConfig(template=config.model.template)).rows)
    # Memory: a batch, the weights, then as many layers' sums as there is room for.
    host = devices.host_gib or psutil.virtual_memory().total / GIB
    batch = _largest_batch(model=model, config=config, scored_rows=scored_rows, devices=devices, host=host)
    weights = _weights_gib(model, config)
    placement = place_weights(weights, batch, devices, host)
    passes = passes_that_fit(model, config, room_for_sums(placement, batch, devices, host))
    # Time: the tokens of each step.
    work = work_of(model, config, data, scored_rows)
    tflops = devices.tflops or _products(model, config.model.dtype, gpu=devices.gpus > 0)
    steps = _steps(
        model=model,
        config=config,
        devices=devices,
        passes=passes,
        work=work,
        pace=_Pace(tflops, placement),
        batch=batch,
    )
    layers = f" --layers-per-pass {passes.layers_per_pass}" if passes.n_passes > 1 else ""
    return Forecast(
        model=config.model.name,
        n_parameters=n_parameters(model),
        weights_gib=weights,
        placement=placement.in_words,
        command=f"{placement.command}{layers} ... --out runs/NAME",
        n_passes=passes.n_passes,
        tflops=tflops,
        steps=tuple(steps),
        experts=experts_in_words(model),
    )


@dataclass(frozen=True)
class _Pace:
    """How fast the devices work."""

    tflops: float
    """10^12 operations a second that one device sustains in plain matrix products."""
    placement: Placement

    def seconds(self, step: str, operations: int, n_batches: int) -> float:
        """The time of the arithmetic, and of the way of offloaded weights."""
        computing = operations / (SHARE_OF_PRODUCTS[step] * 1e12 * self.tflops * self.placement.world_size)
        fetching = n_batches * _FETCHES * self.placement.offloaded * GIB / _BYTES_A_SECOND
        return computing + fetching


def _steps(
    model: HookedModel,
    config: StudyConfig,
    devices: Devices,
    passes: ScoringPasses,
    work: Work,
    pace: _Pace,
    batch: float,
) -> list[StepCost]:
    """The cost of each step. `batch` is what the largest batch of scoring needs, GiB."""
    placement = pace.placement
    on_device = placement.on_device + batch / placement.n_devices
    in_host = weights_in_host(placement, devices)
    per_token = operations_per_token(model)
    steps = [
        _score_step(
            model=model, config=config, passes=passes, work=work, pace=pace, on_device=on_device, in_host=in_host
        ),
        StepCost(
            step="measure",
            seconds=pace.seconds("measure", per_token * work.measured_tokens, work.measure_batches),
            device_gib=on_device,
            host_gib=in_host,
            disk_gib=work.state_bytes / GIB,
        ),
        StepCost(
            step="answer",
            seconds=pace.seconds("answer", per_token * work.answered_tokens, work.answer_batches),
            device_gib=on_device,
            host_gib=in_host,
            disk_gib=0.0,
        ),
        _edit_step(_weights_gib(model, config)),
    ]
    if devices.gpus:
        return steps
    # Without a GPU the device is the machine.
    return [dataclasses.replace(step, host_gib=step.device_gib + step.host_gib) for step in steps]


def _score_step(
    model: HookedModel,
    config: StudyConfig,
    passes: ScoringPasses,
    work: Work,
    pace: _Pace,
    *,
    on_device: float,
    in_host: float,
) -> StepCost:
    is_of_weights = "weight" in config.unit
    # Forward and back, in every pass; and for each weight a product of its own.
    operations = 2 * operations_per_token(model) * passes.n_passes * work.scored_tokens
    if is_of_weights:
        operations += 2 * n_used_weights(model) * work.scored_tokens
    # Sums lie beside the weights.
    placement = pace.placement
    if placement.offloaded:
        in_host += passes.sums
    else:
        on_device += passes.sums / placement.n_devices
    # Every process keeps the top scores of weights with their indices; the files also hold whole scores of neurons.
    n_kept = config.keep * n_weights(model) if is_of_weights else 0
    n_neurons = sum(neuron_counts(model))
    return StepCost(
        step="score",
        seconds=pace.seconds("score", operations, passes.n_passes * work.score_batches),
        device_gib=on_device,
        host_gib=in_host + placement.world_size * (12 * n_kept / GIB),
        disk_gib=3 * (8 * n_kept + 4 * 20 * n_neurons) / GIB,
    )


def _edit_step(weights: float) -> StepCost:
    """Writing the edit into a copy of the checkpoint, of which no more than one file is in memory."""
    seconds = 2 * weights * GIB / _BYTES_A_SECOND
    return StepCost(step="edit", seconds=seconds, device_gib=0.0, host_gib=weights / 10, disk_gib=weights)


def _weights_gib(model: HookedModel, config: StudyConfig) -> float:
    """GiB of all parameters."""
    return n_parameters(model) * DTYPES[config.model.dtype].itemsize / GIB


def _largest_batch(
    model: HookedModel, config: StudyConfig, scored_rows: Sequence[Sequence[Row]], devices: Devices, host: float
) -> float:
    """GiB that the largest batch of scoring needs. Raises `InputError` where it does not fit."""
    score_tokens = config.calibration.score_tokens
    largest = max(batch_bytes(model, rows, score_tokens, config.model.dtype) for rows in scored_rows) / GIB
    usable = max(devices.gpus, 1) * usable_memory(devices, host)
    if largest > usable:
        raise InputError(
            f"what a batch of {score_tokens} tokens leaves for the way back is {largest:.0f} GiB, more than the "
            f"{usable:.0f} that may be used: score_tokens must be {int(score_tokens * usable / largest / 2)} or less"
        )
    return largest


def _products(model: HookedModel, dtype: str, *, gpu: bool) -> float:
    """TFLOP/s of plain matrix products in the model's widths, here."""
    if gpu and not torch.cuda.is_available():
        return _NO_GPU_TFLOPS
    device = "cuda" if gpu else "cpu"
    d_model = residual_width(model)
    a = torch.randn(512, d_model, device=device, dtype=DTYPES[dtype])
    # An expert's matrix is one product; the neurons of a dense layer are.
    d_mlp = max(width // site.n_experts for site, (width,) in neuron_shapes(model).items())
    b = torch.randn(d_model, d_mlp, device=device, dtype=DTYPES[dtype])
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        # Reading a number waits for a GPU.
        float((a @ b)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * a.numel() * b.shape[1] / best / 1e12


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
