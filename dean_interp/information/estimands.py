"""The mutual information between two behaviours, before and after an ablation, by name.

`downstream_mi`: how much a layer's fairness neurons and its privacy neurons tell of each other over the same prompts.
Neither read holds an ablated neuron, so the estimate cannot fall because its own coordinates were deleted; what it
shows is the effect of the ablated neurons on others. Before and after share the prompts, the read noise, the scale and
the PCA basis, all fixed before the ablation. What counts is the excess over a null that shuffles the pairing within
each behaviour's prompts, beside the same for matched random ablations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.editing.ablation import ablate
from dean_interp.errors import InputError
from dean_interp.information.estimators import cross_mi, principal_components, rank, whitened
from dean_interp.information.nulls import shuffled_gaussian_mi, within_group_permutations
from dean_interp.models.load import HookedModel, native_tokenizer
from dean_interp.models.loss import answer_positions, batched, forward
from dean_interp.models.memory import refuse_scored
from dean_interp.models.reads import prompt_reads
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Branch, Template, encode
from dean_interp.selection.selection import Selection
from dean_interp.statistics import rank_p_value

Estimand = Literal["downstream_mi"]
READ_NOISE = 0.3
"""Standard deviation of the independent read noise, in units of each neuron's own before the ablation."""
N_SHUFFLES = 999


@dataclass(frozen=True)
class Reads:
    """Activations at prompt ends, of every neuron that some read needs; prompts in one order throughout."""

    values: Mapping[Site, Float[Tensor, "prompt unit"]]
    units: Selection
    groups: tuple[str, ...]
    """Which behaviour each prompt belongs to: the null shuffles within it."""

    def columns(self, site: Site, wanted: Selection) -> Float[Tensor, "prompt unit"]:
        """The activations of the wanted units of a site, all of which must have been read."""
        return self.values[site][:, torch.isin(self.units.units[site], wanted.units[site])].double()


@dataclass(frozen=True)
class LayerInformation:
    """One layer's estimate, in nats: the value, the mean of its null, their difference, and its p against the null."""

    layer: int
    n_first: int
    n_second: int
    variance_kept: float
    before: float
    before_null: float
    before_p: float
    after: float
    after_null: float
    after_p: float
    flags: tuple[str, ...]

    @property
    def change(self) -> float:
        """After minus before, each as its excess over its null (nats); negative: the ablation lowered it."""
        return (self.after - self.after_null) - (self.before - self.before_null)


@dataclass(frozen=True)
class MutualInformation:
    """An estimand with all that it depends on, one entry a layer. Values in nats."""

    estimand: str
    estimator: str
    n_prompts: int
    k: int
    read_noise: float
    n_shuffles: int
    seed: int
    layers: tuple[LayerInformation, ...]

    @property
    def changes(self) -> tuple[float, ...]:
        """The change of the excess (nats), one a layer."""
        return tuple(layer.change for layer in self.layers)


def mutual_information(
    model: HookedModel,
    behaviours: Sequence[Behaviour],
    *,
    first_read: Selection,
    second_read: Selection,
    ablated: Selection,
    estimand: Estimand = "downstream_mi",
    template: Template = "chat",
    k: int | None = None,
    n_shuffles: int = N_SHUFFLES,
    seed: int = 0,
) -> MutualInformation:
    """Estimate an estimand before and while `ablated` is silenced.

    Args:
        behaviours: whose prompts are pooled (the test splits); a prompt that stands twice counts once.
        first_read, second_read: neurons of the two behaviours; those that are ablated are left out of both.
        ablated: neurons or weights.
        estimand: `downstream_mi`.
        k: principal components a side; None takes 10 from 320 prompts on, else 5.
        n_shuffles: of the null.
        seed: of read noise and shuffles.

    Raises:
        InputError: an unknown estimand, too few prompts for `k`, prompts that were scored, an empty ablation.
    """
    if estimand not in get_args(Estimand):
        raise InputError(f"estimand must be one of {get_args(Estimand)}, got {estimand!r}")
    scored = first_read.prompt_hashes | second_read.prompt_hashes | ablated.prompt_hashes
    refuse_scored(model, behaviours, also=scored)
    _components(len({prompt for behaviour in behaviours for prompt in behaviour.prompts}), k)
    units = first_read | second_read
    before = read_prompts(model, behaviours, units, template=template)
    with ablate(model, ablated):
        after = read_prompts(model, behaviours, units, template=template)
    return downstream_mi(before, after, first_read, second_read, ablated=ablated, k=k, n_shuffles=n_shuffles, seed=seed)


def downstream_mi(
    before: Reads,
    after: Reads,
    first_read: Selection,
    second_read: Selection,
    *,
    ablated: Selection,
    k: int | None = None,
    n_shuffles: int = N_SHUFFLES,
    seed: int = 0,
) -> MutualInformation:
    """The estimand from activations already at hand; arguments as for `mutual_information`.

    Ablated neurons are left out of both reads. Ablated weights silence no neuron, so the reads stay whole.
    """
    first, second = _without_silenced(first_read, ablated), _without_silenced(second_read, ablated)
    n_prompts = len(before.groups)
    k = _components(n_prompts, k)
    shuffles = within_group_permutations(before.groups, n_shuffles, seed=seed)
    noise = torch.Generator().manual_seed(seed)
    layers = []
    for site in before.values:
        # drawn for every unit that was read, whatever is ablated: an edit and its controls share the noise
        drawn = [_noise(before, site, noise), _noise(before, site, noise)]
        sides = [_project(before, after, site, read, drawn[i], k) for i, read in enumerate((first, second))]
        layers.append(_estimate(site, sides, shuffles))
    return MutualInformation(
        "downstream_mi",
        "gaussian_mi on principal components",
        n_prompts,
        k,
        READ_NOISE,
        n_shuffles,
        seed,
        tuple(layers),
    )


@torch.inference_mode()
def read_prompts(
    model: HookedModel, behaviours: Sequence[Behaviour], units: Selection, *, template: Template = "chat"
) -> Reads:
    """Activations of `units` at the end of every distinct prompt; only the prompts are run."""
    owner = {prompt: behaviour.name for behaviour in reversed(behaviours) for prompt in reversed(behaviour.prompts)}
    prompts = [prompt for behaviour in behaviours for prompt in behaviour.prompts]
    prompts = list(dict.fromkeys(prompts))
    tokenizer = native_tokenizer(model)
    encoded = [encode(tokenizer, prompt, [], template=template, n_ctx=model.cfg.n_ctx) for prompt in prompts]
    rows = [(Branch(one.prompt, prompt=i),) for i, one in enumerate(encoded)]
    with prompt_reads(model, units.units, len(prompts)) as reads:
        for batch in batched(model, rows, batch_tokens=1024, label="reading prompts"):
            reads.batch = batch
            with answer_positions(model, batch):  # no answers: the unembedding has nothing to do
                forward(model, batch)
    return Reads(reads.values, units, tuple(owner[prompt] for prompt in prompts))


@dataclass(frozen=True)
class _Side:
    before: Float[Tensor, "prompt dim"]
    after: Float[Tensor, "prompt dim"]
    n_units: int
    variance_kept: float
    constant: bool


def _project(before: Reads, after: Reads, site: Site, read: Selection, noise: Tensor, k: int) -> _Side:
    """One side of one layer: standardised, with read noise, in the basis and scale of before the ablation."""
    wanted = torch.isin(before.units.units[site], read.units[site])
    values = [before.columns(site, read), after.columns(site, read)]
    n_units = values[0].shape[1]
    if not n_units:
        empty = torch.zeros(len(before.groups), 1, dtype=torch.float64)
        return _Side(empty, empty, 0, 0.0, constant=True)
    mean, spread = values[0].mean(0), values[0].std(0)
    scale = torch.where(spread > 0, spread, torch.ones_like(spread))
    noisy = [(value - mean) / scale + READ_NOISE * noise[:, wanted] for value in values]
    basis, kept = principal_components(noisy[0], k)
    return _Side(whitened(noisy[0] @ basis), whitened(noisy[1] @ basis), n_units, kept, not bool((spread > 0).any()))


def _estimate(site: Site, sides: Sequence[_Side], shuffles: Tensor) -> LayerInformation:
    first, second = sides
    n = len(first.before)
    before, before_null = _value_and_null(first.before, second.before, shuffles)
    after, after_null = _value_and_null(first.after, second.after, shuffles)
    dims = first.before.shape[1] + second.before.shape[1]
    flags = [f"fewer than {8 * dims} prompts for {dims} dimensions"] * (n < 8 * dims)
    flags += ["a side without neurons or variance"] * (first.constant or second.constant)
    return LayerInformation(
        layer=site.layer,
        n_first=first.n_units,
        n_second=second.n_units,
        variance_kept=min(first.variance_kept, second.variance_kept),
        before=before,
        before_null=float(before_null.mean()),
        before_p=rank_p_value(before, before_null.tolist()),
        after=after,
        after_null=float(after_null.mean()),
        after_p=rank_p_value(after, after_null.tolist()),
        flags=tuple(flags),
    )


def _without_silenced(read: Selection, ablated: Selection) -> Selection:
    return read - ablated if read.shapes == ablated.shapes else read


def _value_and_null(x: Tensor, y: Tensor, shuffles: Tensor) -> tuple[float, Tensor]:
    n = len(x)
    return float(cross_mi(x.T @ y / (n - 1), n, rank(x), rank(y))), shuffled_gaussian_mi(x, y, shuffles)


def _noise(reads: Reads, site: Site, generator: torch.Generator) -> Tensor:
    return torch.randn(reads.values[site].shape, generator=generator, dtype=torch.float64)


def _components(n_prompts: int, k: int | None) -> int:
    k = k or (10 if n_prompts >= 320 else 5)
    if n_prompts <= 2 * k + 1:
        raise InputError(f"{n_prompts} distinct prompts are too few for k={k} components a side: at least {2 * k + 2}")
    return k
