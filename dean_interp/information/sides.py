"""The two sides that an estimand compares at one place of the model: matrices over the same rows.

Scale, noise, principal components, probe directions, bandwidths and the pairing of rows are those of the unablated
model. So before and after differ by the activations and by nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.information.activations import Activations
from dean_interp.information.kernels import smoother, spread
from dean_interp.information.nulls import Core, fewest_in_half, frozen_core
from dean_interp.information.places import Place
from dean_interp.information.probes import N_FOLDS, folds_of, usable_information
from dean_interp.information.projections import Probe, Projection, Rows, is_safe_row, twice
from dean_interp.information.shifts import DEAD, NO_NEURONS
from dean_interp.selection.selection import Selection
from dean_interp.statistics import rank_p_value

N_RANDOM_PROBES = 99
Matrices = tuple[Float[Tensor, "row dim_x"], Float[Tensor, "row dim_y"]]
RowCore = Callable[[Tensor, Tensor, Tensor, Rows], Tensor]
"""Values for pairings of some rows: `core(x[rows], y[rows], pairings, rows)`."""


@dataclass(frozen=True)
class Sides:
    """Both sides of one estimate at one place, and the estimator that compares them; all fixed before the ablation."""

    variant: str
    """Which of an estimand's several numbers this is; empty where there is one."""
    matrices: Callable[[Activations], Matrices]
    """Both sides in any state of the model."""
    core: RowCore
    groups: tuple[str, ...]
    """The group of each row; nulls shuffle within it."""
    clusters: tuple[str, ...]
    """The cluster of each row, which a subsample draws as one."""
    n_units: tuple[int, int]
    """Neurons on each side."""
    variance_kept: float = 1.0
    """The share of its variance that a side's coordinates keep; the smaller one of both sides."""
    block: int = 1
    """How many rows a shuffle moves together: 2 where rows are the answers to one prompt."""
    flags: tuple[str, ...] = ()
    """Why the sides inform of nothing; empty where they may."""
    beside: Callable[[Tensor, Tensor], Mapping[str, float]] = field(default=lambda x, y: {})
    """Further numbers that belong beside the value before the ablation."""


def neuron_sides(
    before: Activations,
    place: Place,
    neurons: tuple[Selection, Selection],
    *,
    estimator: str,
    k: int,
    seed: int,
) -> list[Sides]:
    """Two sets of neurons at prompt ends, each with independent noise, on `k` principal components."""
    first_neurons, second_neurons = neurons
    # each side's number makes its noise independent of the other's
    first = Projection(before, place, first_neurons, k=k, seed=(seed, 0))
    second = Projection(before, place, second_neurons, k=k, seed=(seed, 1))

    def matrices(state: Activations) -> Matrices:
        return first(state), second(state)

    x, y = matrices(before)
    core = frozen_core(estimator, x, y)
    is_dead = first.is_dead or second.is_dead
    sides = Sides(
        variant="",
        matrices=matrices,
        core=_of_any_rows(core),
        groups=before.groups,
        clusters=before.clusters,
        n_units=(first.n_units, second.n_units),
        variance_kept=min(first.kept, second.kept),
        flags=(DEAD,) if is_dead else (),
    )
    return [sides]


def probe_sides(
    before: Activations,
    place: Place,
    neurons: tuple[Selection, Selection],
    *,
    calibration: Activations | None,
    behaviours: Sequence[str],
    estimator: str,
    seed: int,
) -> list[Sides]:
    """The scores of two probes, each fitted to tell safe from unsafe answers to one behaviour's prompts.

    They are fitted on `calibration`; where there is none, on the half of the topics that a row does not belong to. Two
    numbers compare them: over all answers, and as the mean over the behaviours' own answers.
    """
    first, second = (
        Probe(before, place, selection, calibration=calibration, behaviour=behaviour, seed=seed)
        for selection, behaviour in zip(neurons, behaviours, strict=True)
    )

    def matrices(state: Activations) -> Matrices:
        return first(state), second(state)

    x, y = matrices(before)
    core = frozen_core(estimator, x, y)
    groups = twice(before.groups)
    number_of = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    topic = torch.tensor([number_of[group] for group in groups])

    def given_topic(x: Tensor, y: Tensor, pairings: Tensor, rows: Rows) -> Tensor:
        return _conditional(core, x, y, pairings, topic=topic[rows])

    def random_probes(x: Tensor, y: Tensor) -> dict[str, float]:
        return _among_random_probes(given_topic, (x, y), before, (first, second), seed=seed)

    has_neurons = first.n_units and second.n_units
    pooled = Sides(
        variant="pooled",
        matrices=matrices,
        core=_of_any_rows(core),
        groups=groups,
        clusters=twice(before.clusters),
        n_units=(first.n_units, second.n_units),
        block=2,
        flags=() if has_neurons else (NO_NEURONS,),
    )
    conditional = replace(pooled, variant="given topic", core=given_topic, beside=random_probes)
    return [pooled, conditional]


def _among_random_probes(
    core: RowCore,
    fitted: Matrices,
    before: Activations,
    probes: tuple[Probe, Probe],
    *,
    seed: int,
) -> dict[str, float]:
    """The mean of the number over pairs of probes in random directions, and the rank of the fitted pair among them."""
    first, second = probes
    generator = np.random.default_rng([seed, 2])
    rows = torch.arange(len(fitted[0]))

    def value(x: Tensor, y: Tensor) -> float:
        as_it_is = rows[None]
        return float(core(x, y, as_it_is, rows))

    has_neurons = first.n_units and second.n_units
    random_values = []
    for _ in range(N_RANDOM_PROBES if has_neurons else 0):
        x = first.in_direction(before, generator.standard_normal(first.n_units))
        y = second.in_direction(before, generator.standard_normal(second.n_units))
        random_values.append(value(x, y))
    return {
        "mean of random probes": float(np.mean(random_values or [0.0])),
        "p among random probes": rank_p_value(value(*fitted), random_values),
    }


def label_sides(
    before: Activations,
    place: Place,
    neurons: tuple[Selection, Selection],
    *,
    behaviours: Sequence[str],
    k: int,
    seed: int,
) -> list[Sides]:
    """What each side's neurons tell of each behaviour's label (safe or unsafe answer); crossed where the two differ."""
    groups = twice(before.groups)
    clusters = twice(before.clusters)
    sides_of_labels = []
    for side, (selection, whose) in enumerate(zip(neurons, behaviours, strict=True)):
        for behaviour in behaviours:
            rows = [row for row, group in enumerate(groups) if group == behaviour]
            at_answers = torch.tensor(rows)
            projection = Projection(before, place, selection, k=k, seed=(seed, side), at_answers=at_answers)
            sides = _label_sides(
                projection,
                at_answers,
                [clusters[row] for row in rows],
                variant=f"{whose} neurons, {behaviour} label",
                seed=seed,
            )
            sides_of_labels.append(sides)
    return sides_of_labels


def _label_sides(
    projection: Projection,
    rows: Rows,
    clusters: Sequence[str],
    *,
    variant: str,
    seed: int,
) -> Sides:
    """Neurons against the label of some answers; a shuffle moves both answers to a prompt together."""
    labels = is_safe_row(rows).double()[:, None]
    # a half, which a subsample holds, must do for all folds: where it may be one topic, folds part its prompts
    group_of = np.array(clusters)
    if fewest_in_half(clusters) < 2:
        group_of = rows.numpy() // 2
    n_folds = min(N_FOLDS, fewest_in_half(group_of.tolist()))

    def matrices(state: Activations) -> Matrices:
        return projection(state), labels

    def core(x: Tensor, y: Tensor, pairings: Tensor, subset: Rows) -> Tensor:
        label = y[:, 0].long().numpy()
        folds = folds_of(label, group_of[subset].tolist(), n_folds=n_folds, seed=seed)
        values = []
        for order in pairings.numpy():
            values.append(usable_information(x.numpy(), label[order], folds))
        return torch.tensor(values, dtype=torch.float64)

    return Sides(
        variant=variant,
        matrices=matrices,
        core=core,
        groups=("rows",) * len(rows),
        clusters=tuple(clusters),
        n_units=(projection.n_units, 0),
        variance_kept=projection.kept,
        block=2,
        flags=(DEAD,) if projection.is_dead else (),
    )


def residual_sides(before: Activations, place: Place, *, behaviours: Sequence[str], seed: int) -> list[Sides]:
    """The residual streams of both behaviours' prompts, paired by the seed, as the paper's group does elsewhere."""
    (layer,) = place.layers
    generator = np.random.default_rng(seed)
    rows_of = []
    for behaviour in behaviours:
        rows_of.append([row for row, group in enumerate(before.groups) if group == behaviour])
    n_pairs = min(map(len, rows_of))
    first_rows, second_rows = (torch.from_numpy(generator.permutation(rows)[:n_pairs]) for rows in rows_of)

    def matrices(state: Activations) -> Matrices:
        residual = state.residual[layer]
        return residual[first_rows].double(), residual[second_rows].double()

    x, y = matrices(before)
    scale_x = spread(x)
    scale_y = spread(y)

    def norms(x: Tensor, y: Tensor) -> dict[str, float]:
        first = smoother(x, scale=scale_x)
        second = smoother(y, scale=scale_y)
        squares = first.square().sum() * second.square().sum()
        return {"of equal sides": float(squares.sqrt())}

    sides = Sides(
        variant="",
        matrices=matrices,
        core=_of_any_rows(frozen_core("nhsic", x, y)),
        groups=("pairs",) * n_pairs,
        clusters=tuple(f"pair {i}" for i in range(n_pairs)),
        n_units=(x.shape[1], y.shape[1]),
        beside=norms,
    )
    return [sides]


def _of_any_rows(core: Core) -> RowCore:
    """A core that needs the two sides alone, whichever rows they are."""
    return lambda x, y, pairings, rows: core(x, y, pairings)


def _conditional(
    core: Core,
    x: Tensor,
    y: Tensor,
    pairings: Int[Tensor, "pairing row"],
    *,
    topic: Int[Tensor, " row"],
) -> Float[Tensor, " pairing"]:
    """The mean over topics, each by its share of the rows; pairings stay within topics."""
    n_rows = len(topic)
    total = torch.zeros(len(pairings), dtype=torch.float64)
    for number in topic.unique():
        rows = torch.nonzero(topic == number)[:, 0]
        # pairings name rows of the whole: here they name rows of this topic
        row_of_topic = torch.zeros(n_rows, dtype=torch.long)
        row_of_topic[rows] = torch.arange(len(rows))
        topic_pairings = row_of_topic[pairings[:, rows]]
        share = len(rows) / n_rows
        total += share * core(x[rows], y[rows], topic_pairings)
    return total
