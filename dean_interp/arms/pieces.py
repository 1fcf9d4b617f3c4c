"""The comparison of arms at equal damage, in pieces that can be stopped, resumed, and shared by several processes.

Every arm is given the same calibration pairs, the same number of trials to choose its settings, and the same general
text on which its KL is set. For every arm:

1. Choose its settings on choosing prompts, where its KL is `chosen_at` (`arms.choosing_settings`).
2. Find its dose for each KL.
3. Measure the model at these doses on confirming prompts, which nothing before this step may read (`arms.sealed`).

Then, for the best arm of each kind that knows which answers are safe: the same again with the labels of random topics
exchanged, with the settings that were chosen. That is the null.
"""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from dean_interp.arms.arm import Arm, Change, Kind, Setting, in_words
from dean_interp.arms.at_kl import DoseAtKl, dose_at_kl
from dean_interp.arms.choosing_settings import Trial, best_of, tried_settings
from dean_interp.arms.comparison import (
    NULLS,
    RECORD,
    ArmRecord,
    ComparisonConfig,
    MeasuredState,
    SharedWork,
    piece_folder,
    records_of,
    save,
)
from dean_interp.arms.system_prompt import SystemPromptArm
from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.files import write_bytes
from dean_interp.progress import progress_bar
from dean_interp.statistics import Interval
from dean_interp.study.choosing import random_flips
from dean_interp.study.conclusions import state_results
from dean_interp.study.dosing import KlOfState, state_kl_meter
from dean_interp.study.method import original_of
from dean_interp.study.run_folder import BusyError, locked
from dean_interp.study.state_outcomes import StateOutcomes, outcomes_of
from dean_interp.study.store import ORIGINAL, State


def compare_arms(work: SharedWork, arms: Sequence[Arm], together: Sequence[tuple[SystemPromptArm, Arm]] = ()) -> None:
    """Every piece that is not done and that no other process is at: first the arms, then the nulls.

    Args:
        work: what the pieces share.
        arms: what is compared.
        together: prompts that are measured with an edit, which is one of the arms, at the doses of the edit alone.
    """
    with warnings.catch_warnings():
        # A set that does nothing on general text is no fault here: its KL says so.
        warnings.filterwarnings("ignore", "the ablation of .* changed nothing", UserWarning)
        _do_pieces(work, arms, together)


def _do_pieces(work: SharedWork, arms: Sequence[Arm], together: Sequence[tuple[SystemPromptArm, Arm]]) -> None:
    for arm in progress_bar(arms, desc="arms", unit="arm"):
        with _piece(work.folder, arm.name, RECORD) as is_mine:
            if is_mine:
                save(arm_record(work, arm), work.folder, arm.name)
    records = records_of(work.folder, [arm.name for arm in arms])
    for prompt, arm in together:
        name = name_together(prompt, arm)
        with _piece(work.folder, name, RECORD) as is_mine:
            if is_mine and arm.name in records:
                save(record_together(work, prompt, arm, records[arm.name]), work.folder, name)
    if work.also.others:
        for arm in progress_bar(arms, desc="on further data", unit="arm"):
            if arm.name in records:
                measure_on_further(work, arm, records[arm.name])
    for arm in progress_bar(with_nulls(arms, records), desc="nulls", unit="arm"):
        with _piece(work.folder, arm.name, NULLS) as is_mine:
            if is_mine:
                states = null_states(work, arm, records[arm.name])
                content = TypeAdapter(tuple[MeasuredState, ...]).dump_json(states, indent=1)
                write_bytes(piece_folder(work.folder, arm.name) / NULLS, content + b"\n")


def measure_on_further(work: SharedWork, arm: Arm, record: ArmRecord) -> None:
    """Measure an arm on further data at the KL where settings are chosen; the store keeps it."""
    work.also.further(work.model, ORIGINAL)
    for at in record.states:
        if at.kl in (0, work.config.chosen_at):
            change = arm.fit(work.examples(arm), record.settings)
            work.also.further(work.model, named(change.at(at.dose), at.name))


def with_nulls(arms: Sequence[Arm], records: Mapping[str, ArmRecord]) -> list[Arm]:
    """The best arm of each kind that knows labels, by what it is worth on choosing prompts. A kind whose arms are not
    all done is left for later.
    """
    kinds: dict[Kind, list[Arm]] = {}
    for arm in arms:
        if arm.uses_labels:
            kinds.setdefault(arm.kind, []).append(arm)
    best = []
    for of_kind in kinds.values():
        if not all(arm.name in records for arm in of_kind):
            continue
        # An arm that chose nothing has no worth to be compared.
        chosen = [arm for arm in of_kind if arm.choices and records[arm.name].worth is not None]
        if chosen:
            best.append(max(chosen, key=lambda arm: records[arm.name].worth or 0.0))
    return best


@contextmanager
def _piece(folder: Path, arm: str, record: str) -> Iterator[bool]:
    """Whether a piece is to be done by this process: it is not done, and no other process is at it."""
    own = piece_folder(folder, arm)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(own))
        except BusyError:
            yield False
            return
        yield not (own / record).is_file()


def arm_record(work: SharedWork, arm: Arm) -> ArmRecord:
    """Choose an arm's settings and doses, and measure it on confirming prompts."""
    began = time.monotonic()
    record = ArmRecord(arm.name, arm.kind, arm.source, arm.uses_labels)
    config, meter = work.config, state_kl_meter(work.choose.store, work.model)
    try:
        with work.sealed():
            trials = _tried(work, arm, meter)
            best = best_of(trials)
            if best is None:
                return replace(record, trials=trials, left_out=trials[0].fault if trials else None)
            change = arm.fit(work.examples(arm), best.settings)
            doses = _doses(arm, change, meter, config)
    except InputError as error:
        return replace(record, left_out=str(error))
    seconds = time.monotonic() - began
    states: list[MeasuredState] = []
    # A set that is silenced whole below a KL is the same state at every larger one, and is measured once.
    names: dict[float, str] = {}
    for kl, chosen in doses.items():
        name = names.setdefault(chosen.dose, f"{arm.name}, KL {kl:g}" if kl else arm.name)
        in_full = kl in (0, config.chosen_at)
        state = named(change.at(chosen.dose), name)
        states.append(measured_state(work, state, chosen, kl=kl, in_full=in_full))
    return replace(
        record,
        settings=best.settings,
        trials=trials,
        states=tuple(states),
        n_bytes=change.n_bytes,
        seconds=round(seconds, 1),
    )


def _tried(work: SharedWork, arm: Arm, meter: KlOfState) -> tuple[Trial, ...]:
    """The trials of an arm's settings on choosing prompts."""
    original = original_of(work.choose, work.model, in_full=False)
    config = work.config

    def value_of(settings: dict[str, Setting]) -> float:
        change = arm.fit(work.examples(arm), settings)
        # Nothing is chosen, so nothing needs to be measured.
        if not arm.choices:
            return 0.0
        chosen = dose_at_kl(change, meter, kl=config.chosen_at)
        state = named(change.at(chosen.dose), f"{arm.name}, {in_words(settings)}")
        measured = outcomes_of(work.choose, work.model, state, reference=original.measurement, in_full=False)
        return smaller_rise(original, measured, work.data.choosing)

    journal = piece_folder(work.folder, arm.name) / "trials.log"
    return tried_settings(arm, config.n_choices, journal, value_of, seed=config.study.seed)


def smaller_rise(original: StateOutcomes, measured: StateOutcomes, behaviours: Sequence[Behaviour]) -> float:
    """The smaller of both margins' mean changes, nats per token."""
    changes = state_results(original, measured).change
    return min(changes[behaviour.name].mean for behaviour in behaviours[:2])


def _doses(arm: Arm, change: Change, meter: KlOfState, config: ComparisonConfig) -> dict[float, DoseAtKl]:
    """The dose at each KL, each search from where the last one ended. A prompt has one dose, whatever its KL."""
    if arm.kind == "prompt":
        return {0.0: DoseAtKl(1.0, meter(change.at(1.0)), is_reached=True)}
    doses: dict[float, DoseAtKl] = {}
    start, last_kl = None, config.chosen_at
    for kl in config.kls:
        if start is not None:
            start *= (kl / last_kl) ** 0.5
        doses[kl] = dose_at_kl(change, meter, kl=kl, start=start)
        start, last_kl = doses[kl].dose or None, kl
    return doses


def measured_state(work: SharedWork, state: State, chosen: DoseAtKl, *, kl: float, in_full: bool) -> MeasuredState:
    """Measure a state on confirming prompts, unless the store holds it."""
    original = original_of(work.confirm, work.model)
    outcomes_of(work.confirm, work.model, state, reference=original.measurement, in_full=in_full)
    return MeasuredState(name=state.name, kl=kl, chosen=chosen, fingerprint=state.fingerprint, in_full=in_full)


def named(state: State, name: str) -> State:
    """A state of an arm under the name that its files get."""
    return replace(state, name=name, kind="arm", unit=None)


def name_together(prompt: SystemPromptArm, arm: Arm) -> str:
    """What a prompt together with an edit is called."""
    return f"{prompt.name}, with {arm.name}"


def record_together(work: SharedWork, prompt: SystemPromptArm, arm: Arm, record: ArmRecord) -> ArmRecord:
    """An edit at its doses, under a system prompt. The KL is that of both."""
    name, meter = name_together(prompt, arm), state_kl_meter(work.choose.store, work.model)
    both = ArmRecord(name, prompt.kind, f"{prompt.source}; {arm.source}", uses_labels=False)
    try:
        text = prompt.fit(work.examples(prompt), {})
        change = arm.fit(work.examples(arm), record.settings)
    except InputError as error:
        return replace(both, left_out=str(error))
    states = []
    for alone in record.states:
        state = replace(named(change.at(alone.dose), f"{name}, KL {alone.kl:g}"), change=text.at(1.0).change)
        chosen = DoseAtKl(alone.dose, meter(state), is_reached=True)
        states.append(measured_state(work, state, chosen, kl=alone.kl, in_full=alone.in_full))
    n_bytes = text.n_bytes + change.n_bytes
    return replace(both, settings=record.settings, states=tuple(states), n_bytes=n_bytes)


def null_states(work: SharedWork, arm: Arm, record: ArmRecord) -> tuple[MeasuredState, ...]:
    """The arm with its settings on flipped labels, each at a dose of its own, measured on confirming prompts."""
    config, meter = work.config, state_kl_meter(work.choose.store, work.model)
    at = next(state for state in record.states if state.kl == config.chosen_at)
    topics = [list(scores.clusters) for scores in work.examples(arm).margin_scores[:2]]
    n_flips = config.n_flips_of(arm.kind)
    flips = random_flips(topics[0], topics[1], (n_flips + 1) // 2, seed=config.study.seed)[:n_flips]
    states = []
    for number, flip in enumerate(progress_bar(flips, desc=f"flips of {arm.name}", unit="flip")):
        name = f"{arm.name}, flip {number + 1}"
        try:
            with work.sealed():
                change = arm.fit(work.examples(arm, flip, part=f"flip {number + 1}"), record.settings)
                chosen = dose_at_kl(change, meter, kl=config.chosen_at, start=at.dose)
        except InputError:
            # Nothing is certain enough on flipped labels: a null that changes nothing.
            states.append(_unchanged(name, config.chosen_at))
            continue
        state = named(change.at(chosen.dose), name)
        states.append(measured_state(work, state, chosen, kl=config.chosen_at, in_full=False))
    return tuple(states)


def _unchanged(name: str, kl: float) -> MeasuredState:
    nothing = DoseAtKl(0.0, Interval(0.0, 0.0, 0.0, 1), is_reached=False)
    return MeasuredState(name=name, kl=kl, chosen=nothing, fingerprint="", in_full=False)
