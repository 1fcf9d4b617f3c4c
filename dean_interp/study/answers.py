"""What the model says in its own words: answers before and after, judged, and whether benign questions get one."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dean_interp.data.examples import Behaviour
from dean_interp.editing.ablation import ablate
from dean_interp.errors import InputError
from dean_interp.evaluation.judges.lexical import is_cautious, judge_name, lexical_labels
from dean_interp.evaluation.judges.protocol import LABELS
from dean_interp.evaluation.served import Served, generate_served
from dean_interp.files import read_json, write_text
from dean_interp.models.generate import generate, generate_to
from dean_interp.models.load import HookedModel, native_tokenizer
from dean_interp.models.scored_prompts import refuse_scored
from dean_interp.models.sites import Unit
from dean_interp.models.tokens import Template
from dean_interp.resume import Unfinished
from dean_interp.selection.selection import Selection
from dean_interp.statistics import clustered_interval
from dean_interp.study.config import StudyConfig
from dean_interp.study.results import AnswerSet, Spoken, SpokenState

log = logging.getLogger(__name__)

CAUTION = "caution"
N_COMPARED, N_BEGIN = 8, 3  # prompts whose served answers are compared with the model's own, by their first new tokens


@dataclass(frozen=True)
class Asking:
    """How answers are asked for."""

    lengths: tuple[int, ...]
    """New tokens; the longest is generated, the others are its beginnings."""
    template: Template
    batch_size: int


@dataclass(frozen=True)
class _Given:
    """A file of answers: by length, then by set."""

    fingerprint: str
    answers: dict[int, dict[str, list[str]]]


def spoken(
    config: StudyConfig,
    folder: Path,
    model: HookedModel,
    sets: Sequence[Behaviour],
    benign: Sequence[Behaviour],
    states: Sequence[tuple[str, str, Unit | None, Selection | None]],
    *,
    fingerprint: str,
) -> Spoken:
    """Answers to every set of prompts in every state, judged.

    Args:
        sets: the behaviours whose prompts are answered.
        benign: the over-refusal sets.
        states: name, kind, unit and what is silenced (None: nothing); the original comes first.
        fingerprint: of the model and the data; files of another are refused.
    """
    behaviours = [*sets, *benign]
    refuse_scored(model, behaviours)
    how = Asking((config.max_new_tokens,), config.template, config.answer_batch)
    given = {name: answers_in(folder, model, behaviours, name, ablated, how, fingerprint)[config.max_new_tokens]
             for name, _, _, ablated in states}  # fmt: skip
    original = given[states[0][0]]
    judged = [
        SpokenState(
            name,
            kind,
            unit,
            tuple(_answer_set(one, one in benign, given[name][one.name], original[one.name]) for one in behaviours),
        )
        for name, kind, unit, _ in states
    ]
    return Spoken(judge_name(), {one.name: tuple(one.prompts) for one in behaviours}, tuple(judged))


def answers_in(
    folder: Path,
    model: HookedModel,
    behaviours: Sequence[Behaviour],
    name: str,
    ablated: Selection | None,
    how: Asking,
    fingerprint: str,
    *,
    served: Served | None = None,
) -> dict[int, dict[str, list[str]]]:
    """One state's answers by length and set: from its file, else given and written there.

    They are the model's own, or those of a server that holds this state as a checkpoint.
    """
    path = folder / f"{name.replace(' ', '_')}.json"
    known = [fingerprint, *(one.fingerprint for one in behaviours), ablated.fingerprint if ablated else "nothing"]
    known += [str(how), *([served.base_url, str(served.model)] if served else [])]
    whole = hashlib.sha256(" ".join(known).encode()).hexdigest()[:16]
    if path.is_file():
        there = read_json(path, _Given)
        if there.fingerprint != whole:
            raise InputError(f"{path} is of another model, other data, lengths or units: choose another folder")
        return there.answers
    unfinished = Unfinished(path.with_suffix(".unfinished"), whole)
    prompts = [prompt for one in behaviours for prompt in one.prompts]
    options = {"lengths": how.lengths, "template": how.template}
    with ablate(model, ablated) if ablated else nullcontext():
        if served is not None:
            options |= {"replies": path.with_suffix(".replies.jsonl")}
            _refuse_other_checkpoint(served, model, prompts[:N_COMPARED], options)
            flat = generate_served(served, native_tokenizer(model), prompts, **options)
        else:
            flat = generate_to(
                model, prompts, batch_size=how.batch_size, label=f"answering: {name}", unfinished=unfinished, **options
            )
    starts = np.cumsum([0, *map(len, behaviours)])
    answers = {
        length: {one.name: some[start : start + len(one)] for one, start in zip(behaviours, starts, strict=False)}
        for length, some in flat.items()
    }
    write_text(path, json.dumps({"fingerprint": whole, "answers": answers}, indent=1) + "\n")
    unfinished.discard()
    return answers


def _refuse_other_checkpoint(
    served: Served, model: HookedModel, prompts: Sequence[str], options: Mapping[str, Any]
) -> None:
    """Raise `InputError` where no served answer begins as the model's own: a wrong address shows nowhere else."""
    longest = max(options["lengths"])
    theirs = generate_served(served, native_tokenizer(model), prompts, **options)[longest]
    ours = generate(model, prompts, max_new_tokens=min(N_BEGIN, longest), template=options["template"])
    n_alike = sum(one.startswith(own) and bool(one) == bool(own) for one, own in zip(theirs, ours, strict=True))
    log.info("%s: %d of %d served answers begin as the model's own", served.base_url, n_alike, len(prompts))
    if not n_alike:
        raise InputError(
            f"{served.base_url} holds another checkpoint: none of its first {len(prompts)} answers begins as the "
            f"model's own (the first there: {theirs[0][:40]!r}, here: {ours[0]!r})"
        )


def _answer_set(behaviour: Behaviour, over_refusal: bool, answers: Sequence[str], original: Sequence[str]) -> AnswerSet:
    prompts = behaviour.prompts
    verdicts = lexical_labels(answers)
    now, before = _indicators(verdicts, answers), _indicators(lexical_labels(original), original)
    return AnswerSet(
        behaviour.name,
        over_refusal,
        {name: clustered_interval(values, prompts) for name, values in now.items()},
        {name: clustered_interval(values - before[name], prompts) for name, values in now.items()},
        tuple(answers),
        tuple(verdicts),
    )


def _indicators(verdicts: Sequence[str], answers: Sequence[str]) -> Mapping[str, np.ndarray]:
    """One 0 or 1 an answer, for every verdict and for caution."""
    found = {verdict: np.array([one == verdict for one in verdicts], dtype=float) for verdict in LABELS}
    return found | {CAUTION: np.array([is_cautious(answer) for answer in answers], dtype=float)}
