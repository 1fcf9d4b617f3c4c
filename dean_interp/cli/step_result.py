"""What a step of the command gives back, and the command line that starts what was forecast."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dean_interp.report.html import options_of
from dean_interp.study.config import StudyConfig
from dean_interp.study.improvement import ImproveConfig


@dataclass(frozen=True)
class StepResult:
    """The result of one step, for programs and for people."""

    record: dict[str, Any]
    """What `--json` prints."""
    text: str
    """What is printed without it; empty where the step has said all while it ran."""
    holds: bool = True
    """Whether what the step verified is as it should be. False ends the command with exit code 1."""


def start_command(command: str, config: StudyConfig | ImproveConfig, out: Path) -> str:
    """A forecast's command with the options that were given; which devices it takes, the forecast has said."""
    if "--device" in command:
        config = replace(config, model=replace(config.model, device=None))
    options = options_of(config, type(config)())
    return f"{command} {shlex.join([*options, '--out', str(out)])}"
