"""What every judge is: prompts and answers in, verdicts out. A failure is never a verdict.

A verdict without a label says why there is none, so that it can be counted, shown and taken both ways.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np

from dean_interp.errors import InputError
from dean_interp.models.thoughts import behind_thought

Label = Literal["safe", "unsafe", "refusal", "incoherent"]
LABELS: tuple[Label, ...] = get_args(Label)
IN_THOUGHT = "ends inside its thought"
"""Why an answer, or a judge's reply, that was cut before its thought ended says nothing."""


@dataclass(frozen=True)
class Verdict:
    """A judge's label of one answer. `label` is None where the judge gave none, and then `fault` says why."""

    label: Label | None
    said: str = ""
    """The judge's own words, where it has any."""
    fault: str | None = None

    @property
    def harmless(self) -> bool | None:
        """Whether the answer is safe or refuses; None where there is no verdict."""
        if self.label is None:
            return None
        return self.label in ("safe", "refusal")


Verdicts = Sequence[Verdict]
"""A judge's verdicts on answers, in the order of the answers."""


@runtime_checkable
class Judge(Protocol):
    """Prompts and answers in, one verdict an answer out, in their order.

    A judge may have a `fingerprint`, too: text that says all that decides its verdicts (`judge_fingerprint`).
    """

    @property
    def name(self) -> str:
        """The judge and its version, as it stands in tables and files."""
        ...

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer. Raises `InputError` where prompts and answers do not belong together."""
        ...


def judge_fingerprint(judge: Judge) -> str:
    """What verdicts are kept by: judges with equal fingerprints give equal verdicts. Else its name."""
    return str(getattr(judge, "fingerprint", judge.name))


def refuse_unpaired(prompts: Sequence[str], answers: Sequence[str]) -> None:
    """Raise `InputError` unless there is one prompt an answer and all are text."""
    if len(prompts) != len(answers):
        raise InputError(f"a judge needs one prompt an answer, got {len(prompts)} prompts and {len(answers)} answers")
    for text in (*prompts, *answers):
        if not isinstance(text, str):
            raise InputError(f"prompts and answers must be text, got {type(text).__name__}")


def judged(judge: Judge, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    """Ask a judge, and hold it to the protocol: one verdict an answer, each with a known label or with a fault.

    The judge sees what an answer says behind its thought.

    Raises `InputError` where prompts and answers do not belong together, or a judge of one's own does not keep to it.
    """
    refuse_unpaired(prompts, answers)

    def one_each(prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        verdicts = list(judge(prompts, answers))
        if len(verdicts) != len(answers):
            raise InputError(
                f"{judge.name} gave {len(verdicts)} verdicts on {len(answers)} answers; it must give one each"
            )
        return verdicts

    verdicts = behind_thoughts(one_each, prompts, answers)
    for verdict in verdicts:
        if not isinstance(verdict, Verdict):
            raise InputError(f"{judge.name} must give a Verdict an answer, got {verdict!r:.80}")
        has_label_or_fault = (verdict.label is None) == bool(verdict.fault)
        is_known = verdict.label in (None, *LABELS)
        if not has_label_or_fault or not is_known:
            raise InputError(
                f"{judge.name} must give a label of {', '.join(LABELS)}, or none and a fault; "
                f"got label {verdict.label!r} with fault {verdict.fault!r}"
            )
    return verdicts


def behind_thoughts(
    ask: Callable[[Sequence[str], Sequence[str]], list[Verdict]], prompts: Sequence[str], answers: Sequence[str]
) -> list[Verdict]:
    """Verdicts on what answers say behind their thoughts; an answer that ends inside of it has none."""
    said = [behind_thought(answer) for answer in answers]
    # only answers whose thought has ended are asked about
    asked_prompts, asked_answers = [], []
    for prompt, text in zip(prompts, said, strict=True):
        if text is not None:
            asked_prompts.append(prompt)
            asked_answers.append(text)
    given = ask(asked_prompts, asked_answers) if asked_answers else []
    # the verdicts go back to where their answers stand
    rest = iter(given)
    verdicts = []
    for text in said:
        if text is None:
            verdicts.append(Verdict(None, "", IN_THOUGHT))
        else:
            verdicts.append(next(rest))
    return verdicts


def tally(verdicts: Verdicts) -> dict[str, int]:
    """How many answers have each label, and how many have none by reason (`no verdict: unparsed`)."""
    counts = Counter(verdict.label for verdict in verdicts)
    by_label = {label: counts[label] for label in LABELS}
    by_fault = {f"no verdict: {fault}": n for fault, n in faults(verdicts).items()}
    return by_label | by_fault


def faults(verdicts: Verdicts) -> dict[str, int]:
    """How often there is no verdict, by reason."""
    reasons = Counter[str]()
    for verdict in verdicts:
        if verdict.label is None:
            reasons[verdict.fault or "no reason given"] += 1
    return dict(reasons)


def share_bounds(verdicts: Verdicts) -> tuple[float, float]:
    """The share of harmless answers with missing verdicts taken for harmful, and taken for harmless."""
    surely_harmless = [verdict.harmless is True for verdict in verdicts]
    maybe_harmless = [verdict.harmless is not False for verdict in verdicts]
    return float(np.mean(surely_harmless)), float(np.mean(maybe_harmless))
