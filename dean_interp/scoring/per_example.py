"""Scores of chosen units on every single example, by a second pass that keeps only their products.

They show what a mean over examples hides: whether a unit matters to all examples or to one. Scores of all weights on
every example are too many to keep; those of a selection are not.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.data.prompt_text import hashes_of, is_among
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import batched
from dean_interp.models.matrices import home, shape, weight
from dean_interp.models.neurons import routed_ids
from dean_interp.models.scored_prompts import note_scored
from dean_interp.models.sites import Site
from dean_interp.models.supported import refuse_not_finite
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.scoring.capture import stream_gradients
from dean_interp.scoring.preparation import ScoringConfig, batch_tokens_of, grouped, prepare
from dean_interp.scoring.products import folded
from dean_interp.scoring.scores import Scores
from dean_interp.scoring.sums import Sums
from dean_interp.scoring.top import Top

_NUMBERS_AT_ONCE = 2**26
"""So many numbers are laid out by unit at once, or the units that are kept of a large matrix would not fit."""


@own_torch_settings()
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

    Raises `InputError` as `importance`, and for the target `fisher`, whose effects are of other tokens.
    """
    effects = {}
    for site, chosen in units.items():
        effects[site] = torch.zeros(len(behaviour), len(chosen))

    def keep(site: Site, examples: Tensor, effect: Tensor) -> None:
        effects[site][examples.cpu()] = effect.cpu()

    _stream_effects(model, behaviour, units, config=config, sums=effects, keep=keep)
    return effects


@own_torch_settings()
def with_groups(
    model: HookedModel,
    scores: Scores,
    behaviour: Behaviour,
    *,
    config: ScoringConfig = ScoringConfig(),  # noqa: B008 - frozen
) -> Scores:
    """The same scores with groups of examples for the weights that were kept. Neurons have groups from the first pass.

    Raises `InputError` where these are not the scores of this behaviour under this config, or were kept whole (too many
    to group), and as `example_scores`.
    """
    _refuse_other_examples(scores, behaviour)
    _refuse_other_settings(scores, behaviour, config)
    units = {site: value.indices for site, value in scores.values.items() if isinstance(value, Top)}
    if not units:
        raise InputError("groups of weights are taken for the highest of each matrix: scores.kept() first")
    groups, _ = grouped(behaviour, config)
    group_sizes = torch.bincount(groups)
    # On the device of each matrix, since the effects of a batch are many more than their sums.
    sums = {}
    for site, indices in units.items():
        device = home(model, site)
        sums[site] = torch.zeros(len(group_sizes), len(indices), device=device)

    def keep(site: Site, examples: Tensor, effect: Tensor) -> None:
        total = sums[site]
        of_examples = groups.to(examples.device)[examples]
        added = folded(effect, config.fold).to(total.device)
        total.index_add_(0, of_examples.to(total.device), added)

    _stream_effects(model, behaviour, units, config=config, sums=sums, keep=keep)
    groups_of_sites = dict(scores.groups)
    for site, total in sums.items():
        groups_of_sites[site] = total.cpu() / group_sizes[:, None]
    return replace(scores, groups=groups_of_sites)


def _refuse_other_examples(scores: Scores, behaviour: Behaviour) -> None:
    """Raise `InputError` where scores and a behaviour are not of the same prompts."""
    scored = scores.prompt_hashes
    of_examples = frozenset[str]().union(*map(hashes_of, behaviour.prompts))
    others = scored - of_examples
    are_scored = all(is_among(prompt, scored) for prompt in behaviour.prompts)
    if not are_scored or others:
        n_examples = len(behaviour)
        raise InputError(f"these are scores of other examples than the {n_examples} of '{behaviour.name}' given")


def _refuse_other_settings(scores: Scores, behaviour: Behaviour, config: ScoringConfig) -> None:
    """Raise `InputError` where scores were not made as their groups would be."""
    asked = {
        "method": "importance",
        "target": config.target,
        "signed": config.signed,
        "groups": config.groups,
        "template": config.template,
        "response": behaviour.response,
    }
    for name, value in asked.items():
        scored = scores.facts.get(name, value)
        if scored != value:
            raise InputError(
                f"the scores of {scores.behaviour} were made with {name}={scored!r}, and their groups would be with "
                f"{value!r}: give the behaviour and the config that were scored"
            )


def _refuse_fisher(config: ScoringConfig) -> None:
    """Raise `InputError` for the target `fisher`."""
    if config.target == "fisher":
        raise InputError("target='fisher' has effects of tokens that the model draws: take 'response' or 'margin'")


def _stream_effects(
    model: HookedModel,
    behaviour: Behaviour,
    units: Mapping[Site, Int[Tensor, " unit"]],
    *,
    config: ScoringConfig,
    sums: Mapping[Site, Tensor],
    keep: Callable[[Site, Tensor, Tensor], None],
) -> None:
    """Call `keep(site, examples, effect)` once a batch and site; it adds to `sums`, in place.

    `examples` are the numbers of the batch's examples, `effect` (`example unit`) those of the site's chosen units on
    them, signed.
    """
    _refuse_fisher(config)
    refuse_not_finite(model)
    data = prepare(model, behaviour, config)
    # Without a unit there is nothing that a gradient could reach.
    sites = [site for site, chosen in units.items() if len(chosen)]
    if not sites:
        return
    places = {site: _places(model, site, units[site]) for site in sites}
    weights = {site: _weights(model, site, units[site]) for site in sites if site.unit == "weight"}
    # Sums of no site: they only tell which examples a batch holds, their signs, and whether gradients are finite.
    batch_examples = Sums(model, [], groups=data.groups, rows_each=data.rows_each, folds=("value",))

    def add(site: Site, x: Tensor, gradient: Tensor) -> None:
        batch_examples.note_finite(site, gradient)
        ids = routed_ids(model, site).to(x.device) if site.is_of_experts else None
        by_row = _effects(x, gradient, places[site].to(x.device), ids)
        if site.unit == "weight":
            # The effect of weight (i, j) is W[i, j] times the sum over positions of x_i times the gradient of output j.
            by_row = by_row * weights[site].to(x.device)
        # The rows of an example (safe and unsafe answer) are added.
        effect = by_row.unflatten(0, (-1, data.rows_each)).sum(1)
        keep(site, batch_examples.examples, effect)

    for batch in batched(
        model,
        data.rows,
        batch_tokens=batch_tokens_of(model, config),
        label=f"examples of {behaviour.name}",
        sums={str(site): total for site, total in sums.items()},
        together=data.rows_each,
        padding=config.padding,
    ):
        batch_examples.begin(batch)
        losses = stream_gradients(model, batch, sites, add, signs=batch_examples.signs())
        batch_examples.add_losses(losses)
    note_scored(model, behaviour.prompt_hashes)


def _weights(
    model: HookedModel,
    site: Site,
    chosen: Int[Tensor, " unit"],
) -> Float[Tensor, " unit"]:
    """The entries of a matrix at some flat indices."""
    matrix = weight(model, site).detach()
    chosen = chosen.to(matrix.device)
    n_out = matrix.shape[1]
    return matrix[chosen // n_out, chosen % n_out].float()


@dataclass(frozen=True)
class _Places:
    """Where each chosen unit stands in what its site, or its expert there, reads and writes."""

    read: Int[Tensor, " unit"]
    written: Int[Tensor, " unit"]
    experts: Int[Tensor, " unit"]
    """The expert that it belongs to; 0 at a dense site."""

    def to(self, device: torch.device) -> "_Places":
        """The same on a device."""
        return _Places(self.read.to(device), self.written.to(device), self.experts.to(device))

    def split(self, size: int) -> Iterator["_Places"]:
        """So many units at a time."""
        parts = (self.read.split(size), self.written.split(size), self.experts.split(size))
        for read, written, experts in zip(*parts, strict=True):
            yield _Places(read, written, experts)


def _places(model: HookedModel, site: Site, chosen: Int[Tensor, " unit"]) -> _Places:
    """The places of units by their flat indices in the site, which counts all experts as one wide matrix."""
    n_in, n_out = shape(model, site.matrix)
    if site.unit == "neuron":
        # A neuron is read and written in one place: a row of the matrix after it.
        read = written = chosen
    else:
        read, written = chosen // n_out, chosen % n_out
    if not site.is_of_experts:
        return _Places(read, written, torch.zeros_like(chosen))
    if site.part in ("experts.gate", "experts.in"):
        d_expert = n_out // site.n_experts
        return _Places(read, written % d_expert, written // d_expert)
    d_expert = n_in // site.n_experts
    within = written % d_expert if site.unit == "neuron" else written
    return _Places(read % d_expert, within, read // d_expert)


def _effects(
    x: Float[Tensor, "batch pos *slot d_in"],
    gradient: Float[Tensor, "batch pos *slot d_out"],
    places: _Places,
    ids: Int[Tensor, "batch pos slot"] | None,
) -> Float[Tensor, "batch unit"]:
    """The sum over positions of what each unit reads times the gradient of what it writes, in float32.

    `ids` are the experts of the slots (None: a dense site): a unit counts in the slots of its own expert.
    """
    effects = []
    n_reads = x.shape[:-1].numel()
    units_at_once = max(1, _NUMBERS_AT_ONCE // n_reads)
    for part in places.split(units_at_once):
        # No name holds both columns, which may be large, while the next ones are laid out.
        if ids is None:
            effect = torch.einsum("bpn,bpn->bn", x[..., part.read].float(), gradient[..., part.written].float())
        else:
            read = x[..., part.read].float() * (ids[..., None] == part.experts)
            effect = torch.einsum("bpsn,bpsn->bn", read, gradient[..., part.written].float())
        effects.append(effect)
    return torch.cat(effects, 1)
