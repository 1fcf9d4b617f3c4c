"""What a model does on the test split: margins of behaviours, loss on general text, and its distance to the original.

Prompts with their answers go through the model in batches. What an answer's tokens gave is put where the answer stands
among all, so that no order of batches shows in a result.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.editing.ablation import refuse_foreign
from dean_interp.errors import InputError, refuse_below_one
from dean_interp.evaluation.measurement import BehaviourMeasurement, Measurement
from dean_interp.information.activations import activations_of, hooks_of
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

    Args:
        behaviours: a pair is measured on both its answers, other examples on their one answer.
        original: an earlier measurement. The KL divergence to it is taken for the behaviours that it holds, which costs
            a second unembedding; for the others `kl` stays 0.
        answer_tokens: measure only that many first tokens of each answer; None takes all.
        neurons: also keep these neurons' activations at the ends of the paired behaviours' prompts and of their
            (measured) answers.
        batch_tokens: padded tokens a batch holds at most.
        unfinished: keeps what the finished batches gave, one part a behaviour; a killed call goes on from there.

    Raises:
        InputError: a calibration split, scored prompts, two behaviours of one name, other examples or neurons.
    """
    refuse_scored(model, behaviours)
    known = original.behaviours if original else {}
    _check(behaviours, known)
    measured, recorded, examples = {}, [], []
    for behaviour in behaviours:
        encoded = encoded_answers(model, behaviour, template=template, answer_tokens=answer_tokens)
        # Activations are kept at the ends of a pair's prompt and of both its answers.
        with _recording(model, behaviour, neurons) as activations:
            tokens, n_tokens = _run(
                model,
                encoded,
                name=behaviour.name,
                original=known[behaviour.name].final if behaviour.name in known else None,
                recorded=activations,
                batch_tokens=batch_tokens,
                unfinished=unfinished.part(behaviour.name) if unfinished else None,
            )
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
        then = known.get(behaviour.name)
        if then is not None and then.prompts != tuple(behaviour.prompts):
            raise InputError("`original` was measured on other examples; KL needs the same ones")


@contextmanager
def _recording(model: HookedModel, behaviour: Behaviour, neurons: Selection | None) -> Iterator[EndActivations | None]:
    """While open, the neurons' activations at text ends are kept in what is yielded; None where none are wanted."""
    if neurons is None or not behaviour.paired:
        yield None
        return
    refuse_foreign(model, neurons)
    n = len(behaviour)
    with end_activations(model, hooks_of(neurons), n_prompts=n, n_answers=2 * n) as activations:
        yield activations


def encoded_answers(
    model: HookedModel, behaviour: Behaviour, *, template: Template, answer_tokens: int | None
) -> list[Encoded]:
    """What is measured of a behaviour: each prompt with its two answers, or its one."""
    refuse_below_one(answer_tokens=answer_tokens)
    if behaviour.paired:
        answers = [[example.answers["safe"], example.answers["unsafe"]] for example in behaviour.examples]
    else:
        answers = [[answer] for answer in behaviour.responses]
    tokenizer = native_tokenizer(model)
    encoded = []
    for prompt, its_answers in zip(behaviour.prompts, answers, strict=True):
        tokens = encode(
            tokenizer,
            prompt,
            its_answers,
            template=template,
            answer_tokens=answer_tokens,
            n_ctx=model.cfg.n_ctx,
        )
        encoded.append(tokens)
    return encoded


@torch.inference_mode()
def _run(
    model: HookedModel,
    encoded: Sequence[Encoded],
    *,
    name: str,
    original: Float[Tensor, "answer_token d_model"] | None,
    recorded: EndActivations | None,
    batch_tokens: int,
    unfinished: Unfinished | None,
) -> tuple[AnswerTokens, list[list[int]]]:
    """Every answer token, in the order of the answers' numbers whatever the batches were; each answer's length."""
    n_tokens = [list(map(len, tokens.answers)) for tokens in encoded]
    # An answer's tokens stand behind those of all answers before it.
    lengths = [n for counts in n_tokens for n in counts]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    n_total = int(starts[-1])
    if original is not None and len(original) != n_total:
        raise InputError(
            f"`original` holds {len(original)} answer tokens of '{name}', now there are {n_total}: KL needs the same "
            "template and answer_tokens"
        )
    d_model, _ = unembedding_shape(model)
    log_prob, kl = torch.zeros(n_total), torch.zeros(n_total)
    final = torch.zeros(n_total, d_model)
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
        then = None
        if original is not None:
            then = original[place].to(batch.tokens.device)
        with unhooked(model):
            out = answer_log_probs(model, batch, original=then)
        log_prob[place] = out.log_prob.cpu()
        final[place] = out.final.float().cpu()
        if out.kl is not None:
            kl[place] = out.kl.cpu()
    return AnswerTokens(log_prob, kl, final), n_tokens


def _places(answer: Int[Tensor, " answer_token"], starts: Int[Tensor, " answer"]) -> Int[Tensor, " answer_token"]:
    """Where each answer token of a batch stands among all: its answer's start, plus its place in the answer."""
    first = torch.ones_like(answer, dtype=torch.bool)
    first[1:] = answer[1:] != answer[:-1]
    row = torch.arange(len(answer))
    row_of_first = row.masked_fill(~first, 0).cummax(0).values
    return starts[answer] + row - row_of_first


def _summary(behaviour: Behaviour, tokens: AnswerTokens, n_tokens: list[list[int]]) -> BehaviourMeasurement:
    """Means over each answer's tokens, in float64."""
    counts = torch.tensor(n_tokens)
    n_answers = counts.numel()
    answer_of_token = torch.repeat_interleave(torch.arange(n_answers), counts.flatten())

    def per_answer(values: Tensor) -> Tensor:
        sums = torch.zeros(n_answers, dtype=torch.float64)
        sums.index_add_(0, answer_of_token, values.double())
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
