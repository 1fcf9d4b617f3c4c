"""One arm of a comparison: its settings are chosen, its dose is found for each KL, and it is measured.

Settings and doses are chosen while confirming prompts are sealed; the measurement on these prompts comes last.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dean_interp.arms.arm import Arm, Change, Setting, in_words
from dean_interp.arms.at_kl import DoseAtKl, dose_at_kl
from dean_interp.arms.choosing_settings import Trial, best_of, tried_settings
from dean_interp.arms.comparison import ArmRecord, ComparisonConfig, MeasuredState, SharedWork, piece_folder
from dean_interp.arms.system_prompt import SystemPromptArm
from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.study.conclusions import state_results
from dean_interp.study.dosing import KlOfState, state_kl_meter
from dean_interp.study.method import original_of
from dean_interp.study.state_outcomes import StateOutcomes, outcomes_of
from dean_interp.study.store import State


def arm_record(work: SharedWork, arm: Arm) -> ArmRecord:
    """Choose an arm's settings and doses, and measure it on confirming prompts."""
    began = time.monotonic()
    record = ArmRecord(arm.name, arm.kind, arm.source)
    meter = state_kl_meter(work.choose.store, work.model)
    try:
        with work.sealed():
            trials = _tried(work, arm, meter)
            best = best_of(trials)
            if best is None:
                fault = trials[0].fault if trials else None
                return replace(record, trials=trials, left_out=fault)
            change = arm.fit(work.examples(arm), best.settings)
            doses = _doses(arm, change, meter, work.config)
    except InputError as error:
        return replace(record, left_out=str(error))
    seconds = time.monotonic() - began
    return replace(
        record,
        settings=best.settings,
        trials=trials,
        states=_measured_at_doses(work, arm, change, doses),
        n_bytes=change.n_bytes,
        seconds=round(seconds, 1),
    )


def _measured_at_doses(
    work: SharedWork,
    arm: Arm,
    change: Change,
    doses: Mapping[float, DoseAtKl],
) -> tuple[MeasuredState, ...]:
    """The states of a change at the dose of each KL, measured on confirming prompts."""
    states: list[MeasuredState] = []
    # A set that is silenced whole below a KL is the same state at every larger one, and is measured once.
    names: dict[float, str] = {}
    for kl, chosen in doses.items():
        name_at_kl = f"{arm.name}, KL {kl:g}" if kl else arm.name
        name = names.setdefault(chosen.dose, name_at_kl)
        in_full = kl in (0, work.config.chosen_at)
        state = named(change.at(chosen.dose), name)
        states.append(measured_state(work, state, chosen, kl=kl, in_full=in_full))
    return tuple(states)


def _tried(work: SharedWork, arm: Arm, meter: KlOfState) -> tuple[Trial, ...]:
    """The trials of an arm's settings on choosing prompts."""
    original = original_of(work.choose, work.model, in_full=False)

    def value_of(settings: dict[str, Setting]) -> float:
        change = arm.fit(work.examples(arm), settings)
        # Nothing is chosen, so nothing needs to be measured.
        if not arm.choices:
            return 0.0
        chosen = dose_at_kl(change, meter, kl=work.config.chosen_at)
        state = named(change.at(chosen.dose), f"{arm.name}, {in_words(settings)}")
        measured = outcomes_of(work.choose, work.model, state, reference=original.measurement, in_full=False)
        return smaller_rise(original, measured, work.data.choosing)

    journal = piece_folder(work.folder, arm.name) / "trials.log"
    return tried_settings(arm, work.config.n_choices, journal, value_of, seed=work.config.study.seed)


def smaller_rise(
    original: StateOutcomes,
    measured: StateOutcomes,
    behaviours: Sequence[Behaviour],
) -> float:
    """The smaller of both margins' mean changes, nats per token. Raises `InputError` where one is not a number."""
    changes = state_results(original, measured).change
    rises = [changes[behaviour.name].mean for behaviour in behaviours[:2] if behaviour.name in changes]
    if len(rises) < 2 or any(map(math.isnan, rises)):
        raise InputError("the change breaks the model: it gives no margins")
    return min(rises)


def _doses(
    arm: Arm,
    change: Change,
    meter: KlOfState,
    config: ComparisonConfig,
) -> dict[float, DoseAtKl]:
    """The dose at each KL, each search from where the last one ended. A prompt has one dose, whatever its KL."""
    if arm.kind == "prompt":
        kl_of_prompt = meter(change.at(1.0))
        return {0.0: DoseAtKl(1.0, kl_of_prompt, is_reached=True)}
    doses: dict[float, DoseAtKl] = {}
    start = None
    last_kl = config.chosen_at
    for kl in config.kls:
        # KL grows about as the square of the dose.
        if start is not None:
            start *= (kl / last_kl) ** 0.5
        doses[kl] = dose_at_kl(change, meter, kl=kl, start=start)
        start = doses[kl].dose or None
        last_kl = kl
    return doses


def measured_state(
    work: SharedWork,
    state: State,
    chosen: DoseAtKl,
    *,
    kl: float,
    in_full: bool,
) -> MeasuredState:
    """Measure a state on confirming prompts, unless the store holds it."""
    original = original_of(work.confirm, work.model)
    outcomes_of(work.confirm, work.model, state, reference=original.measurement, in_full=in_full)
    return MeasuredState(
        name=state.name,
        kl=kl,
        chosen=chosen,
        fingerprint=state.fingerprint,
        in_full=in_full,
    )


def named(state: State, name: str) -> State:
    """A state of an arm under the name that its files get."""
    return replace(state, name=name, kind="arm", unit=None)


def name_together(prompt: SystemPromptArm, arm: Arm) -> str:
    """What a prompt together with an edit is called."""
    return f"{prompt.name}, with {arm.name}"


def record_together(
    work: SharedWork,
    prompt: SystemPromptArm,
    arm: Arm,
    record: ArmRecord,
) -> ArmRecord:
    """An edit at its doses, under a system prompt. The KL is that of both.

    It is left out where the arm changes anything but units: a state holds one other change, and the prompt is that.
    """
    name = name_together(prompt, arm)
    meter = state_kl_meter(work.choose.store, work.model)
    both = ArmRecord(name, prompt.kind, f"{prompt.source}; {arm.source}")
    try:
        text = prompt.fit(work.examples(prompt), {})
        change = arm.fit(work.examples(arm), record.settings)
    except InputError as error:
        return replace(both, left_out=str(error))
    states = []
    for alone in record.states:
        edited = named(change.at(alone.dose), f"{name}, KL {alone.kl:g}")
        if edited.change is not None:
            return replace(both, left_out=f"{arm.name} changes more than units, and so it takes no prompt beside it")
        state = replace(edited, change=text.at(1.0).change)
        chosen = DoseAtKl(alone.dose, meter(state), is_reached=True)
        states.append(measured_state(work, state, chosen, kl=alone.kl, in_full=alone.in_full))
    n_bytes = text.n_bytes + change.n_bytes
    return replace(both, settings=record.settings, states=tuple(states), n_bytes=n_bytes)
