"""Published data sets: where they are, at which commit, under which licence; and how their rows are loaded.

`load_behaviour("beavertails:fairness")` loads from the Hugging Face hub, or from the cache of `datasets` where there is
no network, at the commit that is fixed here; `name:part@commit` takes another one. `name:part@path` reads a local file
(.jsonl, .json, .csv, .parquet) or a saved folder with the same columns. `paper:fairness@folder` reads the CSV files of
the paper's authors (`paper_files`).
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dean_interp.data import published
from dean_interp.data.data_rows import DataRow
from dean_interp.data.paper_files import paper_csvs
from dean_interp.data.published import PublishedRecord
from dean_interp.data.readers import BUILTIN, FILES, read_records, source_name
from dean_interp.errors import InputError, did_you_mean, first_line

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class PublishedPart:
    """One behaviour in a published data set."""

    rows: Callable[[Iterable[PublishedRecord]], list[DataRow]]
    """Turns the published rows into ours (a function of `published`)."""
    split: str = "train"
    """The split on the hub."""
    config: str | None = None
    """The configuration on the hub, where the data set has several."""


@dataclass(frozen=True)
class PublishedSet:
    """A published data set."""

    hub: str
    """Its name on the Hugging Face hub."""
    licence: str
    revision: str | None
    """The commit that is loaded; None: the newest."""
    parts: Mapping[str, PublishedPart]


@dataclass(frozen=True)
class PublishedName:
    """`name:part@at`, by which a user asks for a part of a published data set."""

    name: str
    part: str
    at: str | None = None
    """A commit of the hub, a local file or a folder."""

    def __str__(self) -> str:
        return f"{self.name}:{self.part}"


_HARMS = {"fairness": "discrimination,stereotype,injustice", "privacy": "privacy_violation"}
_ANSWERS: Mapping[str, published.AnswerKinds] = {"": "both", "_safe": "safe", "_unsafe": "unsafe"}
_BBQ = ("age", "disability_status", "gender_identity", "nationality", "physical_appearance", "race_ethnicity",
        "race_x_gender", "race_x_ses", "religion", "ses", "sexual_orientation")  # fmt: skip
_DISCRIMINATION = ("nons_group_real_discr", "real_group_nons_discr")
_PRIVACY = ("privacy_public", "privacy_fictional")
_WIKITEXT = "wikitext-2-raw-v1"

SOURCES: Mapping[str, PublishedSet] = {
    "beavertails": PublishedSet(
        "PKU-Alignment/BeaverTails", "CC BY-NC 4.0", "8401fe609d288129cc684a9b3be6a93e41cfe678",
        {f"{name}{end}": PublishedPart(partial(published.beavertails, category=category, answers=answers), "330k_train")
         for name, category in _HARMS.items() for end, answers in _ANSWERS.items()},
    ),
    "salad": PublishedSet(
        "OpenSafetyLab/Salad-Data", "Apache-2.0", "6717297bce57e647c9b27a25c86443a2c40cf22f",
        {"fairness": PublishedPart(partial(published.salad, category="O2: Unfair Representation"), config="base_set"),
         "privacy": PublishedPart(partial(published.salad, category="O9: Privacy Infringement"), config="base_set")},
    ),
    "alpaca": PublishedSet(
        "yahma/alpaca-cleaned", "CC BY 4.0", "12567cabf869d7c92e573c7c783905fc160e9639",
        {"general": PublishedPart(published.alpaca)},
    ),
    "wikitext": PublishedSet(
        "Salesforce/wikitext", "CC BY-SA 3.0", "b08601e04326c79dfdd32d625aee71d232d685c3",
        {"text": PublishedPart(published.wikitext, "test", _WIKITEXT),
         "general": PublishedPart(partial(published.wikitext, continued=True), "train", _WIKITEXT)},
    ),
    "bbq": PublishedSet(
        "Elfsong/BBQ", "CC BY 4.0", "56cd2dcb60a10288b4f1a9c8cff6cf120141c08a",
        {"fairness": PublishedPart(published.bbq, "+".join(_BBQ))},
    ),
    "xstest": PublishedSet(
        "Paul/XSTest", "CC BY 4.0", "f600c994b256f12867dfa5b3eb3d545a3e62f8b5",
        {"safe": PublishedPart(partial(published.xstest, label="safe")),
         "unsafe": PublishedPart(partial(published.xstest, label="unsafe")),
         "fairness": PublishedPart(partial(published.xstest, label="safe", types=_DISCRIMINATION)),
         "privacy": PublishedPart(partial(published.xstest, label="safe", types=_PRIVACY))},
    ),
    "orbench": PublishedSet(
        "bench-llm/or-bench", "CC BY 4.0", "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272",
        {"all": PublishedPart(published.orbench, config="or-bench-80k"),
         "hard": PublishedPart(published.orbench, config="or-bench-hard-1k"),
         "toxic": PublishedPart(published.orbench, config="or-bench-toxic"),
         "fairness": PublishedPart(partial(published.orbench, category="hate"), config="or-bench-hard-1k"),
         "privacy": PublishedPart(partial(published.orbench, category="privacy"), config="or-bench-hard-1k")},
    ),
}  # fmt: skip


def named_source(source: object) -> PublishedName | None:
    """What a name of the form `name:part` or `name:part@at` asks for; None for every other source of a behaviour."""
    if not isinstance(source, str) or os.path.exists(source):
        return None
    match = re.fullmatch(r"([\w-]+):([\w-]+)(?:@(.+))?", source)
    if match is None:
        return None
    name, part, at = match.groups()
    return PublishedName(name, part, at)


def behaviour_name(source: Any) -> str:  # noqa: ANN401 - whatever `load_behaviour` takes
    """What `load_behaviour` calls the behaviour of a source; a published set is called `name_part`."""
    asked = named_source(source)
    if asked is None:
        return source_name(source)
    return f"{asked.name}_{asked.part}"


def names_fault(sources: Sequence[str]) -> str | None:
    """What is wrong where two sources are one file, or would have one name in files and tables; None where nothing is.

    Names that differ in case alone are one, as they are to some file systems.
    """
    for first, second in combinations(sources, 2):
        are_files = os.path.isfile(first) and os.path.isfile(second)
        if are_files and os.path.samefile(first, second):
            return f"{first} and {second} are one file"
        name = behaviour_name(second)
        if behaviour_name(first).lower() == name.lower():
            return f"{first} and {second} would both be called '{name}': rename one of them"
    return None


def load_named(asked: PublishedName, response: str = "safe") -> list[DataRow]:
    """The rows of a published data set; `response` is the answer that will be scored.

    Raises `InputError` where it is not known, not there or not as it should be.
    """
    if asked.name == "paper":
        if asked.at is None:
            raise InputError(f"'{asked}' needs the folder with the authors' CSV files: {asked}@path/to/folder")
        return paper_csvs(asked.at, asked.part, response)
    if asked.at and _is_path(asked.at):
        return load_source(asked.name, asked.part, Path(asked.at))
    return load_source(asked.name, asked.part, revision=asked.at)


def load_source(
    name: str,
    part: str,
    records: Iterable[Any] | Path | None = None,
    *,
    revision: str | None = None,
) -> list[DataRow]:
    """The rows of one part of a published data set.

    Args:
        name: one of `SOURCES`.
        part: one of its parts.
        records: its published rows, a file or saved folder that holds them; None: those on the hub.
        revision: a commit on the hub in place of the fixed one.

    Raises:
        InputError: an unknown name or part, a source that cannot be read, a malformed row (by its number), no rows.
    """
    if name not in SOURCES:
        hint = did_you_mean(name, (*SOURCES, "paper"))
        raise InputError(f"no data set '{name}'{hint}: give {', '.join(SOURCES)} or paper")
    source = SOURCES[name]
    wanted = source.parts.get(part)
    if wanted is None:
        known = ", ".join(f"{name}:{known_part}" for known_part in source.parts)
        hint = did_you_mean(part, source.parts)
        raise InputError(f"no part '{part}' of {name}{hint}: give {known}")
    if records is None:
        records = _from_hub(source, wanted, revision or source.revision)
    try:
        if isinstance(records, Path):
            records = read_records(records, split=wanted.split)
        rows = wanted.rows(records)
    except InputError as error:
        raise InputError(f"{name}:{part}: {error}") from error
    if not rows:
        raise InputError(f"{name}:{part}: none of the rows belongs to it")
    return rows


def _is_path(text: str) -> bool:
    """Whether a text means a file or a folder, there or not, and no commit."""
    if os.path.exists(text) or os.path.isabs(text) or text.startswith((".", "~")):
        return True
    return Path(text).suffix.lower() in FILES


def licence_of(source: object) -> str:
    """The licence of a behaviour's source, where it is known; else "not stated"."""
    asked = named_source(source)
    if asked and asked.name in SOURCES:
        return SOURCES[asked.name].licence
    if asked and asked.name == "paper":
        is_salad = asked.part.endswith("questions")
        return "Apache-2.0" if is_salad else "CC BY-NC 4.0"
    if str(source) in BUILTIN:
        return "Apache-2.0"
    # a `Dataset` in memory has an `info`, a saved one a file of it
    licence = getattr(getattr(source, "info", None), "license", None)
    if isinstance(source, str | Path):
        info_file = Path(source) / "dataset_info.json"
        if info_file.is_file():
            info = json.loads(info_file.read_text(encoding="utf-8"))
            licence = info.get("license") if isinstance(info, dict) else None
    return str(licence or "not stated")


def _from_hub(source: PublishedSet, part: PublishedPart, revision: str | None) -> "Dataset":
    # loaded only where it is needed: importing it takes seconds
    import datasets

    at = f"'{source.hub}'"
    if revision:
        at = f"'{source.hub}' at {revision}"
    try:
        loaded = datasets.load_dataset(source.hub, part.config, split=part.split, revision=revision)
    # whatever the loader raises, the user needs one line that names the source
    except Exception as error:
        reason = first_line(error)
        raise InputError(f"cannot load {at} from the Hugging Face hub, nor from its cache: {reason}") from error
    # without a network `datasets` takes what it cached last, whichever commit was asked for
    files = getattr(loaded, "cache_files", [])
    cached = {Path(file["filename"]).parent.name for file in files}
    is_commit = revision and re.fullmatch(r"[0-9a-f]{40}", revision)
    if is_commit and cached - {revision}:
        commits = ", ".join(sorted(cached))
        raise InputError(f"cannot load {at}: without a network the cache gives its commit {commits}")
    return loaded
