"""Whether a run is what it says: its files, fingerprints computed anew, a sample of its numbers measured again, and the
results that its files give.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.distributed import require_one_process
from dean_interp.errors import InputError
from dean_interp.evaluation.measure import measure
from dean_interp.files import read_json
from dean_interp.frames import Framed
from dean_interp.models.load import HookedModel, model_fingerprint, versions
from dean_interp.models.scored_prompts import measuring_scored_prompts
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.scoring.importance import importance
from dean_interp.scoring.preparation import N_SPREAD_GROUPS, ScoringConfig, scores_fingerprint
from dean_interp.scoring.scores import Scores, load_scores
from dean_interp.scoring.top import Top
from dean_interp.selection.coupling import couple
from dean_interp.selection.selection import load_selection
from dean_interp.selection.stability import jaccard
from dean_interp.study.config import StudyConfig
from dean_interp.study.measurement_file import stored_log_probs
from dean_interp.study.results import RESULTS_FILE, load_results, save_results
from dean_interp.study.run import results_in
from dean_interp.study.run_folder import CHECKSUMS, Clock, checksums, kept_files
from dean_interp.study.store import State, file_name
from dean_interp.study.study_data import StudyData, study_data

_N_SAMPLE = 6
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Nats, and parts of the largest score: what other batches, threads and devices may change."""
_TIED = 0.05
"""How far a selection from new scores may be from the kept one, since nearly tied units change places (1 - Jaccard)."""
_NEW = "new scores"

Match = Literal["same", "within float noise", "different"]


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    what: str
    match: Match
    difference: float
    """The largest; 0 for what is equal or has no size."""
    detail: str = ""


@dataclass(frozen=True)
class Verification(Framed):
    """What holds of a run, and what does not."""

    checks: tuple[Check, ...]
    versions: str
    """Packages that differ from those of the run; empty where none does."""

    @property
    def holds(self) -> bool:
        """Whether nothing is different beyond float noise."""
        return all(one.match != "different" for one in self.checks)

    def to_pandas(self) -> pd.DataFrame:
        """One row a check."""
        return pd.DataFrame([asdict(one) for one in self.checks])

    def __repr__(self) -> str:
        return f"Verification({'holds' if self.holds else 'does not hold'}, {len(self.checks)} checks)"

    def __str__(self) -> str:
        lines = [f"{one.what:<44} {one.match:<18} {one.difference:<9.2g} {one.detail}".rstrip() for one in self.checks]
        n_bad = sum(one.match == "different" for one in self.checks)
        tail = "the run is what it says" if self.holds else f"{n_bad} of {len(self.checks)} checks do not hold"
        return "\n".join([*lines, *([f"other versions: {self.versions}"] if self.versions else []), tail])


@own_torch_settings()
def verify_run(folder: str | Path, *, full: bool = False) -> Verification:
    """Compare a finished run with what its settings give now.

    Always: the files with their checksums, and where these hold the fingerprints of data, model and scores, the
    selections with those that the scores give, losses and neuron scores of every 16th calibration example (a group that
    score files keep), and log-probabilities of the first test prompts under the original and each edit. Where all this
    holds, the results are put together from the kept files again, every control drawn anew. The folder is only read.

    Args:
        full: score everything again, compare every score, and the selections with those of the new scores.

    Raises:
        InputError: no finished run there, or one whose model or data cannot be loaded; several processes.
    """
    require_one_process("verify")
    folder = Path(folder)
    results = load_results(folder / RESULTS_FILE)
    files = _files(folder)
    if files.match == "different":
        return Verification((files,), "")
    begun = read_json(folder / "config.json", _Begun)
    config = begun.config
    data = study_data(config)
    model = config.model.load()
    scores = [load_scores(folder / "scores" / f"{one.name}.safetensors") for one in data.calibration]
    again = _again(model, config, data.calibration, full=full)
    checks = [
        files,
        *_data(begun.data, data.all),
        _equal("model", model_fingerprint(model), results.model_fingerprint),
        *_scores(model, config, data.calibration, scores, again),
        *_selections(folder, config, scores, "the kept scores"),
        *(_selections(folder, config, again, _NEW) if full else ()),
        *_measured(folder, model, config, data.tests),
    ]
    if all(one.match != "different" for one in checks):
        checks.append(_results(folder, model, config, data))
    then, now = scores[0].facts.get("versions", {}), versions()
    other = ", ".join(f"{name} {then.get(name)} there, {now[name]} here" for name in now if then.get(name) != now[name])
    return Verification(tuple(checks), other)


@dataclass(frozen=True)
class _Begun:
    """What `config.json` of a study holds."""

    config: StudyConfig
    data: dict[str, str]


def _files(folder: Path) -> Check:
    try:
        noted = read_json(folder / CHECKSUMS, dict[str, str])
    except InputError:
        return Check("files", "different", 0.0, f"no {CHECKSUMS}, or none that can be read")
    now = checksums(folder, noted.keys() & {*kept_files(folder)})
    changed = sorted(name for name in noted if noted[name] != now.get(name))
    detail = f"{len(noted)} files" if not changed else f"changed since the run: {', '.join(changed[:4])}"
    return Check("files", "different" if changed else "same", float(len(changed)), detail)


def _data(stored: Mapping[str, str], data: Sequence[Behaviour]) -> Iterator[Check]:
    for one in data:
        name = f"{one.name} ({one.split})"
        yield _equal(f"data: {name}", one.fingerprint, stored.get(name))


def _equal(what: str, now: object, then: object) -> Check:
    return Check(what, "same" if now == then else "different", 0.0, "" if now == then else f"{then} there, {now} now")


def _close(what: str, now: Tensor, then: Tensor, dtype: str, detail: str) -> Check:
    if now.shape != then.shape:
        return Check(what, "different", 0.0, f"{tuple(then.shape)} there, {tuple(now.shape)} now")
    difference = float((now.double() - then.double()).abs().max()) if now.numel() else 0.0
    return Check(what, _match(difference, dtype), difference, detail)


def _match(difference: float, dtype: str) -> Match:
    if not difference:
        return "same"
    return "within float noise" if difference <= _TOLERANCE[dtype] else "different"


def _scores(
    model: HookedModel,
    config: StudyConfig,
    calibration: Sequence[Behaviour],
    stored: Sequence[Scores],
    again: Sequence[Scores],
) -> Iterator[Check]:
    for behaviour, then, now in zip(calibration, stored, again, strict=True):
        name = f"scores: {behaviour.name}"
        key = scores_fingerprint(model, behaviour, unit=config.scored, config=_scoring(config))
        yield _equal(f"{name}, fingerprint", key, then.fingerprint)
        if now.units != then.units or len(now.loss) < len(behaviour):
            then = _first_group(then)
        yield _close(f"{name}, losses", now.loss, then.loss, config.model.dtype, f"{len(now.loss)} examples, nats")
        yield _all_scores(name, now, then, config.model.dtype)


def _scoring(config: StudyConfig) -> ScoringConfig:
    return config.calibration.scoring(config.model.template)


def _first_group(scores: Scores) -> Scores:
    """The neuron scores of every 16th example, and their losses."""
    values = {site: groups[0] for site, groups in scores.groups.items()}
    return replace(scores.of("neuron"), values=values, loss=scores.loss[::N_SPREAD_GROUPS])


def _again(model: HookedModel, config: StudyConfig, calibration: Sequence[Behaviour], *, full: bool) -> list[Scores]:
    """Scores of everything, or of the neurons on the first group of examples."""
    some = calibration if full else [replace(one, examples=one.examples[::N_SPREAD_GROUPS]) for one in calibration]
    return [
        importance(
            model,
            one,
            unit=config.scored if full else "neuron",
            config=_scoring(config),
        )
        for one in some
    ]


def _all_scores(name: str, now: Scores, then: Scores, dtype: str) -> Check:
    what, largest = f"{name}, scores of {' and '.join(f'{unit}s' for unit in then.units)}", 0.0
    if now.shapes != then.shapes:
        return Check(what, "different", math.inf, "of another shape")
    for site, value in then.values.items():
        indices = value.indices if isinstance(value, Top) else torch.arange(value.numel())
        held = then.at(site, indices)
        difference = (now.at(site, indices) - held).abs().max() / held.abs().max().clamp(min=1e-30)
        largest = max(largest, float(difference))
    detail = f"{len(now.loss)} examples, parts of the largest of each site"
    return Check(what, _match(largest, dtype), largest, detail)


def _selections(folder: Path, config: StudyConfig, scores: Sequence[Scores], said: str) -> Iterator[Check]:
    for unit in config.unit:
        kept = load_selection(folder / f"selection.{unit}.safetensors")
        now = couple(*(one.of(unit) for one in scores), fraction=config.fraction(unit)).coupled
        apart = 1 - jaccard(now, kept) if now.shapes == kept.shapes else 1.0
        match: Match = "same" if not apart else "different"
        if said == _NEW and 0 < apart <= _TIED:
            match = "within float noise"
        detail = f"{len(kept)} units" if not apart else f"Jaccard overlap {1 - apart:.3f}"
        yield Check(f"selection: {unit}s, from {said}", match, apart, detail)


def _results(folder: Path, model: HookedModel, config: StudyConfig, data: StudyData) -> Check:
    """`results.json` anew, in a folder of links to the kept files."""
    what = "results, from the kept files"
    with tempfile.TemporaryDirectory() as name:
        links = Path(name)
        for file in kept_files(folder):
            (links / file).parent.mkdir(parents=True, exist_ok=True)
            (links / file).symlink_to((folder / file).resolve())
        path = links / RESULTS_FILE
        path.unlink()
        try:
            save_results(results_in(links, model, config, data, Clock(links / "times.json")), path)
        except InputError as error:  # a kept file of another state
            return Check(what, "different", math.inf, str(error))
        then, now = (json.loads((one / RESULTS_FILE).read_bytes()) for one in (folder, links))
    apart = _apart(then, now)
    said = "numbers, parts of the larger of 1 and what was stored"
    return Check(what, _match(apart, config.model.dtype), apart, said)


def _apart(then: Any, now: Any) -> float:  # noqa: ANN401 - what JSON can hold
    """The largest difference of numbers; infinite where anything else differs."""
    match then, now:
        case dict(), dict() if then.keys() == now.keys():
            return max((_apart(then[key], now[key]) for key in then), default=0.0)
        case list(), list() if len(then) == len(now):
            return max((_apart(*pair) for pair in zip(then, now, strict=True)), default=0.0)
        case int() | float(), int() | float():
            return abs(now - then) / max(1.0, abs(then))
        case _:
            return 0.0 if then == now else math.inf


def _measured(folder: Path, model: HookedModel, config: StudyConfig, tests: Sequence[Behaviour]) -> Iterator[Check]:
    """Log-probabilities of the first test prompts under the original and each edit, measured again."""
    few = [replace(test, examples=test.examples[:_N_SAMPLE]) for test in tests]
    states = [State("original", "original")]
    for unit in config.unit:
        edit = load_selection(folder / f"selection.{unit}.safetensors")
        states.append(State("edit", "edit", ablated=edit, unit=unit))
    for state in states:
        # The tests were drawn away from the calibration data, which this process has scored in part.
        with measuring_scored_prompts(model), state.applied(model):
            found = measure(
                model,
                few,
                template=config.model.template,
                answer_tokens=config.data.answer_tokens,
                batch_tokens=config.data.measure_tokens,
            )
        for test in few:
            # General text has files of its own, named by what is ablated.
            place, name = folder / "states", state.title
            if test is few[2]:
                place, name = place / test.name, state.fingerprint or "original"
            then = stored_log_probs(place, file_name(name), test.name)[: len(test)]
            detail = f"{len(test)} prompts, nats per token"
            now = found[test.name].log_prob
            yield _close(f"measured: {state.title}, {test.name}", now, then, config.model.dtype, detail)
