"""From measurements to the outcome that was fixed beforehand, and the sentence that says it."""

from collections.abc import Sequence

from dean_interp.evaluation.guard import PERPLEXITY_LIMIT, SuperWeight
from dean_interp.evaluation.measure import Measurement
from dean_interp.models.sites import Unit
from dean_interp.statistics import Interval, clustered_interval, detectable_difference, rank_p_value
from dean_interp.study.results import Design, Primary, Spoken, State, UnitResults

SIGNIFICANT = 0.05
RANDOM_KINDS = ("random", "equal KL")


def state_of(
    name: str, kind: str, n_units: int, growth: float, measured: Measurement, original: Measurement, general: str
) -> State:
    """One measurement as a line of the results: margins, their paired changes, perplexity and KL."""
    paired = [behaviour for behaviour in measured.behaviours.values() if behaviour.paired]
    return State(
        name,
        kind,
        n_units,
        growth,
        {behaviour.name: float(behaviour.margin.mean()) for behaviour in paired},
        {behaviour.name: _change(behaviour.name, measured, original) for behaviour in paired},
        measured[general].perplexity,
        measured[general].mean_kl,
    )


def design_of(
    controls: Sequence[State], equal_kl: Sequence[Measurement], original: Measurement, behaviours: Sequence[str]
) -> Design:
    """What can be detected, from the original and the controls alone: the edit's margins have not been measured.

    Changes vary over prompts with how much an ablation does, so the spread is that of the equal-KL controls.
    """
    detectable, to_beat = {}, {}
    for name in behaviours:
        changes = [control[name].margin - original[name].margin for control in equal_kl]
        spread = float(sum(change.var() for change in changes) / len(changes)) ** 0.5
        detectable[name] = detectable_difference(spread, len(set(original[name].prompts)))
        to_beat[name] = max(control.change[name].mean for control in controls)
    return Design(len(original[behaviours[0]].prompts), detectable, to_beat, 1 / (len(controls) + 1))


def primary_of(edit: State, states: Sequence[State]) -> Primary:
    """Rank of the edit's change among all random controls, for each behaviour; the larger p counts."""
    controls = [state for state in states if state.kind in RANDOM_KINDS]
    p = {
        name: rank_p_value(change.mean, [control.change[name].mean for control in controls])
        for name, change in edit.change.items()
    }
    kl_of_controls = max(control.kl for control in controls)
    both_rise = all(change.mean > 0 for change in edit.change.values())
    reached = both_rise and max(p.values()) <= SIGNIFICANT and edit.kl <= kl_of_controls
    return Primary(p, max(p.values()), edit.kl, kl_of_controls, both_rise, reached)


def headline_of(unit: Unit, edit: State, states: Sequence[State], primary: Primary, perplexity: float) -> str:
    """The primary outcome in plain words; `perplexity` is the original's."""
    changes = " and ".join(f"the {name} margin by {_signed(change)}" for name, change in edit.change.items())
    controls = [state for state in states if state.kind in RANDOM_KINDS]
    better = {
        name: sum(control.change[name].mean >= change.mean for control in controls)
        for name, change in edit.change.items()
    }
    beaten = " and ".join(f"{n} of {len(controls)} random controls do at least as well on {name}"
                          for name, n in better.items())  # fmt: skip
    verdict = "The primary outcome was reached." if primary.reached else "The primary outcome was not reached."
    return (
        f"{verdict} Silencing {edit.n_units} coupled {unit}s changes {changes} nats per token; {beaten} "
        f"(p = {primary.p_larger:.2f}). Perplexity on general text goes from {perplexity:.1f} to "
        f"{edit.perplexity:.1f}."
    )


def faults_of(
    unit: UnitResults, original: State, spoken: Spoken | None, held: Sequence[SuperWeight]
) -> tuple[str, ...]:
    """What the edit does that it must not do, one line each."""
    edit, found = unit.states[0], []
    ratio = edit.perplexity / original.perplexity
    if ratio > PERPLEXITY_LIMIT:
        found.append(
            f"perplexity on general text rises {ratio:.2f} times ({original.perplexity:.1f} to {edit.perplexity:.1f}; "
            f"the limit is {PERPLEXITY_LIMIT} times)"
        )
    if held:
        found.append(f"it silences {', '.join(map(str, held))}: one huge activation and one huge output hang on each "
                     "(super weights, arXiv 2411.07191)")  # fmt: skip
    for state in spoken.states if spoken else ():
        if state.kind == "edit" and state.unit == unit.unit:
            for one in state.sets:
                change = one.change["incoherent"]
                if change.low > 0:
                    points = f"{100 * change.mean:.0f} points [{100 * change.low:.0f}, {100 * change.high:.0f}]"
                    found.append(f"incoherent answers to {one.behaviour.replace('_', ' ')} prompts rise by {points}")
    return tuple(found)


def _change(name: str, measured: Measurement, original: Measurement) -> Interval:
    difference = measured[name].margin - original[name].margin
    return clustered_interval(difference.numpy(), measured[name].prompts)


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} (95 % {interval.low:+.3f} to {interval.high:+.3f})"
