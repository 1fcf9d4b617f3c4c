"""`dean-interp data`: look at data sets before anything is measured on them."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, subcommand

from dean_interp.data.audit import audit
from dean_interp.data.examples import load_behaviour
from dean_interp.data.leakage import NEAR
from dean_interp.data.sources import licence_of
from dean_interp.errors import InputError
from dean_interp.evaluation.judges.lexical import lexical_labels
from dean_interp.files import check_writable, write_text


@dataclass(frozen=True)
class AuditData:
    """Count duplicates, leakage between data sets, refusals and lengths."""

    sets: Positional[tuple[str, ...]]
    """Built-in names, CSV or JSONL files, data set folders, hub names or published sets; all their rows are read."""
    threshold: float = NEAR
    """Jaccard similarity of word trigrams from which two prompts are near duplicates."""
    tokenizer: str | None = None
    """A checkpoint folder or hub name whose tokenizer counts lengths in tokens too."""
    out: Path | None = None
    """A JSON file to write too."""


@dataclass(frozen=True)
class ShowData:
    """Show how a data set is read: its first examples."""

    name: Positional[str]
    """A built-in name, a CSV or JSONL file, a data set folder, a hub name or a published set."""
    n_examples: int = 3
    """How many."""


@dataclass(frozen=True)
class DataStep:
    """Data sets: audit, show."""

    action: OmitArgPrefixes[Annotated[AuditData, subcommand("audit")] | Annotated[ShowData, subcommand("show")]]


@singledispatch
def data_action(action: object) -> tuple[dict[str, Any], str]:
    """A record and a text for its user. Raises `InputError` for what can be put right."""
    raise TypeError(f"no action of `data`: {action!r}")


@data_action.register
def _(action: AuditData) -> tuple[dict[str, Any], str]:
    if not action.sets:
        raise InputError("name at least one data set")
    if action.out:
        check_writable(action.out)
    behaviours = [load_behaviour(name, n_examples=None, split=None) for name in action.sets]
    found = audit(
        behaviours,
        refused=lambda answers: [one == "refusal" for one in lexical_labels(answers)],
        threshold=action.threshold,
        tokenize=_tokenizer(action.tokenizer) if action.tokenizer else None,
        licences={one.name: licence_of(name) for one, name in zip(behaviours, action.sets, strict=True)},
    )
    record = dataclasses.asdict(found)
    if action.out:
        write_text(action.out, json.dumps(record, indent=1) + "\n")
    return record, str(found)


def _tokenizer(name: str) -> Callable[[str], Sequence[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load a tokenizer from {name!r}: {str(error).splitlines()[0]}") from error
    return lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False)


@data_action.register
def _(action: ShowData) -> tuple[dict[str, Any], str]:
    if action.n_examples < 1:
        raise InputError(f"n_examples must be at least 1, got {action.n_examples}")
    whole = load_behaviour(action.name, n_examples=None, split=None)
    shown = whole.examples[: action.n_examples]
    rows = [{"prompt": one.prompt, "topic": one.topic, **one.answers} for one in shown]
    parts = [
        f"{one.prompt}\n" + "".join(f"  {kind}: {answer}\n" for kind, answer in one.answers.items()) for one in shown
    ]
    return {"name": whole.name, "n_rows": len(whole), "examples": rows}, "\n".join(
        [*parts, f"{len(whole)} rows in all"]
    )
