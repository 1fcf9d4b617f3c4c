"""The lexical judge behind the protocol (`evaluation/judge.py`; how often it is right: docs/lexical_judge.md)."""

from collections.abc import Sequence

from dean_interp.evaluation.judge import judge, judge_name
from dean_interp.evaluation.judges.protocol import Verdict, refuse_unpaired


class LexicalJudge:
    """Rules on the answer's words; it does not read the prompt and always has a verdict."""

    @property
    def name(self) -> str:
        """The judge and the version of its rules."""
        return judge_name()

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer."""
        refuse_unpaired(prompts, answers)
        return [Verdict(label) for label in judge(answers)]
