"""Judges of answers behind one protocol: prompts and answers in, verdicts out."""

from dean_interp.evaluation.judges.agreement import Agreement, JudgedChange, Sensitivity, agreement, sensitivity
from dean_interp.evaluation.judges.classifier import ClassifierJudge
from dean_interp.evaluation.judges.forms import JSON, LLAMA_GUARD, MD_JUDGE, MD_JUDGE_2, QUESTION, Form
from dean_interp.evaluation.judges.lexical import LexicalJudge
from dean_interp.evaluation.judges.make import make_judge
from dean_interp.evaluation.judges.prompted import PromptedJudge
from dean_interp.evaluation.judges.protocol import (
    LABELS,
    Judge,
    Label,
    Verdict,
    faults,
    judge_fingerprint,
    judged,
    share_bounds,
    tally,
)
from dean_interp.evaluation.judges.server import ServerJudge

__all__ = [
    "JSON",
    "LABELS",
    "LLAMA_GUARD",
    "MD_JUDGE",
    "MD_JUDGE_2",
    "QUESTION",
    "Agreement",
    "ClassifierJudge",
    "Form",
    "Judge",
    "JudgedChange",
    "Label",
    "LexicalJudge",
    "PromptedJudge",
    "Sensitivity",
    "ServerJudge",
    "Verdict",
    "agreement",
    "faults",
    "judge_fingerprint",
    "judged",
    "make_judge",
    "sensitivity",
    "share_bounds",
    "tally",
]
