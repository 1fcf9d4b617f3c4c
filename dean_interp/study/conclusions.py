"""From outcomes to conclusions: what can be detected, each state's lines, the primary outcome, faults, the headline."""

from collections.abc import Sequence

from dean_interp.evaluation.guard import PERPLEXITY_LIMIT, SuperWeight
from dean_interp.evaluation.lines import Line, compare, detectable_changes
from dean_interp.evaluation.measurement import BehaviourMeasurement, Measurement
from dean_interp.evaluation.outcomes import INCOHERENT, MARGIN, Outcome
from dean_interp.models.sites import Unit
from dean_interp.statistics import Interval, smallest_rank_p
from dean_interp.study.controls import is_random
from dean_interp.study.results import Design, Primary, StateResults
from dean_interp.study.state_outcomes import StateOutcomes

SIGNIFICANT = 0.05
"""A p that is at most this counts."""


def design_of(original: StateOutcomes, controls: Sequence[StateOutcomes]) -> Design:
    """Step 6: what can be detected, from the original and the controls alone.

    How much changes vary depends on how much an ablation does. So the spread is that of the controls that do as much
    damage as the edit, where there are some.
    """
    of_equal_kl = [control for control in controls if control.state.kind == "equal KL"]
    spread = [control.outcomes for control in of_equal_kl or controls]
    detectable = detectable_changes(original.outcomes, spread)
    margins = [outcome for outcome in original.outcomes if outcome.metric == MARGIN]
    to_beat: dict[str, float] = {}
    for control in controls:
        for outcome in control.outcomes:
            if outcome.metric == MARGIN:
                change = _mean_change(original, outcome)
                to_beat[outcome.on] = max(change, to_beat.get(outcome.on, change))
    return Design(
        n_prompts=len(margins[0].values),
        n_clusters={outcome.on: len(set(outcome.clusters)) for outcome in margins},
        detectable={f"{metric} / {on}": change for (metric, on), change in detectable.items()},
        to_beat=to_beat,
        smallest_p=smallest_rank_p(len(controls)),
    )


def _mean_change(original: StateOutcomes, outcome: Outcome) -> float:
    """The mean change of an outcome from the original's."""
    before = next(own for own in original.outcomes if own.key == outcome.key)
    change = outcome.values - before.values
    return float(change.mean())


def state_results(
    original: StateOutcomes,
    measured: StateOutcomes,
    controls: Sequence[StateOutcomes] = (),
    design: Design | None = None,
) -> StateResults:
    """Step 8: one state compared with the original; the edit, beside its controls."""
    detectable = None
    if design is not None:
        detectable = {}
        for outcome in original.outcomes:
            detectable[outcome.key] = design.detectable[f"{outcome.metric} / {outcome.on}"]
    of_controls = [control.outcomes for control in controls]
    lines = compare(original.outcomes, measured.outcomes, of_controls, detectable=detectable)
    state = measured.state
    general = _general(measured.measurement)
    return StateResults(
        name=state.name,
        kind=state.kind,
        n_units=state.n_units,
        growth=state.growth,
        lines=tuple(lines),
        perplexity=general.perplexity,
        kl=general.mean_kl,
    )


def _general(measurement: Measurement) -> BehaviourMeasurement:
    """The measurement of general text: its examples have one answer."""
    return next(measured for measured in measurement.behaviours.values() if not measured.paired)


def primary_outcome(edit: StateResults, controls: Sequence[StateResults]) -> Primary:
    """Both mean margins rise, each beyond the random controls, at a KL to the original no worse than theirs.

    Each behaviour's p is the rank of the edit's change among all random controls; the larger one counts.
    """
    margins = [line for line in edit.lines if line.metric == MARGIN]
    p = {line.on: _rank(line) for line in margins}
    p_larger = max(p.values())
    kl_of_controls = max(control.kl for control in controls if is_random(control.kind))
    both_rise = all(line.change.mean > 0 for line in margins)
    is_beyond = p_larger <= SIGNIFICANT
    return Primary(
        p=p,
        p_larger=p_larger,
        kl=edit.kl,
        kl_of_controls=kl_of_controls,
        both_rise=both_rise,
        reached=both_rise and is_beyond and edit.kl <= kl_of_controls,
    )


def _rank(line: Line) -> float:
    assert line.rank is not None, "an edit stands beside random controls"
    return line.rank


def headline(unit: Unit, edit: StateResults, primary: Primary, perplexity: float) -> str:
    """The primary outcome in plain words; `perplexity` is the original's."""
    margins = [line for line in edit.lines if line.metric == MARGIN]
    changes = " and ".join(f"the {line.on} margin by {_signed(line.change)}" for line in margins)
    n_controls = len(margins[0].control_changes)
    parts = []
    for line in margins:
        n_better = sum(change >= line.change.mean for change in line.control_changes)
        parts.append(f"{n_better} of {n_controls} random controls do at least as well on {line.on}")
    against = " and ".join(parts)
    units = f"{unit}s" if edit.n_units > 1 else unit
    verdict = "The primary outcome was reached." if primary.reached else "The primary outcome was not reached."
    return (
        f"{verdict} Silencing {edit.n_units} coupled {units} changes {changes} nats per token; {against} "
        f"(p = {primary.p_larger:.2f}). Perplexity on general text goes from {perplexity:.1f} to "
        f"{edit.perplexity:.1f}."
    )


def faults(edit: StateResults, original: StateResults, super_weights: Sequence[SuperWeight]) -> tuple[str, ...]:
    """What the edit does that it must not do, one line each.

    Args:
        super_weights: those that the edit silences.
    """
    sentences = []
    ratio = edit.perplexity / original.perplexity
    if ratio > PERPLEXITY_LIMIT:
        sentences.append(
            f"perplexity on general text rises {ratio:.2f} times ({original.perplexity:.1f} to {edit.perplexity:.1f}; "
            f"the limit is {PERPLEXITY_LIMIT} times)"
        )
    if super_weights:
        named = ", ".join(map(str, super_weights))
        sentences.append(
            f"it silences {named}: one huge activation and one huge output hang on each "
            "(super weights, arXiv 2411.07191)"
        )
    for line in edit.lines:
        if line.metric.startswith(INCOHERENT) and line.change.low > 0:
            mean, low, high = _percent(line.change)
            prompts = line.on.replace("_", " ")
            sentences.append(
                f"incoherent answers to {prompts} prompts rise by {mean:.0f} points [{low:.0f}, {high:.0f}]"
            )
    return tuple(sentences)


def answers_in_words(lines: Sequence[Line]) -> str:
    """What the answers to the prompts of both behaviours became; empty where none were asked for."""
    sentences = []
    for metric in ("safe answers", "refusals"):
        shares = []
        for line in lines:
            if line.metric.startswith(metric):
                mean, low, high = _percent(line.change)
                change = f"{mean:+.0f} points [{low:+.0f}, {high:+.0f}]"
                shares.append(f"{line.on} {line.before.mean:.0%} to {line.after.mean:.0%} ({change})")
        if shares:
            sentences.append(f"{metric.capitalize()}: {'; '.join(shares)}.")
    return " ".join(sentences)


def _percent(interval: Interval) -> tuple[float, float, float]:
    """Mean, lower and upper end of an interval of shares, in percent."""
    return 100 * interval.mean, 100 * interval.low, 100 * interval.high


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} (95 % {interval.low:+.3f} to {interval.high:+.3f})"
