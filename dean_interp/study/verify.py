"""Whether a run is what it says: its files, fingerprints computed anew, and a sample of its numbers measured again."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.editing.ablation import ablate
from dean_interp.errors import InputError
from dean_interp.evaluation.measure import measure
from dean_interp.frames import Framed
from dean_interp.models.load import HookedModel, load_model, model_fingerprint, versions
from dean_interp.models.memory import scored_prompts
from dean_interp.scoring.importance import Scoring, importance, scores_fingerprint
from dean_interp.scoring.scores import Scores, Top, load_scores
from dean_interp.selection.coupling import coupling
from dean_interp.selection.selection import load_selection
from dean_interp.selection.stability import jaccard
from dean_interp.study.config import StudyConfig
from dean_interp.study.results import Results, load_results
from dean_interp.study.states import stored_log_probs
from dean_interp.tensorfile import read_json, write_text

CHECKSUMS = "checksums.json"
_N_SAMPLE = 6
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Nats, and parts of the largest score: what other batches, threads and devices may change."""
_KEPT = ("config.json", "results.json", "selection.*.safetensors", "scores/*.safetensors", "states/**/*.safetensors",
         "answers/*.json")  # fmt: skip

Verdict = Literal["same", "within float noise", "different"]


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    what: str
    verdict: Verdict
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
        return all(one.verdict != "different" for one in self.checks)

    def to_pandas(self) -> pd.DataFrame:
        """One row a check."""
        return pd.DataFrame([asdict(one) for one in self.checks])

    def __repr__(self) -> str:
        return f"Verification({'holds' if self.holds else 'does not hold'}, {len(self.checks)} checks)"

    def __str__(self) -> str:
        lines = [
            f"{one.what:<44} {one.verdict:<18} {one.difference:<9.2g} {one.detail}".rstrip() for one in self.checks
        ]
        n_bad = sum(one.verdict == "different" for one in self.checks)
        tail = "the run is what it says" if self.holds else f"{n_bad} of {len(self.checks)} checks do not hold"
        return "\n".join([*lines, *([f"other versions: {self.versions}"] if self.versions else []), tail])


def write_checksums(folder: Path) -> None:
    """Note the SHA-256 of every file that a finished run keeps, in `checksums.json`."""
    write_text(folder / CHECKSUMS, json.dumps(_checksums(folder), indent=1) + "\n")


def verify_run(folder: str | Path, *, full: bool = False) -> Verification:
    """Compare a finished run with what its settings give now.

    Always: the files with their checksums, the fingerprints of data, model and scores, the selections with those that
    the scores give, losses of the first calibration examples, and log-probabilities of the first test prompts under the
    original and each edit.

    Args:
        full: score everything again, compare every score, and the selections with those of the new scores.

    Raises:
        InputError: no finished run there, or one whose model or data cannot be loaded.
    """
    folder = Path(folder)
    results = load_results(folder / "results.json")
    begun = read_json(folder / "config.json", _Begun)
    config = begun.study
    calibration, benign = config.calibration(), config.benign()
    tests, _ = config.tests(calibration)
    model = load_model(config.model, device=config.device, dtype=config.dtype)
    scores = [load_scores(folder / "scores" / f"{one.name}.safetensors") for one in calibration]
    again = _again(model, config, calibration, full=full)
    checks = [
        *_files(folder),
        *_data(begun.data, [*calibration, *tests, *benign]),
        _equal("model", model_fingerprint(model), results.model_fingerprint),
        *_scores(model, config, calibration, scores, again),
        *_selections(folder, config, results, again if full else scores),
        *_measured(folder, model, config, tests),
    ]
    then, now = scores[0].facts.get("versions", {}), versions()
    other = ", ".join(f"{name} {then.get(name)} there, {now[name]} here" for name in now if then.get(name) != now[name])
    return Verification(tuple(checks), other)


@dataclass(frozen=True)
class _Begun:
    """What `config.json` holds."""

    study: StudyConfig
    data: dict[str, str]


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted({file for pattern in _KEPT for file in folder.glob(pattern)})
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _files(folder: Path) -> Iterator[Check]:
    try:
        noted = read_json(folder / CHECKSUMS, dict[str, str])
    except InputError:
        yield Check("files", "different", 0.0, f"no {CHECKSUMS}, or none that can be read")
        return
    now = _checksums(folder)
    changed = sorted(name for name in noted.keys() | now.keys() if noted.get(name) != now.get(name))
    detail = f"{len(noted)} files" if not changed else f"changed since the run: {', '.join(changed[:4])}"
    yield Check("files", "different" if changed else "same", float(len(changed)), detail)


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
    near: Verdict = "within float noise" if difference <= _TOLERANCE[dtype] else "different"
    return Check(what, near if difference else "same", difference, detail)


def _scores(
    model: HookedModel,
    config: StudyConfig,
    calibration: Sequence[Behaviour],
    stored: Sequence[Scores],
    again: Sequence[Scores],
) -> Iterator[Check]:
    for behaviour, then, now in zip(calibration, stored, again, strict=True):
        name = f"scores: {behaviour.name}"
        key = scores_fingerprint(model, behaviour, unit=config.scored, how=_how(config))
        yield _equal(f"{name}, fingerprint", key, then.fingerprint)
        n = len(now.loss)
        yield _close(f"{name}, losses", now.loss, then.loss[:n], config.dtype, f"{n} examples, nats")
        if n == len(behaviour) and now.units == then.units:
            yield _all_scores(name, now, then, config.dtype)


def _how(config: StudyConfig) -> Scoring:
    return Scoring(template=config.template, batch_tokens=config.score_tokens, layers_per_pass=config.layers_per_pass)


def _again(model: HookedModel, config: StudyConfig, calibration: Sequence[Behaviour], *, full: bool) -> list[Scores]:
    """Scores of everything, or of the neurons on the first few examples."""
    few = calibration if full else [replace(one, examples=one.examples[:_N_SAMPLE]) for one in calibration]
    return [importance(model, one, unit=config.scored if full else "neuron", how=_how(config)) for one in few]


def _all_scores(name: str, now: Scores, then: Scores, dtype: str) -> Check:
    largest = 0.0
    for site, value in then.values.items():
        indices = value.indices if isinstance(value, Top) else torch.arange(value.numel())
        held = then.at(site, indices)
        difference = (now.at(site, indices) - held).abs().max() / held.abs().max().clamp(min=1e-30)
        largest = max(largest, float(difference))
    near: Verdict = "within float noise" if largest <= _TOLERANCE[dtype] else "different"
    return Check(f"{name}, every score", near if largest else "same", largest, "parts of the largest of each site")


def _selections(folder: Path, config: StudyConfig, results: Results, scores: Sequence[Scores]) -> Iterator[Check]:
    for unit in config.units:
        kept = load_selection(folder / f"selection.{unit}.safetensors")
        now = coupling(*(one.of(unit) for one in scores), fraction=config.fraction(unit)).coupled
        same = now.fingerprint == kept.fingerprint and len(kept) == results.of(unit).sizes["coupled"]
        overlap = jaccard(now, kept) if len(now) and len(kept) else 0.0
        detail = f"{len(kept)} units" if same else f"Jaccard overlap {overlap:.3f} with what the scores give"
        yield Check(f"selection: {unit}s", "same" if same else "different", 1 - overlap if not same else 0.0, detail)


def _measured(folder: Path, model: HookedModel, config: StudyConfig, tests: Sequence[Behaviour]) -> Iterator[Check]:
    scored_prompts(model).clear()  # of this process: the tests were drawn away from the calibration data
    few = [replace(one, examples=one.examples[:_N_SAMPLE]) for one in tests[:2]]
    for unit in (None, *config.units):
        name = f"{unit} edit" if unit else "original"
        edit = load_selection(folder / f"selection.{unit}.safetensors") if unit else None
        with ablate(model, edit) if edit is not None else nullcontext():
            found = measure(model, few, template=config.template, answer_tokens=config.answer_tokens,
                            batch_tokens=config.measure_tokens)  # fmt: skip
        for one in few:
            then = stored_log_probs(folder / "states", name, one.name)[: len(one)]
            detail = f"{len(one)} prompts, nats per token"
            yield _close(f"measured: {name}, {one.name}", found[one.name].log_prob, then, config.dtype, detail)
