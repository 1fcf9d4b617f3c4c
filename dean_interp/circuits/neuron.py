"""A look at single neurons: how they score for each behaviour, and where in real text they fire."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import answer_positions, batched, forward
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch, Encoded, Template, encode, paths
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.resume import Unfinished
from dean_interp.scoring.scores import Scores
from dean_interp.selection.selection import Selection

Neuron = tuple[Site, int]


@dataclass(frozen=True)
class NeuronScores:
    """One neuron's place in each behaviour: its score (nats) and its rank in its layer, 1 for the highest."""

    layer: int
    index: int
    score: Mapping[str, float]
    rank: Mapping[str, int]

    @property
    def name(self) -> str:
        """As it is written everywhere: `L17.1042`."""
        return f"L{self.layer}.{self.index}"


@dataclass(frozen=True)
class TextActivations:
    """One text token by token, with the activation of each neuron at each token."""

    behaviour: str
    tokens: tuple[str, ...]
    activations: tuple[tuple[float, ...], ...]
    """One row a token, one column a neuron."""


def parse_neuron(name: str) -> Neuron:
    """Site and index of a neuron from its name, `L17.1042`. Raises `InputError` for another form."""
    match = re.fullmatch(r"[Ll](\d+)\.(\d+)", name.strip())
    if not match:
        raise InputError(f"a neuron is named by its layer and index, as L17.1042; got {name!r}")
    return Site(int(match[1]), "neurons"), int(match[2])


def strongest_neurons(selection: Selection, first: Scores, second: Scores, *, n_neurons: int) -> list[Neuron]:
    """The selected neurons with the highest geometric mean of both behaviours' scores, highest first."""
    ranked = []
    for site, indices in selection.units.items():
        means = (first[site] * second[site]).abs().sqrt()
        for index in indices.tolist():
            ranked.append((float(means[index]), site, index))
    return [(site, index) for _, site, index in sorted(ranked, reverse=True)[:n_neurons]]


def neuron_scores(neuron: Neuron, scores: Sequence[Scores]) -> NeuronScores:
    """How one neuron scores for each behaviour."""
    site, index = neuron
    score, rank = {}, {}
    for behaviour_scores in scores:
        layer = behaviour_scores[site]
        score[behaviour_scores.behaviour] = float(layer[index])
        rank[behaviour_scores.behaviour] = int((layer.abs() > layer[index].abs()).sum()) + 1
    return NeuronScores(site.layer, index, score, rank)


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
    """
    read = _read(model, neurons, behaviours, template, unfinished)
    peak = torch.stack([values.abs().amax(0) for values in read.activations]).amax(0).clamp(min=1e-9)

    def relative_size(i: int) -> float:
        return float((read.activations[i].abs() / peak).amax())

    strongest = sorted(range(len(read.texts)), key=relative_size, reverse=True)[:n_texts]
    return [read.shown(i) for i in strongest]


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
    """Every text (prompt and scored answer), in the order of the behaviours and of their examples."""
    read = _read(model, neurons, behaviours, template, unfinished)
    return [read.shown(i) for i in range(len(read.texts))]


def of_neuron(texts: Sequence[TextActivations], column: int) -> list[TextActivations]:
    """The texts with the activations of one neuron alone, those on which it fires most first."""
    alone = []
    for text in texts:
        alone.append(replace(text, activations=tuple((row[column],) for row in text.activations)))
    return sorted(alone, key=lambda text: peak_of(text, 0), reverse=True)


def peak_of(text: TextActivations, column: int) -> float:
    """The largest size of a neuron's activation in a text."""
    return max(abs(row[column]) for row in text.activations)


@dataclass(frozen=True)
class _ReadTexts:
    owners: Sequence[str]
    texts: Sequence[Encoded]
    activations: Sequence[Float[Tensor, "_ neuron"]]
    tokenizer: PreTrainedTokenizerBase

    def shown(self, i: int) -> TextActivations:
        return _as_text(self.owners[i], self.texts[i], self.activations[i], self.tokenizer)


def _read(
    model: HookedModel,
    neurons: Sequence[Neuron],
    behaviours: Sequence[Behaviour],
    template: Template,
    unfinished: Unfinished | None,
) -> _ReadTexts:
    tokenizer = native_tokenizer(model)
    owners, texts = [], []
    for behaviour in behaviours:
        for prompt, answer in zip(behaviour.prompts, behaviour.responses, strict=True):
            owners.append(behaviour.name)
            texts.append(encode(tokenizer, prompt, [answer], template=template))
    return _ReadTexts(owners, texts, _text_activations(model, neurons, texts, unfinished), tokenizer)


def _text_activations(
    model: HookedModel, neurons: Sequence[Neuron], texts: Sequence[Encoded], unfinished: Unfinished | None
) -> list[Float[Tensor, "token neuron"]]:
    """The activation of every neuron at every token of each text."""
    n_tokens = [len(text.prompt) + len(text.answers[0]) for text in texts]
    values = torch.zeros(len(texts), max(n_tokens), len(neurons))
    current: list[Batch] = []

    def keep(column: int, index: int) -> Callable[..., None]:
        def hook(activation: Tensor, hook: object) -> None:
            (batch,) = current
            text = batch.prompt[batch.prompt_row.argsort()].cpu()
            activation = activation.reshape(*batch.tokens.shape, -1)
            values[text, : activation.shape[1], column] = activation[..., index].float().cpu()

        return hook

    hooks = [(site.hook_name, keep(column, index)) for column, (site, index) in enumerate(neurons)]
    batches = batched(
        model,
        paths(texts),
        batch_tokens=2048,
        label="reading texts",
        unfinished=unfinished,
        sums={"values": values},
    )
    with model.hooks(fwd_hooks=hooks):
        for batch in batches:
            current[:] = [batch]
            with answer_positions(model, batch):
                forward(model, batch)
    return [values[i, :n] for i, n in enumerate(n_tokens)]


def _as_text(
    behaviour: str, text: Encoded, activations: Float[Tensor, "token neuron"], tokenizer: PreTrainedTokenizerBase
) -> TextActivations:
    tokens = (*text.prompt, *text.answers[0])
    rows = []
    for row in activations.tolist():
        rows.append(tuple(round(value, 4) for value in row))
    return TextActivations(
        behaviour=behaviour,
        tokens=tuple(str(tokenizer.decode([token])) for token in tokens),
        activations=tuple(rows),
    )
