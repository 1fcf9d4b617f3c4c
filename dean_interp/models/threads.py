"""How many threads a run computes with on a CPU.

torch takes one thread for each core. Where other processes use the cores too, its threads wait for each other at every
product, so that fewer threads can be faster (docs/performance.md). So a run first times a product of its model.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from dean_interp.distributed import on_rank0
from dean_interp.files import read_json, write_json
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.sizes import neuron_counts, residual_width

log = logging.getLogger(__name__)

_CLEARLY = 1.5  # torch's own number stays where no other is so many times as fast
_N_ROWS, _N_ROUNDS, _SECONDS = 512, 5, 0.03  # tokens of a product, and seconds of each of the rounds
_BY_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

TimeProduct = Callable[[int], float]
"""Seconds of one product with a number of threads."""


@dataclass(frozen=True)
class ThreadChoice:
    """The number of threads of a run, and why."""

    n_threads: int
    seconds: dict[int, float]
    """What a product took with each number that was tried; empty where somebody set the number."""


@contextmanager
def chosen_threads(model: HookedModel, path: Path, *, time_product: TimeProduct | None = None) -> Iterator[None]:
    """While open, torch computes with the threads that are clearly the fastest now; afterwards with those from before.

    A number that the caller has set is taken when a run begins: OMP_NUM_THREADS, MKL_NUM_THREADS or
    `torch.set_num_threads`. Sums over another number of threads round differently, and what a run made would not be
    known again. So the file keeps the number, and a run that goes on takes it whatever is set then.

    Args:
        model: on a GPU nothing is chosen.
        path: the file of the choice, in the folder of the run.
        time_product: times a product; None: one of the model's shape, on this machine's clock.
    """
    before = torch.get_num_threads()
    if torch.device(model.cfg.device).type != "cpu":
        yield
        return
    try:
        if not on_rank0(path.is_file):
            write_json(path, on_rank0(lambda: asdict(_first_choice(before, model, time_product))))
        n_threads = read_json(path, ThreadChoice).n_threads
        if n_threads != before and _is_set(before):
            log.warning("the run began with n_threads=%d and goes on with them, so %d is not taken", n_threads, before)
        torch.set_num_threads(n_threads)
        yield
    finally:
        torch.set_num_threads(before)


def _is_set(n_threads: int) -> bool:
    """Whether somebody chose the number of threads: torch itself takes the cores, or what of them the process has."""
    own = {psutil.cpu_count(), psutil.cpu_count(logical=False)}
    if hasattr(os, "sched_getaffinity"):
        own.add(len(os.sched_getaffinity(0)))
    return n_threads not in own or any(name in os.environ for name in _BY_ENVIRONMENT)


def _first_choice(n_own: int, model: HookedModel, time_product: TimeProduct | None) -> ThreadChoice:
    """What somebody set, or where there is no choice; else what is the fastest now."""
    if n_own == 1 or _is_set(n_own):
        return ThreadChoice(n_own, {})
    # The timer holds matrices of the model's size, so it is made only where something is timed.
    return _fastest(n_own, time_product or _product_timer(model))


def _fastest(n_own: int, time_product: TimeProduct) -> ThreadChoice:
    """The fastest of 1, 2, 4 and so on to torch's own number, which stays where none is clearly faster."""
    numbers = [2**power for power in range(n_own.bit_length()) if 2**power < n_own] + [n_own]
    seconds = dict.fromkeys(numbers, 0.0)
    # In turn, so that a moment in which others compute is not one number's alone.
    for _ in range(_N_ROUNDS):
        for number in numbers:
            seconds[number] += time_product(number) / _N_ROUNDS
    fastest = min(numbers, key=lambda number: seconds[number])
    times_as_fast = seconds[n_own] / seconds[fastest]
    if times_as_fast < _CLEARLY:
        return ThreadChoice(n_own, seconds)
    log.warning(
        "this machine is busy, so the run computes with n_threads=%d: a product is %.1f times as fast as with %d "
        "(OMP_NUM_THREADS sets another number)",
        fastest,
        times_as_fast,
        n_own,
    )
    return ThreadChoice(fastest, seconds)


def _product_timer(model: HookedModel) -> TimeProduct:
    x = torch.ones(_N_ROWS, residual_width(model))
    matrix = torch.ones(residual_width(model), max(neuron_counts(model)))

    def time_product(n_threads: int) -> float:
        torch.set_num_threads(n_threads)
        # The first product wakes the threads.
        _ = x @ matrix
        began, n_products = time.perf_counter(), 0
        while time.perf_counter() - began < _SECONDS or not n_products:
            _ = x @ matrix
            n_products += 1
        return (time.perf_counter() - began) / n_products

    return time_product
