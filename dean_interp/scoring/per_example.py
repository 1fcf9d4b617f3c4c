"""Scores of chosen units on every single example, by a second pass that keeps only those products.

What a score averages away: whether a unit matters to all examples or to one. Weights' own sums are too many to keep
for every example, those of a selection are not.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import batched
from dean_interp.models.matrices import weight
from dean_interp.models.scored_prompts import scored_prompts
from dean_interp.models.sites import Site
from dean_interp.scoring.capture import stream_gradients
from dean_interp.scoring.importance import ScoringConfig, batch_tokens_of, prepare
from dean_interp.scoring.scores import Scores, Top
from dean_interp.scoring.sums import Sums, group_sizes


def example_scores(
    model: HookedModel,
    behaviour: Behaviour,
    units: Mapping[Site, Int[Tensor, " unit"]],
    *,
    config: ScoringConfig = ScoringConfig(),  # noqa: B008 - frozen
) -> dict[Site, Float[Tensor, "example unit"]]:
    """The signed effect of each chosen unit (`selection.units`) on each example's loss, nats.

    `sum over positions of a * dL/da` of a neuron, `W * dL/dW` of a weight: their absolute values average to the scores
    of `importance`.
    """
    found = {site: torch.zeros(len(behaviour), len(chosen)) for site, chosen in units.items()}

    def keep(site: Site, examples: Tensor, effect: Tensor) -> None:
        found[site][examples] = effect

    _stream_effects(model, behaviour, units, config, found, keep)
    return found


def with_groups(
    model: HookedModel,
    scores: Scores,
    behaviour: Behaviour,
    *,
    config: ScoringConfig = ScoringConfig(),  # noqa: B008 - frozen
) -> Scores:
    """The same scores with groups of examples for the weights that were kept, as neurons have them from the first pass.

    Raises `InputError` where these are not the scores of this behaviour, or were kept whole (too many to group).
    """
    if behaviour.prompt_hashes != scores.prompt_hashes:
        raise InputError(f"these are scores of other examples than the {len(behaviour)} of '{behaviour.name}' given")
    tops = {site: value.indices for site, value in scores.values.items() if isinstance(value, Top)}
    if not tops:
        raise InputError("groups of weights are taken for the highest of each matrix: scores.kept() first")
    sizes = group_sizes(len(behaviour))
    sums = {site: torch.zeros(len(sizes), len(indices)) for site, indices in tops.items()}

    def keep(site: Site, examples: Tensor, effect: Tensor) -> None:
        sums[site].index_add_(0, examples % len(sizes), effect if scores.facts["signed"] else effect.abs())

    _stream_effects(model, behaviour, tops, config, sums, keep)
    return replace(scores, groups={**scores.groups, **{site: total / sizes[:, None] for site, total in sums.items()}})


def _stream_effects(
    model: HookedModel,
    behaviour: Behaviour,
    units: Mapping[Site, Int[Tensor, " unit"]],
    config: ScoringConfig,
    sums: Mapping[Site, Tensor],
    keep: Callable[[Site, Tensor, Tensor], None],
) -> None:
    """Hands every batch's examples (numbers) and the effects of each site's chosen units on them to `keep`, which adds
    them to `sums`.
    """
    data = prepare(model, behaviour, config)
    sites = [site for site, chosen in units.items() if len(chosen)]
    batch_examples = Sums(model, [], n_examples=len(behaviour), rows_each=data.rows_each, signed=True)

    def add(site: Site, x: Tensor, gradient: Tensor) -> None:
        chosen = units[site].to(x.device)
        if site.unit == "neuron":
            effect = torch.einsum("bpn,bpn->bn", x[..., chosen].float(), gradient[..., chosen].float())
        else:
            matrix = weight(model, site).detach().float()
            rows, columns = chosen // matrix.shape[1], chosen % matrix.shape[1]
            products = torch.einsum("bpn,bpn->bn", x[..., rows].float(), gradient[..., columns].float())
            held = matrix[rows.to(matrix.device), columns.to(matrix.device)]
            effect = products * held.to(x.device)
        keep(site, batch_examples.examples.cpu(), effect.unflatten(0, (-1, data.rows_each)).sum(1).cpu())

    layout = {"batch_tokens": batch_tokens_of(model, config), "together": data.rows_each, "padding": config.padding,
              "sums": {str(site): total for site, total in sums.items()}}  # fmt: skip
    for batch in batched(model, data.rows, label=f"examples of {behaviour.name}", **layout):
        batch_examples.begin(batch)
        stream_gradients(model, batch, sites, add, signs=batch_examples.signs())
    scored_prompts(model).update(behaviour.prompt_hashes)
