"""What takes the place of the selected units: two options that `ablate` and `edit create` share."""

from dataclasses import dataclass
from pathlib import Path

from dean_interp.editing.values import Mean, Scale, Zero
from dean_interp.errors import InputError
from dean_interp.scoring.scores import load_scores
from dean_interp.study.config import factor_of


@dataclass(frozen=True)
class Replacement:
    """What takes the place of the selected units."""

    value: str = "0"
    """Number that activations or weights are multiplied by (0 silences); or `mean`, for the neurons' means."""
    scores: Path | None = None
    """Score file whose examples `--value mean` takes the means over."""

    def load(self) -> Zero | Scale | Mean:
        """The value as `ablate` and `create_edit` take it. Raises `InputError` where the two options do not agree."""
        factor = factor_of(self.value)
        if (factor is None) != (self.scores is not None):
            raise InputError(
                f"--value mean and --scores go together, got --value {self.value} and "
                f"{'no --scores' if self.scores is None else f'--scores {self.scores}'}"
            )
        if self.scores is not None:
            return Mean(load_scores(self.scores))
        return Scale(factor) if factor else Zero()
