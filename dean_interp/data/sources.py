"""Published data sets: where they are, at which commit, under which licence.

`load_behaviour("beavertails:fairness")` loads from the Hugging Face hub, or from the cache of `datasets` where there is
no network, at the commit that is fixed here; `name:part@commit` takes another one. `name:part@path` reads a local file
(.jsonl, .json, .csv, .parquet) or a saved folder with the same columns. `paper:fairness@folder` reads the CSV files of
the paper's authors (`paper_csvs`).
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dean_interp.data import published
from dean_interp.data.published import Record
from dean_interp.data.readers import BUILTIN, DataRow, read_rows, source_name
from dean_interp.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

FILES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Part:
    """One behaviour of a data set."""

    rows: Callable[[Iterable[Record]], list[DataRow]]
    """What becomes of its rows (`published`)."""
    split: str = "train"
    """The split on the hub."""
    config: str | None = None


@dataclass(frozen=True)
class Source:
    """A published data set."""

    hub: str
    """Its name on the Hugging Face hub."""
    licence: str
    revision: str | None
    """The commit that is loaded; None: the newest."""
    parts: Mapping[str, Part]


@dataclass(frozen=True)
class Named:
    """What `name:part@at` asks for."""

    name: str
    part: str
    at: str | None = None
    """A commit of the hub, a local file or a folder."""

    def __str__(self) -> str:
        return f"{self.name}:{self.part}"


_HARMS = {"fairness": "discrimination,stereotype,injustice", "privacy": "privacy_violation"}
_ANSWERS: Mapping[str, published.Answers] = {"": "both", "_safe": "safe", "_unsafe": "unsafe"}
_BBQ = ("age", "disability_status", "gender_identity", "nationality", "physical_appearance", "race_ethnicity",
        "race_x_gender", "race_x_ses", "religion", "ses", "sexual_orientation")  # fmt: skip
_DISCRIMINATION = ("nons_group_real_discr", "real_group_nons_discr")
_WIKITEXT = "wikitext-2-raw-v1"

SOURCES: Mapping[str, Source] = {
    "beavertails": Source(
        "PKU-Alignment/BeaverTails", "CC BY-NC 4.0", "8401fe609d288129cc684a9b3be6a93e41cfe678",
        {f"{name}{end}": Part(partial(published.beavertails, category=category, answers=answers), "330k_train")
         for name, category in _HARMS.items() for end, answers in _ANSWERS.items()},
    ),
    "salad": Source(
        "OpenSafetyLab/Salad-Data", "Apache-2.0", "6717297bce57e647c9b27a25c86443a2c40cf22f",
        {"fairness": Part(partial(published.salad, category="O2: Unfair Representation"), config="base_set"),
         "privacy": Part(partial(published.salad, category="O9: Privacy Infringement"), config="base_set")},
    ),
    "alpaca": Source(
        "yahma/alpaca-cleaned", "CC BY 4.0", "12567cabf869d7c92e573c7c783905fc160e9639",
        {"general": Part(published.alpaca)},
    ),
    "wikitext": Source(
        "Salesforce/wikitext", "CC BY-SA 3.0", "b08601e04326c79dfdd32d625aee71d232d685c3",
        {"text": Part(published.wikitext, "test", _WIKITEXT),
         "general": Part(partial(published.wikitext, continued=True), "train", _WIKITEXT)},
    ),
    "bbq": Source(
        "Elfsong/BBQ", "CC BY 4.0", "56cd2dcb60a10288b4f1a9c8cff6cf120141c08a",
        {"fairness": Part(published.bbq, "+".join(_BBQ))},
    ),
    "xstest": Source(
        "Paul/XSTest", "CC BY 4.0", "f600c994b256f12867dfa5b3eb3d545a3e62f8b5",
        {"safe": Part(partial(published.xstest, label="safe")),
         "unsafe": Part(partial(published.xstest, label="unsafe")),
         "fairness": Part(partial(published.xstest, label="safe", types=_DISCRIMINATION)),
         "privacy": Part(partial(published.xstest, label="safe", types=("privacy_public", "privacy_fictional")))},
    ),
    "orbench": Source(
        "bench-llm/or-bench", "CC BY 4.0", "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272",
        {"all": Part(published.orbench, config="or-bench-80k"),
         "hard": Part(published.orbench, config="or-bench-hard-1k"),
         "toxic": Part(published.orbench, config="or-bench-toxic"),
         "fairness": Part(partial(published.orbench, category="hate"), config="or-bench-hard-1k"),
         "privacy": Part(partial(published.orbench, category="privacy"), config="or-bench-hard-1k")},
    ),
}  # fmt: skip

PAPER: Mapping[str, tuple[str, ...]] = {
    "fairness": ("*_fairness_safe*.csv", "*_fairness_unsafe*.csv"),
    "fairness_safe": ("*_fairness_safe*.csv",),
    "fairness_unsafe": ("*_fairness_unsafe*.csv",),
    "fairness_questions": ("salad_fairness*.csv",),
    "privacy": ("*_privacy_safe*.csv", "*_privacy_unsafe*.csv"),
    "privacy_safe": ("*_privacy_safe*.csv",),
    "privacy_unsafe": ("*_privacy_unsafe*.csv",),
    "privacy_questions": ("salad_privacy*.csv",),
    "general": ("alpaca*.csv",),
}
"""The files of the paper's authors that each part is read from."""


def named_source(source: object) -> Named | None:
    """What a name of the form `name:part` or `name:part@at` asks for; None for every other source of a behaviour."""
    found = re.fullmatch(r"([\w-]+):([\w-]+)(?:@(.+))?", source) if isinstance(source, str) else None
    return Named(*found.groups()) if found and not os.path.exists(found.string) else None


def behaviour_name(source: Any) -> str:  # noqa: ANN401 - whatever `load_behaviour` takes
    """What `load_behaviour` calls the behaviour of a source; a published set is called `name_part`."""
    asked = named_source(source)
    return f"{asked.name}_{asked.part}" if asked else source_name(source)


def load_named(asked: Named, response: str = "safe") -> list[DataRow]:
    """The rows of a published data set; `response` is the answer that will be scored.

    Raises `InputError` where it is not known, not there or not as it should be.
    """
    if asked.name == "paper":
        if asked.at is None:
            raise InputError(f"'{asked}' needs the folder with the authors' CSV files: {asked}@path/to/folder")
        return paper_csvs(asked.at, asked.part, response)
    at = asked.at
    if at and (os.path.exists(at) or Path(at).suffix.lower() in FILES or at.startswith((".", "/", "~"))):
        return load_source(asked.name, asked.part, Path(at))
    return load_source(asked.name, asked.part, revision=at)


def load_source(
    name: str, part: str, records: Iterable[Any] | Path | None = None, *, revision: str | None = None
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
        raise InputError(f"no data set '{name}': give {', '.join(SOURCES)} or paper")
    source = SOURCES[name]
    wanted = source.parts.get(part)
    if wanted is None:
        raise InputError(f"no part '{part}' of {name}: give {', '.join(f'{name}:{known}' for known in source.parts)}")
    if records is None:
        records = _from_hub(source, wanted, revision or source.revision)
    try:
        rows = wanted.rows(_local(records, wanted) if isinstance(records, Path) else records)
    except InputError as error:
        raise InputError(f"{name}:{part}: {error}") from error
    if not rows:
        raise InputError(f"{name}:{part}: none of the rows belongs to it")
    return rows


def paper_csvs(folder: str | Path, part: str, response: str = "safe") -> list[DataRow]:
    """Rows of the paper's own CSV files, from the folder that holds them.

    `fairness` and `privacy` are the prompts of the safe file (`response="unsafe"`: of the unsafe one), each with its
    first answer in either; those that are in one file alone are for calibration, since a test needs both answers.
    `_safe` and `_unsafe` are one of the files as it stands, `_questions` the SALAD questions, `general` Alpaca.
    """
    if part not in PAPER:
        raise InputError(f"no part '{part}' of paper: give {', '.join(f'paper:{known}' for known in PAPER)}")
    files = []
    for pattern in PAPER[part]:
        found = sorted(Path(folder).expanduser().glob(pattern))
        if len(found) != 1:
            said = f"has {len(found)} files {pattern}: {', '.join(one.name for one in found)}" if found else (
                f"has no file {pattern}")  # fmt: skip
            raise InputError(f"paper:{part} needs one file of each kind, but {folder} {said}")
        files.append(read_rows(found[0]))
    if len(files) == 1:
        return files[0]
    answers = {
        kind: {row.prompt: row.answers["response"] for row in reversed(rows) if "response" in row.answers}
        for kind, rows in zip(("safe", "unsafe"), files, strict=True)
    }
    found = []
    for prompt in dict.fromkeys(row.prompt for row in files[("safe", "unsafe").index(response)]):
        own = {kind: some[prompt] for kind, some in answers.items() if prompt in some}
        if response in own:
            found.append(DataRow(prompt, own, split=None if len(own) == 2 else "calibration"))
    return found


def licence_of(source: object) -> str:
    """The licence of a behaviour's source, where it is known; else "not stated"."""
    asked = named_source(source)
    if asked and asked.name in SOURCES:
        return SOURCES[asked.name].licence
    if asked and asked.name == "paper":
        return "Apache-2.0" if asked.part.endswith("questions") else "CC BY-NC 4.0"
    if str(source) in BUILTIN:
        return "Apache-2.0"
    info = getattr(source, "info", None)
    path = Path(source) if isinstance(source, str | Path) else None
    if path and (path / "dataset_info.json").is_file():
        info = json.loads((path / "dataset_info.json").read_text(encoding="utf-8"))
    licence = info.get("license") if isinstance(info, dict) else getattr(info, "license", None)
    return str(licence or "not stated")


def _from_hub(source: Source, part: Part, revision: str | None) -> "Dataset":
    import datasets  # loaded only where it is needed: importing it takes seconds

    at = f"'{source.hub}'" + (f" at {revision}" if revision else "")
    try:
        loaded = datasets.load_dataset(source.hub, part.config, split=part.split, revision=revision)
    except Exception as error:  # whatever the loader raises, the user needs one line that names the source
        raise InputError(f"cannot load {at} from the Hugging Face hub, nor from its cache: {_line(error)}") from error
    held = {Path(file["filename"]).parent.name for file in getattr(loaded, "cache_files", [])}
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision) and held - {revision}:
        # without a network `datasets` takes what it cached last, whichever commit was asked for
        raise InputError(f"cannot load {at}: without a network the cache gives its commit {', '.join(sorted(held))}")
    return loaded


def _local(path: Path, part: Part) -> Iterable[Any]:
    path = path.expanduser()
    if not path.exists():
        raise InputError(f"no file or folder {path}")
    kind = path.suffix.lower()
    try:
        if path.is_dir():
            import datasets

            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                loaded = datasets.concatenate_datasets([loaded[split] for split in part.split.split("+")])
            return loaded
        if kind == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        with path.open(encoding="utf-8-sig", newline="") as file:  # line ends inside a field stay as written
            text = file.read()
        if kind == ".csv":
            return list(csv.DictReader(StringIO(text, newline=""), strict=True))
        if kind == ".json":
            return json.loads(text)
        if kind == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
    except Exception as error:  # whatever a reader raises, the user needs one line that names the file
        raise InputError(f"cannot read {path}: {_line(error)}") from error
    raise InputError(f"a file of rows is one of {', '.join(FILES)} or a saved folder, got {path}")


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
