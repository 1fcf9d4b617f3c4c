"""Whether a run of `improve` is what it says: `study.verify` for edits that were found and confirmed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dean_interp.data.examples import Behaviour
from dean_interp.evaluation.measure import measure
from dean_interp.files import write_json
from dean_interp.models.load import HookedModel, model_fingerprint
from dean_interp.models.threads import chosen_threads
from dean_interp.scoring.importance import importance
from dean_interp.scoring.preparation import ScoringConfig, grouped, scores_fingerprint
from dean_interp.scoring.scores import Scores, load_scores
from dean_interp.selection.gates import dosed, load_gates
from dean_interp.study.check import (
    Check,
    Verification,
    check_data,
    check_files,
    check_results,
    close,
    equal,
    largest_apart,
    other_versions,
)
from dean_interp.study.choosing import direction_of, scoring_configs
from dean_interp.study.dosing import gated_state
from dean_interp.study.improve import improved
from dean_interp.study.improve_data import ImproveData, improve_data
from dean_interp.study.improvement import GATES_FILE, ImproveConfig, Improvement, load_improvement
from dean_interp.study.measurement_file import stored_log_probs
from dean_interp.study.results import RESULTS_FILE
from dean_interp.study.run_folder import THREADS, Clock, begun_with
from dean_interp.study.store import ORIGINAL, file_name

N_PROMPTS = 6
"""First prompts of each set that are measured again."""


def verify_improvement(folder: Path, *, full: bool) -> Verification:
    """The checks of a finished run of `improve`; errors as of `verify_run`."""
    improvement = load_improvement(folder)
    files = check_files(folder)
    if files.match == "different":
        return Verification((files,), "")
    begun = begun_with(folder, ImproveConfig)
    config = begun.config
    data = improve_data(config)
    model = config.model.load()
    scores = [load_scores(folder / "scores" / f"{behaviour.name}.safetensors") for behaviour in data.scoring]
    with chosen_threads(model, folder / THREADS):
        gates = _gates(folder, improvement, scores)
        checks = [
            files,
            *check_data(begun.data, data.all),
            equal("model", model_fingerprint(model), improvement.model_fingerprint),
            *_scores(model, config, data.scoring, scores, full=full),
            gates,
            *_measured(folder, model, config, data),
        ]
        # Gates that differ by float noise are another state, of which no file holds a measurement.
        if gates.match == "same" and all(check.match != "different" for check in checks):

            def again(links: Path) -> None:
                clock = Clock(links / "times.json")
                results = improved(links, model, config=config, data=data, clock=clock)
                write_json(links / RESULTS_FILE, results)

            checks.append(check_results(folder, again, dtype=config.model.dtype))
    return Verification(tuple(checks), other_versions(scores[0].facts.get("versions", {})))


def _scores(
    model: HookedModel, config: ImproveConfig, scoring: Sequence[Behaviour], stored: Sequence[Scores], *, full: bool
) -> Iterator[Check]:
    """Losses and effects of the first topic of each set (of general text: the first answer), or of everything."""
    dtype = config.model.dtype
    for behaviour, then, settings in zip(scoring, stored, scoring_configs(config), strict=False):
        name = f"scores: {behaviour.name}"
        key = scores_fingerprint(model, behaviour, unit="neuron", config=settings)
        yield equal(f"{name}, fingerprint", key, then.fingerprint)
        part, losses = _part(behaviour, then, settings, full=full)
        now = importance(model, part, unit="neuron", config=settings)
        examples = f"{len(part)} examples"
        yield close(f"{name}, losses", now.loss, losses, dtype=dtype, detail=f"{examples}, nats")
        pairs = [(now.groups[site], groups[: len(now.groups[site])]) for site, groups in then.groups.items()]
        yield largest_apart(f"{name}, effects of neurons", pairs, dtype=dtype, detail=examples)


def _part(
    behaviour: Behaviour, scores: Scores, settings: ScoringConfig, *, full: bool
) -> tuple[Behaviour, torch.Tensor]:
    """The examples that are scored again, and their stored losses."""
    if full:
        return behaviour, scores.loss
    groups, _ = grouped(behaviour, settings)
    of_first = (groups == 0).nonzero().flatten().tolist()
    examples = tuple(behaviour.examples[number] for number in of_first)
    return replace(behaviour, examples=examples), scores.loss[of_first]


def _gates(folder: Path, improvement: Improvement, scores: Sequence[Scores]) -> Check:
    """The gates that the kept scores give, at the kept dose."""
    kept = load_gates(folder / GATES_FILE)
    now = dosed(direction_of(scores, improvement.config).gates, improvement.dose.dose)
    what = "gates, from the kept scores"
    if now.changes.keys() != kept.changes.keys():
        return equal(what, [*map(str, now.changes)], [*map(str, kept.changes)])
    pairs = [(now.changes[site], then) for site, then in kept.changes.items()]
    return largest_apart(what, pairs, dtype="float32", detail=f"{len(kept)} neurons")


def _measured(folder: Path, model: HookedModel, config: ImproveConfig, data: ImproveData) -> Iterator[Check]:
    """Log-probabilities of the first confirming prompts under the original and the edit, measured again."""
    few = [replace(test, examples=test.examples[:N_PROMPTS]) for test in data.confirming[:2]]
    edit = gated_state("edit", "edit", load_gates(folder / GATES_FILE))
    for state in (ORIGINAL, edit):
        with state.applied(model):
            measured = measure(
                model,
                few,
                template=config.model.template,
                answer_tokens=config.data.answer_tokens,
                batch_tokens=config.measure_tokens,
            )
        for test in few:
            stored = stored_log_probs(folder / "confirm" / "states", file_name(state.title), test.name)
            what = f"measured: {state.name}, {test.name}"
            detail = f"{len(test)} prompts, nats per token"
            now = measured[test.name].log_prob
            yield close(what, now, stored[: len(test)], dtype=config.model.dtype, detail=detail)
