"""A judge from a few words, as the command line gives them."""

import re
from pathlib import Path

import torch

from dean_interp.errors import InputError, did_you_mean
from dean_interp.evaluation.judges.classifier import SAFE_AND_UNSAFE, ClassifierJudge
from dean_interp.evaluation.judges.forms import JSON, LLAMA_GUARD, MD_JUDGE, MD_JUDGE_2, QUESTION, Form
from dean_interp.evaluation.judges.lexical import LexicalJudge
from dean_interp.evaluation.judges.prompted import PromptedJudge
from dean_interp.evaluation.judges.protocol import LABELS, Judge, Label
from dean_interp.evaluation.judges.secret import without_login
from dean_interp.evaluation.judges.server import ServerJudge, refuse_address
from dean_interp.models.load import DTYPES, HookedModel, load_model

_FORMS: dict[str, Form] = {
    "md-judge": MD_JUDGE,
    "md-judge-0.2": MD_JUDGE_2,
    "llama-guard": LLAMA_GUARD,
    "chat": QUESTION,
    "json": JSON,
    "server": QUESTION,
}
# the first address ends the model's name, so that a login in it stays in the address
_ON_SERVER = re.compile(r"(.+?)@(https?://.+)")
_ALLOWED = (
    "lexical, self (the studied model), md-judge:MODEL, md-judge-0.2:MODEL, llama-guard:MODEL, chat:MODEL, json:MODEL "
    "(or json:MODEL?dtype=bfloat16), classifier:MODEL (or classifier:MODEL?class=label,...), server:MODEL@http://... "
    "(any of the forms before, too, on a server: llama-guard:MODEL@http://...)"
)


def make_judge(text: str, model: HookedModel | None = None, *, folder: Path | None = None) -> Judge:
    """The judge that `text` names.

    Args:
        text: `lexical`; `self`, which asks the studied model itself; `md-judge:MODEL`, `md-judge-0.2:MODEL`,
            `llama-guard:MODEL`, `chat:MODEL` (a yes-or-no question) or `json:MODEL`, which load another (in float32 on
            a CPU and in bfloat16 on a GPU, or as `?dtype=bfloat16` behind its name says);
            `classifier:MODEL`, whose classes are `safe` and `unsafe` unless `?toxic=unsafe,neutral=safe` says
            otherwise; `server:MODEL@http://host:port/v1` (the yes-or-no question), or a form before with such an
            address, whose key is in `OPENAI_API_KEY`.
        model: the studied model, for `self`.
        folder: where a server's replies are kept, and what a model said while others are still asked.

    Raises:
        InputError: no such judge, or it cannot be loaded.
    """
    kind, _, rest = text.partition(":")
    on_server = _ON_SERVER.fullmatch(rest)
    if kind == "lexical" and not rest:
        return LexicalJudge()
    if kind == "self" and not rest:
        if model is None:
            raise InputError("the judge 'self' is the studied model: pass model=...")
        return PromptedJudge(model, QUESTION, folder=folder)
    if kind in _FORMS and on_server:
        cache = folder / "judge_cache.jsonl" if folder else None
        return ServerJudge(on_server[1], on_server[2], form=_FORMS[kind], cache=cache)
    if kind in _FORMS and kind != "server" and rest:
        name, dtype = _name_and_dtype(rest)
        return PromptedJudge(load_model(name, dtype=dtype), _FORMS[kind], folder=folder)
    if kind == "classifier" and rest:
        name, _, classes = rest.partition("?")
        labels = _labels_by_class(classes) if classes else SAFE_AND_UNSAFE
        return ClassifierJudge(name, labels=labels)
    hint = did_you_mean(kind, ("lexical", "self", "classifier", *_FORMS))
    raise InputError(f"no judge {without_login(text)!r}{hint}: give {_ALLOWED}")


def refuse_useless(text: str) -> None:
    """Raise `InputError` where the judge that `text` names could not judge; `self` is told with the model alone.

    A server is asked once. Of a model only the shape is looked at, so that it takes no memory while others work.
    """
    kind, _, rest = text.partition(":")
    if text == "self":
        return
    is_loaded = kind in _FORMS and kind != "server" and not _ON_SERVER.fullmatch(rest)
    if is_loaded and rest:
        name, dtype = _name_and_dtype(rest)
        PromptedJudge(load_model(name, dtype=dtype, device="meta"), _FORMS[kind])
        return
    judge = make_judge(text)
    if isinstance(judge, ServerJudge):
        judge.refuse_silent()


def refuse_login(text: str) -> None:
    """Raise `InputError` where a judge's address holds a user, a password or a query: it would stand in files."""
    if on_server := _ON_SERVER.fullmatch(text):
        refuse_address(on_server[2])


def _name_and_dtype(text: str) -> tuple[str, str]:
    """`MODEL?dtype=bfloat16` as a model and its number format. Raises `InputError` for another setting."""
    name, _, setting = text.partition("?")
    if not setting:
        return name, "bfloat16" if torch.cuda.is_available() else "float32"
    key, _, dtype = setting.partition("=")
    if key != "dtype" or dtype not in DTYPES:
        raise InputError(f"a judge takes ?dtype= with one of {', '.join(DTYPES)} behind its model, got '?{setting}'")
    return name, dtype


def _labels_by_class(classes: str) -> dict[str, Label]:
    """`toxic=unsafe,neutral=safe` as a map from class names to labels."""
    labels = {}
    for pair in classes.split(","):
        name, _, label = pair.partition("=")
        if not name or label not in LABELS:
            raise InputError(f"classes are given as class=label with label in {LABELS}, got {pair!r}")
        labels[name] = label
    return labels
