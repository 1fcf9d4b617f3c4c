"""Other notions of importance that need no gradient, one function each, all giving `Scores`.

wanda                   weights: size times the norm of what the matrix reads
activation_contrast     neurons: their activations at safe against unsafe answers
magnitude, random       what every method has to beat

`scoring.importance` is DEAN's own; `scoring.integrated_gradients` follows it over many passes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import home, neuron_sites, shape, weight
from dean_interp.models.sites import Site, Unit
from dean_interp.models.tokens import Batch
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.scoring.answer_contrast import add_to_contrast, answer_contrast, contrast_sums, refuse_few_tokens
from dean_interp.scoring.forward_pass import forward_pass
from dean_interp.scoring.preparation import (
    ScoringConfig,
    facts_of,
    prepare,
    scored_sites,
    scores_fingerprint,
    units_of,
)
from dean_interp.scoring.reads import n_read, slots_where, summed_where
from dean_interp.scoring.scores import Scores

_DEFAULT = ScoringConfig()


@own_torch_settings()
def wanda(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    config: ScoringConfig = _DEFAULT,
    unfinished: Path | None = None,
) -> Scores:
    """`|W[i, j]| * rms(x[i])` of every weight, with `x` what its matrix reads over all positions.

    Wanda (Sun et al. 2024), up to the constant that turns a norm into a root mean square. In units of what the matrix
    writes.
    """
    sites = scored_sites(model, ["weight"], config)
    data = prepare(model, behaviour, config)
    fingerprint = scores_fingerprint(model, behaviour, unit="weight", config=config, method="wanda")
    sums = _wanda_sums(model, sites)
    n_positions, loss = forward_pass(
        model,
        behaviour,
        data,
        config,
        sites=sites,
        sums=sums,
        add=partial(_add_squares, model, sums=sums),
        fingerprint=fingerprint,
        unfinished=unfinished,
    )
    norms = {}
    for site in sites:
        n = n_read(site, sums, n_positions)
        mean_square = sums[f"square/{site}"] / n
        norms[site] = mean_square.sqrt().cpu()
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


def _wanda_sums(model: HookedModel, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Zeros: the squares of what each matrix reads, and of experts how many slots were read."""
    sums = {}
    for site in sites:
        device = home(model, site)
        n_in, _ = shape(model, site)
        sums[f"square/{site}"] = torch.zeros(n_in, device=device)
        if site.is_of_experts:
            sums[f"slots/{site}"] = torch.zeros(site.n_experts, device=device)
    return sums


def _add_squares(
    model: HookedModel,
    batch: Batch,
    site: Site,
    x: Float[Tensor, "batch pos *slot width"],
    *,
    sums: Mapping[str, Tensor],
) -> None:
    """Add the squares of what a matrix reads in a batch to the sums, in place."""
    total = sums[f"square/{site}"]
    squares = summed_where(model, site, x.float().square(), batch.real)
    total += squares.to(total.device)
    if site.is_of_experts:
        n_slots = sums[f"slots/{site}"]
        n_slots += slots_where(model, site, batch.real).to(total.device)


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
    """Each weight's size times the norm of what it reads."""
    values = {}
    for site, norm in norms.items():
        values[site] = _sizes(model, site) * norm[:, None]
    return values


def _sizes(model: HookedModel, site: Site) -> Tensor:
    """`|W|` of a matrix, float32 on the CPU."""
    matrix = weight(model, site).detach().float()
    return matrix.abs().cpu()


@own_torch_settings()
def activation_contrast(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    config: ScoringConfig = _DEFAULT,
    unfinished: Path | None = None,
) -> Scores:
    """How differently each neuron fires where a safe and where an unsafe answer is predicted (Cohen's d).

    The difference of the means over all such positions, safe minus unsafe, in pooled standard deviations; the
    difference alone is the contrast of Panickssery et al. 2024. Absolute unless `config.signed`. Raises `InputError`
    for a behaviour without both answers, or with fewer than 10 tokens of safe or of unsafe ones. A neuron of an expert
    that sees fewer scores 0: the spread of so few says nothing.
    """
    if not behaviour.paired:
        raise InputError(f"activation_contrast needs a safe and an unsafe answer to every prompt of '{behaviour.name}'")
    config = dataclasses.replace(config, target="margin")
    method = "activation_contrast"
    sites = neuron_sites(model)
    data = prepare(model, behaviour, config)
    refuse_few_tokens(behaviour.name, data.answer_lengths)
    fingerprint = scores_fingerprint(model, behaviour, unit="neuron", config=config, method=method)
    # Each pass adds the activations where answers are predicted, and for means and norms those at all positions.
    sums = contrast_sums(model, sites)
    _, loss = forward_pass(
        model,
        behaviour,
        data,
        config,
        sites=sites,
        sums=sums,
        add=partial(add_to_contrast, model, sums=sums),
        fingerprint=fingerprint,
        unfinished=unfinished,
    )
    contrast = answer_contrast(sites, sums)
    values = dict(contrast.values)
    if not config.signed:
        values = {site: value.abs() for site, value in values.items()}
    return Scores(
        behaviour=behaviour.name,
        values=values,
        activation_mean=contrast.means,
        activation_norm=contrast.norms,
        groups={},
        loss=loss,
        prompt_hashes=behaviour.prompt_hashes,
        fingerprint=fingerprint,
        facts=facts_of(model, behaviour, config, method=method, data=data),
    )


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
        written = weight(model, site.out).detach().float()
        return written.norm(dim=1).cpu()

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

    method = f"random (seed {seed})"
    return _without_data(model, behaviour, unit=unit, config=config, method=method, score=draw)


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
    sites = scored_sites(model, units_of(unit), config)
    return Scores(
        behaviour=behaviour.name,
        values={site: score(site) for site in sorted(sites)},
        activation_mean={},
        activation_norm={},
        groups={},
        loss=torch.zeros(0),
        prompt_hashes=frozenset(),
        fingerprint=scores_fingerprint(model, behaviour, unit=unit, config=config, method=method),
        facts=facts_of(model, behaviour, config, method=method),
    )
