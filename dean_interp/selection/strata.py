"""What a fair random unit has in common with the unit that it stands for: its stratum.

Large activations and large weights move a model more than small ones whatever they mean. So a fair random neuron has
the same site and the same decile of activation norm; a fair random weight the same matrix, the same decile of `|W|` and
the same decile of what its matrix reads. In routed experts both have the same fifth of routing frequency, too. Scores
play no part: a control matched on them would be the edit again.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int16
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import weight
from dean_interp.models.sites import Site
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.scoring.scores import Scores
from dean_interp.scoring.top import Top

N_DECILES = 10
N_FIFTHS = 5
"""Classes of how often an expert is routed: few, so that one holds several experts even where a layer has eight."""
Strata = Mapping[Site, Int16[Tensor, "..."]]


@own_torch_settings()
def strata(
    model: HookedModel, scores: Sequence[Scores], *, general: Scores | None = None
) -> dict[Site, Int16[Tensor, "..."]]:
    """The stratum of every scored unit, in the shape of its site: what a random control is matched on.

    For neurons it is the decile of activation norm over all behaviours, each weighing the same. For weights it is the
    decile of `|W|` within its matrix and that of the norm of what it reads, as ten times one plus the other. In routed
    experts the fifth of how often the expert is routed is added, a thousand each.

    Args:
        general: match on the decile of this score too, a hundred each. Where a file kept the highest scores of a matrix
            only, these stand for the deciles: kept or not.

    Raises:
        InputError: scores without activation norms.
    """
    if any(not behaviour.activation_norm for behaviour in scores):
        raise InputError("strata need activation norms, which scores that saw no example (magnitude, random) lack")
    codes = {}
    for site, norm in pooled_norm(scores).items():
        codes[site] = deciles(norm)
        if site.unit == "weight":
            sizes = weight(model, site).detach().float().abs()
            size = deciles(sizes.flatten()).reshape(scores[0].shapes[site])
            codes[site] = N_DECILES * size + codes[site][:, None]
        if site.is_of_experts:
            codes[site] = codes[site] + N_DECILES**3 * _routing_fifths(scores, site, codes[site])
    return codes if general is None else by_general_score(codes, general)


def by_general_score(strata: Strata, general: Scores) -> dict[Site, Int16[Tensor, "..."]]:
    """Strata divided further, by the decile of the general score: what `strata(..., general=general)` gives."""
    return {site: N_DECILES**2 * _score_deciles(general, site) + codes for site, codes in strata.items()}


def pooled_norm(scores: Sequence[Scores]) -> dict[Site, Float[Tensor, " _"]]:
    """Root mean square activation (of a matrix: input) over all behaviours, each weighing the same."""
    pooled = {}
    for site in scores[0].activation_norm:
        squares = torch.stack([behaviour.activation_norm[site].square() for behaviour in scores])
        pooled[site] = squares.mean(0).sqrt()
    return pooled


def deciles(values: Float[Tensor, " unit"], n_classes: int = N_DECILES) -> Int16[Tensor, " unit"]:
    """The decile (or other class) of every unit, by rank, so that ties and outliers cannot empty one. Ranked on the
    device of the values, told on the CPU.
    """
    order = torch.sort(values, stable=True).indices
    classes = torch.arange(len(values), device=values.device) * n_classes // len(values)
    return torch.empty_like(order, dtype=torch.int16).scatter_(0, order, classes.to(torch.int16)).cpu()


def _routing_fifths(scores: Sequence[Scores], site: Site, codes: Int16[Tensor, "..."]) -> Int16[Tensor, "..."]:
    """The class of each unit's expert by the share of tokens that it got, each behaviour weighing the same."""
    shares = [behaviour.slots[site] / behaviour.slots[site].sum().clamp(min=1) for behaviour in scores]
    of_experts = deciles(torch.stack(shares).mean(0), N_FIFTHS)
    if site.unit == "weight" and site.part != "experts.out":
        return of_experts.repeat_interleave(codes.shape[1] // site.n_experts)[None]
    of_units = of_experts.repeat_interleave(len(codes) // site.n_experts)
    return of_units if codes.dim() == 1 else of_units[:, None]


def _score_deciles(scores: Scores, site: Site) -> Int16[Tensor, "..."]:
    value = scores.values[site]
    if not isinstance(value, Top):
        return deciles(value.abs().flatten()).reshape(value.shape)
    kept = torch.zeros(value.numel(), dtype=torch.int16)
    kept[value.indices] = N_DECILES - 1
    return kept.reshape(value.shape)
