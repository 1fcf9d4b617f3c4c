"""Random units as arms: what any change of that damage does.

Random neurons like those of the paper's rule, matched by site and stratum and grown until the KL is reached, are
silenced. Or the changes of the closed-form gates are given to other neurons of the same layer and stratum.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from dean_interp.arms.arm import BYTES_OF_NUMBER, ArmExamples, Kind, Setting, Settings
from dean_interp.arms.changes import AlongGates
from dean_interp.arms.coupled_arms import FRACTIONS, PaperRuleArm, rule_scores
from dean_interp.arms.gate_arms import OF_IMPROVE
from dean_interp.errors import InputError
from dean_interp.selection.random_sets import n_units_outside, random_like
from dean_interp.selection.selection import Selection
from dean_interp.selection.strata import Strata, strata
from dean_interp.study.dosing import random_gates
from dean_interp.study.store import State


@dataclass(frozen=True)
class GrowingSet:
    """A random set like another, silenced; its dose is its size relative to that one."""

    like: Selection
    strata: Strata
    seed: int

    @property
    def n_bytes(self) -> int:
        """At a dose of 1, an index is kept of each unit."""
        return BYTES_OF_NUMBER * len(self.like)

    @property
    def first_dose(self) -> float:
        """The random set is as large as the other."""
        return 1.0

    @property
    def largest_dose(self) -> float:
        """All units of the set's sites are drawn."""
        return n_units_outside(self.like) / len(self.like)

    def at(self, dose: float) -> State:
        """The set of that size, silenced."""
        if round(dose * len(self.like)) < 1:
            return State("", "arm")
        drawn = random_like(self.like, self.strata, seed=self.seed, growth=dose)
        return State("", "arm", ablated=drawn)


@dataclass(frozen=True)
class RandomNeuronsArm:
    """Random neurons like those of the paper's rule."""

    number: int
    kind: Kind = "random"
    source: str = "matched by site and decile of activation norm (selection.random_sets)"
    uses_labels: bool = False

    @property
    def name(self) -> str:
        """The name says which draw it is."""
        return f"random neurons {self.number}"

    @property
    def choices(self) -> Mapping[str, Sequence[Setting]]:
        """Nothing is chosen."""
        return {}

    def fit(self, examples: ArmExamples, settings: Settings) -> GrowingSet:
        """Draw the neurons. Raises `InputError` where the paper's rule couples no neuron at any of these fractions."""
        matched = strata(examples.model, rule_scores(examples, "neuron"))
        return GrowingSet(_coupled(examples), matched, seed=examples.seed * 1000 + self.number)


def _coupled(examples: ArmExamples) -> Selection:
    """The neurons of the paper's rule at the paper's fraction, or at the first larger one that couples any."""
    rule = PaperRuleArm("neuron")
    *smaller, largest = FRACTIONS["neuron"][1:]
    for fraction in smaller:
        with suppress(InputError):
            return rule.fit(examples, {"fraction": fraction}).selection
    return rule.fit(examples, {"fraction": largest}).selection


@dataclass(frozen=True)
class RandomGatesArm:
    """The changes of `improve`'s gates, at random neurons."""

    number: int
    kind: Kind = "random"
    source: str = "shuffled within layer and decile of activation norm (study.dosing)"
    uses_labels: bool = False

    @property
    def name(self) -> str:
        """The name says which draw it is."""
        return f"random gates {self.number}"

    @property
    def choices(self) -> Mapping[str, Sequence[Setting]]:
        """Nothing is chosen."""
        return {}

    def fit(self, examples: ArmExamples, settings: Settings) -> AlongGates:
        """Draw the neurons that get the changes."""
        gates = OF_IMPROVE.fit(replace(examples, flip=None), {})
        matched = strata(examples.model, examples.margin_scores[:3])
        seed = examples.seed * 1000 + self.number
        return AlongGates(random_gates(gates.direction, matched, seed=seed), first_dose=gates.first_dose)
