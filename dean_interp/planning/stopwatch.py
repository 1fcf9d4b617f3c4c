"""How long a call takes, on a machine that does other work, too."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

TimedRun = Callable[[], object]
"""A call that is timed."""


@dataclass(frozen=True)
class Took:
    """The seconds that one call took."""

    wall: float
    cpu: float
    """CPU time of this process, all threads added up. Waiting for a core does not count."""

    @property
    def better(self) -> float:
        """The smaller of both.

        On one thread that is the CPU time: what the call takes on an idle machine, whatever else runs on this one. On
        several threads it is mostly the wall time, since their CPU times add up.
        """
        return min(self.wall, self.cpu)


def timed(run: TimedRun, *, device: str = "cpu") -> Took:
    """The seconds of a call, with the work of a GPU to its end. Where a GPU works, both are the wall time."""
    is_gpu = torch.device(device).type == "cuda"
    _wait_for(is_gpu)
    wall_before, cpu_before = time.perf_counter(), time.process_time()
    run()
    _wait_for(is_gpu)
    wall = time.perf_counter() - wall_before
    cpu = time.process_time() - cpu_before
    return Took(wall, wall if is_gpu else cpu)


def _wait_for(is_gpu: bool) -> None:
    # A GPU works on after a call returns.
    if is_gpu:
        torch.cuda.synchronize()
