"""What feeds a set of neurons, and what it feeds, on one example: attribution, checked by intervention.

The predicted effect of an edge is what setting its source to 0 at one token does to its target, to first order:
`-activation * gradient` at the source's hook point, over all paths between them (attribution patching; Nanda 2023,
Syed et al., arXiv 2310.10348). The measured effect sets it to 0 and looks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import mannwhitneyu, spearmanr
from torch import Tensor

from dean_interp.data.examples import Example
from dean_interp.errors import InputError
from dean_interp.frames import Framed
from dean_interp.models.load import HookedModel, native_tokenizer
from dean_interp.models.loss import answer_positions, forward
from dean_interp.models.offload import refuse_offloaded
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch, Template, collate, encode, paths
from dean_interp.progress import progress_bar
from dean_interp.selection.selection import Selection

_ROWS = 32  # sequences a batch of interventions


class Node(NamedTuple):
    """A unit at one token; `position` counts the columns of `Circuit.tokens`."""

    kind: Literal["neuron", "head"]
    layer: int
    index: int
    position: int

    @property
    def name(self) -> str:
        """`L17.1042` or `L17.H3`."""
        return f"L{self.layer}.{'H' if self.kind == 'head' else ''}{self.index}"


@dataclass(frozen=True)
class Edge:
    """What setting `source` to 0 does to `target`: a coupled neuron (share of its activation) or the margin (nats)."""

    source: Node
    target: Node | None
    """None: the margin."""
    predicted: float
    measured: float | None = None
    """None where it was not checked."""


@dataclass(frozen=True)
class EdgeCheck:
    """Predicted against measured over some edges."""

    n: int
    rank_correlation: float
    """Spearman's; NaN where there is none."""
    mean_size: float
    """Mean absolute measured effect."""


@dataclass(frozen=True)
class Circuit(Framed):
    """A set of neurons on one example."""

    tokens: tuple[str, ...]
    """The prompt's tokens, then the safe answer's, then the unsafe one's."""
    n_prompt: int
    n_safe: int
    margin: float
    """`log p(safe) - log p(unsafe)`, each per token, nats."""
    edges: tuple[Edge, ...]
    """From neurons and heads to coupled neurons, and from these to the margin; largest predicted first."""
    random: tuple[Edge, ...]
    """Edges drawn at random into the same targets, checked too."""

    def __repr__(self) -> str:
        into, out = (sum((edge.target is None) == is_out for edge in self.edges) for is_out in (False, True))
        return f"Circuit({len(self.tokens)} tokens, {into} edges into the set, {out} to a margin of {self.margin:+.3f})"

    def to_pandas(self) -> pd.DataFrame:
        """One row an edge: source, target, their tokens, predicted and measured effect, whether drawn at random."""
        return pd.DataFrame([
            {"source": one.source.name, "at": self.tokens[one.source.position],
             "target": one.target.name if one.target else "margin",
             "target_at": self.tokens[one.target.position] if one.target else "", "predicted": one.predicted,
             "measured": one.measured, "random": one in self.random}
            for one in (*self.edges, *self.random)
        ])  # fmt: skip

    @property
    def checks(self) -> dict[str, EdgeCheck]:
        """Largest edges into the set, random edges into the same neurons, edges to the margin."""
        return {
            "largest edges into the set": _checked([edge for edge in self.edges if edge.target]),
            "random edges into the set": _checked(self.random),
            "edges to the margin": _checked([edge for edge in self.edges if not edge.target]),
        }

    @property
    def p(self) -> float:
        """One-sided p that the largest edges do more than random ones (Mann-Whitney, measured sizes)."""
        largest, random = ([abs(edge.measured) for edge in some if edge.target and edge.measured is not None]
                           for some in (self.edges, self.random))  # fmt: skip
        return float(mannwhitneyu(largest, random, alternative="greater").pvalue) if largest and random else 1.0


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

    Args:
        selection: neurons, the coupled ones for instance.
        example: a prompt with a safe and an unsafe answer.
        n_targets: of the selected neurons at their tokens, those with the largest effect on the margin are traced.
        n_sources: largest sources, neurons and attention heads at their tokens, of each target.
        n_checked: so many of the largest edges into the set are measured, and as many random ones; all to the margin.
        answer_tokens: first tokens of both answers; None takes all.
        seed: of the random edges.

    Raises:
        InputError: weights instead of neurons, an empty selection, an example without both answers, a number below 1.
    """
    if any(site.unit != "neuron" for site in selection.shapes) or not len(selection):
        raise InputError(f"a circuit is traced through neurons, at least one; got {selection!r}")
    if not example.paired:
        raise InputError(
            f"the example needs a safe and an unsafe answer; it has {', '.join(example.answers) or 'none'}"
        )
    for name, value in (("n_targets", n_targets), ("n_sources", n_sources), ("n_checked", n_checked)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    refuse_offloaded(model, "tracing a circuit")
    run = _Run(model, example, template, answer_tokens)
    with run.graph():
        margin = run.margin()[0]
        to_margin = run.attributed(margin, run.neuron_hooks)
        found = [
            Edge(Node("neuron", site.layer, index, column), None, float(to_margin[site.hook_name][column, index]))
            for site, units in selection.units.items() for index in units.tolist()
            for column in range(len(run.tokens))
        ]  # fmt: skip
        outward = sorted(found, key=lambda edge: -abs(edge.predicted))[:n_targets]
        inward, drawn = [], []
        generator = np.random.default_rng(seed)
        for edge in progress_bar(outward, desc="tracing", unit="neuron", leave=False):
            largest, random = run.sources(edge.source, n_sources, -(-n_checked // len(outward)), generator)
            inward, drawn = inward + largest, drawn + random
    inward.sort(key=lambda edge: -abs(edge.predicted))
    checked = run.measured([*outward, *inward[:n_checked], *drawn[:n_checked]])
    n_out, n_in = len(outward), len(inward[:n_checked])
    return Circuit(
        run.tokens, run.n_prompt, run.n_safe, float(margin.detach()),
        (*checked[:n_out], *checked[n_out : n_out + n_in], *inward[n_checked:]), tuple(checked[n_out + n_in :]),
    )  # fmt: skip


class _Run:
    """One example as two sequences, prompt with either answer; columns are what both have in common, once."""

    def __init__(self, model: HookedModel, example: Example, template: Template, answer_tokens: int | None) -> None:
        tokenizer = native_tokenizer(model)
        answers = [example.answers["safe"], example.answers["unsafe"]]
        self.encoded = encode(tokenizer, example.prompt, answers, template=template, answer_tokens=answer_tokens,
                              n_ctx=model.cfg.n_ctx)  # fmt: skip
        prompt, (safe, unsafe) = self.encoded.prompt, self.encoded.answers
        self.model, self.n_prompt, self.n_safe = model, len(prompt), len(safe)
        self.tokens = tuple(str(tokenizer.decode([token])) for token in (*prompt, *safe, *unsafe))
        self.n_heads = int(model.cfg.n_heads)
        layers = range(int(model.cfg.n_layers))
        self.neuron_hooks = [Site(layer, "neurons").hook_name for layer in layers]
        self.head_hooks = [f"blocks.{layer}.attn.hook_z" for layer in layers]
        self.held: dict[str, Tensor] = {}
        self.batch = self._batch(1)

    def _batch(self, n: int) -> Batch:
        return collate(paths([self.encoded] * n), device=self.model.cfg.device)

    def rows(self, column: int) -> tuple[tuple[int, ...], int]:
        """Which of the two sequences a column is in, and where."""
        if column < self.n_prompt:
            return (0, 1), column
        safe = column < self.n_prompt + self.n_safe
        return ((0,), column) if safe else ((1,), column - self.n_safe)

    @contextmanager
    def graph(self) -> Iterator[None]:
        """While open, the activations of one pass are held with their graph."""

        def keep(name: str) -> Callable[..., Tensor]:
            def hook(activation: Tensor, hook: object) -> Tensor:
                if not activation.requires_grad:
                    activation.requires_grad_(True)
                self.held[name] = activation
                return activation

            return hook

        hooks = [(name, keep(name)) for name in (*self.neuron_hooks, *self.head_hooks)]
        wanted = {one: one.requires_grad for one in self.model.parameters()}
        try:
            for one in wanted:
                one.requires_grad_(False)
            with torch.enable_grad(), self.model.hooks(fwd_hooks=hooks), answer_positions(self.model, self.batch):
                self.logits = forward(self.model, self.batch)[0].float()
                yield
        finally:
            self.held.clear()
            for one, before in wanted.items():
                one.requires_grad_(before)

    def margin(self, logits: Tensor | None = None, batch: Batch | None = None) -> Float[Tensor, " example"]:
        """The margin of every pair of sequences of a batch."""
        logits, batch = (self.logits, self.batch) if logits is None or batch is None else (logits, batch)
        log_prob = logits.log_softmax(-1).gather(-1, batch.target[:, None])[:, 0]
        n = int(batch.answer.max()) + 1
        total = torch.zeros(n, device=log_prob.device).index_add(0, batch.answer, log_prob)
        mean = total / torch.bincount(batch.answer, minlength=n)
        return mean[0::2] - mean[1::2]

    def columns(self, value: Tensor) -> Float[Tensor, "column unit"]:
        """What belongs to both sequences as one row a column; the prompt's two copies are added."""
        safe, unsafe = value
        return torch.cat([(safe + unsafe)[: self.n_prompt], safe[self.n_prompt : self.n_prompt + self.n_safe],
                          unsafe[self.n_prompt : len(self.tokens) - self.n_safe]])  # fmt: skip

    def attributed(self, target: Tensor, hooks: Sequence[str]) -> dict[str, Float[Tensor, "column unit"]]:
        """First-order effect on the target of setting each unit at each column to 0."""
        held = [self.held[name] for name in hooks]
        gradients = torch.autograd.grad(target, held, retain_graph=True, allow_unused=True)
        found = {}
        for name, activation, gradient in zip(hooks, held, gradients, strict=True):
            product = torch.zeros_like(activation) if gradient is None else -gradient * activation.detach()
            product = product.reshape(*self.batch.tokens.shape, -1).float()
            if name in self.head_hooks:
                product = product.unflatten(-1, (self.n_heads, -1)).sum(-1)
            found[name] = self.columns(product)
        return found

    def sources(self, target: Node, n: int, n_random: int, generator: np.random.Generator) -> list[list[Edge]]:
        """The neurons and heads, at their tokens, that do most to a neuron at its own (share of its activation); and
        some drawn at random from all that come before it.
        """
        rows, position = self.rows(target.position)
        held = self.held[self.neuron_hooks[target.layer]].reshape(*self.batch.tokens.shape, -1)
        value = held[rows[0], position, target.index]
        effects = self.attributed(value, [*self.neuron_hooks[: target.layer], *self.head_hooks[: target.layer + 1]])
        scale = float(value.detach().abs()) or 1.0
        columns = [one for one in range(target.position + 1) if one < self.n_prompt or self.rows(one)[0] == rows]

        def edge(name: str, column: int, unit: int) -> Edge:
            kind = "head" if name in self.head_hooks else "neuron"
            source = Node(kind, int(name.split(".")[1]), unit, column)
            return Edge(source, target, float(effects[name][column, unit]) / scale)

        largest = []
        for name, effect in effects.items():
            top = effect[columns].abs().flatten().topk(min(n, effect[columns].numel())).indices.tolist()
            largest += [edge(name, columns[i // effect.shape[1]], i % effect.shape[1]) for i in top]
        names, sizes = list(effects), np.array([effect.shape[1] for effect in effects.values()])
        random = [
            edge(names[hook], int(generator.choice(columns)), int(generator.integers(sizes[hook])))
            for hook in generator.choice(len(names), n_random, p=sizes / sizes.sum())
        ]
        return [sorted(largest, key=lambda one: -abs(one.predicted))[:n], random]

    @torch.inference_mode()
    def measured(self, edges: Sequence[Edge]) -> list[Edge]:
        """The edges with what setting their sources to 0 really does."""
        before_margin, before = self._effects([None], [edge.target for edge in edges if edge.target])
        per_batch, found = _ROWS // 2, []
        for start in progress_bar(range(0, len(edges), per_batch), desc="intervening", unit="batch", leave=False):
            some = edges[start : start + per_batch]
            margins, values = self._effects(
                [edge.source for edge in some], [edge.target for edge in some if edge.target]
            )
            for i, edge in enumerate(some):
                if edge.target is None:
                    change = float(margins[i] - before_margin[0])
                else:
                    was = float(before[edge.target][0])
                    change = (float(values[edge.target][i]) - was) / (abs(was) or 1.0)
                found.append(replace(edge, measured=change))
        return found

    def _effects(
        self, silenced: Sequence[Node | None], read: Sequence[Node]
    ) -> tuple[Float[Tensor, " intervention"], Mapping[Node, Float[Tensor, " intervention"]]]:
        """Margins, and activations of some nodes, one an intervention."""
        batch, values = self._batch(len(silenced)), {}
        cuts: dict[str, list[tuple[int, Node]]] = {}
        for i, node in enumerate(silenced):
            if node:
                hooks = self.head_hooks if node.kind == "head" else self.neuron_hooks
                cuts.setdefault(hooks[node.layer], []).append((i, node))

        def cut(name: str) -> Callable[..., Tensor]:
            def hook(activation: Tensor, hook: object) -> Tensor:
                changed = activation.clone()
                flat = changed.view(*batch.tokens.shape, -1)
                for i, node in cuts[name]:
                    rows, position = self.rows(node.position)
                    width = flat.shape[-1] // self.n_heads if node.kind == "head" else 1
                    for row in rows:
                        flat[2 * i + row, position, node.index * width : (node.index + 1) * width] = 0
                return changed

            return hook

        def keep(node: Node) -> Callable[..., None]:
            rows, position = self.rows(node.position)

            def hook(activation: Tensor, hook: object) -> None:
                flat = activation.reshape(*batch.tokens.shape, -1)
                values[node] = flat[rows[0] :: 2, position, node.index].float()

            return hook

        hooks = [(name, cut(name)) for name in cuts]
        hooks += [(self.neuron_hooks[node.layer], keep(node)) for node in dict.fromkeys(read)]
        with self.model.hooks(fwd_hooks=hooks), answer_positions(self.model, batch):
            return self.margin(forward(self.model, batch)[0].float(), batch), values


def _checked(edges: Sequence[Edge]) -> EdgeCheck:
    pairs = np.array([(edge.predicted, edge.measured) for edge in edges if edge.measured is not None])
    if len(pairs) < 3 or not all(np.ptp(pairs, axis=0)):
        return EdgeCheck(len(pairs), float("nan"), float(np.abs(pairs[:, 1]).mean()) if len(pairs) else float("nan"))
    return EdgeCheck(len(pairs), float(np.asarray(spearmanr(*pairs.T))[0]), float(np.abs(pairs[:, 1]).mean()))
