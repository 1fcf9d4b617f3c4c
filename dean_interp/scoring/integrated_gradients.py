"""Integrated gradients of every neuron: importance along the path from a silenced layer to the layer as it is."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError, refuse_below_one
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import neuron_sites
from dean_interp.models.neurons import effect_of_rows
from dean_interp.models.scored_prompts import note_scored
from dean_interp.models.sites import Site
from dean_interp.models.supported import refuse_not_finite
from dean_interp.models.tokens import Batch
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.resume import Unfinished
from dean_interp.scoring.capture import stream_activations, stream_gradients
from dean_interp.scoring.importance import PassStep, run_pass
from dean_interp.scoring.means import as_scores
from dean_interp.scoring.preparation import ScoringConfig, facts_of, prepare, scores_fingerprint
from dean_interp.scoring.scores import Scores
from dean_interp.scoring.sums import Sums


@own_torch_settings()
def integrated_gradients(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    n_steps: int = 5,
    config: ScoringConfig = ScoringConfig(),  # noqa: B008 - frozen
    unfinished: Path | None = None,
) -> Scores:
    """`E |sum over positions of a * mean over s in (0, 1) of dL/da at s * a|` of every neuron, nats.

    Integrated gradients (Sundararajan et al. 2017) from a silenced layer to the layer as it is, one layer at a time
    (Dai et al. 2022, "Knowledge neurons"). Signed, a layer's scores add up to the change of the loss when the whole
    layer is silenced, up to the error of the integral (Gauss-Legendre with `n_steps` points). It takes a pass for each
    layer and step: `n_layers * n_steps` times the cost of `importance` for neurons.
    """
    refuse_below_one(n_steps=n_steps)
    refuse_not_finite(model)
    if config.target == "fisher":
        raise InputError("target='fisher' is for `importance`: a path has no Fisher information")
    data = prepare(model, behaviour, config)
    method = f"integrated_gradients ({n_steps} steps)"
    fingerprint = scores_fingerprint(model, behaviour, unit="neuron", config=config, method=method)
    started = Unfinished(unfinished, f"{fingerprint} {config}") if unfinished else None
    step = _integrating_step(n_steps)

    def passes() -> Iterator[Sums]:
        for site in neuron_sites(model):
            label = f"integrating {site}"
            part = started.part(str(site)) if started else None
            yield run_pass(model, data, [site], config, label=label, unfinished=part, step=step)

    facts = facts_of(model, behaviour, config, method=method, data=data)
    scores = as_scores(model, behaviour, passes(), data=data, fingerprint=fingerprint, facts=facts)
    note_scored(model, behaviour.prompt_hashes)
    return scores


def _integrating_step(n_steps: int) -> PassStep:
    """What integrated gradients do with one batch: a pass for each point of the path, then one for the losses."""
    # Gauss-Legendre's points and weights are for (-1, 1); the path is (0, 1).
    points, weights = np.polynomial.legendre.leggauss(n_steps)
    path = []
    for point, weight in zip(points, weights, strict=True):
        scale = float(point + 1) / 2
        share = float(weight) / 2
        path.append((scale, share))

    def step(model: HookedModel, batch: Batch, sites: Sequence[Site], sums: Sums) -> None:
        activations: dict[Site, Tensor] = {}
        effects: dict[Site, list[Tensor]] = {site: [] for site in sites}
        for scale, share in path:

            def add(site: Site, x: Tensor, gradient: Tensor, share: float = share) -> None:
                sums.note_finite(site, gradient)
                activations.setdefault(site, x.float())
                effect = effect_of_rows(model, site, x, gradient)
                effects[site].append(share * effect)

            stream_gradients(model, batch, sites, add, signs=sums.signs(), scale=scale)
        # The losses of the model as it is: those on the path are of scaled activations.
        losses = stream_activations(model, batch, [], lambda site, x: None)
        for site in sites:
            effect = torch.stack(effects[site]).sum(0)
            sums.fold_neurons(site, activations[site], effect)
        # Last, since a batch that does not fit into memory comes again in halves.
        sums.add_losses(losses)

    return step
