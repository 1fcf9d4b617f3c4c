"""Whole experts as sets of neurons: an expert's score is the sum over its neurons."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.sites import Site
from dean_interp.scoring.scores import Scores
from dean_interp.scoring.top import highest
from dean_interp.selection.selection import Selection


def expert_scores(scores: Scores) -> dict[Site, Float[Tensor, " n_experts"]]:
    """The score of every routed expert of every layer that has some: the sum of its neurons' scores, with their signs.

    An expert that no token was sent to has 0, which says nothing (`Scores.slots`). Raises `InputError` where there are
    no routed experts.
    """
    totals = {}
    for site in scores.values:
        if site.is_of_experts and site.unit == "neuron":
            by_expert = scores[site].unflatten(0, (site.n_experts, -1))
            totals[site] = by_expert.sum(1)
    if not totals:
        raise InputError(f"the scores of {scores.behaviour} hold no neurons of routed experts")
    return totals


def top_experts(scores: Scores, fraction: float) -> Selection:
    """All neurons of the highest-scoring `fraction` of the routed experts of each layer, at least one, by size.

    Silencing them takes away all that these experts' neurons write; tokens are still sent to them. Where an expert has
    a bias behind `out` (gpt-oss), the bias is still written. An expert that no token was sent to is never chosen. Dense
    neurons and shared experts are left alone, at their sites with no unit.

    Raises:
        InputError: a fraction that is not in (0, 1], or no routed experts.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction must be in (0, 1], got {fraction}")
    totals = expert_scores(scores)
    units = {}
    for site, value in scores.values.items():
        neurons = torch.arange(value.numel())
        if site in totals:
            chosen = _top_experts_of_layer(scores, site, totals[site], fraction)
            by_expert = neurons.unflatten(0, (site.n_experts, -1))
            units[site] = by_expert[chosen].flatten()
        else:
            units[site] = neurons[:0]
    return Selection(units, scores.shapes, scores.prompt_hashes)


def _top_experts_of_layer(
    scores: Scores,
    site: Site,
    totals: Float[Tensor, " n_experts"],
    fraction: float,
) -> Int[Tensor, " chosen"]:
    """The experts of one layer that score highest by size, among those that a token was sent to."""
    size = totals.abs()
    count = max(1, int(fraction * site.n_experts))
    if site in scores.slots:
        is_seen = scores.slots[site] > 0
        count = min(count, int(is_seen.sum()))
        size = size.masked_fill(~is_seen, -1.0)
    return highest(size, count)
