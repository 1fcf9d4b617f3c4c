"""What a step of the command gives back."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StepResult:
    """The result of one step, for programs and for people."""

    record: dict[str, Any]
    """What `--json` prints."""
    text: str
    """What is printed without it; empty where the step has said all while it ran."""
    holds: bool = True
    """Whether what the step verified is as it should be. False ends the command with exit code 1."""
