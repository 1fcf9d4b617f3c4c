"""The command `dean-interp`."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dean_interp.errors import InputError
from dean_interp.study.config import StudyConfig


@dataclass(frozen=True)
class Run:
    """Run the whole study: score, couple, ablate, measure beside controls, report. Resumes where it was stopped."""

    study: tyro.conf.OmitArgPrefixes[StudyConfig]
    out: Path = Path("runs/demo")
    """The run folder; `report.html` appears in it."""


@dataclass(frozen=True)
class Report:
    """Draw `report.html` anew from the results in a run folder."""

    folder: tyro.conf.Positional[Path]
    """The run folder."""


Command = Annotated[Run, tyro.conf.subcommand("run")] | Annotated[Report, tyro.conf.subcommand("report")]


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 after one line that says what was wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("dean_interp").setLevel(logging.INFO)
    try:
        command = tyro.cli(
            Command, prog="dean-interp", description="Coupled neurons of two behaviours.", args=arguments
        )
        return _run(command) if isinstance(command, Run) else _report(command.folder)
    except InputError as error:
        print(f"dean-interp: {error}", file=sys.stderr)  # noqa: T201 - the command line's own voice
        return 2


def _run(command: Run) -> int:
    from dean_interp.study.run import run_study  # here, so that --help does not wait for TransformerLens

    results = run_study(command.study, command.out)
    for one in results.units:
        print(f"{one.unit}s: {one.headline}")  # noqa: T201
    return _report(command.out)


def _report(folder: Path) -> int:
    from dean_interp.report.html import write_report
    from dean_interp.study.results import load_results

    path = write_report(load_results(folder / "results.json"), folder)
    print(f"report: {path.resolve()}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
