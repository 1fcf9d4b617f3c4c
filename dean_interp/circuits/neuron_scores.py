"""How one neuron scores for each behaviour, and its rank in its layer. Scores of `improve` are shown as gains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from dean_interp.models.neuron_names import Neuron, NeuronName, name_of
from dean_interp.models.sites import Site
from dean_interp.scoring.scores import Scores
from dean_interp.selection.gains import damage_of, gains_at, hold_damage, hold_gains

ScoreKind = Literal["score", "gain", "damage"]
"""What a neuron is ranked by: a score (nats), or gain or damage of `selection.gains` (nats per token)."""


@dataclass(frozen=True)
class NeuronScores:
    """One neuron's place in each behaviour: its score and its rank in its layer by size, 1 for the highest.

    The neurons of all routed experts of a layer are ranked together, those of a shared expert by themselves.
    """

    layer: int
    index: int
    score: Mapping[str, float]
    rank: Mapping[str, int]
    owner: str = ""
    """The expert that it belongs to (`models.neuron_names.NeuronName`)."""
    measured_by: Mapping[str, ScoreKind] = field(default_factory=dict)
    """What each score is. One that is not named is a score (nats)."""
    error: Mapping[str, float] = field(default_factory=dict)
    """The standard error of each gain, by topic."""

    @property
    def name(self) -> str:
        """As it is written everywhere: `L17.1042`."""
        return str(NeuronName(self.layer, self.index, self.owner))


def neuron_scores(neuron: Neuron, scores: Sequence[Scores]) -> NeuronScores:
    """How one neuron scores for each behaviour. Scores that hold gains or damage are shown as these (`ScoreKind`)."""
    site, index = neuron
    score: dict[str, float] = {}
    rank: dict[str, int] = {}
    measured_by: dict[str, ScoreKind] = {}
    error: dict[str, float] = {}
    for behaviour_scores in scores:
        behaviour = behaviour_scores.behaviour
        measure, of_layer, errors = _measured(behaviour_scores, site)
        is_higher = of_layer.abs() > of_layer[index].abs()
        score[behaviour] = float(of_layer[index])
        rank[behaviour] = int(is_higher.sum()) + 1
        if measure != "score":
            measured_by[behaviour] = measure
        if errors is not None:
            error[behaviour] = float(errors[index])
    n_neurons = len(scores[0][site])
    name = name_of(neuron, n_neurons)
    return NeuronScores(
        layer=name.layer,
        index=name.index,
        score=score,
        rank=rank,
        owner=name.owner,
        measured_by=measured_by,
        error=error,
    )


def _measured(scores: Scores, site: Site) -> tuple[ScoreKind, Float[Tensor, " d_mlp"], Float[Tensor, " d_mlp"] | None]:
    """What the scores of a site's neurons are, these numbers, and their standard errors where they are known."""
    if hold_gains(scores):
        gains, errors = gains_at(scores, site)
        return "gain", gains, errors
    if hold_damage(scores):
        return "damage", damage_of(scores).diagonal[site], None
    return "score", scores[site], None
