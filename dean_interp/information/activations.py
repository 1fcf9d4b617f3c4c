"""What the estimands are estimated from: activations where prompts and answers end, in one order of prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.data.examples import Behaviour, Example
from dean_interp.errors import InputError
from dean_interp.models.end_activations import EndActivations, end_activations
from dean_interp.models.load import HookedModel, native_tokenizer
from dean_interp.models.loss import answer_positions, batched, forward, shares_prompts
from dean_interp.models.sites import Site, residual_hook
from dean_interp.models.tokens import Branch, Template, encode, paths, trees
from dean_interp.resume import Unfinished
from dean_interp.selection.selection import Selection


@dataclass(frozen=True)
class Activations:
    """Activations of every neuron that some estimand reads, in one state of the model."""

    values: Mapping[Site, Float[Tensor, "prompt unit"]]
    """At the last token before the answer."""
    units: Selection
    groups: tuple[str, ...]
    """Which behaviour each prompt belongs to: nulls shuffle within it."""
    clusters: tuple[str, ...] = ()
    """What is drawn as one when prompts are subsampled: the prompt's topic where it has one, else the prompt."""
    answers: Mapping[Site, Float[Tensor, "prompt answer unit"]] = field(default_factory=dict)
    """At the last token of the safe and of the unsafe answer, where these were run."""
    residual: Mapping[int, Float[Tensor, "prompt d_model"]] = field(default_factory=dict)
    """The residual stream after each layer, at the last token before the answer, where it was asked for."""

    def columns(self, site: Site, wanted: Selection) -> Float[Tensor, "prompt unit"]:
        """The activations of the wanted units of a site at prompt ends; all of them must have been read."""
        return self.values[site][:, self._places(site, wanted)].double()

    def answer_columns(self, site: Site, wanted: Selection) -> Float[Tensor, "row unit"]:
        """The same at the ends of answers: rows are prompt by prompt, safe before unsafe."""
        return self.answers[site][:, :, self._places(site, wanted)].flatten(0, 1).double()

    def _places(self, site: Site, wanted: Selection) -> Tensor:
        return torch.isin(self.units.units[site], wanted.units[site])


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
        answers: also run each prompt's safe and unsafe answer, and read at their last tokens.
        residual: also keep the residual stream at prompt ends, every layer.
        answer_tokens: keep only that many first tokens of each answer; the last of them is where it ends.

    Raises:
        InputError: `answers` of a behaviour that has no pairs.
    """
    owned = distinct(behaviours)
    for _, example in owned if answers else ():
        if not example.paired:
            raise InputError(f"the prompt {example.prompt[:40]!r} has no safe and unsafe answer to be read at")
    tokenizer = native_tokenizer(model)
    encoded = [
        encode(
            tokenizer, example.prompt, _answers(example), template=template, answer_tokens=answer_tokens,
            n_ctx=model.cfg.n_ctx,
        )
        for _, example in owned
    ]  # fmt: skip
    shared = shares_prompts(model, encoded)
    if not answers:
        encoded = [replace(one, answers=()) for one in encoded]
    if shared:
        rows = trees(encoded)
    else:
        rows = paths(encoded) if answers else [(Branch(one.prompt, prompt=i),) for i, one in enumerate(encoded)]
    wanted = hooks_of(units)
    if residual:
        wanted |= {residual_hook(layer): torch.arange(model.cfg.d_model) for layer in range(model.cfg.n_layers)}
    n_answers = 2 * len(owned) if answers else 0
    with torch.inference_mode(), end_activations(model, wanted, n_prompts=len(owned), n_answers=n_answers) as found:
        options = {"unfinished": unfinished, "sums": found.sums}
        for batch in batched(model, rows, batch_tokens=batch_tokens, label="reading activations", **options):
            found.batch = batch
            with answer_positions(model, batch.predicting_nothing()):
                forward(model, batch)
    return activations_of([found], owned, units)


def _answers(example: Example) -> list[str]:
    kinds = ("safe", "unsafe") if example.paired else list(example.answers)[:1]
    return [example.answers[kind] for kind in kinds]


def hooks_of(units: Selection) -> dict[str, Int[Tensor, " unit"]]:
    """What to collect for a selection of neurons, by hook point."""
    return {site.hook_name: chosen for site, chosen in units.units.items()}


def activations_of(
    found: Sequence[EndActivations], owned: Sequence[tuple[str, Example]], units: Selection
) -> Activations:
    """What passes over the prompts of `owned` collected, one after another, as one record."""
    sites = [site for site in units.units if site.hook_name in found[0].prompts]
    layers = [int(name.split(".")[1]) for name in found[0].prompts if name.endswith("resid_post")]
    prompts = {name: torch.cat([one.prompts[name] for one in found]) for name in found[0].prompts}
    answers = {name: torch.cat([one.answers[name] for one in found]) for name in found[0].answers}
    return Activations(
        {site: prompts[site.hook_name] for site in sites},
        units,
        *groups_and_clusters(owned),
        {site: answers[site.hook_name].reshape(len(owned), 2, -1) for site in sites if len(answers[site.hook_name])},
        {layer: prompts[residual_hook(layer)] for layer in layers},
    )


def groups_and_clusters(owned: Sequence[tuple[str, Example]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which behaviour, and which topic (else prompt) of it, each prompt belongs to."""
    groups = tuple(name for name, _ in owned)
    return groups, tuple(f"{name}: {example.topic or example.prompt}" for name, example in owned)


def distinct(behaviours: Sequence[Behaviour]) -> list[tuple[str, Example]]:
    """Every prompt once, with the name of the first behaviour that holds it, in the order of the behaviours."""
    found: dict[str, tuple[str, Example]] = {}
    for behaviour in behaviours:
        for example in behaviour.examples:
            found.setdefault(example.prompt, (behaviour.name, example))
    return list(found.values())
