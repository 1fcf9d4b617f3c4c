"""What scoring will take, before it is run: memory, time, and the batches that fit.

Two short passes are run and watched: how many bytes autograd keeps for rows of two lengths, and how long a batch takes.
What a batch needs is linear in its positions, but for attention's square of the row length; two lengths give both.
"""

import contextlib
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.distributed import local_world_size, on_rank0, world_size
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import home, shape
from dean_interp.models.sites import Site, Unit
from dean_interp.models.tokens import Row, batches, collate, row_length
from dean_interp.scoring.capture import stream_gradients
from dean_interp.scoring.importance import (
    Prepared,
    ScoringConfig,
    batch_tokens_of,
    give_back,
    in_passes,
    prepare,
    scored_sites,
    units_of,
)
from dean_interp.scoring.sums import N_GROUPS, Sums

_SHARE = 0.8  # of the memory that is free, what a plan takes at most
_BATCH_TOKENS = (8192, 4096, 2048, 1024, 512, 256, 1)
_TIMED_TOKENS = 512
_HEAP = 1.35  # glibc keeps freed blocks of less than 32 MiB: the process grows by about this times what is in use


@dataclass(frozen=True)
class Plan:
    """The cost of one scoring run. Bytes on the device that scores; seconds on this machine."""

    batch_tokens: int
    layers_per_pass: int
    n_passes: int
    n_examples: int
    n_tokens: int
    """Padded tokens that go through the model in each pass."""
    held_bytes: int
    """In use before scoring: on the CPU the whole process, on a GPU what torch has allocated."""
    sums_bytes: int
    """Running sums of one pass."""
    batch_bytes: int
    """What the largest batch needs beside them."""
    peak_bytes: int
    free_bytes: int
    """What could still be allocated before scoring."""
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the peak stays within what is free."""
        return self.peak_bytes - self.held_bytes <= _SHARE * self.free_bytes

    def apply(self, config: ScoringConfig) -> ScoringConfig:
        """The same settings with this plan's batches and passes."""
        return dataclasses.replace(config, batch_tokens=self.batch_tokens, layers_per_pass=self.layers_per_pass)

    def __str__(self) -> str:
        gib = 2**30
        return (
            f"{self.n_examples} examples, {self.n_tokens} padded tokens in batches of {self.batch_tokens}; "
            f"{self.n_passes} pass(es) of {self.layers_per_pass} layers; about {self.seconds:.0f} s; "
            f"peak {self.peak_bytes / gib:.2f} GiB ({self.held_bytes / gib:.2f} in use, {self.sums_bytes / gib:.2f} "
            f"sums, {self.batch_bytes / gib:.2f} a batch; {self.free_bytes / gib:.2f} free)"
        )


def plan(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    unit: Unit | Sequence[Unit] = "neuron",
    config: ScoringConfig = ScoringConfig(),  # noqa: B008 - frozen
    free_bytes: int | None = None,
) -> Plan:
    """Predict what `importance` will take, and choose batches and layers a pass that fit.

    Batches are `config.batch_tokens` where that fits and smaller where it does not; sums of all layers are held at once
    where they fit, else as many layers' as do, in as many passes. Of several processes the first one plans for all.

    Args:
        free_bytes: memory that may be used beside what is held; None: what the device has free now.

    Raises:
        InputError: as `importance`, and where not even one example and one layer fit.
    """
    return Plan(**on_rank0(lambda: dataclasses.asdict(_planned(model, behaviour, units_of(unit), config, free_bytes))))


def _planned(
    model: HookedModel, behaviour: Behaviour, unit: Sequence[Unit], config: ScoringConfig, free_bytes: int | None
) -> Plan:
    sites = scored_sites(model, unit, config)
    data = prepare(model, behaviour, config)
    device = torch.device(model.cfg.device)
    probe = _Probe(model, data, sites, config)
    batch_bytes = probe.batch_bytes()
    give_back()
    n_sharing = local_world_size() if device.type == "cpu" else 1
    free = free_bytes if free_bytes is not None else free_memory(device) // n_sharing
    held = held_memory(device)
    most, wanted = config.layers_per_pass or model.cfg.n_layers, batch_tokens_of(model, config)
    for layers in halved(most):
        passes = in_passes(sites, layers)
        sums = max(sum(_sums_bytes(model, site, len(behaviour)) for site in some) for some in passes)
        for batch_tokens in (wanted, *(n for n in _BATCH_TOKENS if n < wanted)):
            planned = batches(data.rows, batch_tokens=batch_tokens, together=data.rows_each)
            sizes = [(len(some), max(map(row_length, some))) for some in planned]
            largest = max(batch_bytes(*size) for size in sizes)
            if sums + largest <= _SHARE * free:
                n_tokens = sum(n_rows * length for n_rows, length in sizes)
                seconds = len(passes) * n_tokens * probe.seconds_a_token(planned[0]) / world_size()
                give_back()
                return Plan(batch_tokens, layers, len(passes), len(behaviour), n_tokens, held, sums, largest,
                            held + sums + largest, free, seconds)  # fmt: skip
    raise InputError(
        f"one layer's sums ({sums / 2**30:.2f} GiB) and one example ({largest / 2**30:.2f} GiB) do not fit into "
        f"{_SHARE:.0%} of the {free / 2**30:.2f} GiB that are free: use a smaller dtype, max_tokens or more memory"
    )


def halved(n_layers: int) -> list[int]:
    """Layers a pass, the most first: each time half, down to one."""
    return [n_layers >> k for k in range(n_layers.bit_length())]


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on the CPU, what the machine and its container leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def held_memory(device: torch.device) -> int:
    """Bytes in use now: by torch on a GPU, by the process on the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's own lines on standard error are not for the user; errors come as exceptions all the same."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _sums_bytes(model: HookedModel, site: Site, n_examples: int) -> int:
    """Of a site's sums, on the device that computes: those of weights that are away lie in host memory."""
    matrix = site if site.unit == "weight" else Site(site.layer, "out")
    here = home(model, matrix).type == torch.device(model.cfg.device).type
    return site_bytes(model, site, n_examples) if here else 0


def site_bytes(model: HookedModel, site: Site, n_examples: int) -> int:
    """Of a site's running sums."""
    n_in, n_out = shape(model, site if site.unit == "weight" else Site(site.layer, "out"))
    return 4 * (n_in + (n_in * n_out if site.unit == "weight" else n_in * (1 + min(N_GROUPS, n_examples))))


class _Probe:
    """Passes that are watched. Every layer is folded into the middle layer's sums: their cost without their memory."""

    def __init__(self, model: HookedModel, data: Prepared, sites: Sequence[Site], config: ScoringConfig) -> None:
        self.model, self.data, self.sites, self.config = model, data, sites, config
        self.middle = model.cfg.n_layers // 2
        own = [site for site in sites if site.layer == self.middle]
        self.sums = Sums(model, own, n_examples=len(data.rows), rows_each=data.rows_each, signed=config.signed)

    def run(self, rows: Sequence[Row]) -> float:
        """Seconds of one pass."""
        began = time.perf_counter()
        batch = collate(rows, device=self.model.cfg.device, padding=self.config.padding)
        self.sums.begin(batch)

        def add(site: Site, x: Tensor, gradient: Tensor) -> None:
            self.sums.add(Site(self.middle, site.part), x, gradient)

        losses = stream_gradients(self.model, batch, self.sites, add, signs=self.sums.signs())
        losses.cpu()  # waits for a GPU
        return time.perf_counter() - began

    def peak(self, rows: Sequence[Row]) -> int:
        """The most that was allocated at once during one pass, beside what was there."""
        device = torch.device(self.model.cfg.device)
        if device.type == "cuda":
            held = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.run(rows)
            return torch.cuda.max_memory_allocated(device) - held
        with (
            _quiet(),
            torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            ) as profile,
        ):
            self.run(rows)
        events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        return max(itertools.accumulate((n_bytes for _, n_bytes in changes), initial=0))

    def batch_bytes(self) -> Callable[[int, int], int]:
        """What a batch of `n_rows` rows of `length` positions needs: fixed + n_rows * (a * length + b * length**2)."""
        each = self.data.rows_each
        groups = [self.data.rows[i : i + each] for i in range(0, len(self.data.rows), each)]
        groups.sort(key=lambda group: max(map(row_length, group)))
        short, long = groups[0], groups[-1]
        lengths = [max(map(row_length, group)) for group in (short, long)]
        self.run(short)  # whatever is allocated once
        one, two = self.peak(long), self.peak([*long, *long])
        per_row = [(two - one) / each]
        fixed = one - (two - one)
        if lengths[0] < lengths[1]:
            per_row.append(max(0.0, (self.peak(short) - fixed) / each))
            system = np.array([[lengths[1], lengths[1] ** 2], [lengths[0], lengths[0] ** 2]], dtype=float)
            linear, square = np.linalg.solve(system, np.array(per_row))
        else:
            linear, square = per_row[0] / lengths[1], 0.0
        heap = _HEAP if torch.device(self.model.cfg.device).type == "cpu" else 1.0
        return lambda n_rows, length: int(heap * (max(fixed, 0) + n_rows * (linear * length + square * length**2)))

    def seconds_a_token(self, batch: Sequence[Row]) -> float:
        """Of the largest part of a batch that has no more than `_TIMED_TOKENS`."""
        each, length = self.data.rows_each, max(map(row_length, batch))
        n_rows = min(len(batch), max(1, _TIMED_TOKENS // (length * each)) * each)
        return min(self.run(batch[:n_rows]) for _ in range(2)) / (n_rows * length)
