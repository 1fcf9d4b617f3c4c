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
    model: HookedModel,
    scores: Sequence[Scores],
    *,
    general: Scores | None = None,
) -> dict[Site, Int16[Tensor, "..."]]:
    """The stratum of every scored unit, in the shape of its site: what a random control is matched on.

    For neurons it is the decile of activation norm over all behaviours, each weighing the same. For weights it is the
    decile of `|W|` within its matrix and that of the norm of what it reads, as ten times one plus the other. In routed
    experts the fifth of how often the expert is routed is added, a thousand each.

    Args:
        model: the model that was scored, whose weights are ranked by size.
        scores: scores of all behaviours.
        general: match on the decile of this score too, a hundred each. Where a file kept the highest scores of a matrix
            only, these stand for the deciles: kept or not.

    Raises:
        InputError: scores without activation norms.
    """
    if any(not behaviour.activation_norm for behaviour in scores):
        raise InputError("strata need activation norms, which scores that saw no example (magnitude, random) lack")
    codes = {}
    for site, norm in pooled_norm(scores).items():
        of_norm = deciles(norm)
        if site.unit == "neuron":
            codes[site] = of_norm
        else:
            of_size = _size_deciles(model, site)
            codes[site] = N_DECILES * of_size + of_norm[:, None]
        if site.is_of_experts:
            of_routing = _routing_fifths(scores, site, codes[site])
            codes[site] = codes[site] + N_DECILES**3 * of_routing
    if general is None:
        return codes
    return by_general_score(codes, general)


def by_general_score(strata: Strata, general: Scores) -> dict[Site, Int16[Tensor, "..."]]:
    """Strata divided further, by the decile of the general score: what `strata(..., general=general)` gives."""
    finer = {}
    for site, codes in strata.items():
        of_score = _score_deciles(general, site)
        finer[site] = N_DECILES**2 * of_score + codes
    return finer


def pooled_norm(scores: Sequence[Scores]) -> dict[Site, Float[Tensor, " _"]]:
    """Root mean square activation (of a matrix: input) over all behaviours, each weighing the same."""
    pooled = {}
    for site in scores[0].activation_norm:
        norms = torch.stack([behaviour.activation_norm[site] for behaviour in scores])
        pooled[site] = norms.square().mean(0).sqrt()
    return pooled


def deciles(values: Float[Tensor, " unit"], n_classes: int = N_DECILES) -> Int16[Tensor, " unit"]:
    """The decile (or other class) of every unit, by rank, so that ties and outliers cannot empty one.

    Units are ranked on the device of the values. The classes are on the CPU.
    """
    n_units = len(values)
    order = torch.sort(values, stable=True).indices
    of_rank = torch.arange(n_units, device=values.device) * n_classes // n_units
    classes = torch.empty_like(order, dtype=torch.int16)
    classes[order] = of_rank.to(torch.int16)
    return classes.cpu()


def _size_deciles(model: HookedModel, site: Site) -> Int16[Tensor, "d_in d_out"]:
    """The decile of the size of each weight of a matrix."""
    size = weight(model, site).detach().float().abs()
    return deciles(size.flatten()).reshape(size.shape)


def _routing_fifths(
    scores: Sequence[Scores],
    site: Site,
    codes: Int16[Tensor, "..."],
) -> Int16[Tensor, "..."]:
    """The class of each unit's expert by the share of tokens that it got, each behaviour weighing the same.

    `codes` has the shape of the site. The classes broadcast to it.
    """
    shares = []
    for behaviour in scores:
        n_tokens = behaviour.slots[site]
        shares.append(n_tokens / n_tokens.sum().clamp(min=1))
    of_experts = deciles(torch.stack(shares).mean(0), N_FIFTHS)
    # Experts lie side by side: in the columns of `gate` and `in`, in the rows of `out`, among a layer's neurons.
    in_columns = site.unit == "weight" and site.part != "experts.out"
    n_places = codes.shape[1] if in_columns else codes.shape[0]
    of_places = of_experts.repeat_interleave(n_places // site.n_experts)
    if in_columns:
        return of_places[None]
    return of_places if codes.dim() == 1 else of_places[:, None]


def _score_deciles(scores: Scores, site: Site) -> Int16[Tensor, "..."]:
    value = scores.values[site]
    if not isinstance(value, Top):
        size = value.abs().flatten()
        return deciles(size).reshape(value.shape)
    kept = torch.zeros(value.numel(), dtype=torch.int16)
    kept[value.indices] = N_DECILES - 1
    return kept.reshape(value.shape)
