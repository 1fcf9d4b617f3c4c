"""One day for all prompts of a folder, where the chat template writes the day into them.

What is begun on one day and gone on with, verified or evaluated on another has the prompts of the first.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dean_interp.errors import InputError
from dean_interp.files import read_json, write_json
from dean_interp.models.chat_settings import reads_clock, today
from dean_interp.models.load import tokenizer_of
from dean_interp.resume import CONFIG_FILE
from dean_interp.scoring.scores import Scores
from dean_interp.study.results import RESULTS_FILE
from dean_interp.study.run_folder import begun_with
from dean_interp.study.settings import ModelConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Day:
    """What `day.json` of an evaluation holds."""

    date: str


def of_run(model: ModelConfig, folder: Path) -> ModelConfig:
    """The settings with the day on which the run in a folder was begun: that of today where it has not been.

    None is set where the chat template writes none. A finished run keeps its settings. Raises `InputError` where the
    model's tokenizer cannot be loaded.
    """
    date = None
    if (folder / CONFIG_FILE).is_file():
        begun = begun_with(folder, dict[str, Any]).config
        date = begun.get("model", {}).get("date")
    is_finished = any((folder / name).is_file() for name in (RESULTS_FILE, "sweep.json"))
    if model.date is None and (date or is_finished):
        return replace(model, date=date)
    return _set(model, today())


def of_evaluation(model: ModelConfig, folder: Path, scores: Sequence[Scores]) -> ModelConfig:
    """The settings with the day of the measurements in a folder, else that of the scores, else that of today.

    The day is written into the folder. Raises `InputError` for another day than that of the measurements.
    """
    warn_of_days(scores)
    path = folder / "day.json"
    kept = read_json(path, _Day).date if path.is_file() else None
    if kept and model.date not in (None, kept):
        raise InputError(f"{folder} holds measurements with prompts of {kept}, got date {model.date}: leave it unset")
    days = [behaviour.facts["date"] for behaviour in scores if behaviour.facts.get("date")]
    dated = _set(model, kept or next(iter(days), today()))
    if dated.date and not kept:
        write_json(path, _Day(dated.date))
    return dated


def warn_of_days(scores: Sequence[Scores]) -> None:
    """Warn where scores are of prompts with different days, or with and without thinking."""
    for name in ("date", "thinking"):
        values = sorted({str(behaviour.facts.get(name)) for behaviour in scores})
        if len(values) > 1:
            log.warning("the scores are of prompts with another %s each: %s", name, ", ".join(values))


def _set(model: ModelConfig, date: str) -> ModelConfig:
    """The settings with a day, where they have none and the chat template writes one."""
    if model.date or model.template != "chat":
        return model
    if not reads_clock(tokenizer_of(model.name)):
        return model
    return replace(model, date=date)
