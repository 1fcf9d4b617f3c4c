"""What a study found, as frozen records, and their file. Nothing in it depends on the time or place of the run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd
from pydantic import TypeAdapter

from dean_interp.circuits.neuron import NeuronScores, TextActivations
from dean_interp.errors import InputError
from dean_interp.files import read_json, write_bytes
from dean_interp.frames import Framed
from dean_interp.information.estimands import MutualInformation
from dean_interp.models.sites import Unit
from dean_interp.selection.stability import STABLE, Floor, Halves
from dean_interp.statistics import Interval
from dean_interp.study.config import StudyConfig


@dataclass(frozen=True)
class Design:
    """What the study can detect, stated before the edit is measured. Margins in nats per token."""

    n_prompts: int
    detectable: Mapping[str, float]
    """Per behaviour: the mean change that a paired 95 % interval finds with 80 % power, where changes vary over prompts
    as those of the equal-KL controls do."""
    to_beat: Mapping[str, float]
    """Per behaviour: the largest mean change among all random controls."""
    smallest_p: float
    """The smallest p that the number of random controls allows."""


@dataclass(frozen=True)
class State:
    """The model in one state: original, edited, or under a control."""

    name: str
    kind: str
    """`original`, `edit`, `random`, `equal KL` or `named`."""
    n_units: int
    growth: float
    """Size relative to the edit, for random controls."""
    margin: Mapping[str, float]
    """Mean over test prompts of log p(safe) - log p(unsafe), nats per token."""
    change: Mapping[str, Interval]
    """Of the margin, against the original: paired, clustered by prompt, 95 %."""
    perplexity: float
    kl: float
    """KL(original || now) on general text, nats per token."""


@dataclass(frozen=True)
class Primary:
    """The outcome fixed beforehand: both mean margins rise beyond the random controls, at a KL no worse than theirs."""

    p: Mapping[str, float]
    """Per behaviour: rank of the edit's change among all random controls, one-sided."""
    p_larger: float
    kl: float
    kl_of_controls: float
    """The largest KL among the random controls."""
    both_rise: bool
    reached: bool


@dataclass(frozen=True)
class Chance:
    """Whether the coupling is more than chance, and whether other examples would give it."""

    floor: Floor
    """Units in both tops and not in general's, beside shuffles within strata (general score among them)."""
    overlap: Mapping[str, float]
    """Overlap coefficient of each pair of tops; the pairs with general text are of unrelated behaviours."""
    halves: Halves | None
    """Jaccard overlap of one behaviour's top on half of the examples with the other's on the other half."""
    ceiling: Mapping[str, Halves] | None
    """The same of each behaviour with itself."""
    probability: Mapping[str, float] | None
    """How often each coupled unit is selected when the examples are drawn anew; None for weights, as the two above."""

    @property
    def stable(self) -> list[str]:
        """The coupled units that are selected often enough to be called stable."""
        return [name for name, share in (self.probability or {}).items() if share >= STABLE]


@dataclass(frozen=True)
class TestLeak:
    """What of a test set is in the calibration data too, and was left out."""

    behaviour: str
    n_prompts: int
    """Distinct prompts of the test set, the leaked ones among them."""
    n_exact: int
    """After normalisation (`data.leakage.normalised`)."""
    n_near: int
    """Further ones that are near duplicates."""
    change: Mapping[Unit, Interval]
    """Of the margin under each edit, on a draw from the whole test set; empty where it was not asked for."""


@dataclass(frozen=True)
class UnitResults(Framed):
    """One kind of unit: what is coupled, and its edit beside its controls."""

    unit: Unit
    fractions: tuple[float, float, float]
    """Of first, second and general."""
    n_units_per_layer: int
    sizes: Mapping[str, int]
    """Units in each set on the way to the coupled ones."""
    coupled_per_layer: tuple[int, ...]
    chance: Chance
    design: Design
    primary: Primary
    states: tuple[State, ...]
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
        for one in self.states:
            row = {"unit": self.unit, "state": one.name, "kind": one.kind, "n_units": one.n_units,
                   "perplexity": one.perplexity, "kl": one.kl}  # fmt: skip
            for name, change in one.change.items():
                row |= {f"{name} change": change.mean, f"{name} low": change.low, f"{name} high": change.high}
            rows.append(row)
        return pd.DataFrame(rows)

    def state(self, name: str) -> State:
        """One state by name."""
        return next(state for state in self.states if state.name == name)


@dataclass(frozen=True)
class AnswerSet:
    """The answers to one set of prompts in one state of the model, judged."""

    behaviour: str
    over_refusal: bool
    """Whether the prompts are benign and deserve a plain answer."""
    share: Mapping[str, Interval]
    """Of answers with each verdict, and of those with a cautionary phrase (`caution`)."""
    change: Mapping[str, Interval]
    """Of these shares against the original: paired, clustered by prompt, 95 %."""
    answers: tuple[str, ...]
    verdicts: tuple[str, ...]


@dataclass(frozen=True)
class SpokenState:
    """What one state of the model answers."""

    name: str
    kind: str
    unit: Unit | None
    """Of the edit or control; None for the original."""
    sets: tuple[AnswerSet, ...]


@dataclass(frozen=True)
class Spoken:
    """Answers before and after, in the same order of prompts in every state."""

    judge: str
    prompts: Mapping[str, tuple[str, ...]]
    states: tuple[SpokenState, ...]


@dataclass(frozen=True)
class Results(Framed):
    """The whole study."""

    config: StudyConfig
    model_fingerprint: str
    n_layers: int
    d_mlp: int
    original: State
    units: tuple[UnitResults, ...]
    spoken: Spoken | None
    neurons: tuple[NeuronScores, ...]
    """The strongest coupled neurons; empty where neurons were not studied."""
    texts: tuple[TextActivations, ...]
    leaks: tuple[TestLeak, ...]
    """One of each behaviour, general ability last."""

    def __repr__(self) -> str:
        return f"Results({self.config.model!r}: {'; '.join(f'{one.unit}s: {one.headline}' for one in self.units)})"

    def to_pandas(self) -> pd.DataFrame:
        """One row a state of each kind of unit (`UnitResults.to_pandas`)."""
        return pd.concat([one.to_pandas() for one in self.units], ignore_index=True)

    @property
    def behaviours(self) -> list[str]:
        """The two behaviours' names."""
        return list(self.original.margin)

    def of(self, unit: Unit) -> UnitResults:
        """The results of one kind of unit."""
        return next(one for one in self.units if one.unit == unit)


@dataclass(frozen=True)
class InformationResults:
    """Estimands of one edit beside its controls."""

    model: str
    facts: Mapping[str, str]
    """What was silenced, beside what, on which prompts; `command` says how the results were made."""
    informations: tuple[MutualInformation, ...]


Record = TypeVar("Record")


def save_results(results: Results, path: Path) -> None:
    """Write the JSON file; it appears whole or not at all. Equal results give equal bytes."""
    save_record(results, path)


def load_results(path: Path) -> Results:
    """Results from their file. Raises `InputError` where it is missing or something else."""
    return load_record(Results, path, "results")


def save_record(record: object, path: Path) -> None:
    """Write a frozen record as JSON; the file appears whole or not at all. Equal records give equal bytes."""
    write_bytes(path, TypeAdapter(type(record)).dump_json(record, indent=1) + b"\n")


def load_record(kind: type[Record], path: Path, what: str) -> Record:
    """A record from its file. Raises `InputError` where it is missing, damaged or something else than `what`."""
    if not path.is_file():
        raise InputError(f"no {what} in {path.parent}: {path.name} is missing")
    return read_json(path, kind)
