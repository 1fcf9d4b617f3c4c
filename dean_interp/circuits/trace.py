"""What feeds a set of neurons, and what it feeds, on one example: attribution, checked by intervention.

1. `attribution`: the selected neurons that do most to the margin, at their tokens, are the targets.
2. `attribution`: of each target, the neurons and heads that do most to its activation are its sources.
3. `intervention`: the largest edges are measured, and as many random ones into the same targets.

`trace_links` asks the same of the set alone: which of its neurons feed which.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dean_interp.circuits.answer_pair import AnswerPair, answer_pair
from dean_interp.circuits.attribution import edges_to_margin, largest, sources_of
from dean_interp.circuits.graph import Circuit, Edge, Node
from dean_interp.circuits.intervention import measured
from dean_interp.circuits.kept_pass import KeptPass, kept_pass
from dean_interp.data.examples import Example
from dean_interp.editing.ablation import refuse_foreign
from dean_interp.errors import InputError, refuse_below_one
from dean_interp.models.load import HookedModel
from dean_interp.models.offload import refuse_offloaded
from dean_interp.models.tokens import Template
from dean_interp.models.torch_settings import own_torch_settings, refuse_without_gradients
from dean_interp.progress import progress_bar
from dean_interp.selection.selection import Selection


@own_torch_settings()
def trace_circuit(
    model: HookedModel,
    selection: Selection,
    example: Example,
    *,
    n_targets: int = 10,
    n_sources: int = 8,
    n_checked: int = 32,
    answer_tokens: int | None = 12,
    template: Template = "chat",
    seed: int = 0,
) -> Circuit:
    """Trace what feeds the selected neurons on one example and what they do to its margin.

    `circuit_page` shows the same as a page. Sources are neurons and attention heads. A layer that mixes tokens in
    another way (a short convolution, a state space) has no heads: what goes through it counts for its sources.

    Args:
        selection: neurons, the coupled ones for instance.
        example: a prompt with a safe and an unsafe answer.
        n_targets: how many selected neurons, at their tokens, are traced: those that do most to the margin.
        n_sources: how many sources (neurons and attention heads, at their tokens) of each target are kept.
        n_checked: how many of the largest edges into the set are measured, beside as many random ones. Every edge to
            the margin is measured.
        answer_tokens: how many first tokens of both answers count; None takes all.
        seed: seed for the random edges.

    Raises:
        InputError: weights instead of neurons, an empty selection, an example without both answers, a number below 1,
            neurons of experts that the example does not reach.
    """
    _check(model, selection, example, {"n_targets": n_targets, "n_sources": n_sources, "n_checked": n_checked})
    refuse_without_gradients(model, str(model.cfg.model_name))
    pair = answer_pair(model, example, template, answer_tokens)
    return _traced(
        pair,
        lambda kept: _edges_to_margin(kept, selection, n_targets),
        n_sources=n_sources,
        n_measured=(n_targets, n_checked),
        seed=seed,
    )


@own_torch_settings()
def trace_links(
    model: HookedModel,
    selection: Selection,
    example: Example,
    *,
    n_sources: int = 4,
    n_checked: int = 16,
    answer_tokens: int | None = 12,
    template: Template = "chat",
    seed: int = 0,
) -> Circuit:
    """Trace the strongest edges between the selected neurons on one example, and what each does to its margin.

    Every neuron is a target once, at the token where it does most to the margin. In a mixture the circuit has no edge
    where no token is sent to an expert that holds a selected neuron.

    Args:
        n_sources: how many sources of each target are kept: of the selected neurons, at any token before it.
        n_checked: how many of the largest edges to the margin, and as many of the largest between the neurons, are
            measured, beside as many random ones.
        answer_tokens: as of `trace_circuit`.
        seed: as of `trace_circuit`.

    Raises:
        InputError: what `trace_circuit` refuses.
    """
    _check(model, selection, example, {"n_sources": n_sources, "n_checked": n_checked})
    refuse_without_gradients(model, str(model.cfg.model_name))
    pair = answer_pair(model, example, template, answer_tokens)
    return _traced(
        pair,
        lambda kept: _strongest_of_each(kept, selection, pair.n_columns),
        n_sources=n_sources,
        n_measured=(n_checked, n_checked),
        seed=seed,
        among=selection,
    )


def _traced(
    pair: AnswerPair,
    edges_out: Callable[[KeptPass], list[Edge]],
    *,
    n_sources: int,
    n_measured: tuple[int, int],
    seed: int,
    among: Selection | None = None,
) -> Circuit:
    """Trace the edges to the margin, whose sources are the targets, and the edges into these.

    Args:
        edges_out: finds the edges to the margin in a pass.
        n_sources: how many sources of each target are kept, among a selection alone where one is given.
        n_measured: how many of the largest edges to the margin and into the targets are measured; of the latter as many
            random ones, too.
    """
    with kept_pass(pair) as kept:
        margin = float(kept.margin.detach())
        outward = edges_out(kept)
        targets = [edge.source for edge in outward]
        inward, random = _edges_into(
            kept,
            targets,
            n_sources=n_sources,
            n_random=n_measured[1],
            seed=seed,
            among=among,
        )
    return _circuit(
        pair,
        margin=margin,
        outward=outward,
        inward=inward,
        random=random,
        n_measured=n_measured,
    )


def _strongest_of_each(kept: KeptPass, selection: Selection, n_columns: int) -> list[Edge]:
    """The largest edge to the margin of every selected neuron, over all tokens."""
    edges = edges_to_margin(kept, selection, len(selection) * n_columns)
    first: dict[str, Edge] = {}
    # Edges come largest first.
    for edge in edges:
        first.setdefault(edge.source.name, edge)
    return list(first.values())


def _circuit(
    pair: AnswerPair,
    *,
    margin: float,
    outward: Sequence[Edge],
    inward: Sequence[Edge],
    random: Sequence[Edge],
    n_measured: tuple[int, int],
) -> Circuit:
    """The record, with so many of the largest edges to the margin and into the set measured, and all random ones."""
    to_margin = min(n_measured[0], len(outward))
    into_set = min(n_measured[1], len(inward))
    checked = measured(pair, [*outward[:to_margin], *inward[:into_set], *random])
    # What was measured comes back in the same order; of each kind the rest follows as it was.
    n_largest = to_margin + into_set
    all_outward = [*checked[:to_margin], *outward[to_margin:]]
    all_inward = [*checked[to_margin:n_largest], *inward[into_set:]]
    return Circuit(
        tokens=pair.tokens,
        n_prompt=pair.n_prompt,
        n_safe=pair.n_safe,
        margin=margin,
        edges=(*all_outward, *all_inward),
        random=tuple(checked[n_largest:]),
    )


def _edges_to_margin(kept: KeptPass, selection: Selection, n_targets: int) -> list[Edge]:
    """The edges to the margin that are targets. Raises `InputError` where the example reaches no selected neuron."""
    outward = edges_to_margin(kept, selection, n_targets)
    if not outward:
        raise InputError("no token of this example is sent to an expert that holds a selected neuron: take another")
    return outward


def _edges_into(
    kept: KeptPass,
    targets: Sequence[Node],
    *,
    n_sources: int,
    n_random: int,
    seed: int,
    among: Selection | None = None,
) -> tuple[list[Edge], list[Edge]]:
    """The largest edges into all targets (among a selection alone, where one is given), and `n_random` random ones."""
    if not targets:
        return [], []
    generator = np.random.default_rng(seed)
    n_random_each = -(-n_random // len(targets))
    inward: list[Edge] = []
    random: list[Edge] = []
    for target in progress_bar(targets, desc="tracing", unit="neuron", leave=False):
        sources = sources_of(kept, target)
        inward += sources.largest(n_sources, among=among)
        random += sources.random(n_random_each, generator)
    return largest(inward), random[:n_random]


def _check(model: HookedModel, selection: Selection, example: Example, counts: Mapping[str, int]) -> None:
    """Raise `InputError` for what a circuit cannot be traced through, and for a number below 1."""
    has_weights = any(site.unit != "neuron" for site in selection.shapes)
    if has_weights or not len(selection):
        raise InputError(f"a circuit is traced through neurons, at least one; got {selection!r}")
    refuse_foreign(model, selection)
    if not example.paired:
        answers = ", ".join(example.answers) or "none"
        raise InputError(f"the example needs a safe and an unsafe answer; it has {answers}")
    refuse_below_one(**counts)
    refuse_offloaded(model, "tracing a circuit")
