"""Figures: ratios of two things that are run in turn, each beside what bounds it and beside a committed baseline.

A figure is the time of ours over the time of something plain, so less is better. Both sides run in one process in turn,
several times. Of wall and CPU time the better one counts on each side (`planning.stopwatch`): benchmarks run on one
thread, where that is the CPU time, so that other work on the machine does not count.
"""

import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter

from dean_interp import show_progress
from dean_interp.models.load import versions
from dean_interp.planning.stopwatch import timed

HERE = Path(__file__).parent
LATEST, BASELINE = HERE / "latest.json", HERE / "baseline.json"
TOLERANCE = 0.1
"""How much a ratio may be worse than every repeat of the baseline."""
REPEATS = 3

Seconds = Callable[[Callable[[], object]], float]
"""Gives the seconds that a call takes."""


@dataclass(frozen=True)
class Figure:
    """One ratio to be measured."""

    name: str
    limit: float
    """What it would be if ours cost no more than what bounds it."""
    bound: str
    """What bounds it."""
    ratios: Callable[[], list[float]]
    """Measures it, several times."""


@dataclass(frozen=True)
class Measured:
    """A ratio that was measured several times."""

    ratio: float
    """The median."""
    low: float
    high: float


@dataclass(frozen=True)
class Baseline:
    """Ratios to compare with, and where they come from."""

    commit: str
    versions: Mapping[str, str]
    """Of the packages, and of the machine."""
    figures: Mapping[str, Measured]


@dataclass(frozen=True)
class Verdict:
    """What became of each figure since the baseline: names, with both numbers."""

    worse: tuple[str, ...]
    better: tuple[str, ...]
    missing: tuple[str, ...]
    """In the baseline, and not measured."""
    new: tuple[str, ...]
    """Measured, and not in the baseline."""

    @property
    def holds(self) -> bool:
        """Whether nothing got worse and nothing is missing."""
        return not self.worse and not self.missing

    def __str__(self) -> str:
        parts = {"worse": self.worse, "better": self.better, "missing": self.missing, "not in the baseline": self.new}
        lines = [f"{what}: {name}" for what, names in parts.items() for name in names]
        return "\n".join(lines or ["every figure is as it was"])


def interleaved(
    ours: Callable[[], object],
    plain: Callable[[], object],
    *,
    repeats: int = REPEATS,
    seconds: Seconds = lambda run: timed(run).better,
) -> list[float]:
    """Time of one over time of the other, run in turn; a first round warms up."""
    found = []
    for repeat in range(repeats + 1):
        ratio = seconds(ours) / seconds(plain)
        if repeat:
            found.append(ratio)
    return found


def summary(ratios: Sequence[float]) -> Measured:
    """The median, with the smallest and the largest."""
    return Measured(statistics.median(ratios), min(ratios), max(ratios))


def compared(measured: Mapping[str, Measured], baseline: Mapping[str, Measured]) -> Verdict:
    """What got worse by more than a tenth beyond the spread of the baseline, what got better by as much."""
    worse, better = [], []
    for name, now in measured.items():
        then = baseline.get(name)
        if then is None:
            continue
        said = f"{name}, {then.ratio:.3g} before, {now.ratio:.3g} now"
        if now.ratio > (1 + TOLERANCE) * then.high:
            worse.append(said)
        elif now.ratio < then.low / (1 + TOLERANCE):
            better.append(said)
    missing = tuple(name for name in baseline if name not in measured)
    new = tuple(name for name in measured if name not in baseline)
    return Verdict(tuple(worse), tuple(better), missing, new)


def row(figure: Figure, now: Measured, then: Measured | None) -> str:
    """One line: the ratio with its spread, the limit and what bounds it, and the baseline."""
    before = f"{then.ratio:.3g} [{then.low:.3g}, {then.high:.3g}]" if then else "none"
    value = f"{now.ratio:.3g} [{now.low:.3g}, {now.high:.3g}]"
    return f"{figure.name}: {value}; limit {figure.limit:.3g} ({figure.bound}); baseline {before}"


def measure_figures(figures: Sequence[Figure]) -> dict[str, Measured]:
    """Measure, print each figure beside its limit and its baseline, and note it in the results file."""
    torch.set_num_threads(1)
    known = read_baseline(BASELINE).figures if BASELINE.is_file() else {}
    measured = measured_and_printed(figures, known)
    earlier = read_baseline(LATEST).figures if LATEST.is_file() else {}
    write_baseline(LATEST, {**earlier, **measured})
    return measured


def measured_and_printed(figures: Sequence[Figure], known: Mapping[str, Measured]) -> dict[str, Measured]:
    """Measure, and print each figure beside its limit and what is known of it."""
    show_progress(False)
    measured = {}
    for figure in figures:
        measured[figure.name] = summary(figure.ratios())
        print(row(figure, measured[figure.name], known.get(figure.name)), flush=True)
    return measured


def read_baseline(path: Path) -> Baseline:
    """The ratios in a file."""
    return TypeAdapter(Baseline).validate_json(path.read_bytes())


def write_baseline(path: Path, figures: Mapping[str, Measured]) -> None:
    """Write ratios with the commit and the versions that they were measured with."""
    rounded = {name: Measured(*(float(f"{v:.3g}") for v in asdict(each).values())) for name, each in figures.items()}
    machine = {"python": platform.python_version(), "machine": platform.machine(), "threads": "1"}
    content = Baseline(commit=_commit(), versions={**versions(), **machine}, figures=rounded)
    path.write_text(json.dumps(asdict(content), indent=1) + "\n", encoding="utf-8")


def _commit() -> str:
    described = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(described, cwd=HERE, check=True, capture_output=True, text=True).stdout.strip()
