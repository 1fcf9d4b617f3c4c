"""What imports take, each in a fresh interpreter, beside what they cannot do without."""

import resource
import subprocess
import sys
import time
from collections.abc import Callable

from figures import Figure, interleaved

NAMES = "from dean_interp import ablate, couple, importance, load_behaviour, load_model, measure"


def figures() -> list[Figure]:
    """The names that most work needs, over TransformerLens alone."""
    return [
        Figure(
            name="importing the names that most work needs / importing transformer_lens",
            limit=1.0,
            bound="TransformerLens, which they need",
            ratios=lambda: interleaved(
                lambda: run(NAMES), lambda: run("import transformer_lens"), repeats=2, seconds=seconds_of_children
            ),
        )
    ]


def run(program: str) -> None:
    """A process that runs a program."""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def seconds_of_children(call: Callable[[], object]) -> float:
    """The better of wall and CPU time of the processes that a call starts."""
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    call()
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - wall
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return min(wall, cpu)
