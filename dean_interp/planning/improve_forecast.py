"""What `improve` would take, step by step, from the model's configuration and tokenizer alone: no weight is read."""

from collections.abc import Sequence

from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.matrices import neuron_sites
from dean_interp.models.tokens import Row
from dean_interp.planning.costs import forecast_of, placed_model
from dean_interp.planning.estimates import estimates_of
from dean_interp.planning.forecast import Forecast
from dean_interp.planning.memory import GIB
from dean_interp.planning.placement import Devices
from dean_interp.planning.site_sums import site_bytes
from dean_interp.planning.work import Amounts, StepWork, WorkCounter, added, repeated
from dean_interp.scoring.preparation import ScoringConfig, prepare
from dean_interp.study.choosing import CURVE
from dean_interp.study.improve_data import ImproveData, improve_data
from dean_interp.study.improvement import ImproveConfig
from dean_interp.study.settings import INFORMATION_FRACTION

DOSE_TRIES = 3
"""Doses that a search for a KL measures, as on the demo model."""
NOT_COUNTED = "loading, gates, judges, windows of text and tasks are"


def forecast_improve(config: ImproveConfig, devices: Devices = Devices()) -> Forecast:  # noqa: B008 - frozen
    """What `run_improve` would take with these settings, by the steps of its `times.json`.

    Raises:
        InputError: as `run_improve` for settings and data, as `load_model` for the name; devices out of range, or too
            small for one batch.
    """
    config.check()
    data = improve_data(config)

    def scored_rows(model: HookedModel) -> list[Sequence[Row]]:
        scoring = ScoringConfig(template=config.model.template, target="margin")
        return [prepare(model, behaviour, scoring).rows for behaviour in data.scoring[:2]]

    placed = placed_model(config.model, devices, scored_rows, config.score_tokens)
    command = placed.placement.command.replace("dean-interp run", "dean-interp improve")
    return forecast_of(
        placed,
        improve_works(placed.model, config, data),
        command=command,
        not_counted=NOT_COUNTED,
        writes=True,
    )


def improve_works(model: HookedModel, config: ImproveConfig, data: ImproveData) -> list[StepWork]:
    """What each step of `run_improve` sends through the model."""
    counter = improve_counter(model, config)
    original = counter.measured(data.choosing[2:])
    general = counter.measured(data.choosing[2:], with_kl=True)
    n_nulls = config.n_flips + config.n_random
    paper = counter.scored(data.scoring[:3], "neurons") if config.paper_rule else {}
    amounts = {
        "gains, damage and gates": gains_amounts(counter, data),
        "dose": added(original, repeated(general, DOSE_TRIES)),
        "margins by dose, and predictions": _margins_by_dose(counter, data),
        "doses of nulls": repeated(general, n_nulls),
        # The paper's scores are made before the edit is written.
        "edit file": paper,
        "confirming": _confirming(counter, config, data),
    }
    sums = _sums_gib(model, config)
    works = []
    for step, of_step in amounts.items():
        scores = "neurons" in of_step
        works.append(StepWork(step, of_step, sums_gib=sums if scores else 0.0))
    if config.paper_rule:
        # Under the edit and under the rule, between the neurons that the rule finds.
        estimates = estimates_of(model, data.confirming, INFORMATION_FRACTION, n_edits=2, n_controls=n_nulls)
        works.append(StepWork("mutual information", estimates=estimates))
    return works


def improve_counter(model: HookedModel, config: ImproveConfig) -> WorkCounter:
    """Counts passes as `improve` makes them."""
    return WorkCounter(
        model=model,
        template=config.model.template,
        score_tokens=config.score_tokens,
        data=config.data,
        answers=config.answers,
    )


def gains_amounts(counter: WorkCounter, data: ImproveData) -> Amounts:
    """Gains of both behaviours and of the register set, where there is one, and damage to general text."""
    first, second, general, *register = data.scoring
    return added(
        counter.scored([first, second, *register], "neurons", target="margin"),
        counter.scored([general], "neurons", target="fisher"),
    )


def full_state(counter: WorkCounter, data: ImproveData, *, with_kl: bool = True) -> Amounts:
    """One state on confirming prompts and on the register set, with its answers."""
    return added(
        counter.state(data.confirming, with_kl=with_kl),
        counter.measured(data.others),
        counter.answered(data.prompts.all),
    )


def _margins_by_dose(counter: WorkCounter, data: ImproveData) -> Amounts:
    """Margins at some doses and of the original, and gains on the choosing prompts. The KL at the dose is known."""
    paired, general = data.choosing[:2], data.choosing[2:]
    n_doses = len(CURVE)
    return added(
        repeated(counter.measured(paired), 1 + n_doses),
        repeated(counter.measured(general, with_kl=True), n_doses - 1),
        counter.scored(paired, "neurons", target="margin"),
    )


def _confirming(counter: WorkCounter, config: ImproveConfig, data: ImproveData) -> Amounts:
    """The original and the edit in full, some flips too, and the paper's rule; the other nulls and the opposite."""
    n_answering = config.answers.n_answer_controls
    n_full = 1 + n_answering + int(config.paper_rule)
    n_others = 1 + config.n_flips - n_answering + config.n_random
    return added(
        full_state(counter, data, with_kl=False),
        repeated(full_state(counter, data), n_full),
        repeated(counter.state(data.confirming), n_others),
    )


def _sums_gib(model: HookedModel, config: ImproveConfig) -> float:
    """Running sums of damage, where each example is a group: the largest of all."""
    n_bytes = sum(site_bytes(model, site, config.n_score) for site in neuron_sites(model))
    return n_bytes / GIB
