"""The paper's rule as an arm: units that are large for both behaviours and not for general text are silenced.

The rule chooses neurons or weights (arXiv 2410.16672, section 4). Beside it stands what the released code selects in
its place (`selection.released`). The rule has no idea of safe against unsafe: it scores safe answers alone, so flipped
labels make no null of it. Random units of the same strata stand beside it (`random_arms`).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dean_interp.arms.arm import ArmExamples, Kind, Setting, Settings
from dean_interp.arms.changes import Silencing
from dean_interp.models.sites import Unit
from dean_interp.scoring.preparation import ScoringConfig
from dean_interp.scoring.scores import Scores
from dean_interp.selection.coupling import couple, refuse_empty
from dean_interp.selection.released import released_coupling
from dean_interp.study.method import scored_once

_KEEP = 0.02
FRACTIONS: Mapping[Unit, tuple[float, ...]] = {
    "neuron": (0.003, 0.01, 0.03, 0.1),
    "weight": (3e-5, 1e-4, 3e-4, 1e-3),
}
"""Top fractions that are chosen among; the paper's are the second of each."""


def rule_scores(examples: ArmExamples, unit: Unit) -> list[Scores]:
    """What the paper's rule compares: `|activation * gradient|` and `|W dL/dW|` for the safe answers of first and
    second, and for general text. Both units are scored in one pass, once for all arms.
    """
    config = ScoringConfig(template=examples.config.model.template, batch_tokens=examples.config.score_tokens)
    scores = []
    for behaviour in examples.scoring[:3]:
        both = scored_once(
            examples.model,
            behaviour,
            examples.folder / "rule",
            unit=("neuron", "weight"),
            config=config,
            keep=_KEEP,
        )
        scores.append(both.of(unit))
    return scores


@dataclass(frozen=True)
class PaperRuleArm:
    """Silences what the paper's rule couples."""

    unit: Unit
    kind: Kind = "paper's rule"
    source: str = "arXiv 2410.16672, section 4"
    uses_labels: bool = False

    @property
    def name(self) -> str:
        """The name says which unit is silenced."""
        return f"paper's rule, {self.unit}s"

    @property
    def choices(self) -> Mapping[str, Sequence[Setting]]:
        """The top fraction of each behaviour."""
        return {"fraction": FRACTIONS[self.unit]}

    def fit(self, examples: ArmExamples, settings: Settings) -> Silencing:
        """The coupled units. Raises `InputError` where none is."""
        scores = rule_scores(examples, self.unit)
        coupling = couple(*scores, fraction=float(settings["fraction"]))
        refuse_empty(coupling, *scores)
        return Silencing(coupling.coupled)


@dataclass(frozen=True)
class ReleasedArm:
    """Silences the weights that the authors' code selects."""

    kind: Kind = "paper's rule"
    name: str = "released selection, weights"
    source: str = "the authors' repository (selection.released)"
    uses_labels: bool = False

    @property
    def choices(self) -> Mapping[str, Sequence[Setting]]:
        """The top fraction of each matrix."""
        return {"fraction": FRACTIONS["weight"]}

    def fit(self, examples: ArmExamples, settings: Settings) -> Silencing:
        """Its weights. Privacy comes first, as in the authors' script. Raises `InputError` where there are none."""
        first, second, general = rule_scores(examples, "weight")
        with warnings.catch_warnings():
            # It warns that it is no intersection: that is why it stands here.
            warnings.simplefilter("ignore", UserWarning)
            selection = released_coupling(second, first, general, fraction=float(settings["fraction"]))
        return Silencing(selection)
