"""A look at single neurons: how they score for each behaviour, and where in real text they fire."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel, native_tokenizer
from dean_interp.models.loss import answer_positions, batched, forward
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch, Template, encode, paths
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
    found = re.fullmatch(r"[Ll](\d+)\.(\d+)", name.strip())
    if not found:
        raise InputError(f"a neuron is named by its layer and index, as L17.1042; got {name!r}")
    return Site(int(found[1]), "neurons"), int(found[2])


def strongest_neurons(selection: Selection, first: Scores, second: Scores, *, n_neurons: int) -> list[Neuron]:
    """The selected neurons with the highest geometric mean of both behaviours' scores, highest first."""
    ranked = [
        (float((first[site][index] * second[site][index]).abs().sqrt()), site, index)
        for site, indices in selection.units.items()
        for index in indices.tolist()
    ]
    return [(site, index) for _, site, index in sorted(ranked, reverse=True)[:n_neurons]]


def neuron_scores(neuron: Neuron, scores: Sequence[Scores]) -> NeuronScores:
    """How one neuron scores for each behaviour."""
    site, index = neuron
    score = {one.behaviour: float(one[site][index]) for one in scores}
    rank = {one.behaviour: int((one[site].abs() > one[site][index].abs()).sum()) + 1 for one in scores}
    return NeuronScores(site.layer, index, score, rank)


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
    tokenizer = native_tokenizer(model)
    texts = [(b.name, p, r) for b in behaviours for p, r in zip(b.prompts, b.responses, strict=True)]
    encoded = [encode(tokenizer, prompt, [answer], template=template) for _, prompt, answer in texts]
    tokens = [(*one.prompt, *one.answers[0]) for one in encoded]
    values = torch.zeros(len(texts), max(map(len, tokens)), len(neurons))
    rows = paths(encoded)
    now: list[Batch] = []

    def keep(column: int, index: int) -> Callable[..., None]:
        def read(activation: Tensor, hook: object) -> None:
            (batch,) = now
            owner = batch.prompt[batch.prompt_row.argsort()].cpu()
            activation = activation.reshape(*batch.tokens.shape, -1)
            values[owner, : activation.shape[1], column] = activation[..., index].float().cpu()

        return read

    hooks = [(site.hook_name, keep(column, index)) for column, (site, index) in enumerate(neurons)]
    options = {"label": "reading texts", "unfinished": unfinished, "sums": {"values": values}}
    with model.hooks(fwd_hooks=hooks):
        for batch in batched(model, rows, batch_tokens=2048, **options):
            now[:] = [batch]
            with answer_positions(model, batch):
                forward(model, batch)
    found = [values[i, : len(ids)] for i, ids in enumerate(tokens)]
    peak = torch.stack([value.abs().amax(0) for value in found]).amax(0)
    order = sorted(range(len(texts)), key=lambda i: -float((found[i].abs() / peak.clamp(min=1e-9)).amax()))
    return [
        TextActivations(
            texts[i][0],
            tuple(str(tokenizer.decode([token])) for token in tokens[i]),
            tuple(tuple(round(value, 4) for value in row) for row in found[i].tolist()),
        )
        for i in order[:n_texts]
    ]
