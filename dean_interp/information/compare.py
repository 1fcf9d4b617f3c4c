"""The one call: what an ablation does to the mutual information between two behaviours, beside matched controls.

The model passes once over the prompts in each state: the original, the edit, every control. Only one state's
activations are in memory beside the original's. Of a control only its changes stay; they are kept on disk as they come.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from dean_interp.data.examples import Behaviour, prompt_hashes_of
from dean_interp.errors import InputError
from dean_interp.information.activations import Activations, distinct, read_activations
from dean_interp.information.before_after import BeforeAfter
from dean_interp.information.estimands import InformationArm, MutualInformationConfig, refuse_few
from dean_interp.information.kept_controls import Changes, KeptControls, kept_controls
from dean_interp.information.shifts import MutualInformation
from dean_interp.models.load import HookedModel
from dean_interp.models.scored_prompts import refuse_scored
from dean_interp.models.sizes import residual_width
from dean_interp.models.tokens import Template
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.progress import progress_bar
from dean_interp.selection.gates import Gates
from dean_interp.selection.selection import Selection

log = logging.getLogger(__name__)

DEFAULT_CONFIG = MutualInformationConfig()
"""`downstream_mi` with every default."""


def mutual_information(
    model: HookedModel,
    behaviours: Sequence[Behaviour],
    *,
    first_neurons: Selection,
    second_neurons: Selection,
    ablated: Selection | Gates,
    config: MutualInformationConfig = DEFAULT_CONFIG,
    controls: Sequence[Selection | Gates | InformationArm] = (),
    calibration: Sequence[Behaviour] = (),
    template: Template = "chat",
    folder: str | Path | None = None,
) -> MutualInformation:
    """Estimate the mutual information before and under an ablation, and rank its change among controls.

    Args:
        behaviours: first, second, and any others whose prompts are pooled (the test splits). A prompt that stands twice
            counts once.
        first_neurons: neurons of the first behaviour. Silenced ones are left out (see `InformationArm.neurons`).
        second_neurons: neurons of the second behaviour.
        ablated: neurons or weights that are silenced, or gates.
        config: the estimand, `MutualInformationConfig("awareness_mi")` for instance, and how it is estimated.
        controls: matched random ablations (`random_like`), 99 or more for p = 0.01. For `subset_mi` each is an
            `InformationArm` with neurons of its own (`random_arm_like`).
        calibration: both behaviours' calibration splits, on which the probes of `awareness_mi` are fitted. Without
            them they are fitted on the half of the topics that a row does not belong to.
        template: how prompts become tokens.
        folder: where finished controls are kept, so that a killed call goes on; nothing is kept without it.

    Raises:
        InputError: too few prompts, prompts that were scored, an empty ablation, `first_neurons` or `second_neurons`
            that hold weights, behaviours without safe and unsafe answers where the estimand needs answers.
    """
    arm = InformationArm(ablated, first_neurons, second_neurons)
    (information,) = mutual_informations(
        model,
        behaviours,
        [config],
        edit=arm,
        controls=controls,
        calibration=calibration,
        template=template,
        folder=folder,
    )
    return information


@own_torch_settings()
def mutual_informations(
    model: HookedModel,
    behaviours: Sequence[Behaviour],
    configs: Sequence[MutualInformationConfig],
    *,
    edit: InformationArm,
    controls: Sequence[Selection | Gates | InformationArm] = (),
    calibration: Sequence[Behaviour] = (),
    template: Template = "chat",
    folder: str | Path | None = None,
) -> tuple[MutualInformation, ...]:
    """Several estimands from the same passes; arguments as for `mutual_information`."""
    arms = [_as_arm(control, edit) for control in controls]
    _check(model, behaviours, calibration, configs=configs, arms=[edit, *arms])
    units = _all_neurons([edit, *arms])
    answers = any(config.at_answers for config in configs)
    residual = any(config.estimand == "paper_nhsic" for config in configs)
    _log_memory(
        model,
        n_prompts=len(distinct(behaviours)),
        n_units=len(units),
        n_controls=len(arms),
        answers=answers,
        residual=residual,
    )

    def activations() -> Activations:
        """Activations on the test prompts, in the model's present state."""
        return read_activations(model, behaviours, units, answers=answers, residual=residual, template=template)

    # what is fixed before the ablation
    before = activations()
    known = None
    if calibration:
        known = read_activations(model, calibration, units, answers=answers, template=template)
    names = [behaviour.name for behaviour in behaviours[:2]]
    estimands = [BeforeAfter(config, before, edit, names, calibration=known) for config in configs]
    # controls first: what a killed call must not lose
    store = kept_controls(
        folder, model, tests=behaviours, calibration=calibration, configs=configs, arms=[edit, *arms], template=template
    )
    control_changes = _control_changes(model, arms, estimands, activations=activations, store=store)
    # the edit
    with edit.applied(model):
        after = activations()
    informations = []
    for i, estimand in enumerate(estimands):
        controls_of_estimand = [changes[i] for changes in control_changes]
        informations.append(estimand.information(after, controls_of_estimand))
    return tuple(informations)


def _as_arm(control: Selection | Gates | InformationArm, edit: InformationArm) -> InformationArm:
    """A control of ablated units alone compares the edit's neurons."""
    if isinstance(control, InformationArm):
        return control
    return InformationArm(control, edit.first_neurons, edit.second_neurons)


def _all_neurons(arms: Sequence[InformationArm]) -> Selection:
    units = arms[0].first_neurons
    for arm in arms:
        units = units | arm.first_neurons | arm.second_neurons
    return units


def _log_memory(
    model: HookedModel,
    *,
    n_prompts: int,
    n_units: int,
    n_controls: int,
    answers: bool,
    residual: bool,
) -> None:
    # where a prompt ends, and where its two answers do
    n_ends = 3 if answers else 1
    n_numbers = n_ends * n_units
    if residual:
        n_numbers += len(model.blocks) * residual_width(model)
    # two states, in float32
    n_bytes = 2 * 4 * n_numbers * n_prompts
    megabytes = n_bytes / 1e6
    text = "%d passes over %d prompts; two states' activations take %.0f MB"
    log.info(text, 2 + n_controls, n_prompts, megabytes)


def _control_changes(
    model: HookedModel,
    arms: Sequence[InformationArm],
    estimands: Sequence[BeforeAfter],
    *,
    activations: Callable[[], Activations],
    store: KeptControls,
) -> list[Changes]:
    """Every control's changes: those that a killed call left, then one control after another."""
    done = store.load()
    if not arms:
        return done
    n_done = len(done)
    bar = progress_bar(arms[n_done:], initial=n_done, total=len(arms), desc="controls", unit="control")
    for arm in bar:
        with arm.applied(model):
            after = activations()
        done.append([estimand.changes(arm, after) for estimand in estimands])
        store.save(done)
    return done


def _check(
    model: HookedModel,
    behaviours: Sequence[Behaviour],
    calibration: Sequence[Behaviour],
    *,
    configs: Sequence[MutualInformationConfig],
    arms: Sequence[InformationArm],
) -> None:
    # nothing that was scored is ever measured
    scored: set[str] = set()
    for arm in arms:
        for selection in (arm.first_neurons, arm.second_neurons, arm.changed):
            scored |= selection.prompt_hashes
    refuse_scored(model, behaviours, also=frozenset(scored))
    _check_behaviours(behaviours, calibration)
    if any(config.at_answers for config in configs):
        _check_pairs([*behaviours, *calibration])
    groups = [name for name, _ in distinct(behaviours)]
    names = [behaviour.name for behaviour in behaviours[:2]]
    for config in configs:
        refuse_few(config, groups, names)
    for arm in arms:
        _check_neurons(arm.first_neurons, "first_neurons")
        _check_neurons(arm.second_neurons, "second_neurons")
    if any(config.estimand == "subset_mi" for config in configs):
        for arm in arms:
            _check_overlap(arm)


def _check_behaviours(behaviours: Sequence[Behaviour], calibration: Sequence[Behaviour]) -> None:
    names = [behaviour.name for behaviour in behaviours]
    n_names = len(set(names))
    if n_names < 2 or n_names < len(names):
        raise InputError(f"two behaviours or more are needed, each with a name of its own, got {names}")
    calibration_names = [behaviour.name for behaviour in calibration]
    if calibration and not set(names[:2]) <= set(calibration_names):
        raise InputError(f"calibration must hold {names[:2]}, got {calibration_names}")
    # by their normal form, as scored prompts are
    hashes = prompt_hashes_of(behaviours)
    overlap: set[str] = set()
    for behaviour in calibration:
        overlap |= behaviour.prompts_among(hashes)
    if overlap:
        example = min(overlap)[:60]
        raise InputError(f"{len(overlap)} calibration prompts are test prompts too, among them {example!r}")


def _check_pairs(behaviours: Sequence[Behaviour]) -> None:
    for behaviour in behaviours:
        if not behaviour.paired:
            raise InputError(f"'{behaviour.name}' has prompts without a safe and an unsafe answer to be read at")


def _check_neurons(neurons: Selection, name: str) -> None:
    if any(site.unit != "neuron" for site in neurons.units):
        raise InputError(f"{name} must hold neurons, got {neurons!r}")


def _check_overlap(arm: InformationArm) -> None:
    both = arm.first_neurons & arm.second_neurons
    if arm.changed.shapes != both.shapes or len(arm.changed - both):
        raise InputError(
            "subset_mi silences neurons of both behaviours; choose first_neurons and second_neurons that hold `ablated`"
        )
