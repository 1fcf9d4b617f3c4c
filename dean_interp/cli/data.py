"""`dean-interp data`: look at data sets before anything is measured on them."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, subcommand

from dean_interp.cli.step_result import StepResult
from dean_interp.data.audit import audit
from dean_interp.data.examples import Example, load_behaviour
from dean_interp.data.leakage import NEAR
from dean_interp.data.readers import unused_columns
from dean_interp.data.sources import licence_of, names_fault
from dean_interp.errors import InputError, first_line, refuse_below_one
from dean_interp.evaluation.judges.lexical import lexical_labels
from dean_interp.files import check_writable, write_json


@dataclass(frozen=True)
class AuditData:
    """Count duplicates, leakage between data sets, refusals and lengths."""

    sets: Positional[tuple[str, ...]]
    """Data sets: built-in names, CSV or JSONL files, folders, hub names or published sets. All their rows are read."""
    threshold: float = NEAR
    """Jaccard similarity of word trigrams from which two prompts are near duplicates."""
    tokenizer: str | None = None
    """Checkpoint folder or hub name whose tokenizer counts lengths in tokens, too."""
    out: Path | None = None
    """JSON file to write, too."""


@dataclass(frozen=True)
class ShowData:
    """Show the first examples of a data set as they are read."""

    name: Positional[str]
    """Data set: a built-in name, a CSV or JSONL file, a folder, a hub name or a published set."""
    n_examples: int = 3
    """Number of examples to show."""


@dataclass(frozen=True)
class DataStep:
    """Audit or show data sets."""

    action: OmitArgPrefixes[Annotated[AuditData, subcommand("audit")] | Annotated[ShowData, subcommand("show")]]


def do_data(step: DataStep) -> StepResult:
    """Do one action of `data`. Raises `InputError` for what its user can put right."""
    match step.action:
        case AuditData():
            return _audit(step.action)
        case ShowData():
            return _show(step.action)


def _audit(action: AuditData) -> StepResult:
    if not action.sets:
        raise InputError("name at least one data set")
    if fault := names_fault(action.sets):
        raise InputError(f"each data set needs a name of its own: {fault}")
    if action.out:
        check_writable(action.out)
    behaviours = [load_behaviour(name, n_examples=None, split=None) for name in action.sets]
    licences = {behaviour.name: licence_of(name) for behaviour, name in zip(behaviours, action.sets, strict=True)}
    data_audit = audit(
        behaviours,
        refused=lambda answers: [label == "refusal" for label in lexical_labels(answers)],
        threshold=action.threshold,
        tokenize=_tokenizer(action.tokenizer) if action.tokenizer else None,
        licences=licences,
    )
    record = dataclasses.asdict(data_audit)
    if action.out:
        write_json(action.out, record)
    return StepResult(record, str(data_audit))


def _tokenizer(name: str) -> Callable[[str], Sequence[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load a tokenizer from {name!r}: {first_line(error)}") from error
    return lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False)


def _show(action: ShowData) -> StepResult:
    refuse_below_one(n_examples=action.n_examples)
    behaviour = load_behaviour(action.name, n_examples=None, split=None)
    shown = behaviour.examples[: action.n_examples]
    rows = [{"prompt": example.prompt, "topic": example.topic, **example.answers} for example in shown]
    record = {"name": behaviour.name, "n_rows": len(behaviour), "examples": rows}
    lines = [*map(_example_text, shown), f"{len(behaviour)} rows in all"]
    if unused := unused_columns(action.name):
        record["unused_columns"] = unused
        lines.append(f"no use is made of the columns {', '.join(map(repr, unused))}")
    return StepResult(record, "\n".join(lines))


def _example_text(example: Example) -> str:
    answers = "".join(f"  {kind}: {answer}\n" for kind, answer in example.answers.items())
    topic = f"  topic: {example.topic}\n" if example.topic else ""
    return f"{example.prompt}\n{answers}{topic}"
