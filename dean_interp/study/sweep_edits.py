"""The edits of a sweep: what each combination of its settings selects, and what fills the units."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dean_interp.data.examples import Behaviour
from dean_interp.editing.values import Mean, Scale, Value, Zero
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Unit
from dean_interp.scoring.methods import random, wanda_from
from dean_interp.scoring.scores import Scores
from dean_interp.selection.coupling import couple
from dean_interp.selection.selection import Selection
from dean_interp.study.config import SweepConfig, SweepMethod, factor_of
from dean_interp.study.controls import refuse_without_controls
from dean_interp.study.store import State


@dataclass(frozen=True)
class SweepEdit:
    """One combination that selects something."""

    unit: Unit
    method: SweepMethod
    fraction: float
    value: str
    state: State


def sweep_edits(
    config: SweepConfig, model: HookedModel, calibration: Sequence[Behaviour], scores: Sequence[Scores]
) -> tuple[list[SweepEdit], list[str]]:
    """The edits of all combinations that select a unit, and the names of those that select none.

    Raises `InputError` where none selects a unit, or one selects so many that no control is as large.
    """
    selections = _selections(config, model, calibration, scores)
    empty = []
    for (unit, method, fraction), selection in selections.items():
        if not len(selection):
            empty.append(f"{unit} {method} {fraction:g}")
    if len(empty) == len(selections):
        raise InputError(f"no combination selects a unit: raise the fractions (tried {', '.join(empty)})")
    # Any of them may be on the front, and then needs controls.
    for selection in selections.values():
        refuse_without_controls(selection)
    edits = []
    for unit, method, fraction, value in config.combinations():
        selection = selections[unit, method, fraction]
        if len(selection):
            name = f"{method} {fraction:g} x{value}"
            state = State(name, "edit", ablated=selection, value=_value(value, scores), unit=unit)
            edits.append(SweepEdit(unit=unit, method=method, fraction=fraction, value=value, state=state))
    return edits, empty


def _selections(
    config: SweepConfig, model: HookedModel, calibration: Sequence[Behaviour], scores: Sequence[Scores]
) -> dict[tuple[Unit, SweepMethod, float], Selection]:
    """What each combination of unit, method and fraction selects; it may be empty."""
    selections = {}
    by_unit_and_method = itertools.groupby(config.combinations(), key=lambda combination: combination[:2])
    for (unit, method), combinations in by_unit_and_method:
        of_unit = [behaviour.of(unit) for behaviour in scores]
        of_method = _scored(method, model, calibration=calibration, scores=of_unit, seed=config.data.seed)
        for fraction in dict.fromkeys(fraction for _, _, fraction, _ in combinations):
            selections[unit, method, fraction] = couple(*of_method, fraction=fraction).coupled
    return selections


def _scored(
    method: SweepMethod, model: HookedModel, calibration: Sequence[Behaviour], scores: Sequence[Scores], seed: int
) -> list[Scores]:
    """The scores of another method on the same examples."""
    if method == "wanda":
        return [wanda_from(model, behaviour) for behaviour in scores]
    if method == "random":
        drawn = []
        for number, (behaviour, own) in enumerate(zip(calibration, scores, strict=True)):
            drawn.append(random(model, behaviour, unit=own.units[0], seed=seed * 3 + number))
        return drawn
    return list(scores)


def _value(text: str, scores: Sequence[Scores]) -> Value:
    """What fills the units: their mean on general text, a share of what they hold, or 0."""
    factor = factor_of(text)
    if factor is None:
        return Mean(scores[2])
    return Scale(factor) if factor else Zero()
