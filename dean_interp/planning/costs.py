"""The cost of each step of a run: where the weights would lie, and how fast the devices that hold them work."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dean_interp.errors import InputError
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.load import DTYPES
from dean_interp.models.sizes import neuron_shapes, residual_width
from dean_interp.models.tokens import Row
from dean_interp.planning.amounts import PassKind
from dean_interp.planning.calibration import DEPTHS
from dean_interp.planning.device_memory import free_memory, host_memory
from dean_interp.planning.estimates import time_of
from dean_interp.planning.forecast import Forecast, StepCost
from dean_interp.planning.memory import GIB, SHARE_OF_MEMORY, batch_bytes
from dean_interp.planning.parameters import experts_in_words, n_parameters, n_used_weights, operations_per_token
from dean_interp.planning.placement import Devices, Placement, place_weights, usable_memory, weights_in_host
from dean_interp.planning.rates import Pace, Rates, TimeSpan
from dean_interp.planning.remembered import pace_here
from dean_interp.planning.scoring import halved
from dean_interp.planning.shallow import has_layers_alike, shallow_bytes
from dean_interp.planning.work import StepWork
from dean_interp.study.settings import ModelConfig

RowsOf = Callable[[HookedModel], Sequence[Sequence[Row]]]
"""Gives the rows of each behaviour that is scored, from the model's tokenizer."""
SHARE_OF_PRODUCTS: dict[PassKind, float] = {"forward": 0.1, "neurons": 0.15, "weights": 0.15, "answer": 0.08}
"""Share of a device's plain matrix products that each kind of pass sustains, where nothing can be calibrated: as in a
study of the demo model on two busy cores."""
_BYTES_A_SECOND = 3e9
"""From host memory or disk to the device that computes."""
_FETCHES = 3
"""How often an offloaded weight is fetched for a batch, forward and back."""
_NO_GPU_TFLOPS = 200.0


@dataclass(frozen=True)
class PlacedModel:
    """A model on devices."""

    model: HookedModel
    """Without a weight."""
    config: ModelConfig
    devices: Devices
    host: float
    """Memory of the machine, GiB."""
    batch: float
    """GiB that the largest batch of scoring needs."""
    placement: Placement

    @property
    def weights(self) -> float:
        """GiB of all parameters."""
        return _weights_gib(self.model, self.config)

    @property
    def on_device(self) -> float:
        """GiB on each device, without the sums of scoring."""
        return self.placement.on_device + self.batch / self.placement.n_devices


def placed_model(config: ModelConfig, devices: Devices, rows_of: RowsOf, score_tokens: int) -> PlacedModel:
    """Where a model would lie, with room for a batch of scoring.

    Args:
        config: names the model.
        devices: what it would run on.
        rows_of: the rows of each behaviour that is scored, from the model's tokenizer.
        score_tokens: padded tokens a batch in scoring.

    Raises:
        InputError: as `load_model` for the name; devices out of range, or too small for one batch.
    """
    given = [devices.gpu_gib, devices.host_gib, devices.tflops]
    if devices.gpus < 0 or not all(value > 0 for value in given if value is not None):
        raise InputError(f"gpus must be at least 0, memory and tflops above 0, got {devices}")
    model = config.shape()
    host = devices.host_gib or host_memory() / GIB
    behaviours = rows_of(model)

    def largest_batch(tokens: int) -> float:
        return max(batch_bytes(model, rows, tokens, config.dtype) for rows in behaviours) / GIB

    batch = largest_batch(score_tokens)
    usable = max(devices.gpus, 1) * usable_memory(devices, host)
    if batch > usable:
        fitting = [tokens for tokens in halved(score_tokens) if largest_batch(tokens) <= usable]
        # A batch holds one text at least, however long.
        advice = "no score_tokens is small enough for the longest text: take shorter texts or larger devices"
        if fitting:
            advice = f"score_tokens must be {fitting[0]} or less"
        raise InputError(
            f"what a batch of {score_tokens} tokens leaves for the way back is {batch:.4g} GiB, more than the "
            f"{usable:.4g} that may be used: {advice}"
        )
    return PlacedModel(
        model=model,
        config=config,
        devices=devices,
        host=host,
        batch=batch,
        placement=place_weights(_weights_gib(model, config), batch, devices, host),
    )


def _weights_gib(model: HookedModel, config: ModelConfig) -> float:
    return n_parameters(model) * DTYPES[config.dtype].itemsize / GIB


def forecast_of(
    placed: PlacedModel,
    works: Sequence[StepWork],
    *,
    command: str,
    not_counted: str,
    n_passes: int = 1,
    writes: bool = False,
) -> Forecast:
    """What a run with these steps would take.

    Args:
        placed: the model on its devices.
        works: what each step does.
        command: how the run is started.
        not_counted: what the times leave out.
        n_passes: passes of scoring.
        writes: whether the edit is also written into a copy of the checkpoint.
    """
    kinds: dict[PassKind, None] = {}
    for work in works:
        kinds |= dict.fromkeys(work.amounts)
    pace = pace_of(placed, list(kinds))
    steps = [_cost(placed, work, pace) for work in works]
    if writes:
        steps.append(_edit_step(placed.weights))
    return Forecast(
        model=placed.config.name,
        n_parameters=n_parameters(placed.model),
        weights_gib=placed.weights,
        placement=placed.placement.in_words,
        command=command,
        n_passes=n_passes,
        pace=pace.said,
        busy=pace.busy,
        steps=tuple(steps),
        not_counted=not_counted,
        experts=experts_in_words(placed.model),
    )


def pace_of(placed: PlacedModel, kinds: Sequence[PassKind]) -> Pace:
    """How long each kind of pass takes: calibrated where the device is here, else from the arithmetic."""
    devices = placed.devices
    device = "cuda" if devices.gpus else "cpu"
    is_here = not devices.gpus or torch.cuda.is_available()
    room = SHARE_OF_MEMORY * free_memory(torch.device("cpu"))
    fits = sum(shallow_bytes(placed.model, n_layers) for n_layers in DEPTHS) < room
    if devices.tflops is None and is_here and fits and has_layers_alike(placed.model):
        return pace_here(placed.model, kinds, device=device)
    tflops = devices.tflops
    if tflops is None:
        tflops = _products(placed.model, placed.config.dtype, device=device if is_here else None)
    return arithmetic_pace(placed.model, tflops)


def arithmetic_pace(model: HookedModel, tflops: float) -> Pace:
    """The time of the arithmetic alone, at a share of 10^12 operations a second in plain matrix products."""
    forward = operations_per_token(model)
    operations: dict[PassKind, int] = {
        "forward": forward,
        "neurons": 2 * forward,
        # For each weight a product of its own.
        "weights": 2 * forward + 2 * n_used_weights(model),
        "answer": forward,
    }
    rates: dict[PassKind, Rates] = {}
    for kind, n_operations in operations.items():
        a_second = SHARE_OF_PRODUCTS[kind] * 1e12 * tflops
        rates[kind] = Rates(token=n_operations / a_second)
    return Pace(rates=rates, said=f"arithmetic at {tflops:.3g} TFLOP/s a device, to a factor of three")


def _cost(placed: PlacedModel, work: StepWork, pace: Pace) -> StepCost:
    placement = placed.placement
    computing = pace.span(work.amounts)
    n_calls = sum(amount.n_calls for amount in work.amounts.values())
    fetching = n_calls * _FETCHES * placement.offloaded * GIB / _BYTES_A_SECOND
    span = _shared(computing, placement.world_size) + TimeSpan(fetching, fetching, fetching)
    # One process estimates, whatever the number of devices.
    if work.estimates:
        span += time_of(work.estimates)
    on_device = placed.on_device
    in_host = weights_in_host(placement, placed.devices)
    # Sums lie beside the weights.
    if placement.offloaded:
        in_host += work.sums_gib
    else:
        on_device += work.sums_gib / placement.n_devices
    cost = StepCost(
        step=work.step,
        seconds=span.seconds,
        low=span.low,
        high=span.high,
        device_gib=on_device,
        host_gib=in_host + placement.world_size * work.kept_gib,
        disk_gib=work.disk_gib,
    )
    if placed.devices.gpus:
        return cost
    # Without a GPU the device is the machine.
    return replace(cost, host_gib=cost.device_gib + cost.host_gib)


def _shared(span: TimeSpan, world_size: int) -> TimeSpan:
    return TimeSpan(span.seconds / world_size, span.low / world_size, span.high / world_size)


def _edit_step(weights: float) -> StepCost:
    """Writing the edit into a copy of the checkpoint, of which no more than one file is in memory."""
    seconds = 2 * weights * GIB / _BYTES_A_SECOND
    return StepCost(
        step="edit",
        seconds=seconds,
        low=seconds,
        high=seconds,
        device_gib=0.0,
        host_gib=weights / 10,
        disk_gib=weights,
    )


def _products(model: HookedModel, dtype: str, *, device: str | None) -> float:
    """TFLOP/s of plain matrix products in the model's widths, here; a guess for a GPU that is not here (None)."""
    if device is None:
        return _NO_GPU_TFLOPS
    d_model = residual_width(model)
    a = torch.randn(512, d_model, device=device, dtype=DTYPES[dtype])
    # An expert's matrix is one product; the neurons of a dense layer are.
    d_mlp = max(width // site.n_experts for site, (width,) in neuron_shapes(model).items())
    b = torch.randn(d_model, d_mlp, device=device, dtype=DTYPES[dtype])
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        product = a @ b
        # Reading a number waits for a GPU.
        float(product[0, 0])
        best = min(best, time.perf_counter() - began)
    n_operations = 2 * a.numel() * d_mlp
    return n_operations / best / 1e12
