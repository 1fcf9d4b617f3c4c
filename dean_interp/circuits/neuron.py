"""A look at single neurons: which of a selection score highest, and where in real text they fire."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError, refuse_below_one
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import answer_positions, batched, forward
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.neuron_names import Neuron, neuron_of, parse_name, refuse_unknown
from dean_interp.models.neurons import are_routed, read_neurons
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch, Encoded, Template, encode, paths
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.resume import Unfinished
from dean_interp.scoring.scores import Scores
from dean_interp.selection.selection import Selection


@dataclass(frozen=True)
class TextActivations:
    """One text token by token, with the activation of each neuron at each token."""

    behaviour: str
    tokens: tuple[str, ...]
    activations: tuple[tuple[float, ...], ...]
    """One row a token, one column a neuron. 0 where the token was not sent to the neuron's expert."""
    routed: tuple[tuple[bool, ...], ...] = ()
    """The same: whether the token was sent to the neuron's expert. Empty where no neuron is one of a routed expert."""


def parse_neuron(name: str, model: HookedModel | None = None) -> Neuron:
    """Site and number of a neuron from its name: `L17.1042`, `L17.E5.42` of expert 5, `L17.shared.42`.

    Raises `InputError` for another form, for a neuron that the model does not have, and for one of a routed expert
    without the model: its number at its site depends on the width of an expert.
    """
    parts = parse_name(name)
    if model is not None:
        return neuron_of(model, parts)
    if parts.owner.startswith("E"):
        raise InputError(f"{parts} is a neuron of a routed expert: give the model, too")
    site = Site(parts.layer, parts.owner or "neurons")
    return site, parts.index


def strongest_neurons(
    selection: Selection,
    first: Scores,
    second: Scores,
    *,
    n_neurons: int,
) -> list[Neuron]:
    """The selected neurons with the highest geometric mean of both behaviours' scores, highest first.

    Raises `InputError` for a number below 1.
    """
    refuse_below_one(n_neurons=n_neurons)
    ranked = []
    for site, indices in selection.units.items():
        products = first[site] * second[site]
        means = products.abs().sqrt()
        for index in indices.tolist():
            ranked.append((float(means[index]), site, index))
    ranked.sort(reverse=True)
    return [(site, index) for _, site, index in ranked[:n_neurons]]


@own_torch_settings()
@torch.inference_mode()
def top_texts(
    model: HookedModel,
    neurons: Sequence[Neuron],
    behaviours: Sequence[Behaviour],
    *,
    n_texts: int,
    template: Template = "chat",
    unfinished: Unfinished | None = None,
) -> list[TextActivations]:
    """The texts (prompt and scored answer) on which the neurons fire most, largest first.

    A text is ranked by its largest activation relative to each neuron's largest anywhere, so no neuron drowns another.
    Raises `InputError` for a number of texts below 1, where there are no neurons, and as `read_texts` does.
    """
    refuse_below_one(n_texts=n_texts)
    if not neurons:
        raise InputError("texts are ranked by what neurons do on them: give at least one neuron")
    read = _read(model, neurons, behaviours, template=template, unfinished=unfinished)
    peaks = torch.stack([values.abs().amax(0) for values in read.activations])
    peak = peaks.amax(0).clamp(min=1e-9)

    def relative_size(i: int) -> float:
        sizes = read.activations[i].abs() / peak
        return float(sizes.amax())

    strongest = sorted(range(len(read.texts)), key=relative_size, reverse=True)
    return [read.shown(i) for i in strongest[:n_texts]]


@own_torch_settings()
@torch.inference_mode()
def read_texts(
    model: HookedModel,
    neurons: Sequence[Neuron],
    behaviours: Sequence[Behaviour],
    *,
    template: Template = "chat",
    unfinished: Unfinished | None = None,
) -> list[TextActivations]:
    """Every text (prompt and scored answer), in the order of the behaviours and of their examples.

    Raises `InputError` where there are no examples, for a neuron that the model does not have, and for a text that is
    longer than the model's context.
    """
    read = _read(model, neurons, behaviours, template=template, unfinished=unfinished)
    return [read.shown(i) for i in range(len(read.texts))]


def of_neuron(texts: Sequence[TextActivations], column: int) -> list[TextActivations]:
    """The texts with the activations of one neuron alone, those on which it fires most first."""
    alone = []
    for text in texts:
        activations = tuple((row[column],) for row in text.activations)
        routed = tuple((row[column],) for row in text.routed)
        alone.append(replace(text, activations=activations, routed=routed))
    return sorted(alone, key=lambda text: peak_of(text, 0), reverse=True)


def peak_of(text: TextActivations, column: int) -> float:
    """The largest size of a neuron's activation in a text."""
    return max(abs(row[column]) for row in text.activations)


@dataclass(frozen=True)
class _ReadTexts:
    owners: Sequence[str]
    """The behaviour of each text."""
    texts: Sequence[Encoded]
    activations: Sequence[Float[Tensor, "_ neuron"]]
    routed: Sequence[Bool[Tensor, "_ neuron"]]
    """Empty where no neuron is one of a routed expert."""
    tokenizer: PreTrainedTokenizerBase

    def shown(self, i: int) -> TextActivations:
        """The record of a text, with rounded activations."""
        text = self.texts[i]
        tokens = (*text.prompt, *text.answers[0])
        activations = []
        for row in self.activations[i].tolist():
            activations.append(tuple(round(value, 4) for value in row))
        routed = self.routed[i].tolist() if self.routed else ()
        return TextActivations(
            behaviour=self.owners[i],
            tokens=tuple(str(self.tokenizer.decode([token])) for token in tokens),
            activations=tuple(activations),
            routed=tuple(map(tuple, routed)),
        )


def _read(
    model: HookedModel,
    neurons: Sequence[Neuron],
    behaviours: Sequence[Behaviour],
    *,
    template: Template,
    unfinished: Unfinished | None,
) -> _ReadTexts:
    """The neurons on every text of the behaviours."""
    for neuron in neurons:
        refuse_unknown(model, neuron)
    if not any(map(len, behaviours)):
        raise InputError("a neuron is looked at on examples: give at least one behaviour")
    tokenizer = native_tokenizer(model)
    owners = []
    texts = []
    for behaviour in behaviours:
        for prompt, answer in zip(behaviour.prompts, behaviour.responses, strict=True):
            text = encode(tokenizer, prompt, [answer], template=template, n_ctx=model.cfg.n_ctx)
            owners.append(behaviour.name)
            texts.append(text)
    activations, routed = _text_activations(model, neurons, texts, unfinished)
    return _ReadTexts(
        owners=owners,
        texts=texts,
        activations=activations,
        routed=routed,
        tokenizer=tokenizer,
    )


def _text_activations(
    model: HookedModel,
    neurons: Sequence[Neuron],
    texts: Sequence[Encoded],
    unfinished: Unfinished | None,
) -> tuple[list[Float[Tensor, "_ neuron"]], list[Bool[Tensor, "_ neuron"]]]:
    """The activation of every neuron at every token of each text; and whether it was routed, where any can be."""
    n_tokens = [len(text.prompt) + len(text.answers[0]) for text in texts]
    sums = {"values": torch.zeros(len(texts), max(n_tokens), len(neurons))}
    if any(site.is_of_experts for site, _ in neurons):
        sums["routed"] = torch.zeros_like(sums["values"])
    columns_of: dict[Site, list[int]] = {}
    for column, (site, _) in enumerate(neurons):
        columns_of.setdefault(site, []).append(column)
    # Holds the running batch, for the hooks.
    current: list[Batch] = []
    hooks = []
    for site, columns in columns_of.items():
        units = torch.tensor([neurons[column][1] for column in columns])
        hook = _read_into(sums, current, model=model, site=site, units=units, columns=columns)
        hooks.append((site.hook_name, hook))
    batches = batched(
        model,
        paths(texts),
        batch_tokens=2048,
        label="reading texts",
        unfinished=unfinished,
        sums=sums,
    )
    with model.hooks(fwd_hooks=hooks):
        for batch in batches:
            current[:] = [batch]
            with answer_positions(model, batch):
                forward(model, batch)
    # Without padding.
    activations = [values[:n] for values, n in zip(sums["values"], n_tokens, strict=True)]
    if "routed" not in sums:
        return activations, []
    routed = [values[:n] > 0 for values, n in zip(sums["routed"], n_tokens, strict=True)]
    return activations, routed


def _read_into(
    sums: Mapping[str, Float[Tensor, "text token neuron"]],
    current: Sequence[Batch],
    *,
    model: HookedModel,
    site: Site,
    units: Int[Tensor, " unit"],
    columns: Sequence[int],
) -> Callable[..., None]:
    """A hook that writes what the neurons of a site do in the running batch to their columns."""

    def hook(activation: Tensor, hook: object) -> None:
        (batch,) = current
        texts = batch.prompt[batch.prompt_row.argsort()].cpu()
        read = {"values": read_neurons(model, site, activation, units)}
        if "routed" in sums:
            ones = torch.ones_like(read["values"])
            read["routed"] = are_routed(model, site, units) if site.is_of_experts else ones
        for name, values in read.items():
            # Some models (OPT) join row and position in one axis.
            by_row = values.reshape(*batch.tokens.shape, -1).float().cpu()
            n_positions = by_row.shape[1]
            for place, column in enumerate(columns):
                sums[name][texts, :n_positions, column] = by_row[..., place]

    return hook
