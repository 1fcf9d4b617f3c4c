"""What a model does on the test split: margins of behaviours, loss on general text, and its distance to the original.

The likelihood margin `log p(safe) - log p(unsafe)`, each per token, needs no judge: it says which of two written
answers the model finds likelier, and moves before any word of its own does.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.frames import Framed
from dean_interp.information.activations import Activations, activations_of, hooks_of
from dean_interp.models.end_activations import EndActivations, end_activations
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import AnswerTokens, answer_log_probs, batched, shares_prompts
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.scored_prompts import refuse_scored
from dean_interp.models.sizes import unembedding_shape
from dean_interp.models.tokens import Encoded, Template, encode, paths, trees
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.models.unhooked import unhooked, unhooked_is_right
from dean_interp.resume import Unfinished
from dean_interp.selection.selection import Selection


@dataclass(frozen=True)
class BehaviourMeasurement(Framed):
    """One behaviour's answers, as the model sees them. The answers of a pair stand safe first."""

    name: str
    prompts: tuple[str, ...]
    log_prob: Float[Tensor, "example answer"]
    """Mean log-probability per token (nats) of each answer."""
    kl: Float[Tensor, "example answer"]
    """Mean over an answer's tokens of KL(original || now), nats; 0 where there is no original to compare with."""
    n_tokens: Int[Tensor, "example answer"]
    token_log_prob: Float[Tensor, " token"] = field(repr=False)
    """Log-probability (nats) of every answer token, answer after answer."""
    final: Float[Tensor, "kept_token d_model"] = field(repr=False)
    """What the unembedding read at every answer token: with it, a later measurement knows its KL to this one. Empty
    where it was not kept."""

    def __repr__(self) -> str:
        margin = f"mean margin {float(self.margin.mean()):+.3f}, " if self.paired else ""
        said = f"{len(self.prompts)} prompts, {margin}perplexity {self.perplexity:.1f}"
        return f"BehaviourMeasurement({self.name!r}, {said})"

    def to_pandas(self) -> pd.DataFrame:
        """One row a prompt: log-probabilities per token, KL, and the margin where there are two answers."""
        kinds = ("safe", "unsafe") if self.paired else ("answer",)
        table: dict[str, object] = {"behaviour": self.name, "prompt": self.prompts}
        for i, kind in enumerate(kinds):
            table |= {f"log_prob_{kind}": self.log_prob[:, i].numpy(), f"kl_{kind}": self.kl[:, i].numpy()}
        return pd.DataFrame(table | ({"margin": self.margin.numpy()} if self.paired else {}))

    @property
    def paired(self) -> bool:
        """Whether there is a margin."""
        return self.log_prob.shape[1] == 2

    @property
    def margin(self) -> Float[Tensor, " example"]:
        """`log p(safe) - log p(unsafe)`, each per token (nats), one a prompt; positive: safe is likelier."""
        if not self.paired:
            raise InputError(f"'{self.name}' has one answer a prompt, so it has no margin")
        return self.log_prob[:, 0] - self.log_prob[:, 1]

    def margin_of_tokens(self, first: int, last: int | None = None) -> Float[Tensor, " example"]:
        """The margin on tokens `first` to `last` (from 1; None: to the end) of both answers, nats per token.

        NaN where an answer has no such token.
        """
        if not self.paired:
            raise InputError(f"'{self.name}' has one answer a prompt, so it has no margin")
        means = []
        for tokens in self.token_log_prob.double().split(self.n_tokens.flatten().tolist()):
            # The mean of no token is NaN.
            means.append(tokens[first - 1 : last].mean())
        per_answer = torch.stack(means).reshape(self.n_tokens.shape)
        return per_answer[:, 0] - per_answer[:, 1]

    @property
    def perplexity(self) -> float:
        """Perplexity per token over all answers of the behaviour."""
        return float(torch.exp(-(self.log_prob * self.n_tokens).sum() / self.n_tokens.sum()))

    @property
    def mean_kl(self) -> float:
        """KL(original || now) per answer token, nats."""
        return float((self.kl * self.n_tokens).sum() / self.n_tokens.sum())


@dataclass(frozen=True)
class Measurement(Framed):
    """Several behaviours, measured in one state of the model."""

    behaviours: Mapping[str, BehaviourMeasurement]
    activations: Activations | None = field(default=None, repr=False)
    """Activations at the ends of the paired behaviours' prompts and answers, where they were asked for."""

    def __getitem__(self, name: str) -> BehaviourMeasurement:
        return self.behaviours[name]

    def __repr__(self) -> str:
        return f"Measurement({', '.join(map(repr, self.behaviours.values()))})"

    def to_pandas(self) -> pd.DataFrame:
        """One row a prompt of every behaviour."""
        return pd.concat([one.to_pandas() for one in self.behaviours.values()], ignore_index=True)


@own_torch_settings()
def measure(
    model: HookedModel,
    behaviours: Sequence[Behaviour],
    *,
    original: Measurement | None = None,
    template: Template = "chat",
    answer_tokens: int | None = None,
    neurons: Selection | None = None,
    batch_tokens: int = 1024,
    unfinished: Unfinished | None = None,
) -> Measurement:
    """Measure behaviours in the model's present state (inside `ablate`: of the ablated model).

    A pair is measured on both its answers, other examples on their one answer.

    Args:
        original: an earlier measurement. The KL divergence to it is taken for the behaviours that it holds, which costs
            a second unembedding; for the others `kl` stays 0.
        answer_tokens: measure only that many first tokens of each answer; None takes all.
        neurons: also keep these neurons' activations at the ends of the paired behaviours' prompts and of their
            (measured) answers.
        batch_tokens: padded tokens a batch holds at most.
        unfinished: keeps what the finished batches gave, one part a behaviour; a killed call goes on from there.

    Raises:
        InputError: a calibration split, prompts that were scored, two behaviours of one name, or an `original` of
            other examples.
    """
    refuse_scored(model, behaviours)
    known = original.behaviours if original else {}
    _check(behaviours, known)
    measured, recorded, examples = {}, [], []
    for behaviour in behaviours:
        encoded = encoded_answers(model, behaviour, template=template, answer_tokens=answer_tokens)
        then = known[behaviour.name].final if behaviour.name in known else None
        saved = unfinished.part(behaviour.name) if unfinished else None
        # Activations are kept at the ends of a pair's prompt and of both its answers.
        with _recording(model, behaviour, neurons) as activations:
            tokens, n_tokens = _run(model, encoded, then, activations, batch_tokens, behaviour.name, saved)
        measured[behaviour.name] = _summary(behaviour, tokens, n_tokens)
        if activations is not None:
            recorded.append(activations)
            examples += [(behaviour.name, example) for example in behaviour.examples]
    if neurons is None or not recorded:
        return Measurement(measured)
    return Measurement(measured, activations_of(recorded, examples, neurons))


def _check(behaviours: Sequence[Behaviour], known: Mapping[str, BehaviourMeasurement]) -> None:
    names = [behaviour.name for behaviour in behaviours]
    if len(set(names)) < len(names):
        raise InputError(f"each behaviour needs a name of its own (load_behaviour(..., name=...)), got {names}")
    for behaviour in behaviours:
        if behaviour.name in known and known[behaviour.name].prompts != tuple(behaviour.prompts):
            raise InputError("`original` was measured on other examples; KL needs the same ones")


@contextmanager
def _recording(model: HookedModel, behaviour: Behaviour, neurons: Selection | None) -> Iterator[EndActivations | None]:
    """While open, the neurons' activations at text ends are kept in what is yielded; None where none are wanted."""
    if neurons is None or not behaviour.paired:
        yield None
        return
    n = len(behaviour)
    with end_activations(model, hooks_of(neurons), n_prompts=n, n_answers=2 * n) as activations:
        yield activations


def encoded_answers(
    model: HookedModel, behaviour: Behaviour, *, template: Template, answer_tokens: int | None
) -> list[Encoded]:
    """What is measured of a behaviour: each prompt with its two answers, or its one."""
    if answer_tokens is not None and answer_tokens < 1:
        raise InputError(f"answer_tokens must be at least 1, got {answer_tokens}")
    if behaviour.paired:
        answers = [[one.answers["safe"], one.answers["unsafe"]] for one in behaviour.examples]
    else:
        answers = [[answer] for answer in behaviour.responses]
    tokenizer = native_tokenizer(model)
    encoded = []
    for prompt, its_answers in zip(behaviour.prompts, answers, strict=True):
        encoded.append(
            encode(
                tokenizer,
                prompt,
                its_answers,
                template=template,
                answer_tokens=answer_tokens,
                n_ctx=model.cfg.n_ctx,
            )
        )
    return encoded


@torch.inference_mode()
def _run(
    model: HookedModel,
    encoded: Sequence[Encoded],
    original: Float[Tensor, "answer_token d_model"] | None,
    recorded: EndActivations | None,
    batch_tokens: int,
    name: str,
    unfinished: Unfinished | None,
) -> tuple[AnswerTokens, list[list[int]]]:
    """Every answer token, in the order of the answers' numbers whatever the batches were."""
    n_tokens = [[len(answer) for answer in one.answers] for one in encoded]
    starts = torch.tensor([0, *(n for counts in n_tokens for n in counts)]).cumsum(0)
    n_total = int(starts[-1])
    if original is not None and len(original) != n_total:
        raise InputError(
            f"`original` holds {len(original)} answer tokens of '{name}', now there are {n_total}: KL needs the same "
            "template and answer_tokens"
        )
    log_prob, kl = torch.zeros(n_total), torch.zeros(n_total)
    final = torch.zeros(n_total, unembedding_shape(model)[0])
    # Both are asked before a batch is recorded, since they may run passes of their own.
    rows = trees(encoded) if shares_prompts(model, encoded) else paths(encoded)
    unhooked_is_right(model)
    sums = {"log_prob": log_prob, "kl": kl, "final": final}
    if recorded is not None:
        sums |= recorded.sums
    batches = batched(
        model, rows, batch_tokens=batch_tokens, label=f"measuring {name}", unfinished=unfinished, sums=sums
    )
    for batch in batches:
        if recorded is not None:
            recorded.batch = batch
        place = _places(batch.answer.cpu(), starts)
        then = original[place].to(batch.tokens.device) if original is not None else None
        with unhooked(model):
            out = answer_log_probs(model, batch, original=then)
        log_prob[place], final[place] = out.log_prob.cpu(), out.final.float().cpu()
        if out.kl is not None:
            kl[place] = out.kl.cpu()
    return AnswerTokens(log_prob, kl, final), n_tokens


def _places(answer: Int[Tensor, " answer_token"], starts: Int[Tensor, " answer"]) -> Int[Tensor, " answer_token"]:
    """Where each answer token of a batch stands among all: its answer's start, plus its place in the answer."""
    first = torch.ones_like(answer, dtype=torch.bool)
    first[1:] = answer[1:] != answer[:-1]
    index = torch.arange(len(answer))
    return starts[answer] + index - index.masked_fill(~first, 0).cummax(0).values


def _summary(behaviour: Behaviour, tokens: AnswerTokens, n_tokens: list[list[int]]) -> BehaviourMeasurement:
    counts = torch.tensor(n_tokens)
    owner = torch.repeat_interleave(torch.arange(counts.numel()), counts.flatten())

    def per_answer(values: Tensor) -> Tensor:
        sums = torch.zeros(counts.numel(), dtype=torch.float64).index_add(0, owner, values.double())
        return sums.reshape(counts.shape) / counts

    assert tokens.kl is not None
    return BehaviourMeasurement(
        name=behaviour.name,
        prompts=tuple(behaviour.prompts),
        log_prob=per_answer(tokens.log_prob),
        kl=per_answer(tokens.kl),
        n_tokens=counts,
        token_log_prob=tokens.log_prob,
        final=tokens.final,
    )
