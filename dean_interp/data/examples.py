"""A behaviour is a named set of examples: prompts with the answers that show it.

`load_behaviour` is the one way in: a built-in name, a CSV or JSONL file, a folder saved by Hugging Face `datasets`, a
`Dataset` in memory, the name of one on the hub, or a published set by name. Rows are read, split, then drawn.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd

from dean_interp.data.data_rows import DataRow, Split, splits_of
from dean_interp.data.prompt_text import is_among, prompt_hash
from dean_interp.data.readers import read_rows
from dean_interp.data.sources import behaviour_name, load_named, named_source
from dean_interp.errors import InputError, refuse_below_one
from dean_interp.frames import Framed

if TYPE_CHECKING:
    from datasets import Dataset

ResponseKind = Literal["safe", "unsafe"]


@dataclass(frozen=True)
class Example:
    """One prompt and its answers by kind: `safe` and `unsafe` for a pair, `response` where there is only one.

    A prompt without answers can be answered by a model, and neither scored nor measured.
    """

    prompt: str
    answers: Mapping[str, str]
    topic: str | None = None

    @property
    def paired(self) -> bool:
        """Whether a safe and an unsafe answer are both there, so that a margin exists."""
        return "safe" in self.answers and "unsafe" in self.answers

    @property
    def cluster(self) -> str:
        """What the example is clustered by in every interval: its topic, and its prompt where it has none."""
        return self.topic or self.prompt


@dataclass(frozen=True)
class Behaviour(Framed):
    """A named set of examples. `response` says which answer of a pair is the one that is scored."""

    name: str
    examples: tuple[Example, ...]
    response: ResponseKind = "safe"
    split: Split | None = None

    def __post_init__(self) -> None:
        is_plain = self.name.isprintable() and re.fullmatch(r"[^./][^/]*", self.name)
        # a file's name may hold bytes that are no text
        n_bytes = len(self.name.encode(errors="surrogatepass"))
        if not is_plain or n_bytes > 100:
            raise InputError(
                "a behaviour's name is in file names: it must be 1 to 100 bytes of printable text without '/' that do "
                f"not begin with '.', got {self.name[:100]!r}"
            )
        if not self.examples:
            raise InputError(f"behaviour '{self.name}' has no examples; at least one is needed")

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        kind = f"{self.split} split" if self.split else "all"
        return f"Behaviour({self.name!r}, {len(self)} examples, {kind}, scored answer: {self.response})"

    def to_pandas(self) -> pd.DataFrame:
        """One row an example: its prompt, its answers by kind, its topic."""
        rows = []
        for example in self.examples:
            rows.append({"prompt": example.prompt, **example.answers, "topic": example.topic})
        return pd.DataFrame(rows)

    @property
    def prompts(self) -> list[str]:
        """The prompts, in the order of the examples."""
        return [example.prompt for example in self.examples]

    @property
    def responses(self) -> list[str]:
        """The answers that are scored, in the order of the examples."""
        return [_scored_answer(self, example) for example in self.examples]

    @property
    def paired(self) -> bool:
        """Whether every example has a safe and an unsafe answer."""
        return all(example.paired for example in self.examples)

    @property
    def prompt_hashes(self) -> frozenset[str]:
        """The hash of every prompt, in its normal form. Scores keep them: nothing that was scored is ever measured."""
        return frozenset(map(prompt_hash, self.prompts))

    def prompts_among(self, hashes: Set[str]) -> set[str]:
        """The prompts that the hashes hold, as they stand here (`prompt_text.is_among`)."""
        distinct = set(self.prompts)
        return {prompt for prompt in distinct if is_among(prompt, hashes)}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the whole content; equal content gives equal fingerprints on every machine."""
        content = [self.name, self.response, self.split]
        for example in self.examples:
            answers = sorted(example.answers.items())
            content.append([example.prompt, answers, example.topic])
        digest = hashlib.sha256(json.dumps(content).encode())
        return digest.hexdigest()[:16]


def prompt_hashes_of(behaviours: Iterable[Behaviour]) -> frozenset[str]:
    """The hashes of the prompts of several behaviours together."""
    return frozenset(chain.from_iterable(behaviour.prompt_hashes for behaviour in behaviours))


def data_fingerprints(data: Sequence[Behaviour]) -> dict[str, str]:
    """The fingerprint of each set, by name and split, and by its number where a set was divided further."""
    by_name: dict[str, str] = {}
    for behaviour in data:
        name = f"{behaviour.name} ({behaviour.split})"
        n_before = sum(known == name or known.startswith(f"{name}, part ") for known in by_name)
        by_name[f"{name}, part {n_before + 1}" if n_before else name] = behaviour.fingerprint
    return by_name


def load_behaviour(
    name_or_path: "str | Path | Dataset",
    *,
    n_examples: int | None = 128,
    seed: int = 0,
    split: Split | None = "calibration",
    response: ResponseKind = "safe",
    name: str | None = None,
) -> Behaviour:
    """Examples of a behaviour, split and then drawn.

    Args:
        name_or_path: `fairness`, `privacy`, `general`, `over_refusal_fairness`, `over_refusal_privacy` or `register`
            (built in; over-refusal has a test split only), a `.csv` or `.jsonl` file, a folder written by
            `Dataset.save_to_disk`, a `datasets.Dataset`, the `owner/name` of a data set on the Hugging Face hub, or a
            published one as `name:part`, `name:part@commit` or `name:part@path` (`sources`), which is then called
            `name_part`.
        n_examples: how many to draw without replacement; `None` takes all of the split in file order.
        seed: seed for the draw, which is `numpy.random.default_rng(seed).permutation(n_rows)[:n_examples]`, as in the
            released code.
        split: `calibration` is for scoring and `test` for measuring; no prompt is in both. Rows with a `split` field
            keep it; other files are halved by a hash of the prompt (`data_rows`). `None` takes the whole file.
        response: which answer of a pair is scored. Data with one answer a prompt has no choice to make.
        name: what the behaviour is called in tables and files; None: after its source. Of several data sets in memory
            each needs one.

    Raises:
        InputError: no such source, a bad row (by file and line), an empty split, or more asked for than there is.
    """
    if split is not None and split not in get_args(Split):
        raise InputError(f"split must be 'calibration', 'test' or None, got {split!r}")
    if response not in get_args(ResponseKind):
        raise InputError(f"response must be 'safe' or 'unsafe', got {response!r}")
    refuse_below_one(n_examples=n_examples)
    name = name or behaviour_name(name_or_path)
    rows = _rows(name_or_path, response)
    if split is not None:
        halves = splits_of(rows)
        rows = [row for row, half in zip(rows, halves, strict=True) if half == split]
    if not rows:
        raise InputError(f"{_part_name(name, split)} has no examples")
    examples = tuple(Example(row.prompt, row.answers, row.topic) for row in rows)
    whole = Behaviour(name=name, examples=examples, response=response, split=split)
    if n_examples is None:
        return whole
    return draw(whole, n_examples, seed=seed)


def _rows(source: "str | Path | Dataset", response: ResponseKind) -> list[DataRow]:
    published = named_source(source)
    try:
        if published is not None:
            return load_named(published, response)
        return read_rows(source)
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}") from error


def draw(behaviour: Behaviour, n_examples: int, *, seed: int = 0) -> Behaviour:
    """Examples without replacement, as `load_behaviour` draws them. Raises `InputError` where there are too few,
    or for a number below 1.
    """
    refuse_below_one(n_examples=n_examples)
    if n_examples > len(behaviour):
        part = _part_name(behaviour.name, behaviour.split)
        raise InputError(f"n_examples={n_examples} but {part} has {len(behaviour)} examples")
    order = np.random.default_rng(seed).permutation(len(behaviour))
    examples = tuple(behaviour.examples[i] for i in order[:n_examples])
    return dataclasses.replace(behaviour, examples=examples)


def _part_name(name: str, split: Split | None) -> str:
    if split is None:
        return name
    return f"{name} ({split} split)"


def _scored_answer(behaviour: Behaviour, example: Example) -> str:
    answers = example.answers
    for kind in (behaviour.response, "response"):
        if kind in answers:
            return answers[kind]
    others = ", ".join(answers) or "the prompt itself: it can be answered, not scored or measured"
    raise InputError(
        f"behaviour '{behaviour.name}': the prompt {example.prompt[:40]!r} has no {behaviour.response} answer, "
        f"only {others}"
    )
