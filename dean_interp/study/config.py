"""The settings of a study, of a sweep, of the evaluation of one edit and of its mutual information."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from dean_interp.errors import InputError, refuse_other_groups
from dean_interp.evaluation.judges.server import refuse_address
from dean_interp.models.sites import Unit
from dean_interp.scoring.scores import KEPT_FRACTION
from dean_interp.selection.coupling import Fraction, each_fraction
from dean_interp.study.settings import (
    FRACTION,
    INFORMATION_FRACTION,
    AnswerConfig,
    CalibrationConfig,
    ControlConfig,
    DataConfig,
    ModelConfig,
    check_fractions,
    check_units,
)

SweepMethod = Literal["importance", "wanda", "random"]


@dataclass(frozen=True)
class StudyConfig:
    """A whole study: what is scored, which units are selected, beside which controls, and what is measured."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    unit: tuple[Unit, ...] = ("neuron", "weight")
    """What is scored and silenced: MLP neurons, single MLP weights (the paper's unit), or both, side by side."""
    neuron_fraction: Fraction = FRACTION["neuron"]
    """Top fraction of each layer's neurons that counts as important: one number, or one each for first, second and
    general."""
    weight_fraction: Fraction = FRACTION["weight"]
    """Top fraction of each MLP matrix's weights that counts as important, in the same form."""
    information_fraction: float = INFORMATION_FRACTION
    """Mutual information is estimated between this top fraction of the neurons of each behaviour. Neurons in both tops
    are left out."""
    controls: ControlConfig = field(default_factory=ControlConfig)
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    report_leaked: bool = False
    """Measure the edits a second time, on test sets that hold prompts of the calibration data. Such prompts are always
    counted, and left out of the first measurement."""

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        refuse_other_groups(self)
        for group in (self.data, self.calibration, self.controls):
            group.check()
        self.answers.check(self.controls)
        check_units(self.unit)
        for name in ("neuron_fraction", "weight_fraction", "information_fraction"):
            check_fractions(name, getattr(self, name))

    @property
    def scored(self) -> tuple[Unit, ...]:
        """The units that are scored: neurons always, since mutual information is estimated between them."""
        return ("neuron", "weight") if "weight" in self.unit else ("neuron",)

    def fraction(self, unit: Unit) -> Fraction:
        """The top fraction for one kind of unit."""
        return self.neuron_fraction if unit == "neuron" else self.weight_fraction

    @property
    def keep(self) -> float:
        """The top fraction of each matrix's weights whose scores are kept."""
        return max(KEPT_FRACTION, *each_fraction(self.weight_fraction))


@dataclass(frozen=True)
class EvaluationConfig:
    """On what one edit is evaluated, beside which controls, and what is measured."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    information_fraction: float = INFORMATION_FRACTION
    """Activations of this top fraction of the neurons of each behaviour are kept, so that `information` can be run in
    the same folder. Neurons in both tops are left out."""
    controls: ControlConfig = field(default_factory=ControlConfig)
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    scored_data: tuple[str, ...] = ()
    """Data sets whose rows were scored. Scored prompts are left out anyway; with these, near duplicates are, too."""
    answers_from: tuple[str, ...] = ()
    """Two addresses of OpenAI-compatible servers (such as vLLM, `http://host:8000/v1`) that hold the original and the
    edited checkpoint. Their answers are judged in place of the hooked model's, and controls do not answer."""

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        refuse_other_groups(self)
        for group in (self.data, self.controls):
            group.check()
        check_fractions("information_fraction", self.information_fraction)
        self.answers.check(self.controls)
        if len(self.answers_from) not in (0, 2):
            raise InputError(
                "answers_from must be two addresses, of the original and of the edited checkpoint, got "
                f"{len(self.answers_from)}"
            )
        for address in self.answers_from:
            refuse_address(address)


@dataclass(frozen=True)
class InformationConfig:
    """Between which neurons mutual information is estimated before and under an edit, and beside which controls."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    information_fraction: float = INFORMATION_FRACTION
    """Mutual information is estimated between this top fraction of the neurons of each behaviour. Neurons in both tops
    are left out."""
    controls: ControlConfig = field(default_factory=ControlConfig)

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        refuse_other_groups(self)
        for group in (self.data, self.controls):
            group.check()
        check_fractions("information_fraction", self.information_fraction)


@dataclass(frozen=True)
class SweepConfig:
    """Which edits to try. Every combination of unit, method, fraction and value is one, except those of no unit."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    unit: tuple[Unit, ...] = ("neuron", "weight")
    """What is scored and silenced: MLP neurons, single MLP weights (the paper's unit), or both, side by side."""
    neuron_fractions: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Top fractions of each layer's neurons to try."""
    weight_fractions: tuple[float, ...] = (1e-5, 1e-4, 1e-3)
    """Top fractions of each MLP matrix's weights to try."""
    methods: tuple[SweepMethod, ...] = ("importance",)
    """How units are scored: by gradients, for weights by Wanda from the same pass, or at random."""
    values: tuple[str, ...] = ("0",)
    """What a unit's activation (or the weight) becomes: a number times itself (0 silences), or `mean` (neurons: over
    general examples)."""
    controls: ControlConfig = field(default_factory=ControlConfig)
    """The controls of each edit on the front."""

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        refuse_other_groups(self)
        for group in (self.data, self.calibration, self.controls):
            group.check()
        check_units(self.unit)
        for name in ("neuron_fractions", "weight_fractions"):
            check_fractions(name, getattr(self, name))
        for value in self.values:
            factor_of(value)
        if next(self.combinations(), None) is None:
            raise InputError(
                f"no combination of unit {self.unit}, methods {self.methods} and values {self.values} is an edit: "
                "Wanda scores weights only, and the value 'mean' is for neurons"
            )

    def combinations(self) -> Iterator[tuple[Unit, SweepMethod, float, str]]:
        """Unit, method, fraction and value of every edit."""
        for unit in self.unit:
            for method in self.methods:
                # Wanda scores weights only.
                if method == "wanda" and unit == "neuron":
                    continue
                for fraction in self.neuron_fractions if unit == "neuron" else self.weight_fractions:
                    for value in self.values:
                        # A weight has no mean over examples.
                        if value != "mean" or unit == "neuron":
                            yield unit, method, fraction, value


def factor_of(value: str) -> float | None:
    """The number that units are multiplied by; None for their mean. Raises `InputError` for anything else."""
    if value == "mean":
        return None
    try:
        factor = float(value)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise InputError(f"a value is a finite number (0 silences) or 'mean', got {value!r}")
    return factor
