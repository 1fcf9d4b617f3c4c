"""A copy of what the view shows, in plain HTML without a script: for a notebook that is read without a kernel."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined


def snapshot(facts: Mapping[str, Any], state: Mapping[str, Any], answers: Mapping[str, Any]) -> str:
    """The copy.

    Args:
        facts: `ViewFacts` as JSON has them.
        state: `ViewState` as JSON has it; empty before the first.
        answers: `TwoAnswers` as JSON has them; empty before there are any.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["fixed"] = _fixed
    template = (files("dean_interp.exploring") / "snapshot.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(facts=facts, state=state, answers=answers)


def _fixed(value: float | None, form: str) -> str:
    """A number in a form of `str.format`; a number that is not finite is said to be none."""
    return "not finite" if value is None else f"{value:{form}}".replace("-", "−")
