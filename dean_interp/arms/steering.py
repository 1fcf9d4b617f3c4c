"""Steering by a difference of means: a vector is added to the residual stream after one layer, at every position.

Contrastive activation addition (arXiv 2312.06681, section 3: `v = mean(a(safe) - a(unsafe))`, added with a multiplier)
and activation addition (arXiv 2308.10248). The first adds it after the prompt; here it is added everywhere, as all arms
change every position. Both behaviours' directions, each of length 1, are added up, and the sum is brought to the
typical norm of the stream: a dose of 1 adds as much as is there. What the two directions have in opposite senses
cancels, and the rest is scaled up to the same length; where nothing is left, the arm is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.arms.answer_statistics import DEPTHS
from dean_interp.arms.arm import BYTES_OF_NUMBER, ArmExamples, Kind, Setting, Settings
from dean_interp.arms.hooked_change import hooked_state
from dean_interp.arms.mean_differences import mean_differences
from dean_interp.errors import NothingToChangeError
from dean_interp.models.sites import residual_hook
from dean_interp.study.store import State

_OPPOSED = 1e-3
"""Two directions of length 1 whose sum is shorter oppose each other."""


@dataclass(frozen=True)
class Steered:
    """A vector that is added, times the dose, to the residual stream after one layer."""

    layer: int
    vector: Float[Tensor, " d_model"]
    """From unsafe to safe, as long as the stream typically is."""
    first_dose: float = 0.05
    largest_dose: float = 100.0

    @property
    def n_bytes(self) -> int:
        """A number is kept of each dimension."""
        return BYTES_OF_NUMBER * len(self.vector)

    def at(self, dose: float) -> State:
        """The model with `dose` times the vector added."""
        added = dose * self.vector
        maps = {residual_hook(self.layer): lambda model, stream: stream + added.to(stream)}
        return hooked_state(maps, {f"add after {self.layer}": self.vector}, dose)


@dataclass(frozen=True)
class Steering:
    """Adding the difference of means to the residual stream."""

    name: str = "steering"
    kind: Kind = "residual stream"
    source: str = "arXiv 2312.06681, section 3; arXiv 2308.10248"
    uses_labels: bool = True

    @property
    def choices(self) -> Mapping[str, Sequence[Setting]]:
        """The layer, as a share of the model's layers."""
        return {"depth": DEPTHS}

    def fit(self, examples: ArmExamples, settings: Settings) -> Steered:
        """The vector from both behaviours' answers.

        Raises:
            InputError: as `mean_differences`.
            NothingToChangeError: two directions that oppose each other.
        """
        directions = mean_differences(examples, float(settings["depth"]))
        total = directions.units.sum(0)
        length = total.norm()
        if float(length) < _OPPOSED:
            raise NothingToChangeError(
                f"the directions of the two behaviours oppose each other after layer {directions.layer}"
            )
        # As long as the stream typically is.
        vector = directions.norm * total / length
        return Steered(directions.layer, vector.to(torch.float32))
