"""`dean-interp improve`: from two data sets to an edit that raises both behaviours, with its proof."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from dean_interp.cli.step_result import StepResult, start_command
from dean_interp.data.examples import draw
from dean_interp.models.neuron_names import neuron_of, parse_name
from dean_interp.planning.improve_forecast import forecast_improve
from dean_interp.planning.placement import devices_here
from dean_interp.report.improve_page import look_at, neuron_page_of, next_commands, write_improve_report
from dean_interp.report.neuron_page import neuron_page
from dean_interp.study.improve import run_improve
from dean_interp.study.improve_data import improve_data
from dean_interp.study.improvement import GATES_FILE, ImproveConfig, Improvement
from dean_interp.study.results import RESULTS_FILE
from dean_interp.study.run_units import scores_of

N_EXAMPLES, N_TOKENS = 12, 12
"""Confirming examples of each set, and first tokens of their answers, on which the strongest neuron is shown."""


@dataclass(frozen=True)
class ImproveEdit:
    """Find an edit that raises both behaviours within a budget of damage, and confirm it on prompts that chose nothing.

    A killed run goes on where it was. The exit code is 0 where the run finished: "not confirmed" is a result, too.
    """

    improve: OmitArgPrefixes[ImproveConfig] = field(default_factory=ImproveConfig)
    out: Path = Path("runs/improve")
    """Run folder; `report.html` appears in it."""
    dry_run: bool = False
    """Only print the time and the memory that it would take on this machine. No weight is read, and nothing is written
    into the run folder."""


def do_improve(step: ImproveEdit) -> StepResult:
    """Find and confirm the edit, and write its page and that of its strongest neuron."""
    if step.dry_run:
        improve_forecast = forecast_improve(step.improve, devices_here(step.improve.model.device))
        command = start_command(improve_forecast.command, step.improve, step.out)
        improve_forecast = dataclasses.replace(improve_forecast, command=command)
        return StepResult(dataclasses.asdict(improve_forecast), str(improve_forecast))
    improvement = run_improve(step.improve, step.out)
    _write_strongest_neuron(improvement, step.out)
    report = write_improve_report(improvement, step.out)
    files = {"gates": step.out / GATES_FILE, "results": step.out / RESULTS_FILE, "report": report}
    following = next_commands(improvement, step.out)
    record = {
        "confirmed": improvement.confirmed,
        "headline": improvement.headline,
        "faults": list(improvement.faults),
        "conditions": [dataclasses.asdict(condition) for condition in improvement.conditions],
        **{name: str(path) for name, path in files.items()},
        "next": following,
    }
    return StepResult(record, _text(improvement, files, following))


def _write_strongest_neuron(improvement: Improvement, folder: Path) -> None:
    """Write the page of the neuron with the largest part in the predicted rise, where it is not written yet."""
    neuron = improvement.neurons[0]
    path = neuron_page_of(neuron, folder)
    if path.is_file():
        return
    config = improvement.config
    data = improve_data(config)
    examples = [draw(part, min(N_EXAMPLES, len(part))) for part in data.confirming]
    model = config.model.load()
    site, index = neuron_of(model, parse_name(neuron.name))
    page = neuron_page(
        model,
        site,
        index,
        examples,
        scores=scores_of(folder, data.scoring),
        template=config.model.template,
        answer_tokens=N_TOKENS,
    )
    dataclasses.replace(page, command=look_at(neuron, folder)).save(path)


def _text(improvement: Improvement, files: Mapping[str, Path], following: Mapping[str, str]) -> str:
    lines = [improvement.headline, ""]
    lines += [f"fault: {fault}" for fault in improvement.faults]
    for condition in improvement.conditions:
        verdict = "holds" if condition.holds else "does not hold"
        lines.append(f"{verdict:<13}  {condition.name}: {condition.text}")
    for name, informations in improvement.information.items():
        for information in informations:
            lines += [f"{name}: {sentence}" for sentence in information.missing]
    lines += ["", *(f"{name}: {path.resolve()}" for name, path in files.items()), ""]
    lines += [f"{what}: {command}" for what, command in following.items()]
    return "\n".join(lines)
