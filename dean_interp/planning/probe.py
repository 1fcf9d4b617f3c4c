"""Passes of scoring that are watched: what a batch allocates, and how long it takes."""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Row, collate, row_length
from dean_interp.scoring.capture import stream_gradients
from dean_interp.scoring.preparation import Prepared, ScoringConfig
from dean_interp.scoring.sums import Sums

HEAP = 1.35
"""How much a process grows for what is in use: glibc keeps freed blocks of less than 32 MiB."""
_TIMED_TOKENS = 512


class PassProbe:
    """Passes that are watched. Every layer is added to the middle layer's sums: their cost without their memory."""

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
        # This waits for a GPU.
        losses.cpu()
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
        # Allocations and what is given back, in the order of time: their running sum is what was in use.
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        return max(itertools.accumulate((n_bytes for _, n_bytes in changes), initial=0))

    def batch_bytes(self) -> Callable[[int, int], int]:
        """What a batch of `n_rows` rows of `length` positions needs: fixed + n_rows * (a * length + b * length**2)."""
        each = self.data.rows_each
        groups = [self.data.rows[i : i + each] for i in range(0, len(self.data.rows), each)]
        groups.sort(key=longest)
        short, long = groups[0], groups[-1]
        short_length, long_length = longest(short), longest(long)
        # The first pass allocates what is there once and for all.
        self.run(short)
        # Twice as many rows of one length tell what a row needs from what is fixed.
        peak_of_one, peak_of_two = self.peak(long), self.peak([*long, *long])
        of_long_row = (peak_of_two - peak_of_one) / each
        fixed = peak_of_one - (peak_of_two - peak_of_one)
        # Rows of another length tell the linear from the square part.
        linear, square = of_long_row / long_length, 0.0
        if short_length < long_length:
            of_short_row = max(0.0, (self.peak(short) - fixed) / each)
            system = np.array([[long_length, long_length**2], [short_length, short_length**2]], dtype=float)
            linear, square = np.linalg.solve(system, np.array([of_long_row, of_short_row]))
        heap = HEAP if torch.device(self.model.cfg.device).type == "cpu" else 1.0

        def of_batch(n_rows: int, length: int) -> int:
            return int(heap * (max(fixed, 0) + n_rows * (linear * length + square * length**2)))

        return of_batch

    def seconds_a_token(self, batch: Sequence[Row]) -> float:
        """Seconds a padded token, from the largest part of a batch that has no more than `_TIMED_TOKENS`."""
        each, length = self.data.rows_each, longest(batch)
        n_rows = min(len(batch), max(1, _TIMED_TOKENS // (length * each)) * each)
        seconds = min(self.run(batch[:n_rows]) for _ in range(2))
        return seconds / (n_rows * length)


def longest(batch: Sequence[Row]) -> int:
    """The number of positions that each row of a batch is padded to."""
    return max(map(row_length, batch))


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
