"""The CSV files of the paper's authors: which file each part is read from, and which answers belong to one prompt."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from dean_interp.data.data_rows import DataRow
from dean_interp.data.readers import read_rows
from dean_interp.errors import InputError, did_you_mean

PAPER_FILES: Mapping[str, tuple[str, ...]] = {
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


def paper_csvs(folder: str | Path, part: str, response: str = "safe") -> list[DataRow]:
    """Rows of the paper's own CSV files, from the folder that holds them.

    `fairness` and `privacy` are the prompts of the safe file (`response="unsafe"`: of the unsafe one), each with its
    first answer in either; those that are in one file alone are for calibration, since a test needs both answers.
    `_safe` and `_unsafe` are one of the files as it stands, `_questions` the SALAD questions, `general` Alpaca.
    """
    if part not in PAPER_FILES:
        known = ", ".join(f"paper:{known_part}" for known_part in PAPER_FILES)
        raise InputError(f"no part '{part}' of paper{did_you_mean(part, PAPER_FILES)}: give {known}")
    files = [read_rows(_only_file(folder, part, pattern)) for pattern in PAPER_FILES[part]]
    if len(files) == 1:
        return files[0]
    safe_rows, unsafe_rows = files
    answers_of_kind = {"safe": _first_answers(safe_rows), "unsafe": _first_answers(unsafe_rows)}
    scored_rows = safe_rows if response == "safe" else unsafe_rows
    rows = []
    for prompt in dict.fromkeys(row.prompt for row in scored_rows):
        answers = {}
        for kind, answer_of in answers_of_kind.items():
            if prompt in answer_of:
                answers[kind] = answer_of[prompt]
        if response in answers:
            split = None if len(answers) == 2 else "calibration"
            rows.append(DataRow(prompt, answers, split=split))
    return rows


def _first_answers(rows: Iterable[DataRow]) -> dict[str, str]:
    """The first answer of each prompt."""
    answer_of: dict[str, str] = {}
    for row in rows:
        if "response" in row.answers:
            answer_of.setdefault(row.prompt, row.answers["response"])
    return answer_of


def _only_file(folder: str | Path, part: str, pattern: str) -> Path:
    """The one file of a pattern. Raises `InputError` where there is none, or more than one."""
    paths = sorted(Path(folder).expanduser().glob(pattern))
    if not paths:
        raise InputError(f"paper:{part} needs one file of each kind, but {folder} has no file {pattern}")
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise InputError(
            f"paper:{part} needs one file of each kind, but {folder} has {len(paths)} files {pattern}: {names}"
        )
    return paths[0]
