"""The one call: what an ablation does to the mutual information between two behaviours, beside matched controls.

One pass over the prompts a state of the model: the original, the edit, every control. Only one state's activations are
held beside the original's; of a control nothing stays but its changes, which are kept on disk as they come.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dean_interp.data.examples import Behaviour
from dean_interp.editing.ablation import ablate
from dean_interp.errors import InputError
from dean_interp.files import read_json, write_text
from dean_interp.information.activations import Activations, distinct, read_activations
from dean_interp.information.before_after import Frozen, refuse_few
from dean_interp.information.estimands import Arm, Estimand, MutualInformation, MutualInformationConfig
from dean_interp.models.load import HookedModel, model_fingerprint
from dean_interp.models.scored_prompts import refuse_scored
from dean_interp.models.tokens import Template
from dean_interp.progress import progress_bar
from dean_interp.selection.selection import Selection

log = logging.getLogger(__name__)

Changes = list[dict[str, float]]
"""Of one control: for each question, the change at every place."""


def mutual_information(
    model: HookedModel,
    behaviours: Sequence[Behaviour],
    *,
    first_neurons: Selection,
    second_neurons: Selection,
    ablated: Selection,
    estimand: Estimand | MutualInformationConfig = "downstream_mi",
    controls: Sequence[Selection | Arm] = (),
    calibration: Sequence[Behaviour] = (),
    template: Template = "chat",
    folder: str | Path | None = None,
) -> MutualInformation:
    """Estimate an estimand before and while `ablated` is silenced, and rank its change among controls.

    Args:
        behaviours: first, second, and any others whose prompts are pooled (the test splits); a prompt that stands twice
            counts once.
        first_neurons: neurons of the first behaviour. Silenced ones are left out of both reads (see `Arm.reads`).
        second_neurons: neurons of the second.
        ablated: neurons or weights.
        estimand: by name, or a `MutualInformationConfig` that says more.
        controls: matched random ablations (`random_like`), 99 or more for p = 0.01; for `subset_mi` an `Arm` each, with
            reads of its own (`random_arm_like`).
        calibration: both behaviours' calibration splits, on which the probes of `awareness_mi` are fitted. Without
            them they are fitted on the half of the topics that a row does not belong to.
        template: how prompts become tokens.
        folder: where finished controls are kept, so that a killed call goes on; nothing is kept without it.

    Raises:
        InputError: an unknown estimand, too few prompts, prompts that were scored, an empty ablation, reads that are
            not neurons, behaviours without safe and unsafe answers where the estimand reads answers.
    """
    question = estimand if isinstance(estimand, MutualInformationConfig) else MutualInformationConfig(estimand)
    arm = Arm(ablated, first_neurons, second_neurons)
    return mutual_informations(
        model, behaviours, [question], edit=arm, controls=controls, calibration=calibration, template=template,
        folder=folder,
    )[0]  # fmt: skip


def mutual_informations(
    model: HookedModel,
    behaviours: Sequence[Behaviour],
    questions: Sequence[MutualInformationConfig],
    *,
    edit: Arm,
    controls: Sequence[Selection | Arm] = (),
    calibration: Sequence[Behaviour] = (),
    template: Template = "chat",
    folder: str | Path | None = None,
) -> tuple[MutualInformation, ...]:
    """Several questions from the same passes; arguments as for `mutual_information`."""
    arms = [one if isinstance(one, Arm) else Arm(one, edit.first_neurons, edit.second_neurons) for one in controls]
    _check(model, behaviours, questions, [edit, *arms], calibration)
    units = edit.first_neurons | edit.second_neurons
    for arm in arms:
        units = units | arm.first_neurons | arm.second_neurons
    options: dict[str, Any] = {
        "answers": any(question.at_answers for question in questions),
        "residual": any(question.estimand == "paper_nhsic" for question in questions),
        "template": template,
    }
    n_prompts = len(distinct(behaviours))
    n_numbers = (
        len(units) * (3 if options["answers"] else 1) + options["residual"] * model.cfg.n_layers * model.cfg.d_model
    )
    log.info("%d passes over %d prompts; two states' activations take %.0f MB", 2 + len(arms), n_prompts,
             2 * 4 * n_numbers * n_prompts / 1e6)  # fmt: skip
    before = read_activations(model, behaviours, units, **options)
    known = read_activations(model, calibration, units, **{**options, "residual": False}) if calibration else None
    names = [behaviour.name for behaviour in behaviours[:2]]
    asked = [Frozen(question, before, edit, names, known) for question in questions]
    of_controls = _of_controls(model, behaviours, asked, arms, units, options, _kept(
        folder, model, [*behaviours, *calibration], questions, [edit, *arms], template
    ))  # fmt: skip
    with ablate(model, edit.ablated):
        after = read_activations(model, behaviours, units, **options)
    return tuple(one.information(after, [changes[i] for changes in of_controls]) for i, one in enumerate(asked))


def _of_controls(
    model: HookedModel,
    behaviours: Sequence[Behaviour],
    asked: Sequence[Frozen],
    arms: Sequence[Arm],
    units: Selection,
    options: Mapping[str, Any],
    kept: "_Kept",
) -> list[Changes]:
    done = kept.load()
    if not arms:
        return done
    for arm in progress_bar(arms[len(done) :], initial=len(done), total=len(arms), desc="controls", unit="control"):
        with ablate(model, arm.ablated):
            after: Activations = read_activations(model, behaviours, units, **options)
        done.append([one.changes(arm, after) for one in asked])
        kept.save(done)
    return done


@dataclass(frozen=True)
class _Stored:
    fingerprint: str
    changes: list[Changes]


class _Kept:
    """The changes of finished controls, in one file that is replaced whole after each."""

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint

    def load(self) -> list[Changes]:
        if self.path is None or not self.path.is_file():
            return []
        stored = read_json(self.path, _Stored)
        return stored.changes if stored.fingerprint == self.fingerprint else []

    def save(self, changes: Sequence[Changes]) -> None:
        if self.path is not None:
            write_text(self.path, json.dumps({"fingerprint": self.fingerprint, "changes": changes}))


def _kept(
    folder: str | Path | None,
    model: HookedModel,
    data: Sequence[Behaviour],
    questions: Sequence[MutualInformationConfig],
    arms: Sequence[Arm],
    template: Template,
) -> _Kept:
    if folder is None:
        return _Kept(None, "")
    parts = [model_fingerprint(model), template, *map(str, questions), *(one.fingerprint for one in data)]
    for arm in arms:
        parts += [arm.ablated.fingerprint, arm.first_neurons.fingerprint, arm.second_neurons.fingerprint]
    digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    return _Kept(Path(folder) / "controls.json", digest)


def _check(
    model: HookedModel,
    behaviours: Sequence[Behaviour],
    questions: Sequence[MutualInformationConfig],
    arms: Sequence[Arm],
    calibration: Sequence[Behaviour],
) -> None:
    scored = frozenset[str]().union(
        *(one.prompt_hashes for arm in arms for one in (arm.first_neurons, arm.second_neurons, arm.ablated))
    )
    refuse_scored(model, behaviours, also=scored)
    names = [behaviour.name for behaviour in behaviours]
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"two behaviours or more are needed, each with a name of its own, got {names}")
    if calibration and not set(names[:2]) <= {one.name for one in calibration}:
        raise InputError(f"calibration must hold {names[:2]}, got {[one.name for one in calibration]}")
    overlap = set().union(*(one.prompts for one in behaviours)) & set().union(*(one.prompts for one in calibration))
    if overlap:
        raise InputError(f"{len(overlap)} calibration prompts are test prompts too, among them {min(overlap)[:60]!r}")
    for question in questions:
        refuse_few(question, len(distinct(behaviours)))
    for arm in arms:
        for read_, which in ((arm.first_neurons, "first_neurons"), (arm.second_neurons, "second_neurons")):
            if any(site.unit != "neuron" for site in read_.units):
                raise InputError(f"{which} must hold neurons, got {read_!r}")
        for question in questions:
            both = arm.first_neurons & arm.second_neurons
            if question.estimand == "subset_mi" and (arm.ablated.shapes != both.shapes or len(arm.ablated - both)):
                raise InputError("subset_mi silences neurons that both reads hold; choose reads that hold `ablated`")
