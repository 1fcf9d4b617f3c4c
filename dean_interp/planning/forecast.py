"""What a run would take, as a record: time and memory of each of its steps."""

import dataclasses
from dataclasses import dataclass

import pandas as pd

from dean_interp.frames import Framed
from dean_interp.planning.rates import TimeSpan


@dataclass(frozen=True)
class StepCost:
    """One step of a run. Memory is the most at once: on each device that computes, and of the machine."""

    step: str
    seconds: float
    low: float
    """Seconds that it takes at least: of the fastest round of the calibration; a third, where there was none."""
    high: float
    """Seconds that it takes at most, in the same way."""
    device_gib: float
    host_gib: float
    disk_gib: float

    @property
    def span(self) -> TimeSpan:
        """The time with its range."""
        return TimeSpan(self.seconds, self.low, self.high)


@dataclass(frozen=True)
class Forecast(Framed):
    """What a run would take."""

    model: str
    n_parameters: int
    weights_gib: float
    placement: str
    """How the model would lie on the devices, and how many processes would share the work."""
    command: str
    n_passes: int
    """Passes of scoring: more than one where the sums of all layers do not fit beside a batch."""
    pace: str
    """Where the times come from: a calibration on this machine, or the arithmetic at a given speed."""
    busy: str
    """Why the times may be too long: the machine did other work while it was calibrated. Empty where it did not."""
    steps: tuple[StepCost, ...]
    not_counted: str
    """What the times leave out."""
    experts: str = ""
    """How many experts and neurons a mixture has, and what a token uses of it; empty for a dense model."""

    @property
    def span(self) -> TimeSpan:
        """The time of all steps."""
        return sum((step.span for step in self.steps), TimeSpan(0.0, 0.0, 0.0))

    def to_pandas(self) -> pd.DataFrame:
        """One row a step: seconds and GiB."""
        return pd.DataFrame([dataclasses.asdict(step) for step in self.steps])

    def __repr__(self) -> str:
        return f"Forecast({self.model!r}, {self.n_parameters / 1e9:.2f} billion parameters)"

    def __str__(self) -> str:
        billions = self.n_parameters / 1e9
        lines = [f"{self.model}: {billions:.2f} billion parameters, {self.weights_gib:.1f} GiB; {self.placement}"]
        if self.experts:
            lines.append(self.experts)
        width = 2 + max(len(step.step) for step in self.steps)
        lines.append(f"{'':<{width}}{'time':>10}  {'from - to':<20}{'each device':>12}{'machine':>14}{'disk':>14}")
        for step in self.steps:
            sizes = f"{step.device_gib:>8.2f} GiB{step.host_gib:>10.2f} GiB{step.disk_gib:>10.2f} GiB"
            lines.append(f"{step.step:<{width}}{_columns(step.span)}{sizes}")
        in_all = f"{'in all':<{width}}{_columns(self.span)}"
        lines.append(in_all.rstrip())
        passes = f"; {self.n_passes} passes in scoring" if self.n_passes > 1 else ""
        lines.append(f"time: {self.pace}; {self.not_counted} not counted{passes}")
        if self.busy:
            lines.append(f"the machine was busy ({self.busy}): its times may be too long")
        lines.append(f"start: {self.command}")
        return "\n".join(lines)


def _columns(span: TimeSpan) -> str:
    bounds = f"{duration(span.low)} - {duration(span.high)}"
    return f"{duration(span.seconds):>10}  {bounds:<20}"


def duration(seconds: float) -> str:
    """A time in the largest unit that it reaches."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
