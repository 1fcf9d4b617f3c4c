"""Judges of answers behind one protocol: prompts and answers in, verdicts out."""

from dean_interp.evaluation.judges.agreement import Agreement, agreement
from dean_interp.evaluation.judges.classifier import ClassifierJudge
from dean_interp.evaluation.judges.forms import JSON, LLAMA_GUARD, MD_JUDGE, QUESTION, Form
from dean_interp.evaluation.judges.lexical import LexicalJudge
from dean_interp.evaluation.judges.make import make_judge
from dean_interp.evaluation.judges.prompted import PromptedJudge
from dean_interp.evaluation.judges.protocol import Judge, Label, Verdict, faults, share_bounds
from dean_interp.evaluation.judges.server import ServerJudge

__all__ = [
    "JSON",
    "LLAMA_GUARD",
    "MD_JUDGE",
    "QUESTION",
    "Agreement",
    "ClassifierJudge",
    "Form",
    "Judge",
    "Label",
    "LexicalJudge",
    "PromptedJudge",
    "ServerJudge",
    "Verdict",
    "agreement",
    "faults",
    "make_judge",
    "share_bounds",
]
