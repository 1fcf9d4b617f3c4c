"""The forecast of a finished run beside the seconds that its steps took."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dean_interp.errors import InputError
from dean_interp.files import read_json
from dean_interp.frames import Framed
from dean_interp.planning.forecast import Forecast, duration
from dean_interp.planning.improve_forecast import forecast_improve
from dean_interp.planning.placement import Devices
from dean_interp.planning.study import forecast
from dean_interp.study.improvement import Improvement
from dean_interp.study.measured_edit import load_run

TIMES = "times.json"


@dataclass(frozen=True)
class StepBeside:
    """One step: what was forecast, and what it took."""

    step: str
    forecast: float
    """Seconds."""
    actual: float
    """Seconds."""

    @property
    def ratio(self) -> float:
        """Forecast over actual: 1 where both are the same, above 1 where the forecast was too long."""
        if not self.actual:
            return float("nan")
        return self.forecast / self.actual


@dataclass(frozen=True)
class ForecastBeside(Framed):
    """A forecast beside a finished run."""

    folder: str
    steps: tuple[StepBeside, ...]
    """Those that both have."""
    others: dict[str, float]
    """Seconds of the run's steps that no forecast counts, such as loading."""
    forecast: Forecast

    @property
    def in_all(self) -> StepBeside:
        """All steps that both have, added up."""
        return StepBeside(
            step="in all",
            forecast=sum(step.forecast for step in self.steps),
            actual=sum(step.actual for step in self.steps),
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row a step: seconds forecast, seconds taken, and their ratio."""
        rows = []
        for step in self.steps:
            rows.append({"step": step.step, "forecast": step.forecast, "actual": step.actual, "ratio": step.ratio})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"ForecastBeside({self.folder!r}: forecast / actual {self.in_all.ratio:.2f})"

    def __str__(self) -> str:
        width = 2 + max(len(step.step) for step in self.steps)
        lines = [f"{'':<{width}}{'forecast':>10}{'actual':>10}{'ratio':>8}"]
        for step in (*self.steps, self.in_all):
            forecast, actual = duration(step.forecast), duration(step.actual)
            lines.append(f"{step.step:<{width}}{forecast:>10}{actual:>10}{step.ratio:>8.2f}")
        if self.others:
            not_counted = [f"{step} {duration(seconds)}" for step, seconds in self.others.items()]
            lines.append(f"not forecast: {', '.join(not_counted)}")
        lines.append(f"time: {self.forecast.pace}")
        if self.forecast.busy:
            lines.append(f"the machine was busy ({self.forecast.busy})")
        return "\n".join(lines)


def beside_actual(forecast: Forecast, folder: Path) -> ForecastBeside:
    """A forecast beside the seconds in a run folder's `times.json`.

    Raises `InputError` where the folder has no times, or those of other steps alone.
    """
    path = folder / TIMES
    if not path.is_file():
        raise InputError(f"{folder} has no {TIMES}: name the folder of a run")
    actual = read_json(path, dict[str, float])
    steps = []
    others = dict(actual)
    for cost in forecast.steps:
        if cost.step in actual:
            steps.append(StepBeside(step=cost.step, forecast=cost.seconds, actual=actual[cost.step]))
            others.pop(cost.step, None)
    if not steps:
        raise InputError(f"{path} has no step of the forecast: {', '.join(actual)}")
    return ForecastBeside(folder=str(folder), steps=tuple(steps), others=others, forecast=forecast)


def finished_beside_forecast(folder: Path, devices: Devices = Devices()) -> ForecastBeside:  # noqa: B008 - frozen
    """A finished run of `run` or `improve` beside what would be forecast of it now.

    Raises `InputError` as `beside_actual`, as the forecast, and where the run is not finished.
    """
    run = load_run(folder)
    if isinstance(run, Improvement):
        forecast_now = forecast_improve(run.config, devices)
    else:
        forecast_now = forecast(run.config, devices)
    return beside_actual(forecast_now, folder)
