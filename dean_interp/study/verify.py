"""Does a finished run still stand? Its files, its fingerprints, and a sample of its numbers, taken again.

A stage begins only where those before it hold: the bytes of every file; the fingerprints of the data, then of the model
and its scores, and the selections that the kept scores give; the results that the kept files give, every control drawn
anew; and numbers that the model itself gives again. Nothing is written into the run's folder.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Int
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from tqdm.auto import tqdm

from dean_interp.data.examples import Behaviour
from dean_interp.distributed import refuse_several
from dean_interp.editing.ablation import ablate
from dean_interp.errors import InputError
from dean_interp.evaluation.measure import Measurement, measure
from dean_interp.frames import Framed
from dean_interp.models.load import HookedModel, load_model, model_fingerprint
from dean_interp.models.sites import Site, Unit
from dean_interp.scoring.importance import importance, scores_fingerprint
from dean_interp.scoring.scores import Scores, Top, load_scores
from dean_interp.scoring.sums import N_GROUPS
from dean_interp.selection.coupling import coupling
from dean_interp.selection.selection import Selection, load_selection
from dean_interp.selection.stability import jaccard
from dean_interp.study.config import StudyConfig
from dean_interp.study.folder import Clock, file_sum, fingerprints, kept_files, read_sums
from dean_interp.study.results import load_results, save_results
from dean_interp.study.run import StudyData, data_of, known_of, results_in, score_into, scoring_of
from dean_interp.study.states import States

Verdict = Literal["same bytes", "float noise", "different"]
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""By the dtype of the weights: what differs by no more, as a share of the largest stored number, is float noise."""
LEAST_OVERLAP = 0.95
"""Selections from scores within the tolerance differ only where units are nearly tied."""
N_PROMPTS = 4
"""Of each test set in the sample."""


@dataclass(frozen=True)
class Check:
    """One thing that was stored, and what it is now."""

    what: str
    stored: str
    now: str
    verdict: Verdict
    difference: float | None = None
    """The largest one, as a share of the largest stored number."""
    allowed: float | None = None
    """What still is float noise."""


@dataclass(frozen=True)
class Verification(Framed):
    """Everything that was looked at, in order; the last stage that was begun is the first that does not hold."""

    run: str
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing differs beyond float noise."""
        return all(one.verdict != "different" for one in self.checks)

    def to_pandas(self) -> pd.DataFrame:
        """One row a check."""
        return pd.DataFrame([asdict(one) for one in self.checks])

    def __repr__(self) -> str:
        return f"Verification({self.run!r}, {len(self.checks)} checks, {'holds' if self.holds else 'does not hold'})"

    def __str__(self) -> str:
        width = max(len(one.what) for one in self.checks)
        lines = [f"{'':<{width}}  {'stored':<18}{'now':<18}{'difference':>11}{'allowed':>9}"]
        for one in self.checks:
            sizes = "".join(f"{'' if size is None else f'{size:.1e}':>{n}}"
                            for size, n in ((one.difference, 11), (one.allowed, 9)))  # fmt: skip
            lines.append(f"{one.what:<{width}}  {one.stored:<18}{one.now:<18}{sizes}  {one.verdict}")
        n_different = sum(one.verdict == "different" for one in self.checks)
        ends = f"does not hold: {n_different} of {len(self.checks)} checks; what comes after them was not looked at"
        lines.append(f"{self.run} " + (f"holds: {len(self.checks)} checks" if self.holds else ends))
        return "\n".join(lines)


def verify_run(folder: str | Path, *, full: bool = False) -> Verification:
    """Check a finished run of `run_study` against its files, the data and the model that its settings name.

    By default a sample of the numbers is taken again: for each behaviour the losses and neuron scores of every 16th
    example (one of the groups that a score file keeps), and the likelihoods of `N_PROMPTS` test prompts of each set, of
    the original and of every edit. `full` scores every example and measures every prompt: the only check of single
    weights' scores.

    Raises:
        InputError: no finished run there, or a model or data that cannot be loaded.
    """
    refuse_several("verify")
    checks: list[Check] = []
    for stage in _stages(Path(folder), full):
        checks += stage
        if any(one.verdict == "different" for one in stage):
            break
    return Verification(str(folder), tuple(checks))


def _stages(folder: Path, full: bool) -> Iterator[list[Check]]:
    sums = read_sums(folder)
    now = {name: file_sum(folder / name) for name in sums}
    changed = [_equal(name, sums[name][:16], now[name][:16] or "missing") for name in sums if now[name] != sums[name]]
    yield changed or [_equal(f"{len(sums)} files", "as written", "as written")]
    config, known = _begun_with(folder)
    data = data_of(config)
    yield [_equal(f"data: {name}", known.get(name, ""), one) for name, one in fingerprints(data.all).items()]
    model = load_model(config.model, device=config.device, dtype=config.dtype)
    scores = [load_scores(folder / "scores" / f"{one.name}.safetensors") for one in data.calibration]
    found = _coupled(config, scores)
    yield _fingerprints(folder, model, config, data, scores, found)
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for file in kept_files(folder):
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            (copy / file).symlink_to((folder / file).resolve())
        yield [_derived(folder, copy, model, config, data)]
        allowed = TOLERANCE[config.dtype]
        with tqdm(disable=True) as silent:
            states = States(config, copy / "states", model, data.tests, None, known_of(model, data, scores), silent)
        yield _measured(states, found, N_PROMPTS if not full else None, allowed)
        if not full:
            yield [check for one, stored in zip(data.calibration, scores, strict=True)
                   for check in _group_again(model, one, config, stored)]  # fmt: skip
            return
        (copy / "again").mkdir()
        again = [score_into(copy / "again", model, one, config) for one in data.calibration]
        yield [check for stored, now in zip(scores, again, strict=True) for check in _scores(stored, now, allowed)]
        yield [_overlap(unit, found[unit], now) for unit, now in _coupled(config, again).items()]


def _begun_with(folder: Path) -> tuple[StudyConfig, dict[str, str]]:
    """The settings, and the fingerprints of the data."""
    path = folder / "config.json"
    try:
        begun = json.loads(path.read_text())
        return TypeAdapter(StudyConfig).validate_python(begun["study"]), begun["data"]
    except (OSError, ValueError, KeyError, ValidationError) as error:
        raise InputError(f"{path} holds no settings of a study of this version") from error


def _coupled(config: StudyConfig, scores: Sequence[Scores]) -> dict[Unit, Selection]:
    return {
        unit: coupling(*(one.of(unit) for one in scores), fraction=config.fraction(unit)).coupled
        for unit in config.units
    }


def _fingerprints(
    folder: Path,
    model: HookedModel,
    config: StudyConfig,
    data: StudyData,
    scores: Sequence[Scores],
    found: dict[Unit, Selection],
) -> list[Check]:
    checks = [_equal("model", load_results(folder / "results.json").model_fingerprint, model_fingerprint(model))]
    for one, stored in zip(data.calibration, scores, strict=True):
        now = scores_fingerprint(model, one, unit=config.scored, how=scoring_of(config))
        checks.append(_equal(f"scores: {one.name}", stored.fingerprint, now))
    for unit, one in found.items():
        stored = load_selection(folder / f"selection.{unit}.safetensors")
        checks.append(_equal(f"{unit}s, from the kept scores", stored.fingerprint, one.fingerprint))
    return checks


def _derived(folder: Path, copy: Path, model: HookedModel, config: StudyConfig, data: StudyData) -> Check:
    """The results, put together again from the kept files; of a file of another state, what it says."""
    what, path = "results, from the kept files", copy / "results.json"
    path.unlink()
    try:
        save_results(results_in(copy, model, config, data, Clock(copy / "times.json")), path)
    except InputError as error:
        return Check(what, "", str(error), "different")
    stored, now = ((one / "results.json").read_bytes() for one in (folder, copy))
    difference = 0.0 if stored == now else _apart(json.loads(stored), json.loads(now))
    return _near(what, "", "", difference, TOLERANCE[config.dtype])


def _measured(states: States, found: dict[Unit, Selection], n: int | None, allowed: float) -> list[Check]:
    """Likelihoods of the first `n` test prompts of each set (None: all), of the original and of every edit."""
    config, general = states.config, states.general
    tests = [replace(one, examples=one.examples[:n]) for one in states.tests]
    how = {"template": config.template, "answer_tokens": config.answer_tokens, "batch_tokens": config.measure_tokens}
    original, checks = None, []
    for name, ablated in {"original": None, **{f"{unit} edit": one for unit, one in found.items()}}.items():
        with ablate(states.model, ablated) if ablated else nullcontext():
            now = measure(states.model, tests, original=original, **how)
        original = original or Measurement({general: now[general]})
        stored = states.measured(name, ablated)
        for test in tests:
            one, other = stored[test.name], now[test.name]
            pairs = [(torch.cat([one.log_prob[:n], one.kl[:n]], 1), torch.cat([other.log_prob, other.kl], 1))]
            means = [f"{float(log_prob.mean()):.6f}" for log_prob in (one.log_prob[:n], other.log_prob)]
            what = f"{name}: log-probabilities of {len(test)} {test.name} prompts"
            checks.append(_near(what, means[0], means[1], _largest(pairs), allowed))
    return checks


def _group_again(model: HookedModel, behaviour: Behaviour, config: StudyConfig, stored: Scores) -> list[Check]:
    """Every 16th example is one of the groups whose neuron scores are kept."""
    some = replace(behaviour, examples=behaviour.examples[::N_GROUPS])
    now = importance(model, some, how=scoring_of(config))
    group = {site: values[0] for site, values in stored.groups.items()}
    stored = replace(stored.of("neuron"), values=group, loss=stored.loss[::N_GROUPS])
    return _scores(stored, now, TOLERANCE[config.dtype])


def _scores(stored: Scores, now: Scores, allowed: float) -> list[Check]:
    """Losses, and of each kind of unit the scores that both hold."""
    n, means = len(now.loss), [f"{float(one.loss.mean()):.6f}" for one in (stored, now)]
    what = f"losses of {n} {now.behaviour} examples"
    checks = [_near(what, means[0], means[1], _largest([(stored.loss, now.loss)]), allowed)]
    for unit in stored.units:
        pairs = []
        for site in stored.of(unit).values:
            held = _held(stored, site)
            both = held[torch.isin(held, _held(now, site))]
            pairs.append((stored.at(site, both), now.at(site, both)))
        largest = [f"{max(float(pair[i].abs().max()) for pair in pairs):.6g}" for i in (0, 1)]
        what = f"{unit} scores on {n} {now.behaviour} examples"
        checks.append(_near(what, largest[0], largest[1], _largest(pairs), allowed))
    return checks


def _held(scores: Scores, site: Site) -> Int[Tensor, " unit"]:
    value = scores.values[site]
    return value.indices if isinstance(value, Top) else torch.arange(value.numel())


def _overlap(unit: Unit, stored: Selection, now: Selection) -> Check:
    overlap = jaccard(stored, now)
    verdict: Verdict = "same bytes" if overlap == 1 else "float noise" if overlap >= LEAST_OVERLAP else "different"
    what = f"{unit}s, from the new scores (1 - Jaccard overlap)"
    return Check(what, str(len(stored)), str(len(now)), verdict, 1 - overlap, 1 - LEAST_OVERLAP)


def _equal(what: str, stored: str, now: str) -> Check:
    return Check(what, stored, now, "same bytes" if stored == now else "different")


def _near(what: str, stored: str, now: str, difference: float, allowed: float) -> Check:
    verdict: Verdict = "same bytes" if difference == 0 else "float noise" if difference <= allowed else "different"
    return Check(what, stored, now, verdict, difference, allowed)


def _largest(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The largest difference in any pair, each as a share of its largest stored number."""
    return max(float((now - stored).abs().max() / stored.abs().max().clamp(min=1e-30)) for stored, now in pairs)


def _apart(stored: Any, now: Any) -> float:  # noqa: ANN401 - what JSON can hold
    """The largest difference of numbers, as a share of the stored one or of 1; infinite where other things differ."""
    match stored, now:
        case dict(), dict() if stored.keys() == now.keys():
            return max((_apart(stored[key], now[key]) for key in stored), default=0.0)
        case list(), list() if len(stored) == len(now):
            return max((_apart(*pair) for pair in zip(stored, now, strict=True)), default=0.0)
        case int() | float(), int() | float():
            return abs(now - stored) / max(1.0, abs(stored))
        case _:
            return 0.0 if stored == now else math.inf
