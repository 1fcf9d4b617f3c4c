"""What the estimands are estimated from: activations where prompts and answers end, in one order of prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.data.examples import Behaviour, Example
from dean_interp.errors import InputError
from dean_interp.models.end_activations import EndActivations, end_activations
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import answer_positions, batched, forward, shares_prompts
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.sites import Site, residual_hook
from dean_interp.models.sizes import residual_width
from dean_interp.models.tokens import Branch, Row, Template, encode, paths, trees
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.resume import Unfinished
from dean_interp.selection.gates import Gates
from dean_interp.selection.selection import Selection


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
        return self.values[site][:, self._is_among(site, neurons)].double()

    def answer_columns(self, site: Site, neurons: Selection) -> Float[Tensor, "row unit"]:
        """The same at the ends of answers: rows are prompt by prompt, safe before unsafe."""
        return self.answers[site][:, :, self._is_among(site, neurons)].flatten(0, 1).double()

    def before(self, gates: Gates) -> "Activations":
        """The activations as they were before these gates multiplied them; 0 where the gate is 0."""
        values, answers = {}, {}
        for site, units in self.units.units.items():
            gate = gates.multipliers[site][units]
            undo = torch.where(gate == 0, 0.0, 1 / gate)
            if site in self.values:
                values[site] = self.values[site] * undo
            if site in self.answers:
                answers[site] = self.answers[site] * undo
        return replace(self, values=values, answers=answers)

    def _is_among(self, site: Site, neurons: Selection) -> Tensor:
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
        InputError: `answers` of a behaviour that has no pairs.
    """
    prompts = distinct(behaviours)
    if answers:
        _refuse_unpaired(prompts)
    rows = _rows(model, prompts, answers=answers, template=template, answer_tokens=answer_tokens)
    hooks = hooks_of(units)
    if residual:
        width = torch.arange(residual_width(model))
        hooks |= {residual_hook(layer): width for layer in range(len(model.blocks))}
    n_answers = 2 * len(prompts) if answers else 0
    with torch.inference_mode(), end_activations(model, hooks, n_prompts=len(prompts), n_answers=n_answers) as ends:
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


def _refuse_unpaired(prompts: Sequence[tuple[str, Example]]) -> None:
    for _, example in prompts:
        if not example.paired:
            raise InputError(f"the prompt {example.prompt[:40]!r} has no safe and unsafe answer to be read at")


def _answers(example: Example) -> list[str]:
    kinds = ("safe", "unsafe") if example.paired else list(example.answers)[:1]
    return [example.answers[kind] for kind in kinds]


def _rows(
    model: HookedModel,
    prompts: Sequence[tuple[str, Example]],
    *,
    answers: bool,
    template: Template,
    answer_tokens: int | None,
) -> list[Row]:
    """The prompts as rows, with their answers or without them."""
    tokenizer, n_ctx = native_tokenizer(model), model.cfg.n_ctx
    encoded = []
    for _, example in prompts:
        texts = _answers(example)
        # answers are always encoded: they fix where the prompt's tokens end
        encoded.append(
            encode(tokenizer, example.prompt, texts, template=template, answer_tokens=answer_tokens, n_ctx=n_ctx)
        )
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
    passes: Sequence[EndActivations], prompts: Sequence[tuple[str, Example]], units: Selection
) -> Activations:
    """What passes over the prompts collected, one after another, as one record."""
    hooks = list(passes[0].prompts)
    at_prompts, at_answers = {}, {}
    for name in hooks:
        at_prompts[name] = torch.cat([each.prompts[name] for each in passes])
        at_answers[name] = torch.cat([each.answers[name] for each in passes])
    values, answers = {}, {}
    for site in units.units:
        name = site.hook_name
        if name in at_prompts:
            values[site] = at_prompts[name]
            # safe and unsafe follow each other; there are none where answers were not run
            if len(at_answers[name]):
                answers[site] = at_answers[name].reshape(len(prompts), 2, -1)
    layers = [int(name.split(".")[1]) for name in hooks if name.endswith("resid_post")]
    groups, clusters = groups_and_clusters(prompts)
    return Activations(
        values=values,
        units=units,
        groups=groups,
        clusters=clusters,
        answers=answers,
        residual={layer: at_prompts[residual_hook(layer)] for layer in layers},
    )


def groups_and_clusters(prompts: Sequence[tuple[str, Example]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The behaviour of each prompt, and its topic (or the prompt where it has none)."""
    groups = tuple(name for name, _ in prompts)
    clusters = tuple(f"{name}: {example.topic or example.prompt}" for name, example in prompts)
    return groups, clusters


def distinct(behaviours: Sequence[Behaviour]) -> list[tuple[str, Example]]:
    """Every prompt once, with the name of the first behaviour that holds it, in the order of the behaviours."""
    first: dict[str, tuple[str, Example]] = {}
    for behaviour in behaviours:
        for example in behaviour.examples:
            first.setdefault(example.prompt, (behaviour.name, example))
    return list(first.values())
