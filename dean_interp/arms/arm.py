"""The protocol of arms: ways of changing a model that are compared at equal damage (`arms.comparison`).

An arm makes a change of the model from calibration examples (`fit`). A change has a state of the model for every dose:
at 0 it is the model as it is, and the larger the dose the more it changes. A state can be measured like any other, and
is undone to the bit when it closes. How to write one: docs/how_to/add_an_arm.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from dean_interp.data.examples import Behaviour, Example
from dean_interp.models.load import HookedModel
from dean_interp.scoring.scores import Scores
from dean_interp.study.choosing import effects
from dean_interp.study.flips import Flip
from dean_interp.study.improvement import ImproveConfig
from dean_interp.study.store import State

Kind = Literal[
    "paper's rule", "silencing", "gates", "residual stream", "activations", "fine-tuning", "prompt", "random"
]
"""What an arm changes, or whose rule it follows. Nulls are made for the best arm of each kind."""
BYTES_OF_NUMBER = 4
"""What a kept number takes: float32, or an index."""
Setting = float | int | str
Settings = Mapping[str, Setting]


def in_words(settings: Settings) -> str:
    """Settings with their values, for names and tables."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


@runtime_checkable
class Change(Protocol):
    """A change of a model that can be followed farther or less far."""

    @property
    def n_bytes(self) -> int:
        """What has to be kept of it so that it can be made again."""
        ...

    @property
    def first_dose(self) -> float:
        """A dose that changes the model a little: a search for a KL begins there."""
        ...

    @property
    def largest_dose(self) -> float:
        """No dose beyond it is tried."""
        ...

    def at(self, dose: float) -> State:
        """The state of the model at a dose, without a name. At 0 nothing is changed."""
        ...


@dataclass(frozen=True)
class ArmExamples:
    """What every arm is given: the same model, the same calibration examples. No confirming prompt is among them."""

    model: HookedModel
    config: ImproveConfig
    """How text becomes tokens, and in which batches it is scored."""
    scoring: Sequence[Behaviour]
    """First and second with safe and unsafe answers, general text, and the register set where there is one."""
    folder: Path
    """Where scores are kept, for all arms."""
    own_folder: Path
    """Where this arm keeps what takes long to make, for these examples."""
    flip: Flip | None = None
    """A null: topics whose safe and unsafe answers change roles. None: labels as they are."""
    seed: int = 0

    @property
    def pairs(self) -> tuple[Behaviour, Behaviour]:
        """First and second, with the labels that the flip gives to their topics; topics that it leaves out are gone."""
        first, second = self.scoring[:2]
        if self.flip is None:
            return first, second
        return flipped(first, self.flip[0]), flipped(second, self.flip[1])

    @property
    def margin_scores(self) -> list[Scores]:
        """Signed effects on both margins by topic, the damage to general text, and effects on the register set's
        margin: from their files, else scored now. Labels are as they are: gains take the flip (`gains_of(signs=)`).
        """
        return effects(self.model, self.scoring, self.config, self.folder)


def flipped(behaviour: Behaviour, signs: Mapping[str, int]) -> Behaviour:
    """A behaviour whose safe and unsafe answers change roles in the topics with -1; topics without a sign are left out.

    Args:
        behaviour: with two answers a prompt.
        signs: 1 or -1 by topic (by prompt, where there are none).
    """
    examples: list[Example] = []
    for example in behaviour.examples:
        sign = signs.get(example.cluster)
        if sign == 1:
            examples.append(example)
        elif sign == -1:
            answers = {"safe": example.answers["unsafe"], "unsafe": example.answers["safe"]}
            examples.append(replace(example, answers=answers))
    return replace(behaviour, examples=tuple(examples))


@runtime_checkable
class Arm(Protocol):
    """A way of changing a model."""

    @property
    def name(self) -> str:
        """What it is called in tables and files."""
        ...

    @property
    def kind(self) -> Kind:
        """What it changes."""
        ...

    @property
    def source(self) -> str:
        """Where it comes from: a paper with section or equation, or this project."""
        ...

    @property
    def choices(self) -> Mapping[str, Sequence[Setting]]:
        """The settings that are chosen on choosing prompts, each with its possible values; empty: none."""
        ...

    @property
    def uses_labels(self) -> bool:
        """Whether it knows which answer is safe: then flipped labels make a null of it."""
        ...

    def fit(self, examples: ArmExamples, settings: Settings) -> Change:
        """The change that the examples make.

        Args:
            examples: the calibration examples, the same for every arm.
            settings: one value for each of `choices`.

        Raises:
            InputError: a model or data that the arm is not for.
            NothingToChangeError: data that leave nothing to change.
        """
        ...
