"""The model's own answers in one state, from the hooked model or from a server: given once and kept as a file."""

import logging
from collections.abc import Sequence
from pathlib import Path

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.evaluation.served import Served, generate_served
from dean_interp.models.adapters import adapter_of
from dean_interp.models.generate import generate, generate_to
from dean_interp.models.load import HookedModel
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.scored_prompts import refuse_scored
from dean_interp.resume import Unfinished
from dean_interp.study.settings import AnswerConfig
from dean_interp.study.store import State, Store, file_name

log = logging.getLogger(__name__)

N_COMPARED, N_BEGIN = 8, 3
"""Prompts whose served answers are compared with the model's own, and by how many of their first new tokens."""
AnswersByLength = dict[int, dict[str, list[str]]]
"""By length (new tokens) and by set."""


def answers_of(
    store: Store,
    model: HookedModel | None,
    state: State,
    behaviours: Sequence[Behaviour],
    config: AnswerConfig,
    *,
    server: Served | None = None,
) -> AnswersByLength:
    """Greedy answers to the prompts of every set, at every length.

    Args:
        model: None where the state's answers are known to be in the store.
        server: holds this state as a checkpoint, and answers in place of the model.

    Raises:
        InputError: prompts that were scored; a server that holds another checkpoint.
    """
    lengths = tuple(sorted(config.answer_lengths))

    def make(unfinished: Unfinished) -> AnswersByLength:
        assert model is not None, f"{state.title} did not answer"
        refuse_scored(model, behaviours)
        with state.applied(model):
            if server is None:
                return _generated(
                    store, model, state=state, behaviours=behaviours, config=config, unfinished=unfinished
                )
            return _served(store, model, state=state, behaviours=behaviours, lengths=lengths, server=server)

    depends_on = [behaviour.fingerprint for behaviour in behaviours]
    depends_on += [state.fingerprint, str(lengths), str(config.answer_batch)]
    depends_on += [server.base_url, str(server.model)] if server else []
    return store.record(f"{_path(state)}.json", depends_on, AnswersByLength, make)


def _path(state: State) -> str:
    return f"answers/{file_name(state.title)}"


def _generated(
    store: Store,
    model: HookedModel,
    state: State,
    behaviours: Sequence[Behaviour],
    config: AnswerConfig,
    unfinished: Unfinished,
) -> AnswersByLength:
    """The model's own answers."""
    answers = generate_to(
        model,
        _prompts(behaviours),
        lengths=tuple(sorted(config.answer_lengths)),
        template=store.template,
        batch_size=config.answer_batch,
        label=f"answering: {state.title}",
        unfinished=unfinished,
    )
    return {length: _by_set(behaviours, given) for length, given in answers.items()}


def _served(
    store: Store,
    model: HookedModel,
    state: State,
    behaviours: Sequence[Behaviour],
    lengths: tuple[int, ...],
    server: Served,
) -> AnswersByLength:
    """The answers of a server that holds the state as a checkpoint."""
    prompts = _prompts(behaviours)
    # The replies that the comparison got are not asked for again.
    replies = store.folder / f"{_path(state)}.replies.jsonl"
    _refuse_other_checkpoint(server, store, model=model, prompts=prompts[:N_COMPARED], lengths=lengths, replies=replies)
    answers = generate_served(
        server,
        native_tokenizer(model),
        prompts,
        lengths=lengths,
        template=store.template,
        ends=adapter_of(model).end_tokens(native_tokenizer(model)),
        replies=replies,
    )
    return {length: _by_set(behaviours, given) for length, given in answers.items()}


def _prompts(behaviours: Sequence[Behaviour]) -> list[str]:
    return [prompt for behaviour in behaviours for prompt in behaviour.prompts]


def _by_set(behaviours: Sequence[Behaviour], answers: Sequence[str]) -> dict[str, list[str]]:
    by_set = {}
    start = 0
    for behaviour in behaviours:
        end = start + len(behaviour)
        by_set[behaviour.name] = list(answers[start:end])
        start = end
    return by_set


def _refuse_other_checkpoint(
    server: Served,
    store: Store,
    model: HookedModel,
    prompts: Sequence[str],
    lengths: tuple[int, ...],
    replies: Path,
) -> None:
    """Raise `InputError` where no served answer begins as the model's own: a wrong address shows nowhere else."""
    longest, tokenizer = max(lengths), native_tokenizer(model)
    served = generate_served(
        server,
        tokenizer,
        prompts,
        lengths=lengths,
        template=store.template,
        ends=adapter_of(model).end_tokens(tokenizer),
        replies=replies,
    )[longest]
    own = generate(model, prompts, max_new_tokens=min(N_BEGIN, longest), template=store.template)
    n_alike = 0
    for theirs, ours in zip(served, own, strict=True):
        n_alike += theirs.startswith(ours) and bool(theirs) == bool(ours)
    log.info("%s: %d of %d served answers begin as the model's own", server.base_url, n_alike, len(prompts))
    if not n_alike:
        # The right checkpoint may come to the same address: it is not to be judged by these replies.
        replies.unlink(missing_ok=True)
        raise InputError(
            f"{server.base_url} holds another checkpoint: none of its first {len(prompts)} answers begins as the "
            f"model's own (the first there: {served[0][:40]!r}, here: {own[0]!r})"
        )
