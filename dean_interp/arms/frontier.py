"""What a comparison of arms found: how much each raises both behaviours for its damage, and beside which nulls.

Of an arm at a KL the **smaller rise** counts: the smaller of the changes of both margins. Its interval is a bootstrap
over topics, drawn anew for each behaviour. The **area** of an arm is the mean smaller rise over KLs from 0 to the
largest that was looked for, by straight lines between what was measured, from no rise at no KL; an arm that ends before
stays where it ended. p is that of the less certain behaviour (intersection-union), two-sided, adjusted over arms by
Holm's method; against nulls it is the larger of both ranks.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float

from dean_interp.arms.comparison import ArmRecord, ComparisonConfig, MeasuredState, SharedWork, nulls_of, records_of
from dean_interp.arms.frontier_curves import MarginChanges, area_under, smaller_rises
from dean_interp.evaluation.lines import Line, compare
from dean_interp.evaluation.outcomes import MARGIN, clusters_of, likelihoods
from dean_interp.frames import Framed
from dean_interp.models.load import HookedModel
from dean_interp.statistics import Interval, holm, rank_p_value
from dean_interp.study.dosing import kl_interval
from dean_interp.study.state_outcomes import MeasurementPlan, StateOutcomes, outcomes_of
from dean_interp.study.store import ORIGINAL, State, Store


@dataclass(frozen=True)
class FrontierPoint:
    """An arm at one KL, on confirming prompts."""

    kl_wanted: float
    """Nats per answer token; 0 where the arm has one dose."""
    dose: float
    kl: Interval
    """Measured on confirming general text, nats per answer token."""
    is_reached: bool
    """Whether a dose has the KL that was looked for, on the text that chooses doses; else this is the nearest."""
    rises: Mapping[str, Interval]
    """The change of each behaviour's margin, nats per token."""
    smaller: Interval
    """The smaller of both changes."""
    p: float
    """That both margins rise: the larger of both p-values, 1 where one falls."""
    lines: tuple[Line, ...]
    """Everything that was measured, before and after."""

    @property
    def raises_both(self) -> bool:
        """Whether the intervals of both changes lie above 0."""
        return all(rise.low > 0 for rise in self.rises.values())


@dataclass(frozen=True)
class FrontierArm:
    """One arm on confirming prompts."""

    record: ArmRecord
    points: tuple[FrontierPoint, ...]
    area: Interval | None
    """Mean smaller rise over KLs up to the largest; None where the arm has one dose, or was left out."""
    p_holm: float | None
    """At the KL where settings are chosen, adjusted over the arms; None for random ones."""
    null_rises: tuple[Mapping[str, float], ...] | None
    """The changes of both margins under each of its nulls, equal changes once; None where it has none."""
    null_p: float | None
    """The larger rank of both rises among the nulls."""
    further: tuple[Line, ...] = ()
    """Margins on further data, at the KL where settings are chosen."""

    @property
    def name(self) -> str:
        """The name of the arm."""
        return self.record.name

    def point(self, kl: float) -> FrontierPoint | None:
        """The point at a KL that was looked for, or the only one of a prompt; None where there is none."""
        for point in self.points:
            if point.kl_wanted in (kl, 0):
                return point
        return None


@dataclass(frozen=True)
class Frontier(Framed):
    """Arms compared at equal damage, on one model and two behaviours."""

    model: str
    behaviours: tuple[str, str]
    chosen_at: float
    arms: tuple[FrontierArm, ...]
    missing: tuple[str, ...]
    """Arms that are not done."""

    def __getitem__(self, name: str) -> FrontierArm:
        return next(arm for arm in self.arms if arm.name == name)

    def __repr__(self) -> str:
        return f"Frontier({self.model!r}, {len(self.arms)} arms)"

    def to_pandas(self) -> pd.DataFrame:
        """One row an arm and KL: the KL that was reached, both rises and the smaller with their intervals, p."""
        rows = []
        for arm in self.arms:
            rows += [_row(arm, point) for point in arm.points]
        return pd.DataFrame(rows)


def _row(arm: FrontierArm, point: FrontierPoint) -> dict[str, object]:
    row: dict[str, object] = {
        "arm": arm.name,
        "kind": arm.record.kind,
        "kl_wanted": point.kl_wanted,
        "dose": point.dose,
        "kl": point.kl.mean,
        "is_reached": point.is_reached,
    }
    for name, rise in point.rises.items():
        row[name] = rise.mean
        row[f"{name}_low"] = rise.low
        row[f"{name}_high"] = rise.high
    row["smaller"] = point.smaller.mean
    row["p"] = point.p
    row["low"] = point.smaller.low
    row["high"] = point.smaller.high
    return row


def frontier_of(work: SharedWork, names: Sequence[str]) -> Frontier:
    """What the pieces that are done found. Nothing is measured.

    Args:
        work: says where they left it.
        names: the arms, in the order of the table.
    """
    plan, config = work.confirm, work.config
    records = records_of(work.folder, names)
    first, second, _ = plan.store.tests
    original = _measured(plan, ORIGINAL.name, "", in_full=True)
    arms = []
    for record in records.values():
        nulls = nulls_of(work.folder, record.name)
        arm = _with_nulls(_arm(plan, record, original, config), nulls, plan, original, config.chosen_at)
        arms.append(replace(arm, further=_further(work.also, record, config.chosen_at)))
    return Frontier(
        model=config.study.model.title,
        behaviours=(first.name, second.name),
        chosen_at=config.chosen_at,
        arms=_with_holm_over_arms(arms, config.chosen_at),
        missing=tuple(name for name in names if name not in records),
    )


def _arm(
    plan: MeasurementPlan,
    record: ArmRecord,
    original: StateOutcomes,
    config: ComparisonConfig,
) -> FrontierArm:
    """An arm at each of its KLs, not yet beside nulls and other arms."""
    if not record.states:
        return FrontierArm(record, (), area=None, p_holm=None, null_rises=None, null_p=None)
    states = [_measured(plan, state.name, state.fingerprint, in_full=state.in_full) for state in record.states]
    first, second = (_changes(original, states, test.name) for test in plan.store.tests[:2])
    points = []
    for state, measured, smaller in zip(record.states, states, smaller_rises(first, second), strict=True):
        point = _point(plan, record, state, original=original, measured=measured, smaller=smaller)
        points.append(point)
    area = None
    # A prompt has one dose.
    if record.kind != "prompt":
        kls = [point.kl.mean for point in points]
        area = area_under(kls, first, second, largest=config.kls[-1])
    return FrontierArm(record, tuple(points), area=area, p_holm=None, null_rises=None, null_p=None)


def _with_nulls(
    arm: FrontierArm,
    nulls: Sequence[MeasuredState] | None,
    plan: MeasurementPlan,
    original: StateOutcomes,
    kl: float,
) -> FrontierArm:
    """An arm beside its nulls, where they are done."""
    if nulls is None:
        return arm
    # Two flips that make the same change are one null, as a flip and its complement where a direction is taken out.
    distinct = {null.fingerprint or null.name: null for null in nulls}
    null_rises = tuple(_null_rises(plan, null, original) for null in distinct.values())
    point = arm.point(kl)
    null_p = _rank(point, null_rises) if point and null_rises else None
    return replace(arm, null_rises=null_rises, null_p=null_p)


def _further(store: Store, record: ArmRecord, kl: float) -> tuple[Line, ...]:
    """The lines of an arm on further data; none where it was not measured there."""
    measured = next((state for state in record.states if state.kl in (0, kl)), None)
    if not store.others or measured is None:
        return ()
    state = _state(measured.name, measured.fingerprint)
    if not store.holds_further(state):
        return ()
    before = likelihoods(store.further(None, ORIGINAL), store.others)
    after = likelihoods(store.further(None, state), store.others)
    return tuple(compare(before, after))


def _point(
    plan: MeasurementPlan,
    record: ArmRecord,
    state: MeasuredState,
    *,
    original: StateOutcomes,
    measured: StateOutcomes,
    smaller: Interval,
) -> FrontierPoint:
    behaviours = [test.name for test in plan.store.tests[:2]]
    lines = compare(original.outcomes, measured.outcomes)
    # Windows of text are no chat: a system prompt is not there.
    if record.kind == "prompt":
        lines = [line for line in lines if "windows" not in line.metric]
    margins = {line.on: line for line in lines if line.metric == MARGIN and line.on in behaviours}
    rises = {name: margins[name].change for name in behaviours}
    both_rise = all(rise.mean > 0 for rise in rises.values())
    larger_p = max(line.p for line in margins.values())
    general = plan.store.tests[2]
    return FrontierPoint(
        kl_wanted=state.kl,
        dose=state.dose,
        kl=kl_interval(measured.measurement[general.name], clusters_of(general)),
        is_reached=state.chosen.is_reached,
        rises=rises,
        smaller=smaller,
        p=larger_p if both_rise else 1.0,
        lines=tuple(lines),
    )


def _null_rises(plan: MeasurementPlan, null: MeasuredState, original: StateOutcomes) -> dict[str, float]:
    """The change of both margins under a null; 0 where flipped labels gave no edit."""
    behaviours = [test.name for test in plan.store.tests[:2]]
    if not null.fingerprint:
        return dict.fromkeys(behaviours, 0.0)
    measured = _measured(plan, null.name, null.fingerprint, in_full=False)
    rises = {}
    for name in behaviours:
        changes = _changes(original, [measured], name)
        rises[name] = float(changes.values.mean())
    return rises


def _rank(point: FrontierPoint, null_rises: Sequence[Mapping[str, float]]) -> float:
    """The larger rank of both rises among those of nulls."""
    ranks = []
    for name, rise in point.rises.items():
        rises_of_nulls = [rises[name] for rises in null_rises]
        ranks.append(rank_p_value(rise.mean, rises_of_nulls))
    return max(ranks)


def _with_holm_over_arms(arms: Sequence[FrontierArm], kl: float) -> tuple[FrontierArm, ...]:
    """The arms with p-values adjusted over all that are not random."""
    family = {}
    for arm in arms:
        point = arm.point(kl)
        if arm.record.kind != "random" and point is not None:
            family[arm.name] = point.p
    adjusted = holm(family)
    return tuple(replace(arm, p_holm=adjusted.get(arm.name)) for arm in arms)


@dataclass(frozen=True)
class _Known:
    """A change that was measured before: its fingerprint is enough to find what was measured."""

    fingerprint: str

    def applied(self, model: HookedModel) -> AbstractContextManager[None]:
        raise AssertionError("what was measured is in the store")


def _measured(plan: MeasurementPlan, name: str, fingerprint: str, *, in_full: bool) -> StateOutcomes:
    """What the store holds of a state."""
    return outcomes_of(plan, None, _state(name, fingerprint), reference=None, in_full=in_full)


def _state(name: str, fingerprint: str) -> State:
    change = _Known(fingerprint) if fingerprint else None
    return State(name, "arm", change=change)


def _changes(original: StateOutcomes, states: Sequence[StateOutcomes], name: str) -> MarginChanges:
    """The change of a behaviour's margin in several states."""
    before = original.margin(name)
    values: list[Float[np.ndarray, " example"]] = []
    for state in states:
        values.append(state.margin(name).values - before.values)
    return MarginChanges(np.stack(values).astype(float), before.clusters)
