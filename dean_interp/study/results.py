"""What a study found, as frozen records, and their file. Nothing in it depends on the time or place of the run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from dean_interp.circuits.neuron import TextActivations
from dean_interp.circuits.neuron_scores import NeuronScores
from dean_interp.errors import InputError
from dean_interp.evaluation.lines import Line
from dean_interp.evaluation.outcomes import MARGIN
from dean_interp.files import read_json
from dean_interp.frames import Framed
from dean_interp.information.shifts import MutualInformation
from dean_interp.models.sites import Unit
from dean_interp.selection.chance import Chance
from dean_interp.statistics import Interval
from dean_interp.study.config import StudyConfig

RESULTS_FILE = "results.json"
"""In the folder of a run, of a comparison and of a composition: what it found. It is written last."""


@dataclass(frozen=True)
class Design:
    """What can be detected, stated from the controls alone, before the edit is measured."""

    n_prompts: int
    """Number of test prompts of each behaviour."""
    n_clusters: Mapping[str, int]
    """Number of topics (prompts, where they have no topic) of each behaviour: the sample that intervals see."""
    detectable: Mapping[str, float | None]
    """The smallest mean change that 80 % of such designs find, by `metric / set`, in the metric's unit. Changes are
    taken to vary as those of the equal-KL controls do; without controls, a fifth of all shares changes. None: nothing
    says how much they vary."""
    to_beat: Mapping[str, float]
    """The largest mean change of each behaviour's margin among all random controls, nats per token."""
    smallest_p: float
    """The smallest p that the number of random controls allows."""

    def margin(self, behaviour: str) -> float | None:
        """The smallest change of a behaviour's margin that can be detected, nats per token."""
        return self.detectable.get(f"{MARGIN} / {behaviour}")


@dataclass(frozen=True)
class StateResults:
    """One state of the model, compared with the original."""

    name: str
    kind: str
    """`original`, `edit`, a kind of random control (`study.controls`), or `named`."""
    n_units: int
    growth: float
    """Size relative to the edit, for random controls."""
    lines: tuple[Line, ...]
    """Every outcome that was measured, before (the original) and after. The edit's lines hold its rank among the random
    controls."""
    perplexity: float
    """Perplexity per token of general answers."""
    kl: float
    """KL(original || now) on general answers, nats per token."""

    @property
    def margin(self) -> dict[str, float]:
        """Mean margin of each behaviour: log p(safe) - log p(unsafe), nats per token."""
        return {line.on: line.after.mean for line in self.lines if line.metric == MARGIN}

    @property
    def change(self) -> dict[str, Interval]:
        """Change of each behaviour's mean margin against the original."""
        return {line.on: line.change for line in self.lines if line.metric == MARGIN}


def change_cells(state: StateResults) -> dict[str, float]:
    """The change of each margin with its interval, nats per token, as cells of a row: `privacy change` and so on."""
    cells = {}
    for name, change in state.change.items():
        cells[f"{name} change"] = change.mean
        cells[f"{name} low"] = change.low
        cells[f"{name} high"] = change.high
    return cells


@dataclass(frozen=True)
class Primary:
    """The outcome fixed beforehand: both mean margins rise beyond the random controls, at a KL no worse than theirs."""

    p: Mapping[str, float]
    """One-sided rank of the edit's change among all random controls, for each behaviour."""
    p_larger: float
    """The larger of them, which counts."""
    kl: float
    kl_of_controls: float
    """The largest KL among the random controls."""
    both_rise: bool
    reached: bool


@dataclass(frozen=True)
class TestLeak:
    """What of a test set is in the calibration data too, and was left out."""

    behaviour: str
    n_prompts: int
    """Distinct prompts of the test set, the leaked ones among them."""
    n_exact: int
    """Number of them that are calibration prompts after normalisation (`data.leakage.normalised`)."""
    n_near: int
    """Number of further ones that are near duplicates."""
    change: Mapping[Unit, Interval]
    """Change of the margin under each edit, on a draw from the whole test set; empty where it was not asked for."""


@dataclass(frozen=True)
class UnitResults(Framed):
    """One kind of unit: what is coupled, and its edit beside its controls."""

    unit: Unit
    fractions: tuple[float, float, float]
    """Top fractions of first, second and general."""
    n_units_per_layer: int
    sizes: Mapping[str, int]
    """Number of units in each set on the way to the coupled ones."""
    coupled_per_layer: tuple[int, ...]
    chance: Chance
    design: Design
    primary: Primary
    states: tuple[StateResults, ...]
    """The edit first, then its controls."""
    information: tuple[MutualInformation, ...]
    """`downstream_mi` and `awareness_mi` before and under the edit, beside its random controls."""
    headline: str
    faults: tuple[str, ...] = ()
    """What the edit must not do and does: perplexity too high, super weights silenced, incoherent answers."""

    def __repr__(self) -> str:
        return f"UnitResults({self.unit}s: {self.headline})"

    def to_pandas(self) -> pd.DataFrame:
        """One row a state: the edit and its controls, changes of both margins with their intervals, perplexity, KL."""
        rows = []
        for state in self.states:
            row = {
                "unit": self.unit,
                "state": state.name,
                "kind": state.kind,
                "n_units": state.n_units,
                "perplexity": state.perplexity,
                "kl": state.kl,
            }
            rows.append(row | change_cells(state))
        return pd.DataFrame(rows)

    @property
    def edit(self) -> StateResults:
        """The edit."""
        return self.states[0]

    def state(self, name: str) -> StateResults:
        """One state by name."""
        return next(state for state in self.states if state.name == name)


@dataclass(frozen=True)
class AnswerSet:
    """One state's answers to one set of prompts, in their order, with what the rules call each.

    The rules read what stands behind a thought. An answer that ends inside of its thought has that as its label.
    """

    behaviour: str
    answers: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class StateAnswers:
    """What one state of the model answers, at the largest length that was asked for."""

    name: str
    kind: str
    unit: Unit | None
    """The kind of unit of the edit or control; None for the original."""
    sets: tuple[AnswerSet, ...]

    @property
    def title(self) -> str:
        """Unit and name."""
        return f"{self.unit} {self.name}" if self.unit else self.name


@dataclass(frozen=True)
class Answers:
    """Answers before and after, in the same order of prompts in every state. What they say is in the states' lines."""

    judges: tuple[str, ...]
    prompts: Mapping[str, tuple[str, ...]]
    """The prompts of each set."""
    states: tuple[StateAnswers, ...]


@dataclass(frozen=True)
class Results(Framed):
    """The whole study."""

    config: StudyConfig
    model_fingerprint: str
    n_layers: int
    d_mlp: int
    original: StateResults
    units: tuple[UnitResults, ...]
    answers: Answers | None
    neurons: tuple[NeuronScores, ...]
    """The strongest coupled neurons; empty where neurons were not studied."""
    texts: tuple[TextActivations, ...]
    leaks: tuple[TestLeak, ...]
    """One of each behaviour, general ability last."""

    def __repr__(self) -> str:
        headlines = [f"{results.unit}s: {results.headline}" for results in self.units]
        return f"Results({self.config.model.name!r}: {'; '.join(headlines)})"

    def to_pandas(self) -> pd.DataFrame:
        """One row a state of each kind of unit (`UnitResults.to_pandas`)."""
        return pd.concat([results.to_pandas() for results in self.units], ignore_index=True)

    @property
    def behaviours(self) -> list[str]:
        """The two behaviours' names."""
        return list(self.original.margin)

    def of(self, unit: Unit) -> UnitResults:
        """The results of one kind of unit."""
        return next(results for results in self.units if results.unit == unit)

    def only(self, unit: Unit) -> "Results":
        """The same study, as if one kind of unit were all that was studied."""
        return replace(self, units=(self.of(unit),))


@dataclass(frozen=True)
class InformationResults:
    """Estimands of one edit beside its controls."""

    model: str
    facts: Mapping[str, str]
    """What was silenced, beside what, on which prompts; `command` says how the results were made."""
    informations: tuple[MutualInformation, ...]


ResultRecord = TypeVar("ResultRecord")


def load_results(path: Path) -> Results:
    """Results from their file. Raises `InputError` where it is missing or something else."""
    return load_record(Results, path, "results")


def load_record(kind: type[ResultRecord] | Any, path: Path, what: str) -> ResultRecord:  # noqa: ANN401 - a class, or one with its parameter
    """A record from its file. Raises `InputError` where it is missing, damaged or something else than `what`."""
    if not path.is_file():
        if not path.parent.is_dir():
            raise InputError(f"no run folder {path.parent}")
        raise InputError(f"no {what} in {path.parent}: {path.name} is missing")
    return read_json(path, kind)
