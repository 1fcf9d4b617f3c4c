"""What scoring will take, before it is run: memory, time, and the batches that fit.

A few short passes are run and watched: how many bytes they allocate for rows of two lengths, and how long they take.
The memory of a row is linear in its length, plus attention's part, which grows with its square. Two lengths give both.
"""

import contextlib
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.distributed import on_rank0, world_size
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Site, Unit
from dean_interp.models.tokens import Row, batches, collate, row_length
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.planning.device_memory import free_memory, held_memory
from dean_interp.planning.site_sums import alike, pass_bytes
from dean_interp.scoring.capture import stream_gradients
from dean_interp.scoring.means import further_folds, give_back
from dean_interp.scoring.preparation import (
    Prepared,
    ScoringConfig,
    batch_tokens_of,
    in_passes,
    prepare,
    scored_sites,
    units_of,
)
from dean_interp.scoring.products import Fold
from dean_interp.scoring.scores import Also
from dean_interp.scoring.sums import Sums

# A plan takes at most this share of the memory that is free.
_SHARE = 0.8
# Sizes of batches that are tried, where the wanted one does not fit.
_BATCH_TOKENS = (8192, 4096, 2048, 1024, 512, 256, 1)
# A pass is timed on at most so many tokens.
_TIMED_TOKENS = 512
# glibc keeps freed blocks of less than 32 MiB: the process grows by about this times what is in use.
_HEAP = 1.35


@dataclass(frozen=True)
class Plan:
    """The cost of one scoring run, in bytes on the device that scores and in seconds on this machine."""

    batch_tokens: int
    layers_per_pass: int
    n_passes: int
    n_examples: int
    n_tokens: int
    """Padded tokens that go through the model in each pass."""
    held_bytes: int
    """Bytes in use before scoring: on the CPU by the whole process, on a GPU what torch has allocated."""
    sums_bytes: int
    """Bytes of the running sums of one pass."""
    batch_bytes: int
    """Bytes that the largest batch needs beside the sums."""
    peak_bytes: int
    free_bytes: int
    """Bytes that could still be allocated before scoring."""
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the peak stays within what is free."""
        return self.peak_bytes - self.held_bytes <= _SHARE * self.free_bytes

    def apply(self, config: ScoringConfig) -> ScoringConfig:
        """The same settings with this plan's batches and passes."""
        return dataclasses.replace(config, batch_tokens=self.batch_tokens, layers_per_pass=self.layers_per_pass)

    def __str__(self) -> str:
        peak, in_use, sums = _gib(self.peak_bytes), _gib(self.held_bytes), _gib(self.sums_bytes)
        batch, free = _gib(self.batch_bytes), _gib(self.free_bytes)
        return (
            f"{self.n_examples} examples, {self.n_tokens} padded tokens in batches of {self.batch_tokens}; "
            f"{self.n_passes} pass(es) of {self.layers_per_pass} layers; about {self.seconds:.0f} s; "
            f"peak {peak} GiB ({in_use} in use, {sums} sums, {batch} a batch; {free} free)"
        )


@own_torch_settings()
def plan(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    unit: Unit | Sequence[Unit] = "neuron",
    config: ScoringConfig = ScoringConfig(),  # noqa: B008 - frozen
    also: Sequence[Also] = (),
    free_bytes: int | None = None,
) -> Plan:
    """Predict what `importance` will take, and choose batches and layers a pass that fit.

    Batches are `config.batch_tokens` where that fits and smaller where it does not. Sums of all layers are held at once
    where they fit; else there are several passes over fewer layers each. Of several processes the first plans for all.

    Args:
        also: other means that the pass shall keep, as of `importance`.
        free_bytes: memory that may be used beside what is held. None: what the device has free now.

    Raises `InputError` as `importance`, and where not even one example and one layer fit.
    """
    further = further_folds(also, config)
    sites = scored_sites(model, units_of(unit), config)

    def planned() -> dict[str, Any]:
        plan_here = _plan_here(model, behaviour, sites, config, further=further, free_bytes=free_bytes)
        return dataclasses.asdict(plan_here)

    return Plan(**on_rank0(planned))


def _plan_here(
    model: HookedModel,
    behaviour: Behaviour,
    sites: Sequence[Site],
    config: ScoringConfig,
    *,
    further: Sequence[Fold],
    free_bytes: int | None,
) -> Plan:
    """The plan of this process. The most layers a pass are tried first, and for these the largest batches."""
    data = prepare(model, behaviour, config)
    device = torch.device(model.cfg.device)
    probe = _Probe(model, data, sites=sites, config=config, further=further)
    batch_bytes = probe.batch_bytes()
    give_back()
    free_bytes = free_memory(device) if free_bytes is None else free_bytes
    held_bytes = held_memory(device)
    wanted = batch_tokens_of(model, config)
    smaller = [size for size in _BATCH_TOKENS if size < wanted]
    sums_bytes = largest_bytes = 0
    for layers_per_pass in halved(config.layers_per_pass or len(model.blocks)):
        passes = in_passes(sites, layers_per_pass)
        sums_bytes = max(pass_bytes(model, part, len(data.group_sizes), len(further)) for part in passes)
        for batch_tokens in (wanted, *smaller):
            planned = batches(data.rows, batch_tokens=batch_tokens, together=data.rows_each)
            sizes = [(len(rows), _longest(rows)) for rows in planned]
            largest_bytes = max(itertools.starmap(batch_bytes, sizes))
            if sums_bytes + largest_bytes > _SHARE * free_bytes:
                continue
            n_tokens = sum(n_rows * length for n_rows, length in sizes)
            seconds = len(passes) * n_tokens * probe.seconds_a_token(planned[0]) / world_size()
            give_back()
            return Plan(
                batch_tokens=batch_tokens,
                layers_per_pass=layers_per_pass,
                n_passes=len(passes),
                n_examples=len(behaviour),
                n_tokens=n_tokens,
                held_bytes=held_bytes,
                sums_bytes=sums_bytes,
                batch_bytes=largest_bytes,
                peak_bytes=held_bytes + sums_bytes + largest_bytes,
                free_bytes=free_bytes,
                seconds=seconds,
            )
    raise InputError(
        f"one layer's sums ({_gib(sums_bytes)} GiB) and one example ({_gib(largest_bytes)} GiB) do not fit into "
        f"{_SHARE:.0%} of the {_gib(free_bytes)} GiB that are free: use a smaller dtype, max_tokens or more memory"
    )


def halved(most: int) -> list[int]:
    """Numbers to try, of layers a pass for instance: the most first, then each time half, down to one."""
    return [most >> k for k in range(most.bit_length())]


class _Probe:
    """Passes that are watched. Sites that are alike share the sums of one of them: their cost without their memory."""

    def __init__(
        self,
        model: HookedModel,
        data: Prepared,
        sites: Sequence[Site],
        config: ScoringConfig,
        further: Sequence[Fold] = (),
    ) -> None:
        self.model = model
        self.data = data
        self.sites = sites
        self.config = config
        self.like = alike(model, sites)
        shared = sorted(set(self.like.values()))
        folds = (config.fold, *further)
        self.sums = Sums(model, shared, groups=data.groups, rows_each=data.rows_each, folds=folds)

    def run(self, rows: Sequence[Row]) -> float:
        """Seconds of one pass."""
        began = time.perf_counter()
        batch = collate(rows, device=self.model.cfg.device, padding=self.config.padding)
        self.sums.begin(batch)

        def add(site: Site, x: Tensor, gradient: Tensor) -> None:
            self.sums.add(self.like[site], x, gradient)

        losses = stream_gradients(self.model, batch, self.sites, add, signs=self.sums.signs())
        # A GPU works on after a call returns; a copy to the CPU waits for it.
        losses.cpu()
        return time.perf_counter() - began

    def peak(self, rows: Sequence[Row]) -> int:
        """Bytes that one pass allocates at most at once, beside those that were in use."""
        device = torch.device(self.model.cfg.device)
        if device.type == "cuda":
            in_use = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.run(rows)
            return torch.cuda.max_memory_allocated(device) - in_use
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with _quiet(), torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
            self.run(rows)
        # On the CPU the profiler notes every allocation (positive) and release (negative).
        profiler: Any = profile.profiler
        changes = []
        for event in profiler.kineto_results.events():
            if event.name() == "[memory]":
                changes.append((event.start_ns(), event.nbytes()))
        changes.sort()
        in_use = itertools.accumulate((n_bytes for _, n_bytes in changes), initial=0)
        return max(in_use)

    def batch_bytes(self) -> Callable[[int, int], int]:
        """A function that predicts the bytes of a batch of `n_rows` rows of `length` positions.

        It is `fixed + n_rows * (linear * length + square * length**2)`, from the peaks of one example of the longest,
        two of them, and one of the shortest.
        """
        rows, each = self.data.rows, self.data.rows_each
        examples = [rows[start : start + each] for start in range(0, len(rows), each)]
        shortest = min(examples, key=_longest)
        longest = max(examples, key=_longest)
        short_length, long_length = _longest(shortest), _longest(longest)
        # The first pass allocates what stays, so it is not measured.
        self.run(shortest)
        # What a second example adds is its own; the rest is there whatever the rows.
        single = self.peak(longest)
        double = self.peak([*longest, *longest])
        per_row = (double - single) / each
        fixed = single - (double - single)
        if short_length < long_length:
            per_short_row = max(0.0, (self.peak(shortest) - fixed) / each)
            powers = [[long_length, long_length**2], [short_length, short_length**2]]
            linear, square = np.linalg.solve(np.array(powers, dtype=float), np.array([per_row, per_short_row]))
        else:
            linear, square = per_row / long_length, 0.0
        heap = _HEAP if torch.device(self.model.cfg.device).type == "cpu" else 1.0

        def predict(n_rows: int, length: int) -> int:
            in_rows = n_rows * (linear * length + square * length**2)
            return int(heap * (max(fixed, 0) + in_rows))

        return predict

    def seconds_a_token(self, batch: Sequence[Row]) -> float:
        """Seconds a padded token, from the largest part of a batch that has no more than `_TIMED_TOKENS`."""
        each = self.data.rows_each
        length = _longest(batch)
        n_examples = max(1, _TIMED_TOKENS // (length * each))
        n_rows = min(len(batch), n_examples * each)
        seconds = min(self.run(batch[:n_rows]) for _ in range(2))
        return seconds / (n_rows * length)


def _longest(rows: Sequence[Row]) -> int:
    return max(map(row_length, rows))


def _gib(n_bytes: int | float) -> str:
    return f"{n_bytes / 2**30:.2f}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While open, nothing appears on standard error: the profiler's lines are not for the user, errors are raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
