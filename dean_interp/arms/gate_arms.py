"""Gates as arms: the change of all neurons that raises both margins most for its damage to general text.

There are three such arms: the closed form (`selection.gating`), proximal steps that folds of topics stop
(`selection.iterated`), and the gates of the command `improve`. The first two are given the same pairs as every arm. The
last one knows more: it also leaves alone what the register set shows, and its settings were chosen by cross-validation
on the demo model (`analyses/gate_defaults.py`); here nothing of it is chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dean_interp.arms.arm import ArmExamples, Kind, Setting, Settings
from dean_interp.arms.changes import AlongGates
from dean_interp.selection.gains import damage_of, gains_of
from dean_interp.selection.gating import GatingConfig
from dean_interp.selection.iterated import gates_of_scores

_FIRST_DOSE = 0.07
_NOTHING: Mapping[str, Sequence[Setting]] = {}


@dataclass(frozen=True)
class GatesArm:
    """Gates from gains and damage."""

    name: str
    gating: GatingConfig
    """What is not chosen."""
    choices: Mapping[str, Sequence[Setting]] = field(default_factory=lambda: _NOTHING)
    kind: Kind = "gates"
    source: str = "this project (selection.gating, selection.iterated)"
    uses_labels: bool = True

    def fit(self, examples: ArmExamples, settings: Settings) -> AlongGates:
        """The direction of the gates. Raises `InputError` as `gates_of_scores` does."""
        gating = replace(self.gating, **settings)
        first, second, general, *register = examples.margin_scores
        register_is_used = bool(register) and gating.against_register > 0
        gates = gates_of_scores(
            first,
            second,
            damage_of(general),
            signs=examples.flip or (None, None),
            register=gains_of(register[0]) if register_is_used else None,
            config=gating,
        )
        return AlongGates(gates, first_dose=_FIRST_DOSE)


CLOSED_FORM = GatesArm(
    "gates, closed form",
    GatingConfig(against_register=0.0),
    {"ridge": (0.1, 1.0), "cost": ("together", "alone")},
)
ITERATED = GatesArm(
    "gates, iterated",
    GatingConfig(against_register=0.0, folds=4),
    {"sparsity": (0.0, 0.02, 0.05, 0.1)},
)
OF_IMPROVE = GatesArm("gates of improve", GatingConfig())
