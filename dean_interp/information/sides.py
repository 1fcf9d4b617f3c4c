"""What an estimand sees of one place in the model: two matrices over the same rows, by rules frozen beforehand.

Scale, read noise, PCA basis, probe directions, bandwidths and the pairing are those of the unablated model, so before
and after differ by the activations and by nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.information.activations import Activations
from dean_interp.information.kernels import smoother, spread
from dean_interp.information.nulls import Core, frozen
from dean_interp.information.probes import N_FOLDS, folds_of, usable_information
from dean_interp.information.projections import Place, Probe, Projection, Rows, twice
from dean_interp.selection.selection import Selection

N_RANDOM_PROBES = 99
Sides = tuple[Float[Tensor, "row dim_x"], Float[Tensor, "row dim_y"]]


RowCore = Callable[[Tensor, Tensor, Tensor, Rows], Tensor]


@dataclass(frozen=True)
class View:
    """One place as an estimand sees it. Calls take the reads of any state of the model."""

    variant: str
    """Which of an estimand's several numbers it is; empty where there is one."""
    sides: Callable[[Activations], Sides]
    core: RowCore
    """Values for pairings of some rows: `core(x[rows], y[rows], pairings, rows)`."""
    groups: tuple[str, ...]
    """One a row: nulls shuffle within it."""
    clusters: tuple[str, ...]
    """One a row: what a subsample draws as one."""
    n_units: tuple[int, int]
    """Neurons read on each side."""
    variance_kept: float = 1.0
    """The smaller share of a side's variance that its coordinates keep."""
    block: int = 1
    """Rows that a shuffle moves together: the answers to one prompt."""
    flags: tuple[str, ...] = ()
    beside: Callable[[Tensor, Tensor], Mapping[str, float]] = field(default=lambda x, y: {})
    """Further numbers that belong beside the value before the ablation."""


def read_views(
    before: Activations, place: Place, reads: Sequence[Selection], *, estimator: str, k: int, seed: int
) -> list[View]:
    """Two reads of neurons at prompt ends, each with independent noise, on `k` principal components."""
    projections = [Projection(before, place, one, k, (seed, i)) for i, one in enumerate(reads)]
    first, second = projections

    def both(state: Activations) -> Sides:
        return first(state), second(state)

    core = frozen(estimator, *both(before))
    return [
        View(
            "",
            both,
            _whichever_rows(core),
            before.groups,
            before.clusters,
            (first.n_units, second.n_units),
            min(first.kept, second.kept),
            flags=("a side without neurons or variance",) * (first.is_dead or second.is_dead),
        )
    ]


def awareness_views(
    before: Activations,
    place: Place,
    reads: Sequence[Selection],
    calibration: Activations | None,
    *,
    behaviours: Sequence[str],
    estimator: str,
    seed: int,
) -> list[View]:
    """The scores of two probes, each fitted to tell safe from unsafe answers to one behaviour's prompts.

    Fitted on `calibration`; where there is none, on the half of the topics that a row does not belong to.
    """
    probes = [Probe(before, place, read, calibration, name, seed) for read, name in zip(reads, behaviours, strict=True)]

    def both(state: Activations) -> Sides:
        return probes[0](state), probes[1](state)

    core = frozen(estimator, *both(before))
    groups, clusters = twice(before.groups), twice(before.clusters)
    number = torch.tensor([list(dict.fromkeys(groups)).index(name) for name in groups])

    def given_topic(x: Tensor, y: Tensor, pairings: Tensor, rows: Rows) -> Tensor:
        return _conditional(core, x, y, pairings, number[rows])

    n_units = (probes[0].n_units, probes[1].n_units)
    dead = ("a side without neurons",) * (not all(n_units))

    def random_probes(x: Tensor, y: Tensor) -> dict[str, float]:
        directions = np.random.default_rng([seed, 2])
        rows = torch.arange(len(x))
        values = []
        for _ in range(0 if dead else N_RANDOM_PROBES):
            one, two = (side.in_direction(before, directions.standard_normal(side.n_units)) for side in probes)
            values.append(float(given_topic(one, two, rows[None], rows)))
        value = float(given_topic(x, y, rows[None], rows))
        above = (1 + sum(one >= value for one in values)) / (len(values) + 1)
        return {"mean of random probes": float(np.mean(values or [0.0])), "p among random probes": above}

    pooled = View("pooled", both, _whichever_rows(core), groups, clusters, n_units,
                  block=2, flags=dead)  # fmt: skip
    return [pooled, View("given topic", both, given_topic, groups, clusters, n_units, block=2, flags=dead,
                         beside=random_probes)]  # fmt: skip


def label_views(
    before: Activations, place: Place, reads: Sequence[Selection], *, behaviours: Sequence[str], k: int, seed: int
) -> list[View]:
    """What each side's neurons tell of each behaviour's label (safe or unsafe answer); crossed where the two differ."""
    made = []
    for i, read in enumerate(reads):
        for name in behaviours:
            rows = torch.tensor([j for j, group in enumerate(twice(before.groups)) if group == name])
            made.append(_label_view(before, place, read, rows, f"{behaviours[i]} neurons, {name} label", k, (seed, i)))
    return made


def _label_view(
    before: Activations, place: Place, read: Selection, rows: Rows, variant: str, k: int, seed: tuple[int, int]
) -> View:
    projection = Projection(before, place, read, k, seed, at_answers=rows)
    label = (rows % 2 == 0).double()[:, None]  # safe stands first
    clusters = tuple(twice(before.clusters)[i] for i in rows.tolist())
    names = np.array(clusters)
    n_folds = min(N_FOLDS, (len(set(clusters)) + 1) // 2)

    def core(x: Tensor, y: Tensor, pairings: Tensor, some: Rows) -> Tensor:
        label = y[:, 0].long().numpy()
        folds = folds_of(label, names[some].tolist(), n_folds=n_folds, seed=seed[0])
        told = [usable_information(x.numpy(), label[order], folds) for order in pairings.numpy()]
        return torch.tensor(told, dtype=torch.float64)

    return View(variant, lambda state: (projection(state), label), core, ("rows",) * len(rows), clusters,
                (projection.n_units, 0), projection.kept, block=2,
                flags=("a side without neurons or variance",) * projection.is_dead)  # fmt: skip


def paper_views(before: Activations, place: Place, *, behaviours: Sequence[str], seed: int) -> list[View]:
    """The residual streams of both behaviours' prompts, paired by the seed, as the paper's group does elsewhere."""
    (layer,) = place.layers
    drawn = np.random.default_rng(seed)
    of = [np.array([i for i, group in enumerate(before.groups) if group == name]) for name in behaviours]
    n = min(map(len, of))
    picked = [torch.from_numpy(drawn.permutation(one)[:n]) for one in of]

    def both(state: Activations) -> Sides:
        return state.residual[layer][picked[0]].double(), state.residual[layer][picked[1]].double()

    first, second = both(before)
    core = frozen("nhsic", first, second)
    scales = spread(first), spread(second)

    def norms(x: Tensor, y: Tensor) -> dict[str, float]:
        one, two = (smoother(side, scale=scale) for side, scale in zip((x, y), scales, strict=True))
        return {"of equal sides": float((one.square().sum() * two.square().sum()).sqrt())}

    rows = tuple(f"pair {i}" for i in range(n))
    return [View("", both, _whichever_rows(core), ("pairs",) * n, rows,
                 (first.shape[1], second.shape[1]), beside=norms)]  # fmt: skip


def _whichever_rows(core: Core) -> RowCore:
    """A core that needs no more than the two sides."""
    return lambda x, y, pairings, rows: core(x, y, pairings)


def _conditional(core: Core, x: Tensor, y: Tensor, pairings: Tensor, topic: Tensor) -> Tensor:
    """The mean over topics, each by its share of the rows; pairings stay within topics."""
    total = torch.zeros(len(pairings), dtype=torch.float64)
    for one in topic.unique():
        rows = torch.nonzero(topic == one)[:, 0]
        place = torch.zeros(len(topic), dtype=torch.long)
        place[rows] = torch.arange(len(rows))
        total += len(rows) / len(topic) * core(x[rows], y[rows], place[pairings[:, rows]])
    return total
