"""What is asked of one state of the model: its likelihoods, answers and verdicts, windows of text, tasks.

Each is taken once and kept in the folder, so that a killed evaluation goes on where it was.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from dean_interp.data.examples import Behaviour, draw, load_behaviour, prompt_hash
from dean_interp.data.leakage import without_leaks
from dean_interp.data.readers import BUILTIN
from dean_interp.editing.ablation import ablate
from dean_interp.errors import InputError
from dean_interp.evaluation.harness import TaskResult, run_harness
from dean_interp.evaluation.judges import (
    Agreement,
    Judge,
    Sensitivity,
    Verdict,
    agreement,
    faults,
    judged,
    make_judge,
    sensitivity,
)
from dean_interp.evaluation.judges.lexical import cautionary_phrases
from dean_interp.evaluation.outcomes import Outcome, likelihoods, spoken
from dean_interp.evaluation.served import Served
from dean_interp.evaluation.windows import WindowMeasurement, window_loss
from dean_interp.files import read_json, write_text
from dean_interp.resume import Unfinished
from dean_interp.selection.selection import Selection
from dean_interp.study.answers import Asking, answers_in
from dean_interp.study.states import States


@dataclass(frozen=True)
class Asked:
    """What is asked of each state beyond the margins and the loss on general text."""

    harmful: tuple[str, ...] = ()
    """Sets whose prompts should not be complied with; none: the test prompts of first and second."""
    calibration: tuple[str, ...] = ()
    """Data that units were scored on. What was scored is left out anyway; with these, its near duplicates are, too."""
    benign: tuple[str, ...] = ("over_refusal_fairness", "over_refusal_privacy")
    """Harmless prompts that look alike and deserve a plain answer."""
    n_answers: int = 24
    """Prompts of each set that are answered, and of general ability. 0: none."""
    lengths: tuple[int, ...] = (64, 256)
    """New tokens at which answers are judged."""
    judges: tuple[str, ...] = ("lexical",)
    """Who judges whether answers to harmful prompts are safe (docs/judges.md). The rules always judge the rest."""
    n_answer_controls: int = 2
    """Random ablations that answer too, where there are scores."""
    answers_from: tuple[str, ...] = ()
    """Two addresses of OpenAI-compatible servers (such as vLLM, `http://host:8000/v1`) that hold the original and the
    edited checkpoint: their answers are judged in place of the hooked model's. Controls do not answer then."""
    answer_batch: int = 32
    """Prompts a batch."""
    text: str = "general"
    """What is cut into windows for perplexity: a behaviour, or a plain .txt file."""
    window: int = 1024
    """Tokens of a window."""
    tasks: tuple[str, ...] = ()
    """Tasks of EleutherAI's lm-eval harness, by name (needs the extra `eval`)."""
    task_folder: Path | None = None
    """A folder with task files of one's own."""
    task_limit: int | None = 200
    """Items of each task; None: all."""

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        if self.n_answers and (not self.lengths or min(self.lengths) < 1):
            raise InputError(f"lengths must be at least 1, got {self.lengths}")
        for name in ("n_answers", "n_answer_controls", "window", "answer_batch"):
            least = 0 if name in ("n_answers", "n_answer_controls") else 1
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if len(self.answers_from) not in (0, 2):
            raise InputError(
                "answers_from must be two addresses, of the original and of the edited checkpoint, got "
                f"{len(self.answers_from)}"
            )

    def server(self, state: str) -> Served | None:
        """Where a state's answers come from; None: from the hooked model."""
        if not self.answers_from:
            return None
        return Served(self.answers_from[0 if state == "original" else 1])


@dataclass(frozen=True)
class Sets:
    """The prompts that are answered, by what a good answer is, and what was left out of them."""

    harmful: tuple[Behaviour, ...]
    benign: tuple[Behaviour, ...]
    general: tuple[Behaviour, ...]
    removed: Mapping[str, int]
    """Per set: prompts that were scored."""

    @property
    def all(self) -> tuple[Behaviour, ...]:
        """All of them, in the order in which they are answered."""
        return self.harmful + self.benign + self.general


def sets_of(asked: Asked, states: States, scored: frozenset[str]) -> Sets:
    """The prompts to answer, drawn by the states' seed from those that were not scored."""
    if not asked.n_answers:
        return Sets((), (), (), {})
    seed, n = states.config.seed, asked.n_answers

    def drawn(source: str) -> Behaviour:
        split = "test" if source in BUILTIN else None
        whole = load_behaviour(source, n_examples=None, seed=seed, split=split)
        clean, removed[whole.name] = without_scored(whole, scored)
        if calibration:
            clean, leaked = without_leaks(clean, calibration)
            removed[whole.name] += len(leaked.exact) + len(leaked.near)
        return draw(clean, min(n, len(clean)), seed=seed)

    removed: dict[str, int] = {}
    calibration = [
        _scored_part(load_behaviour(source, n_examples=None, split=None), scored) for source in asked.calibration
    ]
    first, second, general = states.config.sources
    harmful = [drawn(source) for source in asked.harmful or (first, second)]
    benign = [drawn(source) for source in asked.benign]
    return Sets(tuple(harmful), tuple(benign), (drawn(general),), removed)


def without_scored(behaviour: Behaviour, scored: frozenset[str]) -> tuple[Behaviour, int]:
    """The behaviour without prompts that were scored, and how many those are. Raises `InputError` if none is left."""
    kept = tuple(one for one in behaviour.examples if prompt_hash(one.prompt) not in scored)
    if not kept:
        raise InputError(f"all {len(behaviour)} prompts of '{behaviour.name}' were scored: measure on others")
    return dataclasses.replace(behaviour, examples=kept), len(behaviour) - len(kept)


def _scored_part(behaviour: Behaviour, scored: frozenset[str]) -> Behaviour:
    kept = tuple(one for one in behaviour.examples if prompt_hash(one.prompt) in scored)
    if not kept:
        raise InputError(f"calibration is data that units were scored on, and no prompt of '{behaviour.name}' was")
    return dataclasses.replace(behaviour, examples=kept)


class Taken:
    """Everything that a state of the model gives, as outcomes; each is taken once and kept in the folder."""

    def __init__(self, states: States, asked: Asked, sets: Sets, folder: Path) -> None:
        self.states, self.asked, self.sets, self.folder = states, asked, sets, folder
        cache = folder / "judge_cache.jsonl"
        self.judges: dict[str, Judge] = {
            text: make_judge(text, states.model, cache=cache) for text in asked.judges if asked.n_answers
        }
        self.how = Asking(tuple(sorted(asked.lengths)), states.config.template, asked.answer_batch)
        self.text = _text(asked, states)
        self.windows: WindowMeasurement | None = None
        self.verdicts: dict[str, dict[str, list[Verdict]]] = {name: {} for name in self.judges}
        self.caution: dict[str, dict[str, int]] = {}

    def outcomes(self, name: str, ablated: Selection | None, *, answers: bool) -> list[Outcome]:
        """Likelihoods of the test answers; and what takes longer, where it is asked for."""
        measured = self.states.original if ablated is None else self.states.measured(name, ablated)
        found = likelihoods(measured, self.states.tests)
        if answers:
            found += self._windows(name, ablated) + self._answers(name, ablated) + self._tasks(name, ablated)
        return found

    def agreements(self) -> tuple[Agreement, ...]:
        """Of every pair of judges that have a verdict in common."""
        found = []
        for one, other in combinations(self.verdicts, 2):
            mine, theirs = (list(chain(*self.verdicts[name].values())) for name in (one, other))
            if any(a.label and b.label for a, b in zip(mine, theirs, strict=True)):
                found.append(agreement(one, mine, other, theirs))
        return tuple(found)

    def faults(self) -> dict[str, dict[str, int]]:
        """How often each judge gave no verdict."""
        return {name: faults(list(chain(*verdicts.values()))) for name, verdicts in self.verdicts.items()}

    def sensitivity(self, edit: str) -> Sensitivity | None:
        """What each judge makes of the edit; None where nothing was judged."""
        sides = {name: (some["original"], some[edit]) for name, some in self.verdicts.items() if some.get(edit)}
        return sensitivity(sides) if sides else None

    def _windows(self, name: str, ablated: Selection | None) -> list[Outcome]:
        key = _key(self.states.fingerprint, ablated, self.text, self.asked.window)
        unfinished = Unfinished(self.folder / "windows" / f"{name.replace(' ', '_')}.unfinished", key)
        with ablate(self.states.model, ablated) if ablated else nullcontext():
            found = window_loss(
                self.states.model, self.text, window=self.asked.window, original=self.windows, unfinished=unfinished
            )
        self.windows = self.windows or found
        clusters = tuple(map(str, range(len(found.loss))))
        unit = "nats per token"
        return [
            Outcome(
                "loss on windows of text", self.asked.text, unit, "lower", found.loss.numpy().astype(float), clusters
            ),
            Outcome("KL on windows of text", self.asked.text, unit, "lower", found.kl.numpy().astype(float), clusters),
        ]

    def _answers(self, name: str, ablated: Selection | None) -> list[Outcome]:
        if not self.asked.n_answers:
            return []
        folder, fingerprint = self.folder / "answers", self.states.fingerprint
        given = answers_in(folder, self.states.model, self.sets.all, name, ablated, self.how, fingerprint,
                           served=self.asked.server(name))  # fmt: skip
        longest = given[self.how.lengths[-1]]
        phrases = Counter(phrase for some in longest.values() for one in some for phrase in cautionary_phrases(one))
        self.caution[name] = dict(phrases.most_common())
        found = []
        for length in self.how.lengths:
            for one in self.sets.all:
                answers = given[length][one.name]
                kind = "harmful" if one in self.sets.harmful else "benign" if one in self.sets.benign else "general"
                verdicts = {each: self._verdicts(each, name, one, length, answers) for each in self.judges}
                found += spoken(kind, one, answers, verdicts if kind == "harmful" else {}, length)
        return found

    def _verdicts(
        self, name: str, state: str, behaviour: Behaviour, length: int, answers: Sequence[str]
    ) -> list[Verdict]:
        """Of one judge on harmful prompts' answers: from their file, else given and written there."""
        if behaviour not in self.sets.harmful:
            return []
        asked = json.dumps([name, self.judges[name].name, behaviour.prompts, list(answers)])
        path = self.folder / "verdicts" / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.json"
        if not path.is_file():
            given = judged(self.judges[name], behaviour.prompts, answers)
            if not any(verdict.label is None for verdict in given):  # a failure is asked again next time
                write_text(path, TypeAdapter(list[Verdict]).dump_json(given).decode())
        else:
            given = read_json(path, list[Verdict])
        if state in ("original", "edit"):
            self.verdicts[name].setdefault(state, []).extend(given)
        return given

    def _tasks(self, name: str, ablated: Selection | None) -> list[Outcome]:
        if not self.asked.tasks:
            return []
        settings = (self.asked.tasks, self.asked.task_limit, str(self.asked.task_folder))
        path = self.folder / "tasks" / f"{_key(self.states.fingerprint, ablated, *settings)}.json"
        if not path.is_file():
            with ablate(self.states.model, ablated) if ablated else nullcontext():
                results = run_harness(
                    self.states.model, self.asked.tasks, limit=self.asked.task_limit, folder=self.asked.task_folder
                )
            stored = [dataclasses.asdict(one) | {"values": one.values.tolist()} for one in results]
            write_text(path, json.dumps(stored) + "\n")
        found = [TaskResult(**one | {"values": np.array(one["values"]), "items": tuple(one["items"])})
                 for one in read_json(path, list[dict[str, Any]])]  # fmt: skip
        return [
            Outcome(
                f"{one.metric} (lm-eval)",
                one.task,
                "share" if set(one.values) <= {0.0, 1.0} else "mean over items",
                "higher" if one.higher_is_better else "lower",
                one.values,
                one.items,
            )
            for one in found
        ]


def _text(asked: Asked, states: States) -> list[str]:
    """Running text: a file, or the prompts and answers of a behaviour; of running text, the prompts alone."""
    path = Path(asked.text)
    if path.suffix == ".txt":
        if not path.is_file():
            raise InputError(f"no file {path}")
        return [path.read_text(encoding="utf-8")]
    split = "test" if asked.text in BUILTIN else None
    whole = load_behaviour(asked.text, n_examples=None, split=split)
    return [text for one in whole.examples
            for text in ([f"{one.prompt}\n{answer}" for answer in one.answers.values()] or [one.prompt])]  # fmt: skip


def _key(*parts: object) -> str:
    named = [part.fingerprint if isinstance(part, Selection) else str(part) for part in parts]
    return hashlib.sha256(" ".join(named).encode()).hexdigest()[:16]
