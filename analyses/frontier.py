"""Which edit raises both behaviours at equal damage? Every arm on one model, beside its nulls and a system prompt.

    python analyses/frontier.py --out runs/frontier

on the demo model (--model for another, --first, --second and --general for other data). Every arm gets the same
calibration pairs, the same number of trials to choose its settings, and the same general text on which its KL is set.
Both margins are measured on confirming prompts, which no arm may read before. Work is done in pieces, one an arm: the
command can be stopped and started again, and started in several terminals at once, which then share the pieces. Each
ends by writing results.json, table.md, points.csv, report.html and a figure of all that is done.
"""

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from tyro.conf import OmitArgPrefixes

from dean_interp import load_behaviour
from dean_interp.arms.all_arms import TOGETHER, all_arms
from dean_interp.arms.choosing_settings import refuse_without_optuna
from dean_interp.arms.comparison import ComparisonConfig, begun
from dean_interp.arms.frontier import Frontier, frontier_of
from dean_interp.arms.measured_arms import name_together
from dean_interp.arms.pieces import compare_arms
from dean_interp.cli.ending import command, script
from dean_interp.errors import InputError
from dean_interp.models.threads import chosen_threads
from dean_interp.planning.comparison_forecast import forecast_comparison
from dean_interp.planning.forecast import Forecast
from dean_interp.planning.placement import devices_here
from dean_interp.report.frontier_page import write_frontier
from dean_interp.report.html import options_of
from dean_interp.study import day
from dean_interp.study.improve_data import ImproveData, improve_data
from dean_interp.study.run_folder import THREADS, Clock, owned

ONCE_BEGUN = ("scores/*", "choose/states/*", "confirm/states/*")


@dataclass(frozen=True)
class FrontierRun:
    """Arms compared at equal damage."""

    out: Path = Path("runs/frontier")
    """The run folder."""
    only: tuple[str, ...] = ()
    """Arms that are compared, by name or the beginning of it. Unset: all."""
    also: tuple[str, ...] = ()
    """Further data sets with safe and unsafe answers, on whose test prompts every arm is measured, too."""
    quick: bool = False
    """Compare at one KL, with two trials an arm, two flips, and one random arm of each sort."""
    dry_run: bool = False
    """Only print the time that it would take on this machine."""
    comparison: OmitArgPrefixes[ComparisonConfig] = field(default_factory=ComparisonConfig)


def run(given: FrontierRun) -> Frontier | Forecast:
    """Every piece that is left, and what all of them found so far; of a dry run what all of them would take."""
    config = _quick(given.comparison) if given.quick else given.comparison
    config.check()
    refuse_without_optuna()
    study = dataclasses.replace(config.study, model=day.of_run(config.study.model, given.out))
    config = dataclasses.replace(config, study=study)
    data = improve_data(study)
    arms = all_arms(study.n_random)
    worked_on = [arm for arm in arms if not given.only or arm.name.startswith(given.only)]
    if not worked_on:
        raise InputError(f"no arm begins with {' or '.join(given.only)}; arms: {'; '.join(arm.name for arm in arms)}")
    if given.dry_run:
        forecast = forecast_comparison(config, worked_on, devices_here(study.model.device))
        options = options_of(dataclasses.replace(given, dry_run=False), FrontierRun())
        forecast = dataclasses.replace(forecast, command=shlex.join([*forecast.command.split(), *options]))
        print(forecast)
        return forecast
    with owned(given.out, config, data.all, begun=ONCE_BEGUN):
        pass
    clock = Clock(given.out / "times.json")
    model = study.model.load()
    further = [load_behaviour(source, n_examples=None, split="test") for source in given.also]
    together = TOGETHER if not given.only else ()
    with chosen_threads(model, given.out / THREADS):
        work = begun(given.out, config, data, model, further)
        clock.lap("original and shared scores")
        compare_arms(work, worked_on, together)
        clock.lap("arms")
    names = [arm.name for arm in worked_on] + [name_together(prompt, arm) for prompt, arm in together]
    frontier = frontier_of(work, names)
    page = write_frontier(frontier, given.out, facts(data, config))
    print(page.table, f"page: {page.path.resolve()}", sep="\n\n")
    return frontier


def _quick(config: ComparisonConfig) -> ComparisonConfig:
    """The quick form of the settings."""
    study = dataclasses.replace(config.study, n_flips=2, n_random=1)
    return dataclasses.replace(config, kls=(config.chosen_at,), n_choices=2, n_flips_tuned=2, study=study)


def facts(data: ImproveData, config: ComparisonConfig) -> dict[str, str]:
    """How it was done."""
    roles = {"scored": data.scoring, "choosing": data.choosing, "confirming": [*data.confirming, *data.others]}
    counted = {}
    for role, parts in roles.items():
        counted[f"{role} examples"] = ", ".join(f"{len(part)} of {part.name}" for part in parts)
    n_flips, n_tuned = config.study.n_flips, config.n_flips_tuned
    return counted | {
        "trials an arm": str(config.n_choices),
        "nulls of the best arm of each kind": f"{n_flips} flips of labels; {n_tuned} of fine-tuning",
        "command": command(),
    }


if __name__ == "__main__":
    script(lambda: run(tyro.cli(FrontierRun, description=__doc__)))
