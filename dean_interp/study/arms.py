"""Arms of a study: states of one model or of several, each measured once, and compared with the original in one table.

`States` holds one model and what is silenced in it; an arm may be another model altogether (fine-tuned, quantised). So
no KL is taken here: it is of two states that share their unembedding.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dean_interp.data.examples import Behaviour
from dean_interp.editing.ablation import ablate
from dean_interp.editing.values import Value, Zero
from dean_interp.errors import InputError
from dean_interp.evaluation.judges import judged, make_judge
from dean_interp.evaluation.measure import measure
from dean_interp.evaluation.outcomes import Line, Outcome, frame, likelihoods, lines_of, spoken
from dean_interp.files import read_json, write_text
from dean_interp.fine_tuning import FineTuningConfig, fine_tune
from dean_interp.frames import Framed
from dean_interp.models.load import HookedModel
from dean_interp.selection.selection import Selection
from dean_interp.statistics import Interval
from dean_interp.study.answers import Asking, answers_in
from dean_interp.study.config import StudyConfig

MARGIN, LOSS = "margin of safe over unsafe", "loss on answers"
OVER_SEEDS = "share over seeds"


@dataclass(frozen=True)
class ArmResults(Framed):
    """What a study of several arms found."""

    title: str
    model: str
    facts: Mapping[str, str]
    """How it was done; `command` makes it again."""
    said: tuple[str, ...]
    """What was found, in plain words, one paragraph each."""
    arms: Mapping[str, tuple[Line, ...]]
    """Of each arm, every outcome before (the original) and after."""

    def __str__(self) -> str:
        return "\n\n".join(self.said)

    def __repr__(self) -> str:
        return f"ArmResults({self.title!r}, {len(self.arms)} arms)"

    def to_pandas(self) -> pd.DataFrame:
        """One row a line of an arm (`outcomes.frame`)."""
        tables = [frame(lines).assign(arm=arm) for arm, lines in self.arms.items()]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"said": self.said})

    @property
    def margins(self) -> dict[str, dict[str, Interval]]:
        """Of each behaviour, the change of its margin in every arm."""
        found: dict[str, dict[str, Interval]] = {}
        for arm, lines in self.arms.items():
            for name, line in margins(lines).items():
                found.setdefault(f"{name} margin", {})[arm] = line.change
        return found

    def change(self, arm: str, metric: str, on: str) -> Line:
        """One line of one arm. Raises `InputError` where there is none."""
        found = [line for line in self.arms.get(arm, ()) if line.metric == metric and line.on == on]
        if not found:
            raise InputError(f"no '{metric}' on {on} in the arm {arm!r}; arms: {', '.join(self.arms)}")
        return found[0]


class Arms:
    """Takes the outcomes of one arm after another and keeps each in a file, so that a killed study goes on."""

    def __init__(
        self, config: StudyConfig, folder: Path, tests: Sequence[Behaviour], benign: Sequence[Behaviour] = ()
    ) -> None:
        """`tests` are first, second and general; `config` says how many of their prompts are answered, and how long.

        The folder must belong to these settings and data alone (`study.folder.owned`).
        """
        self.config, self.folder, self.tests, self.benign = config, folder / "arms", tests, benign
        self.harmful = [dataclasses.replace(one, examples=one.examples[: config.n_answers])
                        for one in tests[:2] if config.n_answers]  # fmt: skip

    def known(self, name: str) -> list[Outcome] | None:
        """What was taken of an arm before, or None."""
        path = self._path(name)
        if not path.is_file():
            return None
        return [Outcome(**one | {"values": np.array(one["values"], dtype=float), "clusters": tuple(one["clusters"])})
                for one in read_json(path, list[dict[str, Any]])]  # fmt: skip

    def take(
        self,
        name: str,
        model: HookedModel,
        ablated: Selection | None = None,
        *,
        value: Value = Zero(),  # noqa: B008 - frozen
        answers: bool = False,
    ) -> list[Outcome]:
        """Margins, loss on general answers, on request judged answers: of the model as it is, or with units changed.

        Margins and losses are over the first `answer_tokens` tokens. Taken before: from its file, whatever the model.
        """
        there = self.known(name)
        if there is not None:
            return there
        config = self.config
        with ablate(model, ablated, value=value) if ablated else nullcontext():
            measured = measure(
                model, self.tests, template=config.template, answer_tokens=config.answer_tokens,
                batch_tokens=config.measure_tokens,
            )  # fmt: skip
            found = [one for one in likelihoods(measured, self.tests) if not one.metric.startswith("KL")]
            if answers and config.n_answers:
                found += self._spoken(name, model)
        stored = [dataclasses.asdict(one) | {"values": one.values.tolist()} for one in found]
        write_text(self._path(name), json.dumps(stored) + "\n")
        return found

    def fine_tuned(
        self, name: str, behaviours: Sequence[Behaviour], how: FineTuningConfig, *, at: Sequence[int] | None = None
    ) -> dict[int, list[Outcome]]:
        """Outcomes of one fine-tuning of the study's model, by step, answers after the last; its checkpoints go then.

        Args:
            at: the steps to look at, multiples of `how.every`; None: all of them.
        """
        config, folder = self.config, self.folder.parent / "tuned" / _slug(name)
        steps = {step: f"{name}, step {step}" for step in at or range(how.every, how.n_steps + 1, how.every)}

        def watch(step: int, model: HookedModel) -> None:
            if step in steps:
                self.take(steps[step], model, answers=step == how.n_steps)

        if any(self.known(one) is None for one in steps.values()):
            fine_tune(
                config.model, behaviours, how, folder=folder, template=config.template, watch=watch,
                device=config.device, dtype=config.dtype,
            )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        return {step: self.known(one) or [] for step, one in steps.items()}

    def _spoken(self, name: str, model: HookedModel) -> list[Outcome]:
        config, length = self.config, self.config.max_new_tokens
        how = Asking((length,), config.template, config.answer_batch)
        sets = [*self.harmful, *self.benign]
        given = answers_in(self.folder / "answers", model, sets, _slug(name), None, how, "")[length]
        rules, found = make_judge("lexical", model), []
        for one in sets:
            kind = "harmful" if one in self.harmful else "benign"
            answers = given[one.name]
            verdicts = {"lexical": judged(rules, one.prompts, answers)} if kind == "harmful" else {}
            found += spoken(kind, one, answers, verdicts, length)
        return found

    def _path(self, name: str) -> Path:
        return self.folder / f"{_slug(name)}.json"


def margins(lines: Sequence[Line]) -> dict[str, Line]:
    """Of an arm's lines, each behaviour's margin."""
    return {line.on: line for line in lines if line.metric == MARGIN}


def answered(lines: Sequence[Line]) -> str:
    """What the answers to the prompts of both behaviours became, in plain words; empty where none were asked for."""
    found = []
    for metric in ("safe answers", "refusals"):
        some = [line for line in lines if line.metric.startswith(metric)]
        if some:
            shares = "; ".join(
                f"{line.on} {line.before.mean:.0%} to {line.after.mean:.0%} ({100 * line.change.mean:+.0f} points "
                f"[{100 * line.change.low:+.0f}, {100 * line.change.high:+.0f}])" for line in some)  # fmt: skip
            found.append(f"{metric[0].upper()}{metric[1:]}: {shares}.")
    return " ".join(found)


def command() -> str:
    """The command that is running, as a study states it."""
    return " ".join([f"python analyses/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def averaged(seeds: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """One arm from its seeds: each prompt's mean. An interval over prompts holds for these seeds, not for others."""
    first, *others = seeds
    by_name = [{(one.metric, one.on): one for one in some} for some in others]
    return [
        dataclasses.replace(
            one,
            unit=OVER_SEEDS if one.unit == "share" else one.unit,
            values=np.mean([one.values, *(some[one.metric, one.on].values for some in by_name)], axis=0),
        )
        for one in first
    ]


def compared(
    original: Sequence[Outcome],
    arms: Mapping[str, Sequence[Outcome]],
    controls: Mapping[str, Sequence[Sequence[Outcome]]] | None = None,
) -> dict[str, tuple[Line, ...]]:
    """Every arm against the original, beside its random controls where it has some."""
    found = {}
    for name, some in arms.items():
        shares = {one.metric for one in some if one.unit == OVER_SEEDS}
        before = [dataclasses.replace(one, unit=OVER_SEEDS) if one.metric in shares else one for one in original]
        found[name] = tuple(lines_of(before, some, (controls or {}).get(name, ())))
    return found


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)
