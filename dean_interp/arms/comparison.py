"""What a comparison of arms is made with, what its pieces share, and what they leave behind.

A piece is one arm, or the nulls of one. Its record says that it is done; what it measured lies in the stores of the run
folder. The pieces themselves are made in `arms.pieces`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dean_interp.arms.arm import Arm, ArmExamples, Kind, Setting
from dean_interp.arms.at_kl import DoseAtKl
from dean_interp.arms.choosing_settings import Trial, best_of
from dean_interp.arms.coupled_arms import rule_scores
from dean_interp.arms.sealed import sealed
from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError, refuse_below, refuse_other_groups
from dean_interp.files import write_json
from dean_interp.models.load import HookedModel
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.resume import read_kept
from dean_interp.study.choosing import effects, gates_store
from dean_interp.study.flips import Flip
from dean_interp.study.improve_data import ImproveData
from dean_interp.study.improvement import ImproveConfig
from dean_interp.study.method import original_of
from dean_interp.study.run_folder import waited_for
from dean_interp.study.settings import AnswerConfig
from dean_interp.study.state_outcomes import MeasurementPlan, measurement_plan
from dean_interp.study.store import Store, file_name
from dean_interp.study.study_data import PromptSets

RECORD = "arm.json"
NULLS = "nulls.json"


@dataclass(frozen=True)
class ComparisonConfig:
    """What is compared, on which model and data."""

    kls: tuple[float, ...] = (0.02, 0.05, 0.1)
    """KLs on general text at which arms are compared, nats per answer token."""
    chosen_at: float = 0.05
    """KL at which settings are chosen, answers are given, and nulls are made; one of them."""
    n_choices: int = 4
    """Number of trials in which an arm's settings are chosen, the same for every arm."""
    n_flips_tuned: int = 5
    """Number of nulls of the best arm of those that are trained: each null takes as long as the arm."""
    study: ImproveConfig = field(default_factory=lambda: ImproveConfig(n_flips=10, n_random=3))
    """Model, data, and what is measured. `n_flips` nulls stand beside the best arm of every other kind, and `n_random`
    random arms of each sort beside all."""

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        refuse_other_groups(self)
        is_ascending = list(self.kls) == sorted(set(self.kls))
        if not self.kls or not is_ascending or not self.kls[0] > 0:
            raise InputError(f"kls must be above 0 and ascending, in nats per token, got {self.kls}")
        if self.chosen_at not in self.kls:
            raise InputError(f"chosen_at must be one of kls {self.kls}, got {self.chosen_at}")
        refuse_below(self, {"n_choices": 1, "n_flips_tuned": 0})
        self.study.check()

    def n_flips_of(self, kind: Kind) -> int:
        """Number of nulls of a kind of arms."""
        return self.n_flips_tuned if kind == "fine-tuning" else self.study.n_flips


@dataclass(frozen=True)
class MeasuredState:
    """One state that was measured on confirming prompts."""

    name: str
    kl: float
    """The KL that was looked for, nats per answer token; 0 where the arm has no dose to choose."""
    chosen: DoseAtKl
    """The dose, and the KL on the text that chooses doses."""
    fingerprint: str
    """The fingerprint of the state; empty where nothing is changed."""
    in_full: bool
    """Whether answers and windows were measured, too."""

    @property
    def dose(self) -> float:
        """How far the arm was followed."""
        return self.chosen.dose


@dataclass(frozen=True)
class ArmRecord:
    """What is known of an arm when its piece is done. What was measured lies in the store."""

    name: str
    kind: Kind
    source: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
    states: tuple[MeasuredState, ...] = ()
    n_bytes: int = 0
    seconds: float = 0.0
    """Spent on choosing settings and doses, without the scores that arms share."""
    left_out: str | None = None
    """Why it was not measured."""

    @property
    def worth(self) -> float | None:
        """The best trial's value."""
        best = best_of(self.trials)
        return best.value if best else None


@dataclass(frozen=True)
class SharedWork:
    """Everything that the pieces share."""

    folder: Path
    config: ComparisonConfig
    data: ImproveData
    model: HookedModel
    confirm: MeasurementPlan
    choose: MeasurementPlan
    also: Store
    """Further data with two answers a prompt, on which every arm is measured at `chosen_at`; mostly none."""

    def examples(self, arm: Arm, flip: Flip | None = None, *, part: str = "fit") -> ArmExamples:
        """What an arm is given."""
        return ArmExamples(
            model=self.model,
            config=self.config.study,
            scoring=self.data.scoring,
            folder=self.folder,
            own_folder=self.folder / "arms" / file_name(arm.name) / part,
            flip=flip,
            seed=self.config.study.seed,
        )

    @contextmanager
    def sealed(self) -> Iterator[None]:
        """While open, no confirming prompt may be read."""
        confirming = [*self.data.confirming, *self.data.others, *self.also.others]
        with sealed(native_tokenizer(self.model), confirming):
            yield


def begun(
    folder: Path,
    config: ComparisonConfig,
    data: ImproveData,
    model: HookedModel,
    also: Sequence[Behaviour] = (),
) -> SharedWork:
    """The stores of the comparison, with what all arms share: the original, and the scores.

    Args:
        folder: the run folder.
        config: the settings.
        data: the examples by role.
        model: as the settings name it.
        also: further data with two answers a prompt, which nothing is chosen on.

    Raises `InputError` as `refuse_chosen_on`, and where the folder holds measurements of other data.
    """
    refuse_chosen_on(data, also)
    study = config.study
    no_answers = AnswerConfig(n_answers=0)
    choosing: Store = gates_store(folder / "choose", model, study, data.choosing)
    confirming: Store = gates_store(folder / "confirm", model, study, data.confirming, data.others)
    work = SharedWork(
        folder=folder,
        config=config,
        data=data,
        model=model,
        choose=measurement_plan(choosing, PromptSets(), no_answers, model, progress=None),
        confirm=measurement_plan(confirming, data.prompts, study.answers, model, progress=None),
        also=gates_store(folder / "also", model, study, data.confirming, also),
    )
    with waited_for(folder / "shared"):
        original_of(work.choose, model, in_full=False)
        original_of(work.confirm, model)
        with work.sealed():
            effects(model, data.scoring, study, folder)
            rule_scores(_anyone(work), "neuron")
    return work


def refuse_chosen_on(data: ImproveData, also: Sequence[Behaviour]) -> None:
    """Raise `InputError` for further data that have no pairs, or that share a prompt with what scores or chooses."""
    for behaviour in also:
        if not behaviour.paired:
            raise InputError(f"'{behaviour.name}' has prompts without two answers, so it has no margin to measure")
        for part in (*data.scoring, *data.choosing):
            if shared := behaviour.prompts_among(part.prompt_hashes):
                raise InputError(
                    f"{len(shared)} prompts of '{behaviour.name}' are among those of '{part.name}' that score or choose"
                )


def _anyone(work: SharedWork) -> ArmExamples:
    return ArmExamples(work.model, work.config.study, work.data.scoring, work.folder, work.folder)


def piece_folder(folder: Path, arm: str) -> Path:
    """Where the pieces of an arm lie."""
    return folder / "arms" / file_name(arm)


def save(record: ArmRecord, folder: Path, arm: str) -> None:
    """Write the record of an arm, which says that its piece is done."""
    write_json(piece_folder(folder, arm) / RECORD, record)


def records_of(folder: Path, names: Sequence[str]) -> dict[str, ArmRecord]:
    """The records of the arms that are done, by name."""
    records = {}
    for name in names:
        path = piece_folder(folder, name) / RECORD
        if path.is_file():
            records[name] = read_kept(path, ArmRecord)
    return records


def nulls_of(folder: Path, arm: str) -> tuple[MeasuredState, ...] | None:
    """The nulls of an arm; None where they are not done."""
    path = piece_folder(folder, arm) / NULLS
    return read_kept(path, tuple[MeasuredState, ...]) if path.is_file() else None
