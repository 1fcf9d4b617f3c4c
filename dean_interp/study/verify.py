"""Whether a run is what it says: its files, fingerprints computed anew, a sample of its numbers measured again, and the
results that its files give.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dean_interp.data.examples import Behaviour
from dean_interp.distributed import require_one_process
from dean_interp.evaluation.measure import measure
from dean_interp.files import write_json
from dean_interp.models.load import HookedModel, model_fingerprint
from dean_interp.models.scored_prompts import measuring_scored_prompts
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.scoring.importance import importance
from dean_interp.scoring.preparation import N_SPREAD_GROUPS, ScoringConfig, scores_fingerprint
from dean_interp.scoring.scores import Scores, load_scores
from dean_interp.scoring.top import Top
from dean_interp.selection.coupling import couple
from dean_interp.selection.selection import load_selection
from dean_interp.selection.stability import jaccard
from dean_interp.study.check import (
    Check,
    Match,
    Verification,
    check_data,
    check_files,
    check_results,
    close,
    equal,
    largest_apart,
    other_versions,
)
from dean_interp.study.config import StudyConfig
from dean_interp.study.improvement import is_improvement
from dean_interp.study.measurement_file import stored_log_probs
from dean_interp.study.results import RESULTS_FILE, load_results
from dean_interp.study.run import results_in
from dean_interp.study.run_folder import Clock, begun_with
from dean_interp.study.store import ORIGINAL, State, file_name
from dean_interp.study.study_data import study_data
from dean_interp.study.verify_improvement import verify_improvement

_N_SAMPLE = 6
_TIED = 0.05
"""How far a selection from new scores may be from the kept one, since nearly tied units change places (1 - Jaccard)."""
_NEW = "new scores"


@own_torch_settings()
def verify_run(folder: str | Path, *, full: bool = False) -> Verification:
    """Compare a finished run with what its settings give now.

    Always: the files with their checksums, and where these hold the fingerprints of data, model and scores, the
    selections with those that the scores give, losses and neuron scores of every 16th calibration example (a group that
    score files keep), and log-probabilities of the first test prompts under the original and each edit. Where all this
    holds, the results are put together from the kept files again, every control drawn anew. Of a run of `improve`: the
    gates that the kept scores give in place of the selections, and scores of the first topic. The folder is only read.

    Args:
        full: score everything again, compare every score, and the selections with those of the new scores.

    Raises:
        InputError: no finished run there, or one whose model or data cannot be loaded; several processes.
    """
    require_one_process("verify")
    folder = Path(folder)
    return verify_improvement(folder, full=full) if is_improvement(folder) else _verify_study(folder, full=full)


def _verify_study(folder: Path, *, full: bool) -> Verification:
    results = load_results(folder / RESULTS_FILE)
    files = check_files(folder)
    if files.match == "different":
        return Verification((files,), "")
    begun = begun_with(folder, StudyConfig)
    config = begun.config
    data = study_data(config)
    model = config.model.load()
    scores = []
    for behaviour in data.calibration:
        path = folder / "scores" / f"{behaviour.name}.safetensors"
        scores.append(load_scores(path))
    again = _again(model, config, data.calibration, full=full)
    checks = [
        files,
        *check_data(begun.data, data.all),
        equal("model", model_fingerprint(model), results.model_fingerprint),
        *_scores(model, config, calibration=data.calibration, stored=scores, again=again),
        *_selections(folder, config, scores, "the kept scores"),
    ]
    if full:
        checks += _selections(folder, config, again, _NEW)
    checks += _measured(folder, model, config, data.tests)
    if all(check.match != "different" for check in checks):

        def again_in(links: Path) -> None:
            clock = Clock(links / "times.json")
            now = results_in(links, model, config=config, data=data, clock=clock)
            write_json(links / RESULTS_FILE, now)

        checks.append(check_results(folder, again_in, dtype=config.model.dtype))
    then = scores[0].facts.get("versions", {})
    return Verification(tuple(checks), other_versions(then))


def _scores(
    model: HookedModel,
    config: StudyConfig,
    calibration: Sequence[Behaviour],
    stored: Sequence[Scores],
    again: Sequence[Scores],
) -> Iterator[Check]:
    dtype = config.model.dtype
    for behaviour, then, now in zip(calibration, stored, again, strict=True):
        name = f"scores: {behaviour.name}"
        key = scores_fingerprint(model, behaviour, unit=config.scored, config=_scoring(config))
        yield equal(f"{name}, fingerprint", key, then.fingerprint)
        if now.units != then.units or len(now.loss) < len(behaviour):
            then = _first_group(then)
        n_examples = len(now.loss)
        yield close(f"{name}, losses", now.loss, then.loss, dtype=dtype, detail=f"{n_examples} examples, nats")
        yield _all_scores(name, now, then, dtype)


def _scoring(config: StudyConfig) -> ScoringConfig:
    return config.calibration.scoring(config.model.template)


def _first_group(scores: Scores) -> Scores:
    """The neuron scores of every 16th example, and their losses."""
    values = {site: groups[0] for site, groups in scores.groups.items()}
    return replace(scores.of("neuron"), values=values, loss=scores.loss[::N_SPREAD_GROUPS])


def _again(model: HookedModel, config: StudyConfig, calibration: Sequence[Behaviour], *, full: bool) -> list[Scores]:
    """Scores of everything, or of the neurons on the first group of examples."""
    scoring = _scoring(config)
    if full:
        return [importance(model, behaviour, unit=config.scored, config=scoring) for behaviour in calibration]
    scores = []
    for behaviour in calibration:
        first_group = replace(behaviour, examples=behaviour.examples[::N_SPREAD_GROUPS])
        scores.append(importance(model, first_group, unit="neuron", config=scoring))
    return scores


def _all_scores(name: str, now: Scores, then: Scores, dtype: str) -> Check:
    """The scores that both have, by their largest difference."""
    units = " and ".join(f"{unit}s" for unit in then.units)
    what = f"{name}, scores of {units}"
    if now.shapes != then.shapes:
        return Check(what, "different", math.inf, "of another shape")
    pairs = []
    for site, value in then.values.items():
        indices = value.indices if isinstance(value, Top) else torch.arange(value.numel())
        pairs.append((now.at(site, indices), then.at(site, indices)))
    return largest_apart(what, pairs, dtype=dtype, detail=f"{len(now.loss)} examples")


def _selections(folder: Path, config: StudyConfig, scores: Sequence[Scores], source: str) -> Iterator[Check]:
    for unit in config.unit:
        kept = load_selection(folder / f"selection.{unit}.safetensors")
        own = [of_behaviour.of(unit) for of_behaviour in scores]
        now = couple(*own, fraction=config.fraction(unit)).coupled
        apart = 1 - jaccard(now, kept) if now.shapes == kept.shapes else 1.0
        match: Match = "different"
        if not apart:
            match = "same"
        elif source == _NEW and apart <= _TIED:
            match = "within float noise"
        detail = f"{len(kept)} units" if not apart else f"Jaccard overlap {1 - apart:.3f}"
        yield Check(f"selection: {unit}s, from {source}", match, apart, detail)


def _measured(folder: Path, model: HookedModel, config: StudyConfig, tests: Sequence[Behaviour]) -> Iterator[Check]:
    """Log-probabilities of the first test prompts under the original and each edit, measured again."""
    few = [replace(test, examples=test.examples[:_N_SAMPLE]) for test in tests]
    states = [ORIGINAL]
    for unit in config.unit:
        edit = load_selection(folder / f"selection.{unit}.safetensors")
        states.append(State("edit", "edit", ablated=edit, unit=unit))
    for state in states:
        # The tests were drawn away from the calibration data, which this process has scored in part.
        with measuring_scored_prompts(model), state.applied(model):
            measured = measure(
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
                place, name = place / test.name, state.fingerprint or ORIGINAL.name
            stored = stored_log_probs(place, file_name(name), test.name)
            then = stored[: len(test)]
            now = measured[test.name].log_prob
            what = f"measured: {state.title}, {test.name}"
            yield close(what, now, then, dtype=config.model.dtype, detail=f"{len(test)} prompts, nats per token")
