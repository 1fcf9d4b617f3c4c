"""Gates by proximal gradient steps that folds of topics stop early.

The closed form (`selection.gating`) goes all the way to the best gates for the gains that were scored, their noise
included. Here the same quadratic is climbed in steps from no change at all, in units of each neuron's own cost
`u = sqrt(D) delta`, with the threshold of a lasso (ISTA; Beck and Teboulle 2009, section 1.2):

    u  <-  soft(u + s (b - u - G u), s threshold),    b = D^-1/2 benefit,    G = D^-1/2 F D^-1/2,    s = 1 / (1 + |G|)

The first step counts each neuron's cost alone, the last ones count costs together. Topics are divided into folds: the
number of steps is the one whose gates raise the margins of a left-out fold most for their damage, on average.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.sites import Site
from dean_interp.scoring.scores import Scores
from dean_interp.selection.gains import Damage, Gains, gains_of
from dean_interp.selection.gates import Gates
from dean_interp.selection.gating import GatingConfig, PerNeuron, benefit_of, closed_form_gates, gates_of_cost_one

Signs = Mapping[str, int]
PerAnswer = Mapping[Site, Float[Tensor, "answer d_mlp"]]
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of steps that folds choose among."""


def gates_of_scores(
    first: Scores,
    second: Scores,
    damage: Damage,
    *,
    signs: tuple[Signs | None, Signs | None] = (None, None),
    register: Gains | None = None,
    config: GatingConfig,
) -> Gates:
    """The direction of the gates: as far as folds of topics let the steps go, or without folds in closed form.

    Args:
        first: scores of one behaviour's margin by topic, as `gains_of` takes them.
        second: scores of the other behaviour's.
        damage: what changes cost.
        signs: the topics that count, as `gains_of` takes them.
        register: gains for harmless answers in the two registers, which no fold leaves out.
        config: how these become gates.

    Raises:
        InputError: a setting out of its range; a behaviour with fewer topics than two a fold.
        NoNeuronError: no neuron that is left to change.
    """
    config.check()
    of_first, of_second = gains_of(first, signs=signs[0]), gains_of(second, signs=signs[1])
    if not config.folds:
        return closed_form_gates(of_first, of_second, damage, register=register, config=config)
    counted = (_counted(first, signs[0]), _counted(second, signs[1]))
    n_reached = _reached_by_folds((first, second), counted, damage, register, config)
    # All topics climb as far as the folds said.
    stages = climb(benefit_of(of_first, of_second, register, config), damage, config)
    return gates_of_cost_one(next(islice(stages, n_reached, None)), damage, of_first, of_second)


def _reached_by_folds(
    scores: Sequence[Scores],
    counted: Sequence[Signs],
    damage: Damage,
    register: Gains | None,
    config: GatingConfig,
) -> int:
    """The place in `STEPS` whose gates raise the margins of left-out folds most."""
    folds = [_folds(each.behaviour, list(topics), config) for each, topics in zip(scores, counted, strict=True)]
    values = np.zeros(len(STEPS))
    for number in range(config.folds):
        left_out = [set(of_each[number]) for of_each in folds]
        chosen = _benefit(scores, counted, left_out, register, config, inside=False)
        held_out = _benefit(scores, counted, left_out, register, config, inside=True)
        values += [_value(changes, held_out, damage) for changes in climb(chosen, damage, config)]
    return int(values.argmax())


def climb(benefit: PerNeuron, damage: Damage, config: GatingConfig) -> Iterator[dict[Site, Tensor]]:
    """The changes after each number of steps in `STEPS`."""
    root = {site: cost.sqrt() for site, cost in damage.own_costs(config.ridge).items()}
    rows = {site: each / root[site] for site, each in damage.rows.items()}
    pull = {site: benefit[site] / root[site] for site in benefit}
    step = 1 / (1 + _largest_eigenvalue(rows, damage.n_tokens))
    threshold = step * config.sparsity * max(float(each.abs().max()) for each in pull.values())
    reached = {site: torch.zeros_like(each) for site, each in pull.items()}
    for number in range(1, STEPS[-1] + 1):
        along = _along(rows, reached) / damage.n_tokens
        for site, each in reached.items():
            moved = each + step * (pull[site] - each - rows[site].T @ along)
            reached[site] = moved.sign() * (moved.abs() - threshold).clamp(min=0)
        if number in STEPS:
            yield {site: each / root[site] for site, each in reached.items()}


def _along(rows: PerAnswer, values: PerNeuron) -> Float[Tensor, " answer"]:
    """Every answer's row times the values, summed over sites."""
    return torch.stack([rows[site] @ values[site] for site in rows]).sum(0)


def _largest_eigenvalue(rows: PerAnswer, n_tokens: int) -> float:
    """Of `G`: that of its Gram matrix, one row and column an answer."""
    gram = torch.stack([each @ each.T for each in rows.values()]).sum(0)
    return float(torch.linalg.eigvalsh(gram.double())[-1]) / n_tokens


def _counted(scores: Scores, signs: Signs | None) -> dict[str, int]:
    """Every topic that counts, with its sign."""
    return dict(signs) if signs is not None else dict.fromkeys(scores.clusters, 1)


def refuse_few_topics(behaviour: str, n_topics: int, config: GatingConfig) -> None:
    """Raise `InputError` where a behaviour has fewer than two topics a fold."""
    if n_topics < 2 * config.folds:
        raise InputError(f"{config.folds} folds need {2 * config.folds} topics or more; '{behaviour}' has {n_topics}")


def _folds(behaviour: str, topics: Sequence[str], config: GatingConfig) -> list[list[str]]:
    """The topics in so many random parts."""
    refuse_few_topics(behaviour, len(topics), config)
    order = np.random.default_rng(0).permutation(len(topics))
    return [[topics[int(i)] for i in part] for part in np.array_split(order, config.folds)]


def _benefit(
    scores: Sequence[Scores],
    counted: Sequence[Signs],
    left_out: Sequence[set[str]],
    register: Gains | None,
    config: GatingConfig,
    *,
    inside: bool,
) -> dict[Site, Tensor]:
    """The benefit on a fold (`inside`), or on all topics but it."""
    gains = []
    for each, topics, part in zip(scores, counted, left_out, strict=True):
        wanted = {name: sign for name, sign in topics.items() if (name in part) == inside}
        gains.append(gains_of(each, signs=wanted))
    return benefit_of(gains[0], gains[1], register, config)


def _value(changes: PerNeuron, held_out: PerNeuron, damage: Damage) -> float:
    """The held-out benefit of changes, for a damage of 1; 0 where nothing changes."""
    gates = Gates({site: 1 + change for site, change in changes.items()})
    cost = damage.kl(gates) + damage.kl_alone(gates)
    rise = sum(float(held_out[site].double() @ change.double()) for site, change in changes.items())
    return rise / cost**0.5 if cost > 0 else 0.0
