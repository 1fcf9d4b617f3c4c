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
        head = f"{self.model}: {self.n_parameters / 1e9:.2f} billion parameters, {self.weights_gib:.1f} GiB; "
        width = 2 + max(len(step.step) for step in self.steps)
        lines = [f"{'':<{width}}{'time':>10}  {'from - to':<20}{'each device':>12}{'machine':>14}{'disk':>14}"]
        for step in self.steps:
            sizes = "".join(f"{size:>10.2f} GiB" for size in (step.device_gib, step.host_gib, step.disk_gib))
            lines.append(f"{step.step:<{width}}{_columns(step.span)}{sizes[2:]}")
        lines.append(f"{'in all':<{width}}{_columns(self.span)}".rstrip())
        tail = f"time: {self.pace}; {self.not_counted} not counted"
        tail += f"; {self.n_passes} passes in scoring" if self.n_passes > 1 else ""
        experts = [self.experts] if self.experts else []
        busy = [f"the machine was busy ({self.busy}): its times may be too long"] if self.busy else []
        return "\n".join([head + self.placement, *experts, *lines, tail, *busy, f"start: {self.command}"])


def _columns(span: TimeSpan) -> str:
    return f"{duration(span.seconds):>10}  {duration(span.low) + ' - ' + duration(span.high):<20}"


def duration(seconds: float) -> str:
    """A time in the largest unit that it reaches."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
