"""The paper's rule on the examples of `improve`, to stand beside its edit."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dean_interp.data.examples import Behaviour
from dean_interp.models.load import HookedModel
from dean_interp.scoring.preparation import ScoringConfig
from dean_interp.selection.coupling import couple, refuse_empty
from dean_interp.selection.selection import Selection
from dean_interp.study.improvement import ImproveConfig
from dean_interp.study.method import disjoint_neurons, scored_once
from dean_interp.study.settings import FRACTION, INFORMATION_FRACTION
from dean_interp.study.store import State

PAPER = "paper's rule"
"""The kind of the state that the paper's rule makes."""


@dataclass(frozen=True)
class PaperRule:
    """What the paper's rule selects on the same examples."""

    state: State
    """The model with the coupled neurons silenced."""
    neurons: tuple[Selection, Selection]
    """The neurons of first and of second between which mutual information is estimated."""


def paper_rule(model: HookedModel, scoring: Sequence[Behaviour], config: ImproveConfig, folder: Path) -> PaperRule:
    """The paper's rule silences the neurons that are coupled on the same examples (arXiv 2410.16672, section 4).

    Raises `InputError` where none is coupled.
    """
    settings = ScoringConfig(template=config.model.template, batch_tokens=config.score_tokens)
    scores = []
    for behaviour in scoring[:3]:
        scores.append(scored_once(model, behaviour, folder, unit="neuron", config=settings))
    coupling = couple(*scores, fraction=FRACTION["neuron"])
    refuse_empty(coupling, *scores)
    state = State("paper's rule", PAPER, ablated=coupling.coupled, unit="neuron")
    return PaperRule(state, disjoint_neurons(scores, INFORMATION_FRACTION))
