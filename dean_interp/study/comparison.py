"""One kind of unit: its edit beside its controls, in the order that keeps the outcome honest.

Size-matched controls come first. Then the edit's KL on general text is taken, and nothing else of it: controls are
grown to that KL. What the design can detect is stated from controls alone. Only then are the edit's margins measured.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from dean_interp.evaluation.measure import Measurement
from dean_interp.files import read_json, write_text
from dean_interp.information.activations import Activations
from dean_interp.information.before_after import BeforeAfter
from dean_interp.information.estimands import HEADLINES, Arm, MutualInformationConfig
from dean_interp.information.shifts import MutualInformation
from dean_interp.models.sites import Unit
from dean_interp.scoring.scores import Scores
from dean_interp.selection.controls import Strata, n_units_outside, named_controls, random_like
from dean_interp.selection.coupling import Coupling
from dean_interp.selection.selection import Selection
from dean_interp.study.chance import chance_of
from dean_interp.study.config import StudyConfig
from dean_interp.study.controls import grow_to_kl
from dean_interp.study.outcome import RANDOM_KINDS, design_of, headline_of, primary_of, state_of
from dean_interp.study.results import State, UnitResults
from dean_interp.study.states import States

log = logging.getLogger(__name__)

N_DRAWS = 3  # random draws that an equal-KL control may take to come within 10 % of the edit's KL


@dataclass(frozen=True)
class Ablated:
    """One state to measure: its kind as in `State`, what is silenced, and its size relative to the edit."""

    kind: str
    selection: Selection
    growth: float = 1.0


class Comparison:
    """The states of one kind of unit, by name."""

    def __init__(
        self,
        config: StudyConfig,
        unit: Unit,
        found: Coupling,
        scores: Sequence[Scores],
        strata: Strata,
        states: States,
        reads: tuple[Selection, Selection],
    ) -> None:
        self.unit: Unit = unit
        self.config, self.found, self.scores = config, found, scores
        self.strata, self.states, self.reads = strata, states, reads
        self.ablated: dict[str, Ablated] = {}

    def results(self) -> UnitResults:
        """Measure every state that is not there yet, and put the outcome together."""
        config, edit = self.config, self.found.coupled
        for i in range(config.n_random):
            self.ablated[f"random {i + 1}"] = Ablated("random", self.random(i, 1.0))
        target = self.states.kl(edit)
        for i in range(config.n_equal_kl):
            self.ablated[f"equal KL {i + 1}"] = self.equal_kl(i, target)
        controls = [self.state(name) for name in self.ablated]
        measured = [self.measured(name) for name, one in self.ablated.items() if one.kind == "equal KL"]
        behaviours = [test.name for test in self.states.tests[:2]]
        design = design_of(controls, measured, self.states.original, behaviours)
        log.info("%ss, before the edit is measured: %s", self.unit, design)
        self.ablated = {"edit": Ablated("edit", edit)} | self.ablated
        for name, chosen in named_controls(self.found, *self.scores).items():
            if len(chosen):
                self.ablated[name] = Ablated("named", chosen, len(chosen) / len(edit))
        states = [self.state(name) for name in self.ablated]
        primary = primary_of(states[0], states)
        per_layer = [0] * (max(site.layer for site in edit.shapes) + 1)
        for site, n in edit.counts().items():
            per_layer[site.layer] += n
        return UnitResults(
            self.unit,
            self.found.fractions,
            sum(value.numel() for value in self.scores[0].values.values()) // len(per_layer),
            self.found.sizes(),
            tuple(per_layer),
            chance_of(self.found, self.scores, self.strata, seed=config.seed),
            design,
            primary,
            tuple(states),
            self.information(states),
            headline_of(self.unit, states[0], states, primary, self.states.original[self.states.general].perplexity),
        )

    def measured(self, name: str) -> Measurement:
        """The measurement of one state."""
        return self.states.measured(f"{self.unit} {name}", self.ablated[name].selection)

    def state(self, name: str) -> State:
        """One state as a line of the results."""
        one = self.ablated[name]
        original, general = self.states.original, self.states.general
        return state_of(name, one.kind, len(one.selection), one.growth, self.measured(name), original, general)

    def random(self, number: int, growth: float) -> Selection:
        """The `number`-th random selection like the edit, at a given growth."""
        return random_like(self.found.coupled, self.strata, seed=self.config.seed * 1000 + number, growth=growth)

    def equal_kl(self, number: int, target: float) -> Ablated:
        """Random control `number` of equal KL. The draw and growth found are remembered beside the states.

        One unit alone can jump over the allowed band of KL. Then another draw is grown, up to `N_DRAWS` in all.
        """
        path = self.states.folder / f"{self.unit}_equal_kl.json"
        known: dict[str, tuple[int, float]] = read_json(path, dict[str, tuple[int, float]]) if path.is_file() else {}
        edit = self.found.coupled
        for attempt in range(0 if str(number) in known else N_DRAWS):
            draw = self.config.n_random + number + attempt * self.config.n_equal_kl
            self.states.progress.set_postfix_str(f"{self.unit} equal KL {number + 1}: size")
            growth, inside = grow_to_kl(
                lambda growth, draw=draw: self.random(draw, growth),
                self.states.kl,
                target,
                bounds=(1 / len(edit), n_units_outside(edit) / len(edit)),
                start=known[str(number - 1)][1] if number else 1.0,
            )
            known[str(number)] = draw, growth
            if inside:
                break
            if attempt == N_DRAWS - 1:
                log.warning("equal-KL control %d does not come within 10 %% of the edit's KL", number + 1)
        write_text(path, json.dumps(known))
        draw, growth = known[str(number)]
        return Ablated("equal KL", self.random(draw, growth), growth)

    def information(self, states: Sequence[State]) -> tuple[MutualInformation, ...]:
        """The headline estimands under the edit and under every random control, on the activations already at hand."""
        names = ["edit", *(state.name for state in states if state.kind in RANDOM_KINDS)]
        ablated = {name: self.ablated[name].selection for name in names}
        return information_change(self.states, ablated, self.measured, self.reads)


def information_change(
    states: States,
    ablated: Mapping[str, Selection],
    measured: Callable[[str], Measurement],
    reads: tuple[Selection, Selection],
) -> tuple[MutualInformation, ...]:
    """Both headline estimands before and under every ablation; the first is the edit, the others are its controls."""

    def under(name: str) -> tuple[Arm, Activations]:
        after = measured(name).activations
        assert after is not None
        return Arm(ablated[name], *reads), after

    edit, *controls = ablated
    before, behaviours = states.original.activations, [test.name for test in states.tests[:2]]
    assert before is not None
    asked = [
        BeforeAfter(
            MutualInformationConfig(estimand, seed=states.config.seed),
            before,
            under(edit)[0],
            behaviours,
            states.calibration,
        )
        for estimand in HEADLINES
    ]
    changes = [
        [one.changes(*under(name)) for one in asked] for name in tqdm(controls, desc="mutual information", leave=False)
    ]
    after = under(edit)[1]
    return tuple(one.information(after, [control[i] for control in changes]) for i, one in enumerate(asked))
