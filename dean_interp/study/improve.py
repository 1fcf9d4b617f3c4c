"""From two data sets to an edit that raises both behaviours, and its proof, in ten steps.

On prompts that score (`study.choosing`):
1. Score the gain of every neuron for both margins, and its damage to general text (`selection.gains`).
2. Turn them into gates in closed form (`selection.gating`).
On prompts that choose:
3. Find the largest dose whose KL on general text is within the budget (`study.dosing`).
4. Measure margins at some doses, and say how much of the predicted rise is fit and how much is curvature.
5. Make the nulls: choose anew with safe and unsafe flipped by whole topics, each flip beside its complement; and put
   the edit's own changes at random neurons. All get the edit's KL.
On prompts that confirm, which no earlier step may open:
6. Measure the nulls, and state what can be detected.
7. Measure the edit and its opposite.
8. Ask the original and the edit for answers.
9. Where the paper's rule stands beside the edit: estimate mutual information before and under both.
10. Decide by conditions that were fixed beforehand (`study.confirmation`).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dean_interp.data.examples import Behaviour
from dean_interp.editing.ablation import gated
from dean_interp.editing.apply import apply_edit, create_gates_edit, revert_edit
from dean_interp.evaluation.measure import measure
from dean_interp.evaluation.outcomes import clusters_of
from dean_interp.files import write_json
from dean_interp.information.shifts import MutualInformation
from dean_interp.models.load import HookedModel, model_fingerprint
from dean_interp.models.sizes import neuron_counts
from dean_interp.models.threads import chosen_threads
from dean_interp.models.tokens import Template
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.selection.gates import Gates
from dean_interp.statistics import Interval, smallest_rank_p
from dean_interp.study import day
from dean_interp.study.choosing import Chosen, choose, gates_store
from dean_interp.study.conclusions import SIGNIFICANT, state_results
from dean_interp.study.confirmation import Condition, SignTest, conditions, headline, sign_test
from dean_interp.study.confirming import Confirmed, confirm, information_of
from dean_interp.study.dosing import kl_interval
from dean_interp.study.improve_data import ImproveData, earlier_confirmations, improve_data
from dean_interp.study.improvement import (
    EDIT_FILE,
    GATES_FILE,
    ChangedNeuron,
    EarlierConfirmation,
    ImproveConfig,
    Improvement,
    load_improvement,
)
from dean_interp.study.preflight import refuse_silent
from dean_interp.study.results import RESULTS_FILE, StateResults
from dean_interp.study.roles import RoleCount, Roles
from dean_interp.study.run_folder import THREADS, Clock, note_checksums, owned
from dean_interp.study.run_units import strongest_changes
from dean_interp.study.shown import shown_answers
from dean_interp.study.state_outcomes import measurement_plan

log = logging.getLogger(__name__)
N_NEURONS = 12
"""Neurons that the report names."""
BEGUN = ("choose/states/*.safetensors", "confirm/states/*", RESULTS_FILE)
"""Files from which on a run keeps its settings. Before that a budget that cannot be reached may be lowered in the same
folder: scores and KL say themselves what they are of."""


@own_torch_settings()
def run_improve(config: ImproveConfig, folder: str | Path) -> Improvement:
    """Find an edit that raises both behaviours, confirm it, and write all of it into a folder, or go on there.

    The folder gets `gates.safetensors` and `edit.safetensors` (the edit), `results.json`, and all that was measured.

    Raises:
        InputError: anything wrong with the model or the data, before any long work: a set without pairs, too few topics
            for three roles, sets that share prompts; a KL that cannot be reached; no neuron that raises both.
    """
    config.check()
    if 0 < config.n_flips and smallest_rank_p(config.n_flips) > SIGNIFICANT:
        log.warning("%d gates of flipped labels are too few to confirm an edit: 20 are enough", config.n_flips)
    folder = Path(folder)
    config = replace(config, model=day.of_run(config.model, folder))
    data = improve_data(config)
    if not (folder / RESULTS_FILE).is_file():
        refuse_silent(config.answers)
    with owned(folder, config, data.all, begun=BEGUN):
        path = folder / RESULTS_FILE
        if not path.is_file():
            clock = Clock(folder / "times.json")
            model = config.model.load()
            with chosen_threads(model, folder / THREADS):
                write_json(path, improved(folder, model, config=config, data=data, clock=clock))
        note_checksums(folder)
        return load_improvement(folder)


def improved(folder: Path, model: HookedModel, config: ImproveConfig, data: ImproveData, clock: Clock) -> Improvement:
    """All ten steps. What is not in the folder yet is made and written there."""
    # The plan opens no prompt: it comes first so that a judge or a text that does not exist is told now.
    store = gates_store(folder / "confirm", model, config=config, tests=data.confirming, others=data.others)
    plan = measurement_plan(store, data.prompts, config.answers, model, progress=None)
    clock.lap("load")
    chosen = choose(folder, model, config=config, scoring=data.scoring, choosing=data.choosing, clock=clock)
    chosen.gates.save(folder / GATES_FILE)
    earlier = earlier_confirmations(folder, data)
    rounding_kl = write_edit(
        folder, model, gates=chosen.gates, general=data.general.choose, template=config.model.template
    )
    clock.lap("edit file")
    confirmed = confirm(folder, model, config=config, chosen=chosen, plan=plan)
    clock.lap("confirming")
    information = information_of(chosen, confirmed)
    clock.lap("mutual information")
    return _improvement(
        model,
        config,
        data=data,
        chosen=chosen,
        confirmed=confirmed,
        earlier=earlier,
        rounding_kl=rounding_kl,
        information=information,
    )


def write_edit(folder: Path, model: HookedModel, gates: Gates, general: Behaviour, template: Template) -> float:
    """Write `edit.safetensors`, and return the KL that rounding its numbers to the checkpoint's format costs.

    It is between the model under the gates by hooks and the model with the edit in its weights, on the general text
    that chose the dose, nats per answer token; 0 where nothing is rounded.
    """
    edit = create_gates_edit(model, gates)
    edit.save(folder / EDIT_FILE)
    if edit.equals_hooks:
        return 0.0
    with gated(model, gates):
        by_hooks = measure(model, [general], template=template)
    apply_edit(model, edit)
    try:
        return measure(model, [general], template=template, original=by_hooks)[general.name].mean_kl
    finally:
        revert_edit(model, edit)


def _improvement(
    model: HookedModel,
    config: ImproveConfig,
    data: ImproveData,
    chosen: Chosen,
    confirmed: Confirmed,
    *,
    earlier: tuple[EarlierConfirmation, ...],
    rounding_kl: float,
    information: Mapping[str, tuple[MutualInformation, ...]],
) -> Improvement:
    """Step 10: the decision, and all that it rests on, as a record."""
    original, edit = confirmed.original, confirmed.edit
    names = [roles.score.name for roles in data.roles[:2]]
    states = [state_results(original, edit, confirmed.flips, confirmed.design)]
    states += [state_results(original, other) for other in confirmed.others]
    signs, met = _decided(confirmed, states[0], names, data)
    unchanged = state_results(original, original)
    general = data.general.confirm
    kl = kl_interval(edit.measurement[general.name], clusters_of(general))
    return Improvement(
        config=config,
        model_fingerprint=model_fingerprint(model),
        n_layers=len(model.blocks),
        d_mlp=max(neuron_counts(model)),
        roles=tuple(map(_role_count, data.roles)),
        preference=chosen.preference,
        n_changed=len(chosen.gates),
        largest_change=chosen.gates.largest_change,
        dose=chosen.dose,
        predictions=chosen.predictions,
        curve=chosen.curve,
        neurons=_strongest(chosen),
        design=confirmed.design,
        original=unchanged,
        states=tuple(states),
        signs=signs,
        conditions=met,
        kl=kl,
        rounding_kl=rounding_kl,
        information=information,
        answers=shown_answers(confirmed.plan, [original, edit, *confirmed.paper]),
        earlier=earlier,
        headline=_headline(config, names, unchanged=unchanged, edit=states[0], met=met, kl=kl),
        n_neurons=sum(neuron_counts(model)),
    )


def _headline(
    config: ImproveConfig,
    names: Sequence[str],
    unchanged: StateResults,
    edit: StateResults,
    met: Sequence[Condition],
    kl: Interval,
) -> str:
    change = {name: edit.change[name] for name in names}
    perplexity = (unchanged.perplexity, edit.perplexity)
    return headline(met, change, kl=kl, max_kl=config.max_kl, perplexity=perplexity)


def _decided(
    confirmed: Confirmed, edit: StateResults, names: Sequence[str], data: ImproveData
) -> tuple[tuple[SignTest, ...], tuple[Condition, ...]]:
    """The sign tests and the conditions; none without flips, since then nothing is confirmed."""
    if not confirmed.flips:
        return (), ()
    signs = []
    for name in names:
        sign = sign_test(
            confirmed.original,
            confirmed.edit,
            opposite=confirmed.opposite,
            flips=confirmed.flips,
            behaviour=name,
        )
        signs.append(sign)
    register = data.register.name if data.register else None
    answers = confirmed.original.answers
    answered = tuple(next(iter(answers.verdicts.values()))) if answers else ()
    return tuple(signs), conditions(edit.lines, names, signs, register=register, answered=answered)


def _role_count(roles: Roles) -> RoleCount:
    parts = {"score": roles.score, "choose": roles.choose, "confirm": roles.confirm}
    n_examples, n_topics = {}, {}
    for role, part in parts.items():
        n_examples[role] = len(part)
        n_topics[role] = len(set(clusters_of(part)))
    return RoleCount(
        name=roles.score.name,
        divided_by=roles.divided_by,
        n_examples=n_examples,
        n_topics=n_topics,
        n_left_out=roles.n_left_out,
    )


def _strongest(chosen: Chosen) -> tuple[ChangedNeuron, ...]:
    """The neurons that the report names."""
    direction = chosen.direction
    changes = strongest_changes(chosen.gates, direction.first, direction.second, direction.damage, n_neurons=N_NEURONS)
    return tuple(changed for _, changed in changes)
