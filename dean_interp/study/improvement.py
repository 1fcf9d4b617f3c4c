"""What `improve` found, as frozen records, and the settings that it was made with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dean_interp.data.sources import names_fault
from dean_interp.errors import InputError, refuse_below, refuse_other_groups
from dean_interp.evaluation.lines import Line
from dean_interp.evaluation.outcomes import MARGIN
from dean_interp.frames import Framed
from dean_interp.information.shifts import MutualInformation
from dean_interp.models.neuron_names import NeuronName
from dean_interp.selection.gating import GatingConfig
from dean_interp.statistics import Interval
from dean_interp.study.conclusions import faults
from dean_interp.study.confirmation import Condition, SignTest, kl_text
from dean_interp.study.dosing import Dose
from dean_interp.study.results import RESULTS_FILE, Answers, Design, StateResults, change_cells, load_record
from dean_interp.study.roles import RoleCount
from dean_interp.study.run_folder import begun_with
from dean_interp.study.settings import AnswerConfig, ControlConfig, DataConfig, ModelConfig

GATES_FILE, EDIT_FILE = "gates.safetensors", "edit.safetensors"
"""The gates in a run folder, and the same edit as checkpoints take it."""
PREFERS_UNSAFE = -0.5
"""Nats per token: where the original's mean margin lies below, safe and unsafe may have been swapped."""


@dataclass(frozen=True)
class ImproveConfig:
    """From two data sets to an edit: which examples, which budget of damage, and beside which nulls it is confirmed."""

    model: ModelConfig = field(default_factory=ModelConfig)
    first: str = "fairness"
    """First behaviour, with safe and unsafe answers: a built-in name, a file, a hub data set or a published set."""
    second: str = "privacy"
    """Second behaviour, in the same form."""
    general: str = "general"
    """Other text, with one answer a prompt, on which the edit's damage is measured: named as the behaviours are."""
    register: str | None = "register"
    """Harmless prompts with two harmless answers, one worded as safe answers are and one as unsafe ones: the edit must
    hardly tell them apart. None: not measured."""
    max_kl: float = 0.05
    """Budget of damage: the largest KL to the original on general text, nats per answer token."""
    gating: GatingConfig = field(default_factory=GatingConfig)
    n_score: int = 104
    """Number of examples of each behaviour that gains come from, and of general text that damage comes from. Of the
    register set all examples are scored that are not measured."""
    n_choose: int = 32
    """Number of examples of each behaviour and of general text that the dose is chosen on."""
    n_confirm: int = 42
    """Number of examples of each behaviour and of general text that confirm the edit."""
    n_flips: int = 20
    """Number of nulls that choose gates anew with safe and unsafe exchanged in random topics; they come in pairs. Below
    20, p cannot reach 0.05. 0: none, and nothing is confirmed."""
    n_random: int = 2
    """Number of nulls that put the edit's own changes at random neurons."""
    paper_rule: bool = False
    """Also silence what the paper's rule selects on the same examples, measure it beside the edit, and estimate the
    mutual information of the two behaviours' neurons under both."""
    answers: AnswerConfig = field(default_factory=lambda: AnswerConfig(n_answers=24, n_answer_controls=0))
    """The model's own answers. `improve` has defaults of its own: in Python change them with `dataclasses.replace`."""
    score_tokens: int = 512
    """Number of padded tokens a batch in scoring."""
    measure_tokens: int = 1024
    """Number of padded tokens a batch in measuring."""
    seed: int = 0
    """Seed for sampling examples, flips and random gates."""

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        refuse_other_groups(self)
        self.gating.check()
        least = {"n_score": 6, "n_choose": 2, "n_confirm": 4, "n_flips": 0, "n_random": 0, "score_tokens": 1}
        refuse_below(self, least)
        if self.n_flips % 2:
            raise InputError(f"n_flips must be even, since each flip stands beside its complement; got {self.n_flips}")
        if not 0 < self.max_kl < math.inf:
            raise InputError(f"max_kl must be above 0 and finite, in nats per token, got {self.max_kl}")
        self.data.check()
        if self.register in self.data.sources:
            raise InputError(f"register must be a set of its own, got {self.register!r}, which is another one's too")
        if self.register is not None and (fault := names_fault((*self.data.sources, self.register))):
            raise InputError(f"register must be a set of its own: {fault}")
        if self.answers.n_answer_controls > self.n_flips:
            raise InputError(
                f"n_answer_controls must be at most n_flips ({self.n_flips}), got {self.answers.n_answer_controls}"
            )
        self.answers.check(ControlConfig(n_random=self.n_flips, n_equal_kl=0))

    @property
    def data(self) -> DataConfig:
        """How states are measured: on whole answers."""
        return DataConfig(
            first=self.first,
            second=self.second,
            general=self.general,
            answer_tokens=None,
            measure_tokens=self.measure_tokens,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Prediction:
    """The change of one behaviour's margin that gains predict, and what was measured; nats per token."""

    on: str
    fitted: float
    """Predicted from the gains that chose the gates."""
    held_out: float
    """Predicted from gains on the examples that chose the dose."""
    measured: float
    """Measured on these examples."""

    @property
    def fit(self) -> float:
        """What is too high because the same examples chose and predict."""
        return self.fitted - self.held_out

    @property
    def curvature(self) -> float:
        """What is left: effects beyond the first order."""
        return self.held_out - self.measured


@dataclass(frozen=True)
class CurvePoint:
    """Both margins and KL at one dose, on the examples that chose the dose."""

    dose: float
    """In units of the chosen dose; negative: the opposite."""
    change: Mapping[str, Interval]
    """Change of each behaviour's margin, nats per token."""
    kl: float


@dataclass(frozen=True)
class ChangedNeuron:
    """One neuron that the edit changes."""

    layer: int
    index: int
    multiplier: float
    gain: Mapping[str, float]
    """Gain for each behaviour, nats per token."""
    error: Mapping[str, float]
    """Its standard error by topic."""
    damage: float
    """Fisher information of its gate on general text, nats per token: twice the KL that a change of 1 costs alone."""
    owner: str = ""
    """The expert that it belongs to (`models.neuron_names.NeuronName`)."""

    @property
    def name(self) -> str:
        """Layer and index: L17.1042. Of an expert its number, too: L17.E5.42."""
        return str(NeuronName(self.layer, self.index, self.owner))


@dataclass(frozen=True)
class EarlierConfirmation:
    """Another run beside this one whose confirming prompts were opened before, and are partly the same."""

    folder: str
    n_shared: int
    """Number of shared prompts."""


@dataclass(frozen=True)
class Improvement(Framed):
    """The edit, how it was chosen, and whether it is confirmed."""

    config: ImproveConfig
    model_fingerprint: str
    n_layers: int
    d_mlp: int
    """Neurons of a layer, of the widest where they differ: in a mixture those of all its experts."""
    roles: tuple[RoleCount, ...]
    """First, second and general."""
    preference: Mapping[str, Interval]
    """The original's margin on the scored examples of each behaviour, nats per token."""
    n_changed: int
    """Number of neurons that change."""
    largest_change: float
    dose: Dose
    predictions: tuple[Prediction, ...]
    curve: tuple[CurvePoint, ...]
    neurons: tuple[ChangedNeuron, ...]
    """The neurons with the largest part in the predicted rise."""
    design: Design
    """What the confirming design can detect, from the nulls alone, before the edit was measured."""
    original: StateResults
    states: tuple[StateResults, ...]
    """On confirming prompts: the edit first, then its opposite, flips and random gates."""
    signs: tuple[SignTest, ...]
    conditions: tuple[Condition, ...]
    """Empty without flips: then nothing is confirmed."""
    kl: Interval
    """On the confirming general text, nats per answer token."""
    rounding_kl: float
    """KL between the gates by hooks and the edit in the weights, whose numbers are rounded; nats per answer token."""
    information: Mapping[str, tuple[MutualInformation, ...]]
    """Both headline estimands under the edit and under the paper's rule, by the name of the state; empty without it."""
    answers: Answers | None
    earlier: tuple[EarlierConfirmation, ...]
    headline: str
    n_neurons: int | None = None
    """Number of all neurons; None in older files, where it is `n_layers * d_mlp`."""

    def __repr__(self) -> str:
        return f"Improvement({self.config.model.name!r}: {self.headline})"

    @property
    def confirmed(self) -> bool:
        """Whether every condition holds."""
        return bool(self.conditions) and all(condition.holds for condition in self.conditions)

    @property
    def faults(self) -> tuple[str, ...]:
        """What the edit must not do and does, and what looks wrong with the data, one line each."""
        lines = []
        if self.kl.mean > self.config.max_kl:
            lines.append(
                f"KL above the budget: {kl_text(self.kl)} nats per token on the general text that confirms, "
                f"{self.config.max_kl:g} allowed"
            )
        lines += faults(self.edit, self.original, [])
        return tuple(lines + swapped_labels(self.preference))

    @property
    def behaviours(self) -> tuple[str, str]:
        """The names of first and second."""
        return self.roles[0].name, self.roles[1].name

    @property
    def edit(self) -> StateResults:
        """The edit on confirming prompts."""
        return self.states[0]

    @property
    def margins(self) -> list[Line]:
        """The edit's lines of both behaviours' margins."""
        return [line for line in self.edit.lines if line.metric == MARGIN and line.on in self.behaviours]

    def of_kind(self, kind: str) -> list[StateResults]:
        """The states of one kind: `opposite`, `flip`, `random gates`."""
        return [state for state in self.states if state.kind == kind]

    def to_pandas(self) -> pd.DataFrame:
        """One row a state: changes of both margins with their intervals, perplexity, KL."""
        rows = []
        for state in self.states:
            row = {"state": state.name, "kind": state.kind, "perplexity": state.perplexity, "kl": state.kl}
            rows.append(row | change_cells(state))
        return pd.DataFrame(rows)


def load_improvement(folder: Path) -> Improvement:
    """The improvement in a run folder. Raises `InputError` where it is missing, unfinished or something else."""
    return load_record(Improvement, folder / RESULTS_FILE, "results")


def is_improvement(folder: Path) -> bool:
    """Whether a run folder is that of an improvement. Not where its settings cannot be read: that is told elsewhere."""
    try:
        return "gating" in begun_with(folder, dict[str, Any]).config
    except InputError:
        return False


def refuse_improvement(folder: Path, what: str) -> None:
    """Raise `InputError` where a run folder is that of an improvement, of which `what` cannot be done."""
    if is_improvement(folder):
        raise InputError(f"{folder} holds an edit of `improve`; {what} takes runs of `run` alone")


def swapped_labels(preference: Mapping[str, Interval]) -> list[str]:
    """The behaviours whose safe and unsafe answers look swapped, one line each.

    Args:
        preference: the original's margin on the scored examples of each behaviour, nats per token.
    """
    lines = []
    for name, margin in preference.items():
        if margin.high < PREFERS_UNSAFE:
            lines.append(
                f"the model finds the unsafe answers of '{name}' likelier than the safe ones, by {-margin.mean:.2f} "
                "nats per token: are safe and unsafe swapped?"
            )
    return lines
