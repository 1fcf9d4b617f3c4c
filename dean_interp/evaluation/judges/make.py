"""A judge from a few words, as the command line gives them."""

from pathlib import Path
from typing import get_args

from dean_interp.errors import InputError
from dean_interp.evaluation.judges.classifier import SAFE_AND_UNSAFE, ClassifierJudge
from dean_interp.evaluation.judges.forms import LLAMA_GUARD, MD_JUDGE, QUESTION, Form
from dean_interp.evaluation.judges.lexical import LexicalJudge
from dean_interp.evaluation.judges.prompted import PromptedJudge
from dean_interp.evaluation.judges.protocol import Judge, Label
from dean_interp.evaluation.judges.server import ServerJudge
from dean_interp.models.load import HookedModel, load_model

_FORMS: dict[str, Form] = {"md-judge": MD_JUDGE, "llama-guard": LLAMA_GUARD, "chat": QUESTION}
_ALLOWED = (
    "lexical, self (the studied model), md-judge:MODEL, llama-guard:MODEL, chat:MODEL, classifier:MODEL (or "
    "classifier:MODEL?class=label,...), server:MODEL@http://..."
)


def make_judge(text: str, model: HookedModel, *, cache: Path | None = None) -> Judge:
    """The judge that `text` names.

    Args:
        text: `lexical`; `self`, which asks the studied model itself; `md-judge:MODEL`, `llama-guard:MODEL` or
            `chat:MODEL`, which load another; `classifier:MODEL`, whose classes are `safe` and `unsafe` unless
            `?toxic=unsafe,neutral=safe` says otherwise; `server:MODEL@http://host:port/v1`, whose key is in
            `OPENAI_API_KEY`.
        model: the studied model.
        cache: where a server's replies are kept.

    Raises:
        InputError: no such judge, or it cannot be loaded.
    """
    kind, _, rest = text.partition(":")
    if kind == "lexical" and not rest:
        return LexicalJudge()
    if kind == "self" and not rest:
        return PromptedJudge(model, QUESTION)
    if kind in _FORMS and rest:
        return PromptedJudge(load_model(rest), _FORMS[kind])
    if kind == "classifier" and rest:
        name, _, classes = rest.partition("?")
        return ClassifierJudge(name, labels=_labels(classes) if classes else SAFE_AND_UNSAFE)
    if kind == "server" and "@" in rest:
        name, _, url = rest.partition("@")
        return ServerJudge(name, url, cache=cache)
    raise InputError(f"no judge {text!r}: give {_ALLOWED}")


def _labels(classes: str) -> dict[str, Label]:
    found: dict[str, Label] = {}
    for pair in classes.split(","):
        name, _, label = pair.partition("=")
        match = [one for one in get_args(Label) if one == label]
        if not name or not match:
            raise InputError(f"classes are given as class=label with label in {get_args(Label)}, got {pair!r}")
        found[name] = match[0]
    return found
