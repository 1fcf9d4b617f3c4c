"""What activations are over the tokens of safe and of unsafe answers: one forward pass, kept a row an answer.

Flipped labels only exchange the two rows of an example, so nulls need no pass of their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.arms.arm import ArmExamples
from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.files import read_tensors, write_tensors
from dean_interp.models.load import HookedModel, model_fingerprint
from dean_interp.models.loss import answer_positions, batched, forward
from dean_interp.models.native_tokenizer import chat_parts
from dean_interp.models.neurons import are_routed, experts_at, read_neurons
from dean_interp.models.scored_prompts import note_scored
from dean_interp.models.sites import Site, residual_hook
from dean_interp.models.sizes import neuron_shapes, residual_width, site_shape
from dean_interp.models.supported import refuse_missing_hooks, refuse_not_finite
from dean_interp.models.tokens import Batch
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.resume import Unfinished
from dean_interp.scoring.preparation import ScoringConfig, batch_tokens_of, prepare
from dean_interp.study.store import fingerprint_of

Stream = Literal["residual", "neurons"]
"""The residual stream after the layers of `DEPTHS`, or the neurons of all layers."""
Summary = Literal["mean", "largest", "norm"]
DEPTHS = (0.25, 0.4, 0.55, 0.7)
"""Shares of the layers after which the residual stream is read."""
_SUMMARIES: dict[Stream, tuple[Summary, ...]] = {"residual": ("mean", "norm"), "neurons": ("mean", "largest")}
_FORMAT = "dean_interp.answer_statistics.1"


@dataclass(frozen=True)
class AnswerStatistics:
    """Summaries over the tokens of each answer, with the labels that a flip gives."""

    tensors: Mapping[str, Float[Tensor, "example answer unit"]]
    """By summary and hook point, as the labels are without a flip: the safe answer, then the unsafe one."""
    rows: Int[Tensor, " row"]
    """The examples that the flip leaves."""
    is_flipped: Bool[Tensor, " row"]
    """Whether safe and unsafe change roles."""

    def reached(self, site: Site) -> Float[Tensor, "row answer expert"]:
        """The share of each answer's tokens that are sent to each routed expert."""
        return self._of_rows(f"share/{site.hook_name}")

    def of(self, summary: Summary, hook_name: str) -> Float[Tensor, "row answer unit"]:
        """A summary of an activation over each answer's tokens, safe before unsafe: its `mean`, its `largest` value, or
        the mean `norm` of the whole vector (then there is one unit). Where a token is not sent to a neuron's expert,
        the activation is 0.
        """
        return self._of_rows(f"{summary}/{hook_name}")

    def _of_rows(self, name: str) -> Float[Tensor, "row answer _"]:
        values = self.tensors[name][self.rows]
        return torch.where(self.is_flipped[:, None, None], values.flip(1), values)


def layer_at(model: HookedModel, depth: float) -> int:
    """The layer that a share of the model's layers ends in, from 0."""
    return int(depth * len(model.blocks))


def answer_statistics(examples: ArmExamples, stream: Stream) -> tuple[AnswerStatistics, AnswerStatistics]:
    """Statistics of first and second: from their files, else read now.

    Raises:
        InputError: a behaviour without safe and unsafe answers, text that is too long, or files of another model or
            other data.
    """
    first, second = examples.scoring[:2]
    first_signs, second_signs = examples.flip or (None, None)
    of_first = _read_once(examples, first, stream)
    of_second = _read_once(examples, second, stream)
    return _labelled(of_first, first, first_signs), _labelled(of_second, second, second_signs)


def _labelled(
    tensors: Mapping[str, Tensor],
    behaviour: Behaviour,
    signs: Mapping[str, int] | None,
) -> AnswerStatistics:
    """The statistics of the topics that have a sign, with the labels that it gives; of all topics without signs."""
    rows, is_flipped = [], []
    for row, example in enumerate(behaviour.examples):
        sign = 1 if signs is None else signs.get(example.cluster)
        if sign is not None:
            rows.append(row)
            is_flipped.append(sign == -1)
    if not rows:
        raise InputError(f"the flip leaves no topic of '{behaviour.name}'")
    return AnswerStatistics(tensors, torch.tensor(rows), torch.tensor(is_flipped))


@dataclass(frozen=True)
class _Facts:
    fingerprint: str


def _read_once(examples: ArmExamples, behaviour: Behaviour, stream: Stream) -> dict[str, Tensor]:
    """The unflipped statistics, from their file in the folder that all arms share, else made and written there."""
    if not behaviour.paired:
        raise InputError(f"every prompt of '{behaviour.name}' needs a safe and an unsafe answer")
    model = examples.model
    template = examples.config.model.template
    parts = [model_fingerprint(model), behaviour.fingerprint, template, stream, str(DEPTHS)]
    if template == "chat":
        parts += chat_parts(model)
    fingerprint = fingerprint_of(*parts)
    path = examples.folder / "answers" / f"{behaviour.name}.{stream}.safetensors"
    unfinished = Unfinished(path.with_suffix(".unfinished"), fingerprint)
    if not path.is_file():
        tensors = _read(
            model,
            behaviour,
            widths=_hook_widths(model, stream),
            summaries=_SUMMARIES[stream],
            config=ScoringConfig(template=template, target="margin", batch_tokens=examples.config.score_tokens),
            unfinished=unfinished,
        )
        write_tensors(path, _FORMAT, tensors, {"fingerprint": fingerprint})
    unfinished.discard()
    tensors, facts = read_tensors(path, _FORMAT, _Facts)
    if facts.fingerprint != fingerprint:
        raise InputError(f"{path} was made with another model or other data: choose another folder")
    note_scored(model, behaviour.prompt_hashes)
    return tensors


def _hook_widths(model: HookedModel, stream: Stream) -> dict[str, int]:
    """The hook points to read, and how many units each has."""
    if stream == "residual":
        width = residual_width(model)
        widths = {residual_hook(layer_at(model, depth)): width for depth in DEPTHS}
        refuse_missing_hooks(model, widths, "reading the residual stream")
        return widths
    return {site.hook_name: width for site, (width,) in neuron_shapes(model).items()}


@own_torch_settings()
@torch.inference_mode()
def _read(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    widths: Mapping[str, int],
    summaries: tuple[Summary, ...],
    config: ScoringConfig,
    unfinished: Unfinished,
) -> dict[str, Tensor]:
    """The summaries of every answer, example by example, safe before unsafe."""
    refuse_not_finite(model)
    data = prepare(model, behaviour, config)
    n_rows = len(data.rows)
    rows = {}
    for summary in summaries:
        for name, width in widths.items():
            n_units = 1 if summary == "norm" else width
            rows[f"{summary}/{name}"] = torch.zeros(n_rows, n_units)
    for name in widths:
        site = experts_at(model, name)
        if site is not None:
            rows[f"share/{name}"] = torch.zeros(n_rows, site.n_experts)
    batches = batched(
        model,
        data.rows,
        batch_tokens=batch_tokens_of(model, config),
        label=f"reading answers of {behaviour.name}",
        unfinished=unfinished,
        sums=rows,
    )
    for batch in batches:
        hooks = [(name, _reader(model, name, batch, summaries, rows)) for name in widths]
        # No answer token has to be predicted, so nothing is unembedded.
        with model.hooks(fwd_hooks=hooks), answer_positions(model, batch.predicting_nothing()):
            forward(model, batch)
    return {name: values.reshape(len(behaviour), 2, -1) for name, values in rows.items()}


def _reader(
    model: HookedModel,
    name: str,
    batch: Batch,
    summaries: tuple[Summary, ...],
    rows: Mapping[str, Tensor],
) -> Callable[..., None]:
    """A hook that puts the summaries of a batch's answers into their rows."""
    site = experts_at(model, name)

    def keep(summary: str, by_row: Float[Tensor, "batch _"]) -> None:
        # Each row of a batch is a prompt and one answer.
        by_answer = by_row[batch.ended_row.to(by_row.device)]
        rows[f"{summary}/{name}"][batch.ended.cpu()] = by_answer.cpu()

    def read(activation: Tensor, hook: object) -> None:
        values = activation.detach()
        is_answer = batch.is_answer.to(values.device)
        if site is not None:
            (n_neurons,) = site_shape(model, site)
            # A token is sent to an expert where it is sent to the expert's first neuron.
            first_of_each = torch.arange(0, n_neurons, n_neurons // site.n_experts)
            is_sent = are_routed(model, site, first_of_each)
            keep("share", _mean(is_sent.float(), is_answer))
            values = read_neurons(model, site, values, torch.arange(n_neurons))
        # Some models (OPT) join batch and pos.
        values = values.reshape(*batch.tokens.shape, -1).float()
        for summary in summaries:
            keep(summary, _summary(values, is_answer, summary))

    return read


def _summary(
    values: Float[Tensor, "batch pos unit"],
    is_answer: Bool[Tensor, "batch pos"],
    summary: Summary,
) -> Float[Tensor, "batch _"]:
    """One row a text, over the tokens of its answer."""
    if summary == "largest":
        of_answers = values.masked_fill(~is_answer[..., None], -torch.inf)
        return of_answers.amax(1)
    if summary == "norm":
        values = values.norm(dim=-1, keepdim=True)
    return _mean(values, is_answer)


def _mean(
    values: Float[Tensor, "batch pos unit"],
    is_answer: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch unit"]:
    total = values.masked_fill(~is_answer[..., None], 0.0).sum(1)
    return total / is_answer.sum(1, keepdim=True)
