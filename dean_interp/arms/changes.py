"""Changes that several arms make: a set of units that is silenced step by step, and gates along their direction."""

from dataclasses import dataclass

from dean_interp.arms.arm import BYTES_OF_NUMBER
from dean_interp.editing.values import Scale
from dean_interp.selection.gates import Gates, dosed, gates_of
from dean_interp.selection.selection import Selection
from dean_interp.study.dosing import gated_state
from dean_interp.study.store import State

_FARTHEST = 1e4


@dataclass(frozen=True)
class Silencing:
    """A set of units, each times `1 - dose`: 0 leaves them as they are, 1 silences them. There is no more."""

    selection: Selection
    largest_dose: float = 1.0

    @property
    def n_bytes(self) -> int:
        """An index is kept of each unit."""
        return BYTES_OF_NUMBER * len(self.selection)

    @property
    def first_dose(self) -> float:
        """The whole set, silenced: many sets never reach the KL that is looked for."""
        return 1.0

    def at(self, dose: float) -> State:
        """The model with the units times `1 - dose`."""
        if dose == 0 or not len(self.selection):
            return State("", "arm")
        if next(iter(self.selection.shapes)).unit == "neuron":
            return gated_state("", "arm", gates_of(self.selection, 1 - dose))
        return State("", "arm", ablated=self.selection, value=Scale(1 - dose))


@dataclass(frozen=True)
class AlongGates:
    """Gates along their direction, held to `selection.gates.LIMITS`."""

    direction: Gates
    first_dose: float
    largest_dose: float = _FARTHEST

    @property
    def n_bytes(self) -> int:
        """An index and a multiplier are kept of each neuron that changes."""
        return 2 * BYTES_OF_NUMBER * len(self.direction)

    def at(self, dose: float) -> State:
        """The model under the gates with `dose` times their changes."""
        return gated_state("", "arm", dosed(self.direction, dose), dose=dose)
