"""What the estimands are estimated from: activations where prompts and answers end, in one order of prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.data.examples import Behaviour, Example
from dean_interp.errors import InputError
from dean_interp.models.end_activations import EndActivations, end_activations
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import answer_positions, batched, forward, shares_prompts
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.sites import Site, residual_hook
from dean_interp.models.sizes import residual_width
from dean_interp.models.supported import refuse_missing_hooks
from dean_interp.models.tokens import Branch, Row, Template, encode, paths, trees
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.resume import Unfinished
from dean_interp.selection.gates import Gates
from dean_interp.selection.selection import Selection

NamedExample = tuple[str, Example]
"""An example with the name of its behaviour."""


@dataclass(frozen=True)
class Activations:
    """Activations of every neuron that an estimand compares, in one state of the model."""

    values: Mapping[Site, Float[Tensor, "prompt unit"]]
    """At the last token before the answer."""
    units: Selection
    """The neurons whose activations these are."""
    groups: tuple[str, ...]
    """The behaviour that each prompt belongs to; nulls shuffle within it."""
    clusters: tuple[str, ...] = ()
    """The topic of each prompt, or the prompt where it has none; subsamples draw a topic as one."""
    answers: Mapping[Site, Float[Tensor, "prompt answer unit"]] = field(default_factory=dict)
    """At the last token of the safe and of the unsafe answer, where these were run."""
    residual: Mapping[int, Float[Tensor, "prompt d_model"]] = field(default_factory=dict)
    """The residual stream after each layer, at the last token before the answer, where it was asked for."""

    def columns(self, site: Site, neurons: Selection) -> Float[Tensor, "prompt unit"]:
        """The activations of some neurons of a site at prompt ends; all of them must be among `units`."""
        is_among = self._is_among(site, neurons)
        return self.values[site][:, is_among].double()

    def answer_columns(self, site: Site, neurons: Selection) -> Float[Tensor, "row unit"]:
        """The same at the ends of answers: rows are prompt by prompt, safe before unsafe."""
        is_among = self._is_among(site, neurons)
        rows = self.answers[site].flatten(0, 1)
        return rows[:, is_among].double()

    def before(self, gates: Gates) -> "Activations":
        """The activations as they were before these gates multiplied them; 0 where the gate is 0."""
        values = {}
        answers = {}
        for site, units in self.units.units.items():
            gate = gates.multipliers[site][units]
            is_silenced = gate == 0
            undo = torch.where(is_silenced, 0.0, 1 / gate)
            if site in self.values:
                values[site] = self.values[site] * undo
            if site in self.answers:
                answers[site] = self.answers[site] * undo
        return replace(self, values=values, answers=answers)

    def _is_among(self, site: Site, neurons: Selection) -> Bool[Tensor, " unit"]:
        return torch.isin(self.units.units[site], neurons.units[site])


@own_torch_settings()
def read_activations(
    model: HookedModel,
    behaviours: Sequence[Behaviour],
    units: Selection,
    *,
    answers: bool = False,
    residual: bool = False,
    template: Template = "chat",
    answer_tokens: int | None = None,
    batch_tokens: int = 1024,
    unfinished: Unfinished | None = None,
) -> Activations:
    """Activations of `units` in the model's present state, for every distinct prompt.

    Args:
        answers: also run each prompt's safe and unsafe answer, and keep the activations at their last tokens.
        residual: also keep the residual stream at prompt ends, every layer.
        answer_tokens: keep only that many first tokens of each answer; the last of them is where it ends.

    Raises:
        InputError: `answers` of a behaviour that has no pairs; `residual` of a model that shows no residual stream.
    """
    prompts = distinct(behaviours)
    if answers:
        _refuse_unpaired(prompts)
    rows = _rows(model, prompts, answers=answers, template=template, answer_tokens=answer_tokens)
    hooks = hooks_of(units)
    if residual:
        everywhere = torch.arange(residual_width(model))
        for layer in range(len(model.blocks)):
            hooks[residual_hook(layer)] = everywhere
        refuse_missing_hooks(model, hooks, "reading the residual stream")
    n_prompts = len(prompts)
    n_answers = 2 * n_prompts if answers else 0
    collecting = end_activations(model, hooks, n_prompts=n_prompts, n_answers=n_answers)
    with torch.inference_mode(), collecting as ends:
        batches = batched(
            model,
            rows,
            batch_tokens=batch_tokens,
            label="reading activations",
            unfinished=unfinished,
            sums=ends.sums,
        )
        for batch in batches:
            ends.batch = batch
            # no answer token has to be predicted, so nothing is unembedded
            with answer_positions(model, batch.predicting_nothing()):
                forward(model, batch)
    return activations_of([ends], prompts, units)


def _refuse_unpaired(prompts: Sequence[NamedExample]) -> None:
    for _, example in prompts:
        if not example.paired:
            raise InputError(f"the prompt {example.prompt[:40]!r} has no safe and unsafe answer to be read at")


def _answers(example: Example) -> list[str]:
    """Both answers of a pair, else the first answer that there is."""
    if example.paired:
        return [example.answers["safe"], example.answers["unsafe"]]
    return list(example.answers.values())[:1]


def _rows(
    model: HookedModel,
    prompts: Sequence[NamedExample],
    *,
    answers: bool,
    template: Template,
    answer_tokens: int | None,
) -> list[Row]:
    """The prompts as rows, with their answers or without them."""
    tokenizer = native_tokenizer(model)
    encoded = []
    for _, example in prompts:
        text = encode(
            tokenizer,
            example.prompt,
            # answers are always encoded: they fix where the prompt's tokens end
            _answers(example),
            template=template,
            answer_tokens=answer_tokens,
            n_ctx=model.cfg.n_ctx,
        )
        encoded.append(text)
    shared = shares_prompts(model, encoded)
    if not answers:
        encoded = [replace(text, answers=()) for text in encoded]
    if shared:
        return trees(encoded)
    if answers:
        return paths(encoded)
    return [(Branch(text.prompt, prompt=i),) for i, text in enumerate(encoded)]


def hooks_of(units: Selection) -> dict[str, Int[Tensor, " unit"]]:
    """What to collect for a selection of neurons, by hook point."""
    return {site.hook_name: indices for site, indices in units.units.items()}


def activations_of(
    passes: Sequence[EndActivations],
    prompts: Sequence[NamedExample],
    units: Selection,
) -> Activations:
    """What passes over the prompts collected, one after another, as one record."""
    at_prompts = {}
    at_answers = {}
    residual = {}
    for name in passes[0].prompts:
        at_prompts[name] = torch.cat([ends.prompts[name] for ends in passes])
        at_answers[name] = torch.cat([ends.answers[name] for ends in passes])
        if name.endswith("resid_post"):
            # blocks.3.hook_resid_post
            layer = int(name.split(".")[1])
            residual[layer] = at_prompts[name]
    values = {}
    answers = {}
    for site in units.units:
        name = site.hook_name
        if name in at_prompts:
            values[site] = at_prompts[name]
            # safe and unsafe follow each other; there are none where answers were not run
            if len(at_answers[name]):
                answers[site] = at_answers[name].reshape(len(prompts), 2, -1)
    groups, clusters = groups_and_clusters(prompts)
    return Activations(
        values=values,
        units=units,
        groups=groups,
        clusters=clusters,
        answers=answers,
        residual=residual,
    )


def groups_and_clusters(prompts: Sequence[NamedExample]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The behaviour of each prompt, and its topic (or the prompt where it has none)."""
    groups = []
    clusters = []
    for name, example in prompts:
        groups.append(name)
        clusters.append(f"{name}: {example.cluster}")
    return tuple(groups), tuple(clusters)


def distinct(behaviours: Sequence[Behaviour]) -> list[NamedExample]:
    """Every prompt once, with the name of the first behaviour that holds it, in the order of the behaviours."""
    first: dict[str, NamedExample] = {}
    for behaviour in behaviours:
        for example in behaviour.examples:
            first.setdefault(example.prompt, (behaviour.name, example))
    return list(first.values())
