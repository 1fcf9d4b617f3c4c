"""Other notions of importance that need no gradient, one function each, all giving `Scores`.

wanda                   weights: size times the norm of what the matrix reads
activation_contrast     neurons: their activations at safe against unsafe answers
magnitude, random       what every method has to beat

`scoring.importance` is DEAN's own; `scoring.integrated_gradients` follows it over many passes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import batched
from dean_interp.models.matrices import home, neuron_sites, shape, weight
from dean_interp.models.scored_prompts import scored_prompts
from dean_interp.models.sites import Site, Unit
from dean_interp.models.sizes import site_shape
from dean_interp.models.supported import refuse_not_finite
from dean_interp.models.tokens import Batch
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.resume import Unfinished
from dean_interp.scoring.capture import stream_activations
from dean_interp.scoring.preparation import (
    Prepared,
    ScoringConfig,
    batch_tokens_of,
    facts_of,
    prepare,
    scored_sites,
    scores_fingerprint,
    units_of,
)
from dean_interp.scoring.scores import Scores
from dean_interp.scoring.sums import n_read, slots_where, summed_where

_DEFAULT = ScoringConfig()


@own_torch_settings()
def wanda(
    model: HookedModel, behaviour: Behaviour, *, config: ScoringConfig = _DEFAULT, unfinished: Path | None = None
) -> Scores:
    """`|W[i, j]| * rms(x[i])` of every weight, with `x` what its matrix reads over all positions.

    Wanda (Sun et al. 2024), up to the constant that turns a norm into a root mean square. In units of what the matrix
    writes.
    """
    sites = scored_sites(model, ["weight"], config)
    data = prepare(model, behaviour, config)
    fingerprint = scores_fingerprint(model, behaviour, unit="weight", config=config, method="wanda")
    sums = {f"square/{site}": torch.zeros(shape(model, site)[0], device=home(model, site)) for site in sites}
    for site in sites:
        if site.is_of_experts:
            sums[f"slots/{site}"] = torch.zeros(site.n_experts, device=home(model, site))

    def add(batch: Batch, site: Site, x: Tensor) -> None:
        total = sums[f"square/{site}"]
        total += summed_where(model, site, x.float().square(), batch.real).to(total.device)
        if site.is_of_experts:
            sums[f"slots/{site}"] += slots_where(model, site, batch.real).to(total.device)

    n_positions, loss = _forward_pass(
        model, behaviour, data, config, sites=sites, sums=sums, add=add, fingerprint=fingerprint, unfinished=unfinished
    )
    norms = {site: (sums[f"square/{site}"] / n_read(site, sums, n_positions)).sqrt().cpu() for site in sites}
    return Scores(
        behaviour=behaviour.name,
        values=_size_times_norm(model, norms),
        activation_mean={},
        activation_norm=norms,
        groups={},
        loss=loss,
        prompt_hashes=behaviour.prompt_hashes,
        fingerprint=fingerprint,
        facts=facts_of(model, behaviour, config, method="wanda", data=data),
    )


@own_torch_settings()
def wanda_from(model: HookedModel, scores: Scores) -> Scores:
    """Wanda from the gradient scores of weights, which hold what every matrix reads: no further pass is run.

    Raises `InputError` where the scores are not those of weights on some examples.
    """
    norms = {site: norm for site, norm in scores.activation_norm.items() if site.unit == "weight"}
    if norms.keys() != scores.values.keys():
        raise InputError(f"Wanda needs what matrices read, which these scores of {scores.behaviour} do not hold")
    return dataclasses.replace(
        scores,
        values=_size_times_norm(model, norms),
        groups={},
        signed={},
        squared={},
        fingerprint=f"{scores.fingerprint} wanda",
        facts={**scores.facts, "method": "wanda"},
    )


def _size_times_norm(model: HookedModel, norms: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    return {site: _sizes(model, site) * norm[:, None] for site, norm in norms.items()}


def _sizes(model: HookedModel, site: Site) -> Tensor:
    """`|W|` of a matrix, float32 on the CPU."""
    return weight(model, site).detach().float().abs().cpu()


@own_torch_settings()
def activation_contrast(
    model: HookedModel, behaviour: Behaviour, *, config: ScoringConfig = _DEFAULT, unfinished: Path | None = None
) -> Scores:
    """How differently each neuron fires where a safe and where an unsafe answer is predicted (Cohen's d).

    The difference of the means over all such positions, safe minus unsafe, in pooled standard deviations; the
    difference alone is the contrast of Panickssery et al. 2024. Absolute unless `config.signed`. Behaviours with both
    answers only.
    """
    if not behaviour.paired:
        raise InputError(f"activation_contrast needs a safe and an unsafe answer to every prompt of '{behaviour.name}'")
    config = dataclasses.replace(config, target="margin")
    sites, method = neuron_sites(model), "activation_contrast"
    data = prepare(model, behaviour, config)
    fingerprint = scores_fingerprint(model, behaviour, unit="neuron", config=config, method=method)
    # Each pass adds the activations where answers are predicted, and for means and norms those at all positions.
    sums = _contrast_sums(model, sites)

    def add(batch: Batch, site: Site, x: Tensor) -> None:
        x = x.to(batch.tokens.device).float()
        for row, where in enumerate((*_answer_positions(batch), batch.real)):
            sums[f"sum/{site}"][row] += summed_where(model, site, x, where)
            sums[f"square/{site}"][row] += summed_where(model, site, x.square(), where)
            slots = slots_where(model, site, where) if site.is_of_experts else where.sum()
            sums[f"slots/{site}"][row] += slots

    _, loss = _forward_pass(
        model, behaviour, data, config, sites=sites, sums=sums, add=add, fingerprint=fingerprint, unfinished=unfinished
    )
    values, means, norms = {}, {}, {}
    for site in sites:
        total, square = sums[f"sum/{site}"], sums[f"square/{site}"]
        # Of experts each neuron is counted where its expert is.
        counts = sums[f"slots/{site}"].repeat_interleave(total.shape[1] // site.n_experts, 1).clamp(min=1)
        contrast = _cohens_d(total[:2], square[:2], counts[:2])
        values[site] = (contrast if config.signed else contrast.abs()).cpu()
        means[site] = (total[2] / counts[2]).cpu()
        norms[site] = (square[2] / counts[2]).sqrt().cpu()
    return Scores(
        behaviour=behaviour.name,
        values=values,
        activation_mean=means,
        activation_norm=norms,
        groups={},
        loss=loss,
        prompt_hashes=behaviour.prompt_hashes,
        fingerprint=fingerprint,
        facts=facts_of(model, behaviour, config, method=method, data=data),
    )


def _answer_positions(batch: Batch) -> list[Bool[Tensor, "batch pos"]]:
    """Where a token of a safe answer is predicted, and where one of an unsafe answer is."""
    masks = []
    for kind in (0, 1):
        is_kind = batch.answer % 2 == kind
        mask = torch.zeros_like(batch.real)
        mask[batch.read_row[is_kind], batch.read_pos[is_kind]] = True
        masks.append(mask)
    return masks


def _contrast_sums(model: HookedModel, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Zeros: sums over positions of safe (row 0) and unsafe answers (row 1) and over all (row 2), and their counts."""
    device, sums = model.cfg.device, {}
    for site in sites:
        (width,) = site_shape(model, site)
        sums[f"sum/{site}"] = torch.zeros(3, width, device=device)
        sums[f"square/{site}"] = torch.zeros(3, width, device=device)
        sums[f"slots/{site}"] = torch.zeros(3, site.n_experts, device=device)
    return sums


def _cohens_d(
    total: Float[Tensor, "2 unit"], square: Float[Tensor, "2 unit"], counts: Float[Tensor, "2 unit"]
) -> Float[Tensor, " unit"]:
    """The difference of two means, first minus second, in pooled standard deviations, from sums over positions."""
    mean = total / counts
    variance = (square / counts - mean.square()).clamp(min=0).mean(0)
    return (mean[0] - mean[1]) / variance.sqrt().clamp(min=1e-12)


@own_torch_settings()
def magnitude(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    unit: Unit | Sequence[Unit] = "neuron",
    config: ScoringConfig = _DEFAULT,
) -> Scores:
    """`|W|` of every weight; of a neuron the norm of the row that it writes (Han et al. 2015).

    No example is looked at: `behaviour` gives its name alone.
    """

    def size(site: Site) -> Tensor:
        if site.unit == "weight":
            return _sizes(model, site)
        return weight(model, site.out).detach().float().norm(dim=1).cpu()

    return _without_data(model, behaviour, unit=unit, config=config, method="magnitude", score=size)


@own_torch_settings()
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
        if site.unit == "weight":
            return torch.rand(shape(model, site), generator=generator)
        n_neurons, _ = shape(model, site.out)
        return torch.rand(n_neurons, generator=generator)

    return _without_data(model, behaviour, unit=unit, config=config, method=f"random (seed {seed})", score=draw)


def _without_data(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    unit: Unit | Sequence[Unit],
    config: ScoringConfig,
    method: str,
    score: Callable[[Site], Tensor],
) -> Scores:
    """Scores that `score(site)` gives without any example."""
    return Scores(
        behaviour=behaviour.name,
        values={site: score(site) for site in sorted(scored_sites(model, units_of(unit), config))},
        activation_mean={},
        activation_norm={},
        groups={},
        loss=torch.zeros(0),
        prompt_hashes=frozenset(),
        fingerprint=scores_fingerprint(model, behaviour, unit=unit, config=config, method=method),
        facts=facts_of(model, behaviour, config, method=method),
    )


def _forward_pass(
    model: HookedModel,
    behaviour: Behaviour,
    data: Prepared,
    config: ScoringConfig,
    *,
    sites: Sequence[Site],
    sums: Mapping[str, Tensor],
    add: Callable[[Batch, Site, Tensor], None],
    fingerprint: str,
    unfinished: Path | None,
) -> tuple[int, Tensor]:
    """Run every batch forward once. `add(batch, site, x)` adds what a site sees to `sums`, in place.

    Returns how many positions there were, and the loss of each row.
    """
    refuse_not_finite(model)
    started = Unfinished(unfinished, f"{fingerprint} {config}") if unfinished else None
    n_positions = torch.zeros((), dtype=torch.int64)
    loss = torch.zeros(len(data.rows))
    for batch in batched(
        model,
        data.rows,
        batch_tokens=batch_tokens_of(model, config),
        label=f"reading {behaviour.name}",
        leave=True,
        unfinished=started,
        sums={**sums, "n_positions": n_positions, "loss": loss},
        together=data.rows_each,
        padding=config.padding,
    ):
        losses = stream_activations(model, batch, sites, lambda site, x, batch=batch: add(batch, site, x))
        loss[batch.answer.unique().cpu()] = losses.cpu()
        n_positions += int(batch.real.sum())
    scored_prompts(model).update(behaviour.prompt_hashes)
    return int(n_positions), loss
