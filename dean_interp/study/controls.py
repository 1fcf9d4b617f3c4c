"""The controls of an edit: random ablations that differ from it only in which units they hold, and other selections.

A new kind of random control is a function here and an entry in `RANDOM_CONTROLS`. It then stands beside the edit in
`run`, `sweep`, `evaluate` and the report, and counts in every rank.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dean_interp.errors import InputError
from dean_interp.files import write_json
from dean_interp.resume import read_kept
from dean_interp.scoring.scores import Scores
from dean_interp.selection.coupling import Coupling
from dean_interp.selection.random_sets import n_units_outside, random_like
from dean_interp.selection.selection import Selection, strongest
from dean_interp.selection.size_at_kl import size_at_kl
from dean_interp.selection.strata import Strata
from dean_interp.study.settings import ControlConfig
from dean_interp.study.store import State, file_name

log = logging.getLogger(__name__)

N_DRAWS = 3
"""Random draws that an equal-KL control may take to come within 10 % of the edit's KL."""


@dataclass(frozen=True)
class ControlRequest:
    """What controls are drawn for."""

    edit: State
    strata: Strata
    """What random controls are matched on (`selection.strata`)."""
    config: ControlConfig
    seed: int
    kl: Callable[[State], float]
    """KL of a state to the original on general text, nats per token."""
    folder: Path
    """Where the sizes that were found are kept."""

    def state(self, name: str, kind: str, selection: Selection, growth: float = 1.0) -> State:
        """A control: another selection, ablated as the edit is."""
        prefix = "" if self.edit.name == "edit" else f"{self.edit.name} "
        return State(
            name=f"{prefix}{name}",
            kind=kind,
            ablated=selection,
            value=self.edit.value,
            unit=self.edit.unit,
            growth=growth,
        )

    def random(self, number: int, growth: float) -> Selection:
        """The random selection of that number, at a given growth."""
        assert self.edit.ablated is not None
        return random_control(self.edit.ablated, self.strata, seed=self.seed, number=number, growth=growth)


def random_control(edit: Selection, strata: Strata, *, seed: int, number: int, growth: float = 1.0) -> Selection:
    """The random control of that number. The only place where the seed of its draw is made."""
    return random_like(edit, strata, seed=seed * 1000 + number, growth=growth)


def refuse_without_controls(edit: Selection) -> None:
    """Raise `InputError` where the layers of an edit hold too few other units for a random control of its size."""
    n_outside = n_units_outside(edit)
    if len(edit) > n_outside:
        raise InputError(
            f"the edit holds {len(edit)} units and leaves {n_outside} others where they are, too few for a random "
            "control of its size: take a smaller fraction"
        )


def size_matched(request: ControlRequest) -> Iterator[State]:
    """As many units as the edit, of the same sites and strata."""
    for number in range(request.config.n_random):
        selection = request.random(number, 1.0)
        yield request.state(f"random {number + 1}", "random", selection)


def equal_kl(request: ControlRequest) -> Iterator[State]:
    """The same, grown until the KL to the original is the edit's.

    Of the edit nothing but its KL on general text is measured for them.
    """
    assert request.edit.ablated is not None
    if not request.config.n_equal_kl:
        return
    of_unit = file_name(request.edit.title).removesuffix("_edit")
    path = request.folder / "states" / f"{of_unit}_equal_kl.json"
    known = _known_sizes(path, request)
    target = request.kl(request.edit)
    start = 1.0
    for number in range(request.config.n_equal_kl):
        if number == len(known.sizes):
            known.sizes.append(_grown(request, number, target, start))
            write_json(path, known)
        draw, growth = known.sizes[number]
        # The next search begins where this one ended.
        start = growth
        selection = request.random(draw, growth)
        yield request.state(f"equal KL {number + 1}", "equal KL", selection, growth)


@dataclass(frozen=True)
class _KnownSizes:
    """The equal-KL controls of an edit whose sizes are known, in their order."""

    edit: str
    """Fingerprint of the edit."""
    seed: int
    n_random: int
    n_equal_kl: int
    """How many random and equal-KL controls there are: the numbers of the draws depend on both."""
    sizes: list[tuple[int, float]]
    """Each control's draw and growth."""


def _known_sizes(path: Path, request: ControlRequest) -> _KnownSizes:
    """What a file knows. Raises `InputError` where it is of other controls, whose draws these would repeat."""
    n_random, n_equal_kl = request.config.n_random, request.config.n_equal_kl
    none = _KnownSizes(request.edit.fingerprint, request.seed, n_random, n_equal_kl, [])
    if not path.is_file():
        return none
    known = read_kept(path, _KnownSizes)
    if replace(known, sizes=[]) != none:
        raise InputError(
            f"{path} holds controls of another edit or another seed, or beside other numbers of controls: "
            f"n_random {known.n_random} and n_equal_kl {known.n_equal_kl} there, {n_random} and {n_equal_kl} here; "
            "choose another folder"
        )
    return known


def _grown(request: ControlRequest, number: int, target: float, start: float) -> tuple[int, float]:
    """The draw of a control of equal KL, and its growth.

    One unit alone can jump over the allowed band of KL. Then another draw is grown, up to `N_DRAWS` in all.
    """
    edit = request.edit.ablated
    assert edit is not None
    n_random, n_equal_kl = request.config.n_random, request.config.n_equal_kl
    draw, growth = 0, start
    for attempt in range(N_DRAWS):
        draw = n_random + number + attempt * n_equal_kl

        def kl(growth: float, draw: int = draw) -> float:
            selection = request.random(draw, growth)
            state = request.state(f"equal KL {number + 1}", "equal KL", selection)
            return request.kl(state)

        # From one unit to all others where the edit is.
        bounds = (1 / len(edit), n_units_outside(edit) / len(edit))
        growth, is_inside = size_at_kl(kl, target, bounds=bounds, start=start)
        if is_inside:
            return draw, growth
    log.warning("equal-KL control %d does not come within 10 %% of the edit's KL", number + 1)
    return draw, growth


@dataclass(frozen=True)
class RandomControl:
    """One kind of random control."""

    draw: Callable[[ControlRequest], Iterator[State]]
    label: str
    """What is alike in the edit and in these controls, as the report says it."""


RANDOM_CONTROLS: dict[str, RandomControl] = {
    "random": RandomControl(size_matched, "same size"),
    "equal KL": RandomControl(equal_kl, "same KL"),
}
"""Every kind of random control, in the order in which they are measured."""


def random_controls(request: ControlRequest) -> list[State]:
    """The random controls of every kind."""
    states = []
    for control in RANDOM_CONTROLS.values():
        states += control.draw(request)
    return states


def is_random(kind: str) -> bool:
    """Whether a state of that kind is a random control, which counts in ranks."""
    return kind in RANDOM_CONTROLS


def named_controls(request: ControlRequest, coupling: Coupling, scores: Sequence[Scores]) -> list[State]:
    """The named controls that hold a unit (`named_selections`), ablated as the edit is."""
    states = []
    for name, selection in named_selections(coupling, scores).items():
        if len(selection):
            growth = len(selection) / len(coupling.coupled)
            states.append(request.state(name, "named", selection, growth))
    return states


def named_selections(tops: Coupling, scores: Sequence[Scores]) -> Mapping[str, Selection]:
    """Sets of about the coupled set's size at each site, chosen by other rules from the same scores.

    `first only` and `second only`: the strongest of one behaviour's top that are in neither other top. `all three`: the
    strongest, by general score, of the units in all three tops. `general only`: the strongest of general's top that are
    in neither other. They are smaller where there are not enough units.
    """
    first, second, general = scores
    first_only = tops.first - tops.second - tops.general
    second_only = tops.second - tops.first - tops.general
    all_three = tops.both & tops.general
    general_only = tops.general - tops.first - tops.second
    counts = tops.coupled.counts()
    return {
        f"{first.behaviour} only": strongest(first, first_only, counts),
        f"{second.behaviour} only": strongest(second, second_only, counts),
        "all three": strongest(general, all_three, counts),
        f"{general.behaviour} only": strongest(general, general_only, counts),
    }
