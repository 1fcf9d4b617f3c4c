"""The comparison of arms at equal damage, in pieces that can be stopped, resumed, and shared by several processes.

Every arm is given the same calibration pairs, the same number of trials to choose its settings, and the same general
text on which its KL is set. For every arm (`arms.measured_arms`):

1. Choose its settings on choosing prompts, where its KL is `chosen_at` (`arms.choosing_settings`).
2. Find its dose for each KL.
3. Measure the model at these doses on confirming prompts, which nothing before this step may read (`arms.sealed`).

Then, for the best arm of each kind that knows which answers are safe: the same again with the labels of random topics
exchanged, with the settings that were chosen. That is the null.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dean_interp.arms.arm import Arm, Kind
from dean_interp.arms.at_kl import DoseAtKl, dose_at_kl
from dean_interp.arms.comparison import (
    NULLS,
    RECORD,
    ArmRecord,
    MeasuredState,
    SharedWork,
    piece_folder,
    records_of,
    save,
)
from dean_interp.arms.measured_arms import arm_record, measured_state, name_together, named, record_together
from dean_interp.arms.system_prompt import SystemPromptArm
from dean_interp.errors import NothingToChangeError
from dean_interp.files import write_json
from dean_interp.progress import progress_bar
from dean_interp.statistics import Interval
from dean_interp.study.dosing import state_kl_meter
from dean_interp.study.flips import Flip, random_flips
from dean_interp.study.run_folder import BusyError, locked, waited_for
from dean_interp.study.store import ORIGINAL


def compare_arms(
    work: SharedWork,
    arms: Sequence[Arm],
    together: Sequence[tuple[SystemPromptArm, Arm]] = (),
) -> None:
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


def _do_pieces(
    work: SharedWork,
    arms: Sequence[Arm],
    together: Sequence[tuple[SystemPromptArm, Arm]],
) -> None:
    for arm in progress_bar(arms, desc="arms", unit="arm"):
        with _piece(work.folder, arm.name, RECORD) as is_mine:
            if is_mine:
                record = arm_record(work, arm)
                save(record, work.folder, arm.name)
    records = records_of(work.folder, [arm.name for arm in arms])
    for prompt, arm in together:
        name = name_together(prompt, arm)
        with _piece(work.folder, name, RECORD) as is_mine:
            if is_mine and arm.name in records:
                record = record_together(work, prompt, arm, records[arm.name])
                save(record, work.folder, name)
    if work.also.others:
        for arm in progress_bar(arms, desc="on further data", unit="arm"):
            if arm.name in records:
                measure_on_further(work, arm, records[arm.name])
    for arm in progress_bar(with_nulls(arms, records), desc="nulls", unit="arm"):
        with _piece(work.folder, arm.name, NULLS) as is_mine:
            if is_mine:
                states = null_states(work, arm, records[arm.name])
                write_json(piece_folder(work.folder, arm.name) / NULLS, states)


def measure_on_further(work: SharedWork, arm: Arm, record: ArmRecord) -> None:
    """Measure an arm on further data at the KL where settings are chosen; the store keeps it.

    Where another process measures there, its end is waited for: two would write the same files.
    """
    with waited_for(work.also.folder):
        work.also.further(work.model, ORIGINAL)
        for measured in record.states:
            if measured.kl in (0, work.config.chosen_at):
                change = arm.fit(work.examples(arm), record.settings)
                state = named(change.at(measured.dose), measured.name)
                work.also.further(work.model, state)


def with_nulls(arms: Sequence[Arm], records: Mapping[str, ArmRecord]) -> list[Arm]:
    """The best arm of each kind that knows labels, by what it is worth on choosing prompts. A kind whose arms are not
    all done is left for later.
    """
    kinds: dict[Kind, list[Arm]] = {}
    for arm in arms:
        if arm.uses_labels:
            kinds.setdefault(arm.kind, []).append(arm)
    best = []
    for arms_of_kind in kinds.values():
        if not all(arm.name in records for arm in arms_of_kind):
            continue
        worth: dict[str, float] = {}
        for arm in arms_of_kind:
            value = records[arm.name].worth
            # An arm that chose nothing has no worth to be compared.
            if arm.choices and value is not None:
                worth[arm.name] = value
        if worth:
            best_name = max(worth, key=worth.__getitem__)
            best += [arm for arm in arms_of_kind if arm.name == best_name]
    return best


@contextmanager
def _piece(folder: Path, arm: str, record: str) -> Iterator[bool]:
    """Whether a piece is to be done by this process: it is not done, and no other process is at it."""
    folder_of_arm = piece_folder(folder, arm)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder_of_arm))
        except BusyError:
            yield False
            return
        is_done = (folder_of_arm / record).is_file()
        yield not is_done


def null_states(work: SharedWork, arm: Arm, record: ArmRecord) -> tuple[MeasuredState, ...]:
    """The arm with its settings on flipped labels, each at a dose of its own, measured on confirming prompts."""
    kl = work.config.chosen_at
    meter = state_kl_meter(work.choose.store, work.model)
    (dose,) = (state.dose for state in record.states if state.kl == kl)
    states = []
    flips = _flips(work, arm)
    for number, flip in enumerate(progress_bar(flips, desc=f"flips of {arm.name}", unit="flip"), start=1):
        name = f"{arm.name}, flip {number}"
        examples = work.examples(arm, flip, part=f"flip {number}")
        try:
            with work.sealed():
                change = arm.fit(examples, record.settings)
                # Where no dose of the arm itself was left, the search begins as for the arm.
                chosen = dose_at_kl(change, meter, kl=kl, start=dose or None)
        except NothingToChangeError:
            # A null that changes nothing.
            states.append(_unchanged(name, kl))
            continue
        state = named(change.at(chosen.dose), name)
        states.append(measured_state(work, state, chosen, kl=kl, in_full=False))
    return tuple(states)


def _flips(work: SharedWork, arm: Arm) -> list[Flip]:
    """The flips of an arm's nulls. Each stands beside its complement, unless their number is odd."""
    first, second = work.examples(arm).margin_scores[:2]
    n_flips = work.config.n_flips_of(arm.kind)
    n_pairs = (n_flips + 1) // 2
    flips = random_flips(list(first.clusters), list(second.clusters), n_pairs, seed=work.config.study.seed)
    return flips[:n_flips]


def _unchanged(name: str, kl: float) -> MeasuredState:
    nothing = DoseAtKl(0.0, Interval(0.0, 0.0, 0.0, 1), is_reached=False)
    return MeasuredState(name=name, kl=kl, chosen=nothing, fingerprint="", in_full=False)
