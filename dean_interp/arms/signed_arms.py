"""Silencing by sign: neurons that lower both margins, and that general text does not need most, are silenced.

They are the neurons whose gains for both margins lie below 0 by some standard errors (`selection.signed`), without the
top hundredth of general text. Silencing them raises both margins to first order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dean_interp.arms.arm import ArmExamples, Kind, Setting, Settings
from dean_interp.arms.changes import Silencing
from dean_interp.arms.coupled_arms import rule_scores
from dean_interp.errors import NothingToChangeError
from dean_interp.models.sizes import neuron_shapes
from dean_interp.selection.gains import Gains, gains_of, towards_zero
from dean_interp.selection.selection import Selection, top_fraction

_GENERAL = 0.01


@dataclass(frozen=True)
class SignedSilencingArm:
    """Silences the neurons whose silencing raises both margins."""

    kind: Kind = "silencing"
    name: str = "silencing by sign"
    source: str = "this project (selection.signed)"
    uses_labels: bool = True

    @property
    def choices(self) -> Mapping[str, Sequence[Setting]]:
        """How many standard errors a gain must lie below 0."""
        return {"certainty": (0.5, 1.0, 1.5, 2.0)}

    def fit(self, examples: ArmExamples, settings: Settings) -> Silencing:
        """The neurons. Raises `NothingToChangeError` where none is that certain."""
        certainty = float(settings["certainty"])
        first_signs, second_signs = examples.flip or (None, None)
        first_scores, second_scores = examples.margin_scores[:2]
        first = gains_of(first_scores, signs=first_signs)
        second = gains_of(second_scores, signs=second_signs)
        lower_both = _lowering(first, certainty) & _lowering(second, certainty)
        general = rule_scores(examples, "neuron")[2]
        # A small site has no hundredth: then its first neuron counts.
        fewest = min(width for (width,) in neuron_shapes(examples.model).values())
        fraction = max(_GENERAL, 1 / fewest)
        chosen = lower_both - top_fraction(general, fraction)
        if not len(chosen):
            raise NothingToChangeError(
                f"no neuron lowers both {first.behaviour} and {second.behaviour} by {settings['certainty']} standard "
                "errors: take a smaller certainty"
            )
        return Silencing(chosen)


def _lowering(gains: Gains, certainty: float) -> Selection:
    """The neurons whose gain lies below 0 by so many standard errors."""
    units, shapes = {}, {}
    for site, mean in gains.mean.items():
        bound = towards_zero(mean, certainty * gains.error[site])
        units[site] = torch.nonzero(bound < 0)[:, 0]
        shapes[site] = (len(mean),)
    return Selection(units, shapes, gains.prompt_hashes)
