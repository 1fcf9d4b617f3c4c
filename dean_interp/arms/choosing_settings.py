"""The settings of an arm, chosen on prompts that choose: the same number of trials for every arm, by Optuna.

A trial fits the arm with some settings, follows its change to a KL, and is worth the smaller of the two margins' rises
there. A grid with no more points than trials is gone through; from a larger one Optuna's TPE sampler takes its points.
Trials are kept in a journal, so a killed search goes on; a trial that was cut off is made again.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dean_interp.arms.arm import Arm, Setting
from dean_interp.errors import InputError

_FAULT = "fault"


@dataclass(frozen=True)
class Trial:
    """Some settings of an arm, and what they are worth on choosing prompts."""

    settings: dict[str, Setting]
    value: float | None
    """The smaller of both margins' mean rises at the KL where settings are chosen, nats per token; None: no edit."""
    fault: str | None = None
    """Why these settings gave no edit."""


def refuse_without_optuna() -> None:
    """Raise `InputError` where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise InputError("comparing arms needs the package optuna: pip install 'dean_interp[comparison]'")


def tried_settings(
    arm: Arm,
    n_trials: int,
    journal: Path,
    value_of: Callable[[dict[str, Setting]], float],
    *,
    seed: int,
) -> tuple[Trial, ...]:
    """The trials of an arm, from the journal where they were made before.

    Args:
        arm: says what there is to choose. Where this is nothing, one trial is made.
        n_trials: most trials; a grid that has fewer points is gone through once.
        journal: their file, for this arm and these data alone.
        value_of: makes a trial. Where it raises `InputError` the settings give no edit.
        seed: Seed for the sampler.
    """
    import optuna

    n_points = math.prod(len(values) for values in arm.choices.values())
    n_trials = min(n_trials, n_points)
    grid = {name: list(values) for name, values in arm.choices.items()}
    study = _study(arm.name, journal, seed)
    # A process that was killed left a trial that never ends.
    for cut_off in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(cut_off.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(cut_off.params)
    # A grid that is small enough is gone through, whatever the sampler would take.
    if n_points <= n_trials:
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            study.enqueue_trial(point, skip_if_exists=True)
    while len(_finished(study)) < n_trials:
        trial = study.ask()
        settings: dict[str, Setting] = {}
        for name, values in grid.items():
            value: Any = trial.suggest_categorical(name, values)
            settings[name] = value
        try:
            study.tell(trial, value_of(settings))
        except InputError as error:
            trial.set_user_attr(_FAULT, str(error))
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    trials = []
    for trial in _finished(study):
        trials.append(Trial(dict(trial.params), trial.value, trial.user_attrs.get(_FAULT)))
    return tuple(trials)


def _study(name: str, journal: Path, seed: int) -> Any:  # noqa: ANN401 - optuna's own, which comes with the extra
    """The search that the journal keeps, or a new one."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    return optuna.create_study(
        study_name=name,
        storage=storage,
        sampler=optuna.samplers.TPESampler(seed=seed),
        direction="maximize",
        load_if_exists=True,
    )


def best_of(trials: tuple[Trial, ...]) -> Trial | None:
    """The trial that is worth most; the first of those that are worth the same. None where none gave an edit."""
    with_edit = [trial for trial in trials if trial.value is not None]
    return max(with_edit, key=lambda trial: trial.value or 0.0, default=None)


def _finished(study: Any) -> list[Any]:  # noqa: ANN401 - optuna's own, which only arrives with the extra
    import optuna

    states = optuna.trial.TrialState
    return study.get_trials(deepcopy=False, states=[states.COMPLETE, states.PRUNED])
