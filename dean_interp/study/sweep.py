"""Many edits from one scoring pass: fraction, unit, method and value, and which of them is worth having.

Every edit is measured on the same test prompts. They are split by topic: the Pareto front over both behaviours and
general ability is **chosen** on one half and **confirmed** on the other, beside matched random controls. The best of
many edits looks good by luck where it was chosen; only the other half says how good it is.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool
from tqdm.auto import tqdm

from dean_interp.data.examples import Behaviour
from dean_interp.editing.values import Mean, Scale, Value, Zero
from dean_interp.errors import InputError
from dean_interp.evaluation.measure import Measurement
from dean_interp.models.load import HookedModel, load_model, model_fingerprint, refuse_not_finite
from dean_interp.models.sites import Unit
from dean_interp.scoring.methods import random, wanda_from
from dean_interp.scoring.scores import Scores
from dean_interp.selection.controls import random_like, strata
from dean_interp.selection.coupling import couple
from dean_interp.selection.selection import Selection
from dean_interp.statistics import Interval, clustered_interval
from dean_interp.study.config import StudyConfig
from dean_interp.study.folder import Clock, owned
from dean_interp.study.results import load_record, save_record
from dean_interp.study.run import score_into
from dean_interp.study.states import States

SweepMethod = Literal["importance", "wanda", "random"]
ABILITY = "ability"
"""The third objective: minus the change of the loss on general text, nats per token."""


@dataclass(frozen=True)
class SweepConfig:
    """Which edits to try. Every combination is one, but those that select nothing."""

    study: StudyConfig = field(default_factory=lambda: StudyConfig(n_test=48, n_general_test=32))
    """Model, behaviours, sizes and seed, as in a study; its own fractions and controls are not used."""
    neuron_fractions: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Top fractions of each layer's neurons."""
    weight_fractions: tuple[float, ...] = (1e-5, 1e-4, 1e-3)
    """Top fractions of each matrix's weights."""
    methods: tuple[SweepMethod, ...] = ("importance",)
    """How units are scored: by gradients, for weights by Wanda from the same pass, or at random."""
    values: tuple[str, ...] = ("0",)
    """What takes a unit's place: a number times itself (0 silences), or `mean` (neurons: over general examples)."""
    n_controls: int = 3
    """Matched random edits beside each one on the front, measured on the confirming half."""

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        self.study.check()
        for name in ("neuron_fractions", "weight_fractions"):
            if not all(0 < fraction <= 1 for fraction in getattr(self, name)):
                raise InputError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        for value in self.values:
            _factor(value)

    def combinations(self) -> Iterator[tuple[Unit, SweepMethod, float, str]]:
        """Unit, method, fraction and value of every edit."""
        for unit in self.study.units:
            for method in self.methods:
                if method == "wanda" and unit == "neuron":
                    continue
                for fraction in self.neuron_fractions if unit == "neuron" else self.weight_fractions:
                    for value in self.values:
                        if value != "mean" or unit == "neuron":
                            yield unit, method, fraction, value


@dataclass(frozen=True)
class Point:
    """One edit. Changes are against the original, per behaviour and for `ability`, nats per token; larger is better."""

    unit: Unit
    method: SweepMethod
    fraction: float
    value: str
    n_units: int
    chosen_on: Mapping[str, Interval]
    confirmed_on: Mapping[str, Interval]
    on_front: bool = False
    """No other edit is better in one objective and no worse in the others, where it was chosen."""
    controls: tuple[Mapping[str, float], ...] = ()
    """The same changes of matched random edits, on the confirming half; for edits on the front."""

    @property
    def name(self) -> str:
        """Unit, method, fraction and value in one word."""
        return f"{self.unit} {self.method} {self.fraction:g} x{self.value}"


@dataclass(frozen=True)
class Sweep:
    """Every edit that was tried."""

    config: SweepConfig
    model_fingerprint: str
    points: tuple[Point, ...]
    empty: tuple[str, ...]
    """Combinations that select no unit."""

    @property
    def objectives(self) -> list[str]:
        """Both behaviours and ability."""
        return list(self.points[0].chosen_on)


def run_sweep(config: SweepConfig, folder: str | Path) -> Sweep:
    """Run a sweep into a folder, or go on with the one that is there. Killed, it loses no more than a batch.

    Raises `InputError` as `run_study` does, and where no combination selects a unit.
    """
    config.check()
    folder = Path(folder)
    study = dataclasses.replace(config.study, weight_fraction=max(config.weight_fractions))  # what scores keep
    calibration = study.calibration()
    tests, _ = study.tests(calibration)
    settings = dataclasses.asdict(config.study) | {name: one for name, one in vars(config).items() if name != "study"}
    with owned(folder, settings, [*calibration, *tests]):
        if (folder / "sweep.json").is_file():
            return load_sweep(folder / "sweep.json")
        clock = Clock(folder / "times.json")
        model = load_model(study.model, device=study.device, dtype=study.dtype)
        refuse_not_finite(model)
        scores = [score_into(folder, model, behaviour, study) for behaviour in calibration]
        clock.lap("score")
        sweep = _sweep(config, folder, model, calibration, tests, scores)
        clock.lap("edits")
        save_record(sweep, folder / "sweep.json")
        return sweep


def load_sweep(path: Path) -> Sweep:
    """A sweep from its file. Raises `InputError` where it is missing or something else."""
    return load_record(Sweep, path, "sweep results")


def sweep_headline(sweep: Sweep) -> str:
    """Whether any edit on the front raises both behaviours on the confirming half, in plain words."""
    front = [point for point in sweep.points if point.on_front]
    first, second, _ = sweep.objectives
    better = [
        point for point in front
        if all(point.confirmed_on[name].low > 0 for name in (first, second))
        and all(control[name] < point.confirmed_on[name].mean for control in point.controls for name in (first, second))
    ]  # fmt: skip
    if not better:
        return (
            f"None of {len(sweep.points)} edits raises both the {first} and the {second} margin on the confirming "
            f"half, intervals above 0 and beyond its random controls ({len(front)} are on the front)."
        )
    names = ", ".join(point.name for point in better)
    return (
        f"{len(better)} of {len(front)} edits on the front raise both margins on the confirming half, beyond their "
        f"random controls: {names}."
    )


def pareto_front(points: Sequence[Mapping[str, float]]) -> list[bool]:
    """Which points no other dominates: none is at least as good in every objective and better in one."""
    table = np.array([list(point.values()) for point in points])
    return [
        not any((other >= own).all() and (other > own).any() for k, other in enumerate(table) if k != i)
        for i, own in enumerate(table)
    ]


def halves(behaviour: Behaviour) -> Bool[np.ndarray, " example"]:
    """True for the examples that edits are chosen on: every other topic (where there are none, every other prompt)."""
    groups = [example.topic or example.prompt for example in behaviour.examples]
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    return np.array([number[group] % 2 == 0 for group in groups])


def _sweep(
    config: SweepConfig,
    folder: Path,
    model: HookedModel,
    calibration: Sequence[Behaviour],
    tests: Sequence[Behaviour],
    scores: Sequence[Scores],
) -> Sweep:
    chosen: dict[tuple[Unit, SweepMethod, float], Selection] = {}
    for (unit, method), some in itertools.groupby(config.combinations(), key=lambda each: each[:2]):
        own = _scored(method, model, calibration, [one.of(unit) for one in scores], config.study.seed)
        for fraction in dict.fromkeys(fraction for _, _, fraction, _ in some):
            chosen[unit, method, fraction] = couple(*own, fraction=fraction).coupled
    empty = tuple(f"{unit} {method} {fraction:g}" for (unit, method, fraction), one in chosen.items() if not len(one))
    tried = [each for each in config.combinations() if len(chosen[each[:3]])]
    if not tried:
        raise InputError(f"no combination selects a unit: raise the fractions (tried {', '.join(empty)})")
    known = [model_fingerprint(model), *(test.fingerprint for test in tests), *(one.fingerprint for one in scores)]
    split = {test.name: halves(test) for test in tests}
    with tqdm(total=1 + len(tried), desc="edits", unit="edit") as progress:
        states = States(config.study, folder / "states", model, tests, None, known, progress)
        points = []
        for unit, method, fraction, text in tried:
            selection = chosen[unit, method, fraction]
            measured = states.measured(f"{unit} {method} {fraction:g} x{text}", selection, _value(text, scores))
            chosen_on, confirmed_on = (_changes(measured, states.original, split, half) for half in (True, False))
            points.append(Point(unit, method, fraction, text, len(selection), chosen_on, confirmed_on))
        front = pareto_front([{name: one.mean for name, one in point.chosen_on.items()} for point in points])
        progress.total += config.n_controls * sum(front)
        units = {points[i].unit for i in np.flatnonzero(front)}
        matched = {unit: strata(model, [one.of(unit) for one in scores]) for unit in units}
        for i in np.flatnonzero(front):
            point, controls = points[i], []
            selection, value = chosen[point.unit, point.method, point.fraction], _value(point.value, scores)
            for k in range(config.n_controls):
                control = random_like(selection, matched[point.unit], seed=config.study.seed * 1000 + k)
                measured = states.measured(f"{point.name} control {k + 1}", control, value)
                changes = _changes(measured, states.original, split, False)
                controls.append({name: change.mean for name, change in changes.items()})
            points[i] = dataclasses.replace(point, on_front=True, controls=tuple(controls))
    return Sweep(config, model_fingerprint(model), tuple(points), empty)


def _changes(
    now: Measurement, before: Measurement, split: Mapping[str, Bool[np.ndarray, " example"]], wanted: bool
) -> dict[str, Interval]:
    """Paired changes on one half of the prompts."""
    found = {}
    for name, measured in now.behaviours.items():
        rows = split[name] == wanted
        if measured.paired:
            difference = measured.margin - before[name].margin
        else:
            difference = measured.log_prob[:, 0] - before[name].log_prob[:, 0]
        prompts = [prompt for prompt, row in zip(measured.prompts, rows, strict=True) if row]
        values = difference[torch.from_numpy(rows)].numpy()
        found[name if measured.paired else ABILITY] = clustered_interval(values, prompts)
    return found


def _scored(
    method: SweepMethod, model: HookedModel, calibration: Sequence[Behaviour], scores: Sequence[Scores], seed: int
) -> list[Scores]:
    if method == "wanda":
        return [wanda_from(model, one) for one in scores]
    if method == "random":
        return [random(model, behaviour, unit=one.units[0], seed=seed * 3 + i)
                for i, (behaviour, one) in enumerate(zip(calibration, scores, strict=True))]  # fmt: skip
    return list(scores)


def _factor(value: str) -> float | None:
    """What the units are multiplied by; None for their mean."""
    if value == "mean":
        return None
    try:
        factor = float(value)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise InputError(f"a value is a finite number (0 silences) or 'mean', got {value!r}")
    return factor


def _value(text: str, scores: Sequence[Scores]) -> Value:
    factor = _factor(text)
    if factor is None:
        return Mean(scores[2])
    return Scale(factor) if factor else Zero()
