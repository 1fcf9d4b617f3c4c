"""`dean-interp plan`, `run`, `sweep`, `verify` and `report`: whole studies, and what becomes of them."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from dean_interp.cli.step_result import StepResult, start_command
from dean_interp.errors import InputError
from dean_interp.planning.beside_actual import finished_beside_forecast
from dean_interp.planning.placement import Devices
from dean_interp.planning.study import forecast
from dean_interp.report.html import write_comparison, write_report, write_sweep_report
from dean_interp.report.improve_page import write_improve_report
from dean_interp.study.config import StudyConfig, SweepConfig
from dean_interp.study.improvement import Improvement, refuse_improvement
from dean_interp.study.measured_edit import load_run
from dean_interp.study.results import RESULTS_FILE, load_results
from dean_interp.study.run import run_study
from dean_interp.study.sweep import run_sweep, sweep_headline
from dean_interp.study.verify import verify_run


@dataclass(frozen=True)
class PlanStudy:
    """Print the memory and time that `run` would take on given devices. Of `improve`, `improve --dry-run` says it.

    The options are those of `run`. Only the model's configuration and its tokenizer are read, no weight.
    """

    finished: Path | None = None
    """Folder of a finished `run` or `improve`, of which the forecast of each step is printed beside the time that it
    took. The other settings of the study are those of that run."""
    devices: OmitArgPrefixes[Devices] = field(default_factory=Devices)
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=StudyConfig)


@dataclass(frozen=True)
class RunStudy:
    """Run the whole study: score, couple, ablate, measure beside controls, report.

    A killed run goes on where it was.
    """

    study: OmitArgPrefixes[StudyConfig]
    out: Path = Path("runs/study")
    """Run folder; `report.html` appears in it."""


@dataclass(frozen=True)
class RunSweep:
    """Try many edits from one scoring pass.

    The Pareto front is chosen on one half of the tests and confirmed on the other half.
    """

    sweep: OmitArgPrefixes[SweepConfig]
    out: Path = Path("runs/sweep")
    """Run folder; `sweep.html` appears in it."""


@dataclass(frozen=True)
class VerifyRun:
    """Check that a finished run is what it says: files, fingerprints, and a sample of its numbers measured again.

    The exit code is 1 where something differs by more than float noise.
    """

    run: Positional[Path]
    """Run folder."""
    full: bool = False
    """Score every example again, too."""


@dataclass(frozen=True)
class WriteReport:
    """Write `report.html` again from the results in a run folder, or one page that compares several runs."""

    folders: Positional[tuple[Path, ...]]
    """Run folders."""
    out: Path | None = None
    """Page that compares the runs. Unset: comparison.html in the first folder, and report.html of one folder alone."""


def do_plan(step: PlanStudy) -> StepResult:
    """Forecast what a study takes, or what a finished one should have taken."""
    if step.finished is not None:
        beside = finished_beside_forecast(step.finished, step.devices)
        return StepResult(dataclasses.asdict(beside), str(beside))
    study_forecast = forecast(step.study, step.devices)
    command = start_command(study_forecast.command, step.study, RunStudy.out)
    study_forecast = dataclasses.replace(study_forecast, command=command)
    return StepResult(dataclasses.asdict(study_forecast), str(study_forecast))


def do_run(step: RunStudy) -> StepResult:
    """Run the study and write its report."""
    results = run_study(step.study, step.out)
    report = _write_report(step.out)
    headlines = {unit_results.unit: unit_results.headline for unit_results in results.units}
    lines = [f"{unit}s: {headline}" for unit, headline in headlines.items()]
    for unit_results in results.units:
        for information in unit_results.information:
            lines += [f"{unit_results.unit}s: {sentence}" for sentence in information.missing]
    record = {"results": str(step.out / RESULTS_FILE), "report": str(report), "headlines": headlines}
    return StepResult(record, "\n".join([*lines, f"report: {report.resolve()}"]))


def do_sweep(step: RunSweep) -> StepResult:
    """Run the sweep and write its report."""
    sweep = run_sweep(step.sweep, step.out)
    report = write_sweep_report(sweep, step.out)
    headline = sweep_headline(sweep)
    front = [point.name for point in sweep.points if point.on_front]
    record = {"out": str(step.out), "headline": headline, "front": front, "report": str(report)}
    return StepResult(record, f"{headline}\nreport: {report.resolve()}")


def do_verify(step: VerifyRun) -> StepResult:
    """Verify a finished run."""
    verification = verify_run(step.run, full=step.full)
    record = {"holds": verification.holds, **dataclasses.asdict(verification)}
    return StepResult(record, str(verification), verification.holds)


def do_report(step: WriteReport) -> StepResult:
    """Write the page of one run, or of several."""
    if not step.folders:
        raise InputError("name at least one run folder")
    if len(step.folders) == 1 and step.out is None:
        report = _write_report(step.folders[0])
    else:
        for folder in step.folders:
            refuse_improvement(folder, "a page that compares runs")
        runs = {str(folder): load_results(folder / RESULTS_FILE) for folder in step.folders}
        report = write_comparison(runs, step.out or step.folders[0] / "comparison.html")
    return StepResult({"report": str(report)}, f"report: {report.resolve()}")


def _write_report(folder: Path) -> Path:
    """The page of a run folder: of an improvement, or of a study."""
    run = load_run(folder)
    if isinstance(run, Improvement):
        return write_improve_report(run, folder)
    return write_report(run, folder)
