"""Other notions of importance, one function each, all giving `Scores`; `importance` is DEAN's own.

weight_gradient, activation_gradient    `importance` for one kind of unit (DEAN; SNIP)
integrated_gradients                    neurons: exact sums over the path to zero, many passes
wanda                                   weights: size times input norm, no gradient
activation_contrast                     neurons: safe against unsafe answers, no gradient
magnitude, random                       what every method has to beat
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel, refuse_not_finite
from dean_interp.models.loss import batched
from dean_interp.models.matrices import home, shape, weight
from dean_interp.models.scored_prompts import scored_prompts
from dean_interp.models.sites import Site, Unit, neuron_sites
from dean_interp.models.tokens import Batch
from dean_interp.resume import Unfinished
from dean_interp.scoring.capture import stream_activations, stream_gradients
from dean_interp.scoring.importance import (
    Prepared,
    ScoringConfig,
    as_scores,
    batch_tokens_of,
    facts_of,
    importance,
    prepare,
    run_pass,
    scored_sites,
    scores_fingerprint,
    units_of,
)
from dean_interp.scoring.scores import Scores
from dean_interp.scoring.sums import Sums

_DEFAULT = ScoringConfig()


def weight_gradient(
    model: HookedModel, behaviour: Behaviour, *, config: ScoringConfig = _DEFAULT, unfinished: Path | None = None
) -> Scores:
    """`|W| * E |dL/dW|` of every weight, nats (DEAN, arXiv 2410.16672, equation 4; SNIP, Lee et al. 2019)."""
    return importance(model, behaviour, unit="weight", config=config, unfinished=unfinished)


def activation_gradient(
    model: HookedModel, behaviour: Behaviour, *, config: ScoringConfig = _DEFAULT, unfinished: Path | None = None
) -> Scores:
    """`E |sum over positions of a * dL/da|` of every neuron, nats: the first-order change of the loss when it is
    silenced (Molchanov et al. 2017; attribution patching to zero, Nanda 2023).
    """
    return importance(model, behaviour, unit="neuron", config=config, unfinished=unfinished)


def integrated_gradients(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    n_steps: int = 5,
    config: ScoringConfig = _DEFAULT,
    unfinished: Path | None = None,
) -> Scores:
    """`E |sum over positions of a * mean over s in (0, 1) of dL/da at s * a|` of every neuron, nats.

    Integrated gradients (Sundararajan et al. 2017) from a silenced layer to the layer as it is, one layer at a time
    (Dai et al. 2022, "Knowledge neurons"). Signed, a layer's scores add up to the change of the loss when the whole
    layer is silenced, up to the error of the integral (Gauss-Legendre with `n_steps` points). It takes a pass for each
    layer and step: `n_layers * n_steps` times the cost of `activation_gradient`.
    """
    if n_steps < 1:
        raise InputError(f"n_steps must be at least 1, got {n_steps}")
    refuse_not_finite(model)
    data = prepare(model, behaviour, config)
    points, weights = np.polynomial.legendre.leggauss(n_steps)
    path = [(float(point + 1) / 2, float(share) / 2) for point, share in zip(points, weights, strict=True)]
    method = f"integrated_gradients ({n_steps} steps)"
    key = scores_fingerprint(model, behaviour, unit="neuron", config=config, method=method)

    def step(model: HookedModel, batch: Batch, sites: Sequence[Site], sums: Sums) -> None:
        along = {site: [] for site in sites}
        for scale, share in path:

            def add(site: Site, x: Tensor, gradient: Tensor, share: float = share) -> None:
                along[site].append((x.float(), share * torch.einsum("bpn,bpn->bn", x.float(), gradient.float())))

            stream_gradients(model, batch, sites, add, signs=sums.signs(), scale=scale)
        sums.add_losses(stream_activations(model, batch, [], lambda site, x: None))
        for site, found in along.items():
            sums.fold_neurons(site, found[0][0], torch.stack([effect for _, effect in found]).sum(0))

    def passes() -> Iterator[Sums]:
        for site in neuron_sites(model):
            saved = Unfinished(unfinished, f"{key} {config}").part(str(site)) if unfinished else None
            sums = Sums(model, [site], n_examples=len(behaviour), rows_each=data.rows_each, signed=config.signed)
            run_pass(model, data, sums, config, label=f"integrating {site}", unfinished=saved, step=step)
            yield sums

    scores = as_scores(model, behaviour, passes(), key, facts_of(model, behaviour, method, config, data))
    scored_prompts(model).update(behaviour.prompt_hashes)
    return scores


def wanda(
    model: HookedModel, behaviour: Behaviour, *, config: ScoringConfig = _DEFAULT, unfinished: Path | None = None
) -> Scores:
    """`|W[i, j]| * rms(x[i])` of every weight, with `x` what its matrix reads over all positions (Wanda, Sun et al.
    2024, up to the constant that turns a norm into a root mean square). In units of what the matrix writes.
    """
    sites = scored_sites(model, ["weight"], config)
    data, key = (
        prepare(model, behaviour, config),
        scores_fingerprint(model, behaviour, unit="weight", config=config, method="wanda"),
    )
    sums = {f"square/{site}": torch.zeros(shape(model, site)[0], device=home(model, site)) for site in sites}

    def add(batch: Batch, site: Site, x: Tensor) -> None:
        total = sums[f"square/{site}"]
        total += x[batch.real.to(x.device)].float().square().sum(0).to(total.device)

    n_positions, loss = _forward_passes(model, behaviour, data, config, sites, sums, add, key, unfinished)
    norms = {site: (sums[f"square/{site}"] / n_positions).sqrt().cpu() for site in sites}
    facts = facts_of(model, behaviour, "wanda", config, data)
    values = _wanda(model, norms)
    return Scores(behaviour.name, values, {}, norms, {}, loss, behaviour.prompt_hashes, key, facts)


def wanda_from(model: HookedModel, scores: Scores) -> Scores:
    """The same from the gradient scores of weights, which saw what every matrix reads: no further pass.

    Raises `InputError` where the scores are not those of weights on some examples.
    """
    norms = {site: norm for site, norm in scores.activation_norm.items() if site.unit == "weight"}
    if norms.keys() != scores.values.keys():
        raise InputError(f"Wanda needs what matrices read, which these scores of {scores.behaviour} do not hold")
    facts, key = {**scores.facts, "method": "wanda"}, f"{scores.fingerprint} wanda"
    return dataclasses.replace(scores, values=_wanda(model, norms), groups={}, fingerprint=key, facts=facts)


def _wanda(model: HookedModel, norms: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    return {site: weight(model, site).detach().float().abs().cpu() * norm[:, None] for site, norm in norms.items()}


def activation_contrast(
    model: HookedModel, behaviour: Behaviour, *, config: ScoringConfig = _DEFAULT, unfinished: Path | None = None
) -> Scores:
    """How differently each neuron fires where a safe and where an unsafe answer is predicted: the difference of the
    means over all such positions, safe minus unsafe, in pooled standard deviations (Cohen's d; the difference alone is
    the contrast of Panickssery et al. 2024). Absolute unless `config.signed`. Behaviours with both answers only.
    """
    if not behaviour.paired:
        raise InputError(f"activation_contrast needs a safe and an unsafe answer to every prompt of '{behaviour.name}'")
    config = dataclasses.replace(config, target="margin")
    sites, method = neuron_sites(model), "activation_contrast"
    data, key = (
        prepare(model, behaviour, config),
        scores_fingerprint(model, behaviour, unit="neuron", config=config, method=method),
    )
    width, device = model.cfg.d_mlp, model.cfg.device
    sums = {f"{kind}/{site}": torch.zeros(2, width, device=device) for site in sites for kind in ("sum", "square")}
    sums |= {f"all {kind}/{site}": torch.zeros(width, device=device) for site in sites for kind in ("sum", "square")}
    sums["counts"] = torch.zeros(2)

    def add(batch: Batch, site: Site, x: Tensor) -> None:
        x = x.to(batch.tokens.device)
        kind, at = batch.answer % 2, x[batch.read_row, batch.read_pos].float()
        everywhere = x[batch.real].float()
        sums[f"sum/{site}"].index_add_(0, kind, at)
        sums[f"square/{site}"].index_add_(0, kind, at.square())
        sums[f"all sum/{site}"] += everywhere.sum(0)
        sums[f"all square/{site}"] += everywhere.square().sum(0)
        if site == sites[0]:
            sums["counts"] += torch.bincount(kind.cpu(), minlength=2)

    n_positions, loss = _forward_passes(model, behaviour, data, config, sites, sums, add, key, unfinished)
    counts = sums["counts"][:, None].to(device)
    values, means, norms = {}, {}, {}
    for site in sites:
        mean = sums[f"sum/{site}"] / counts
        variance = (sums[f"square/{site}"] / counts - mean.square()).clamp(min=0).mean(0)
        contrast = (mean[0] - mean[1]) / variance.sqrt().clamp(min=1e-12)
        values[site] = (contrast if config.signed else contrast.abs()).cpu()
        means[site] = (sums[f"all sum/{site}"] / n_positions).cpu()
        norms[site] = (sums[f"all square/{site}"] / n_positions).sqrt().cpu()
    facts = facts_of(model, behaviour, method, config, data)
    return Scores(behaviour.name, values, means, norms, {}, loss, behaviour.prompt_hashes, key, facts)


def magnitude(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    unit: Unit | Sequence[Unit] = "neuron",
    config: ScoringConfig = _DEFAULT,
) -> Scores:
    """`|W|` of every weight; of a neuron the norm of the row that it writes (Han et al. 2015). No example is looked at:
    `behaviour` gives its name alone.
    """

    def size(site: Site) -> Tensor:
        if site.unit == "neuron":
            return weight(model, Site(site.layer, "out")).detach().float().norm(dim=1).cpu()
        return weight(model, site).detach().float().abs().cpu()

    return _without_data(model, behaviour, unit, config, "magnitude", size)


def random(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    unit: Unit | Sequence[Unit] = "neuron",
    seed: int = 0,
    config: ScoringConfig = _DEFAULT,
) -> Scores:
    """Uniform in [0, 1), by seed: what a method that knows nothing would choose. `behaviour` gives its name alone."""
    generator = torch.Generator().manual_seed(seed)

    def draw(site: Site) -> Tensor:
        size = shape(model, site if site.unit == "weight" else Site(site.layer, "out"))
        return torch.rand(size if site.unit == "weight" else size[:1], generator=generator)

    return _without_data(model, behaviour, unit, config, f"random (seed {seed})", draw)


def _without_data(
    model: HookedModel,
    behaviour: Behaviour,
    unit: Unit | Sequence[Unit],
    config: ScoringConfig,
    method: str,
    value: Callable[[Site], Tensor],
) -> Scores:
    key = scores_fingerprint(model, behaviour, unit=unit, config=config, method=method)
    values = {site: value(site) for site in sorted(scored_sites(model, units_of(unit), config))}
    facts = facts_of(model, behaviour, method, config)
    return Scores(behaviour.name, values, {}, {}, {}, torch.zeros(0), frozenset(), key, facts)


def _forward_passes(
    model: HookedModel,
    behaviour: Behaviour,
    data: Prepared,
    config: ScoringConfig,
    sites: Sequence[Site],
    sums: dict[str, Tensor],
    add: Callable[[Batch, Site, Tensor], None],
    key: str,
    unfinished: Path | None,
) -> tuple[int, Tensor]:
    """Every batch forward once; `add` folds what a site sees into `sums`. Gives the positions seen, and the losses."""
    refuse_not_finite(model)
    sums |= {"n_positions": torch.zeros((), dtype=torch.int64), "loss": torch.zeros(len(data.rows))}
    saved = Unfinished(unfinished, f"{key} {config}") if unfinished else None
    layout = {"batch_tokens": batch_tokens_of(model, config), "together": data.rows_each, "padding": config.padding}
    kept = {"label": f"reading {behaviour.name}", "leave": True, "unfinished": saved, "sums": sums}
    for batch in batched(model, data.rows, **layout, **kept):
        losses = stream_activations(model, batch, sites, lambda site, x, batch=batch: add(batch, site, x))
        sums["loss"][batch.answer.unique().cpu()] = losses.cpu()
        sums["n_positions"] += int(batch.real.sum())
    scored_prompts(model).update(behaviour.prompt_hashes)
    return int(sums["n_positions"]), sums["loss"]
