"""Gates by proximal gradient steps that folds of topics stop early.

The closed form (`selection.gating`) goes all the way to the best gates for the gains that were scored, their noise
included. Here the same quadratic is climbed in steps from no change at all, in units of each neuron's own cost
`u = sqrt(D) delta`, with the threshold of a lasso (ISTA; Beck and Teboulle 2009, section 1.2):

    u  <-  soft(u + s (b - u - G u), s threshold),    b = D^-1/2 benefit,    G = D^-1/2 F D^-1/2,    s = 1 / (1 + |G|)

The first step counts each neuron's cost alone, the last ones count costs together. Topics are divided into folds: the
number of steps is the one whose gates raise the margins of a left-out fold most for their damage, on average.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.sites import Site
from dean_interp.scoring.scores import Scores
from dean_interp.selection.gains import Damage, Gains, gains_of
from dean_interp.selection.gates import Gates, gates_from_changes
from dean_interp.selection.gating import GatingConfig, PerNeuron, benefit_of, closed_form_gates, gates_of_cost_one

Signs = Mapping[str, int]
"""The topics that count, each with 1 or -1."""
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
        NothingToChangeError: no neuron that is left to change.
    """
    config.check()
    first_gains = gains_of(first, signs=signs[0])
    second_gains = gains_of(second, signs=signs[1])
    if not config.folds:
        return closed_form_gates(first_gains, second_gains, damage, register=register, config=config)
    first_folds = _folds(first, signs[0], config)
    second_folds = _folds(second, signs[1], config)
    stage = _best_stage(first_folds, second_folds, damage, register, config)
    # All topics climb as far as the folds said.
    benefit = benefit_of(first_gains, second_gains, register, config)
    stages = climb(benefit, damage, config)
    changes = next(islice(stages, stage, None))
    return gates_of_cost_one(changes, damage, first_gains, second_gains)


def _best_stage(
    first_folds: Sequence["_Fold"],
    second_folds: Sequence["_Fold"],
    damage: Damage,
    register: Gains | None,
    config: GatingConfig,
) -> int:
    """The place in `STEPS` whose gates raise the margins of left-out folds most."""
    values = np.zeros(len(STEPS))
    for first, second in zip(first_folds, second_folds, strict=True):
        chosen = benefit_of(first.others, second.others, register, config)
        held_out = benefit_of(first.left_out, second.left_out, register, config)
        stages = climb(chosen, damage, config)
        values += [_value(changes, held_out, damage) for changes in stages]
    return int(values.argmax())


def climb(
    benefit: PerNeuron,
    damage: Damage,
    config: GatingConfig,
) -> Iterator[dict[Site, Tensor]]:
    """The changes after each number of steps in `STEPS`."""
    # In units of each neuron's own cost, F's rows become rows D^-1/2, so that G = rows' rows / (number of tokens).
    costs = damage.own_costs(config.ridge)
    root = {site: cost.sqrt() for site, cost in costs.items()}
    rows = {site: damage.rows[site] / root[site] for site in damage.rows}
    pull = {site: benefit[site] / root[site] for site in benefit}
    # The longest step that is sure to climb is 1 over the curvature, which I + G has at most.
    step = 1 / (1 + _largest_eigenvalue(rows, damage.n_tokens))
    strongest_pulls = [float(pull_at_site.abs().max()) for pull_at_site in pull.values()]
    threshold = step * config.sparsity * max(strongest_pulls)

    reached = {site: torch.zeros_like(pull_at_site) for site, pull_at_site in pull.items()}
    for number in range(1, STEPS[-1] + 1):
        along = _along(rows, reached) / damage.n_tokens
        for site, u in reached.items():
            # A step along the gradient, then the lasso's threshold.
            gradient = pull[site] - u - rows[site].T @ along
            moved = u + step * gradient
            reached[site] = _soft(moved, threshold)
        if number in STEPS:
            yield {site: u / root[site] for site, u in reached.items()}


def _soft(u: Float[Tensor, " d_mlp"], threshold: float) -> Float[Tensor, " d_mlp"]:
    """Numbers moved towards 0 by a threshold, never past it."""
    size = (u.abs() - threshold).clamp(min=0)
    return u.sign() * size


def _along(rows: PerAnswer, values: PerNeuron) -> Float[Tensor, " answer"]:
    """Every answer's row times the values, summed over sites."""
    products = [rows[site] @ values[site] for site in rows]
    return torch.stack(products).sum(0)


def _largest_eigenvalue(rows: PerAnswer, n_tokens: int) -> float:
    """The largest eigenvalue of `G`: that of its Gram matrix, which has one row and column an answer."""
    grams = [rows_at_site @ rows_at_site.T for rows_at_site in rows.values()]
    gram = torch.stack(grams).sum(0)
    eigenvalues = torch.linalg.eigvalsh(gram.double())
    return float(eigenvalues[-1]) / n_tokens


def refuse_few_topics(behaviour: str, n_topics: int, config: GatingConfig) -> None:
    """Raise `InputError` where a behaviour has fewer than two topics a fold."""
    fewest = 2 * config.folds
    if n_topics < fewest:
        raise InputError(f"{config.folds} folds need {fewest} topics or more; '{behaviour}' has {n_topics}")


@dataclass(frozen=True)
class _Fold:
    """A behaviour's gains on the topics of one fold, and on all other topics."""

    left_out: Gains
    others: Gains


def _folds(
    scores: Scores,
    signs: Signs | None,
    config: GatingConfig,
) -> list[_Fold]:
    """The topics that count, in so many random parts, each left out once."""
    if signs is None:
        signs = dict.fromkeys(scores.clusters, 1)
    topics = list(signs)
    refuse_few_topics(scores.behaviour, len(topics), config)
    order = np.random.default_rng(0).permutation(len(topics))
    folds = []
    for part in np.array_split(order, config.folds):
        names = {topics[number] for number in part}
        signs_left_out = {topic: sign for topic, sign in signs.items() if topic in names}
        signs_of_others = {topic: sign for topic, sign in signs.items() if topic not in names}
        left_out = gains_of(scores, signs=signs_left_out)
        others = gains_of(scores, signs=signs_of_others)
        folds.append(_Fold(left_out, others))
    return folds


def _value(
    changes: PerNeuron,
    held_out: PerNeuron,
    damage: Damage,
) -> float:
    """The held-out benefit of changes, for a damage of 1; 0 where nothing changes."""
    gates = gates_from_changes(changes)
    cost = damage.kl(gates) + damage.kl_alone(gates)
    if not cost > 0:
        return 0.0
    rise = 0.0
    for site, change in changes.items():
        rise += float(held_out[site].double() @ change.double())
    return rise / cost**0.5
