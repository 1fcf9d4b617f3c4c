"""Steps 1 to 5 of `improve`: gains and damage become gates, gates get their dose, and so do their nulls.

Nothing here sees a confirming prompt.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dean_interp.data.examples import Behaviour
from dean_interp.errors import NothingToChangeError
from dean_interp.evaluation.outcomes import clusters_of
from dean_interp.models.load import HookedModel, model_fingerprint
from dean_interp.models.sites import Unit
from dean_interp.progress import progress_bar
from dean_interp.scoring.preparation import ScoringConfig
from dean_interp.scoring.scores import Scores
from dean_interp.selection.gains import Damage, Gains, damage_of, gains_of
from dean_interp.selection.gates import Gates, dosed
from dean_interp.selection.iterated import gates_of_scores
from dean_interp.selection.strata import strata
from dean_interp.statistics import Interval, clustered_interval
from dean_interp.study.conclusions import state_results
from dean_interp.study.dosing import Dose, KlOf, dose_to_kl, gated_state, kl_meter, largest_dose, random_gates
from dean_interp.study.flips import Flip, random_flips
from dean_interp.study.improvement import CurvePoint, ImproveConfig, Prediction, swapped_labels
from dean_interp.study.method import original_of, scored_once
from dean_interp.study.paper_rule import PaperRule, paper_rule
from dean_interp.study.run_folder import Clock
from dean_interp.study.settings import AnswerConfig
from dean_interp.study.state_outcomes import measurement_plan, outcomes_of
from dean_interp.study.store import State, Store, fingerprint_of
from dean_interp.study.study_data import PromptSets

log = logging.getLogger(__name__)

CURVE = (0.5, 1.0, 2.0)
"""Doses at which margins are measured on choosing prompts, in units of the chosen one."""
FLIP, RANDOM_GATES = "flip", "random gates"
"""The two kinds of null."""


@dataclass(frozen=True)
class Direction:
    """Gates before their dose, and what they were made from."""

    gates: Gates
    first: Gains
    second: Gains
    damage: Damage


@dataclass(frozen=True)
class Chosen:
    """The edit and its nulls, all with their doses."""

    direction: Direction
    dose: Dose
    gates: Gates
    """The direction at its dose: the edit."""
    preference: Mapping[str, Interval]
    """The original's margin on the scored examples of each behaviour, nats per token."""
    predictions: tuple[Prediction, ...]
    curve: tuple[CurvePoint, ...]
    flips: tuple[State, ...]
    """Each flip followed by its complement."""
    random: tuple[State, ...]
    paper: PaperRule | None
    """Where it was asked for."""


def choose(
    folder: Path,
    model: HookedModel,
    config: ImproveConfig,
    scoring: Sequence[Behaviour],
    choosing: Sequence[Behaviour],
    clock: Clock,
) -> Chosen:
    """Steps 1 to 5.

    Args:
        scoring: first, second and general, whose gains and damage make the gates; and the register set, where its
            gains are subtracted.
        choosing: first, second and general, on which the dose is chosen.
    """
    # Steps 1 and 2.
    scores = effects(model, scoring, config, folder)
    preference = _preference(scores[:2], scoring[:2])
    direction = direction_of(scores, config)
    clock.lap("gains, damage and gates")
    # Step 3.
    store = gates_store(folder / "choose", model, config, choosing)
    kl = kl_meter(store, model)
    dose = largest_dose(direction.gates, kl, max_kl=config.max_kl)
    gates = dosed(direction.gates, dose.dose)
    clock.lap("dose")
    # Step 4. What the choosing prompts measure comes first: once they are scored, they are not measured again.
    curve = margins_by_dose(store, model, direction.gates, dose)
    held_out = effects(model, choosing[:2], config, folder / "choose")
    predictions = _predictions(direction, held_out, gates, curve)
    clock.lap("margins by dose, and predictions")
    # Step 5.
    flips = _flips(scores, direction.gates, config=config, dose=dose, kl=kl)
    random = _random(model, scores, direction=direction.gates, config=config, dose=dose, kl=kl)
    clock.lap("doses of nulls")
    paper = paper_rule(model, scoring, config, folder / "paper") if config.paper_rule else None
    return Chosen(
        direction=direction,
        dose=dose,
        gates=gates,
        preference=preference,
        predictions=predictions,
        curve=curve,
        flips=tuple(flips),
        random=tuple(random),
        paper=paper,
    )


def effects(model: HookedModel, parts: Sequence[Behaviour], config: ImproveConfig, folder: Path) -> list[Scores]:
    """Step 1: signed effects on both margins by topic, the damage of a third set, effects on the margin of a fourth."""
    unit: Unit = "neuron"
    scores = []
    for behaviour, scoring in zip(parts, scoring_configs(config), strict=False):
        scores.append(scored_once(model, behaviour, folder, unit=unit, config=scoring))
    return scores


def scoring_configs(config: ImproveConfig) -> list[ScoringConfig]:
    """How first, second, general and register are scored."""
    fisher = ScoringConfig(template=config.model.template, batch_tokens=config.score_tokens, target="fisher")
    margin = replace(fisher, target="margin", signed=True, groups="cluster")
    return [margin, margin, fisher, margin]


def direction_of(scores: Sequence[Scores], config: ImproveConfig, flip: Flip | None = None) -> Direction:
    """Step 2: the gates' direction, with the labels that a flip gives to topics."""
    signs = flip or (None, None)
    of_first, of_second = signs
    damage = damage_of(scores[2])
    register = gains_of(scores[3]) if len(scores) > 3 else None
    gates = gates_of_scores(scores[0], scores[1], damage, signs=signs, register=register, config=config.gating)
    return Direction(
        gates=gates,
        first=gains_of(scores[0], signs=of_first),
        second=gains_of(scores[1], signs=of_second),
        damage=damage,
    )


def gates_store(
    folder: Path,
    model: HookedModel,
    config: ImproveConfig,
    tests: Sequence[Behaviour],
    others: Sequence[Behaviour] = (),
) -> Store:
    """The store of one role's measurements."""
    parts = [test.fingerprint for test in (*tests, *others)]
    return Store(
        folder=folder,
        fingerprint=fingerprint_of(model_fingerprint(model), config.model.template, *parts),
        tests=tests,
        config=config.data,
        template=config.model.template,
        others=others,
    )


def margins_by_dose(store: Store, model: HookedModel, direction: Gates, dose: Dose) -> tuple[CurvePoint, ...]:
    """Both margins and KL on choosing prompts, at some doses around the chosen one."""
    first, second = store.tests[:2]
    with progress_bar(total=1 + len(CURVE), desc="margins by dose", unit="dose") as progress:
        plan = measurement_plan(store, PromptSets(), config=AnswerConfig(n_answers=0), model=model, progress=progress)
        original = original_of(plan, model, in_full=False)
        points = []
        for share in CURVE:
            gates = dosed(direction, share * dose.dose)
            state = gated_state(f"dose {share:g}", "dose", gates, dose=share)
            measured = outcomes_of(plan, model, state, reference=original.measurement, in_full=False)
            results = state_results(original, measured)
            change = {name: results.change[name] for name in (first.name, second.name)}
            points.append(CurvePoint(share, change, results.kl))
    return tuple(points)


def _predictions(
    direction: Direction, held_out: Sequence[Scores], gates: Gates, curve: Sequence[CurvePoint]
) -> tuple[Prediction, ...]:
    """The rise of each margin: predicted from scoring prompts, from choosing prompts, and measured on these."""
    at_dose = next(point for point in curve if point.dose == 1.0)
    predictions = []
    for fitted, scores in zip((direction.first, direction.second), held_out, strict=True):
        name = fitted.behaviour
        prediction = Prediction(
            on=name,
            fitted=fitted.of(gates),
            held_out=gains_of(scores).of(gates),
            measured=at_dose.change[name].mean,
        )
        predictions.append(prediction)
    return tuple(predictions)


def _preference(scores: Sequence[Scores], parts: Sequence[Behaviour]) -> dict[str, Interval]:
    """The original's margins, with a warning where the labels look swapped."""
    preference = {}
    for of_behaviour, behaviour in zip(scores, parts, strict=True):
        # The loss is minus the margin.
        margins = np.asarray(-of_behaviour.loss, dtype=float)
        preference[behaviour.name] = clustered_interval(margins, clusters_of(behaviour))
    for line in swapped_labels(preference):
        log.warning(line)
    return preference


def _flips(scores: Sequence[Scores], direction: Gates, config: ImproveConfig, dose: Dose, kl: KlOf) -> list[State]:
    """The whole choice again, with labels flipped by whole topics; each flip gets a dose of its own."""
    first = list(scores[0].clusters)
    second = list(scores[1].clusters)
    drawn = random_flips(first, second, config.n_flips // 2, seed=config.seed)
    states = []
    # The last null's dose is near the next one's: the less is left to predict.
    start = dose.dose
    for number, flip in enumerate(progress_bar(drawn, desc="doses of flips", unit="flip")):
        name = f"flip {number + 1}"
        try:
            turned = direction_of(scores, config, flip).gates
        except NothingToChangeError:
            # Nothing is certain enough on flipped labels: a null that changes nothing.
            states.append(gated_state(name, FLIP, direction * 0.0, dose=0.0))
            continue
        own = dose_to_kl(turned, kl, kl=dose.kl.mean, start=start)
        gates = dosed(turned, own.dose)
        states.append(gated_state(name, FLIP, gates, dose=own.dose))
        start = own.dose
    return states


def _random(
    model: HookedModel, scores: Sequence[Scores], direction: Gates, config: ImproveConfig, dose: Dose, kl: KlOf
) -> list[State]:
    """The edit's own changes at random neurons, with doses of their own."""
    matched = strata(model, scores[:3])
    states = []
    start = dose.dose
    for number in range(config.n_random):
        shuffled = random_gates(direction, matched, seed=config.seed * 1000 + number)
        own = dose_to_kl(shuffled, kl, kl=dose.kl.mean, start=start)
        gates = dosed(shuffled, own.dose)
        name = f"{RANDOM_GATES} {number + 1}"
        states.append(gated_state(name, RANDOM_GATES, gates, dose=own.dose))
        start = own.dose
    return states
