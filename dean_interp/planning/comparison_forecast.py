"""What comparing arms at equal damage would take (`analyses/frontier.py`): no weight is read."""

from collections.abc import Sequence

from dean_interp.arms.arm import Arm, Kind
from dean_interp.arms.comparison import ComparisonConfig
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.tokens import Row
from dean_interp.planning.costs import forecast_of, placed_model
from dean_interp.planning.forecast import Forecast
from dean_interp.planning.improve_forecast import DOSE_TRIES, full_state, gains_amounts, improve_counter
from dean_interp.planning.placement import Devices
from dean_interp.planning.work import Amounts, StepWork, WorkCounter, added, repeated
from dean_interp.scoring.preparation import ScoringConfig, prepare
from dean_interp.study.improve_data import ImproveData, improve_data

NOT_COUNTED = "loading, fits of arms without passes of their own, windows of text and further data are"


def forecast_comparison(
    config: ComparisonConfig,
    arms: Sequence[Arm],
    devices: Devices = Devices(),  # noqa: B008 - frozen
) -> Forecast:
    """What `compare_arms` would take with these settings, by the steps of its `times.json`.

    Raises `InputError` as `forecast_improve`.
    """
    config.check()
    study = config.study
    data = improve_data(study)

    def scored_rows(model: HookedModel) -> list[Sequence[Row]]:
        scoring = ScoringConfig(template=study.model.template, target="margin")
        return [prepare(model, behaviour, scoring).rows for behaviour in data.scoring[:2]]

    placed = placed_model(study.model, devices, scored_rows, study.score_tokens)
    works = comparison_works(placed.model, config, data, arms)
    return forecast_of(placed, works, command="python analyses/frontier.py", not_counted=NOT_COUNTED)


def comparison_works(
    model: HookedModel, config: ComparisonConfig, data: ImproveData, arms: Sequence[Arm]
) -> list[StepWork]:
    """What the original with the shared scores, and the arms, send through the model."""
    counter = improve_counter(model, config.study)
    shared = added(
        counter.state(data.choosing, with_kl=False),
        full_state(counter, data, with_kl=False),
        gains_amounts(counter, data),
        counter.scored(data.scoring[:3], "neurons"),
    )
    parts = [_arm(counter, config, data, arm) for arm in arms]
    parts.append(_nulls(counter, config, data, arms))
    return [
        StepWork("original and shared scores", shared),
        StepWork("arms", added(*parts)),
    ]


def _arm(counter: WorkCounter, config: ComparisonConfig, data: ImproveData, arm: Arm) -> Amounts:
    """Trials on choosing prompts, a search for the dose of each KL, and a measurement at each of these doses."""
    general = counter.measured(data.choosing[2:], with_kl=True)
    margins = counter.measured(data.choosing[:2])
    confirmed = counter.state(data.confirming)
    in_full = added(counter.measured(data.others), counter.answered(data.prompts.all))
    fit = _fit(counter, data, arm)
    # A prompt has one dose, whatever the KL.
    if arm.kind == "prompt":
        return added(fit, general, confirmed, in_full)
    n_trials = config.n_choices if arm.choices else 0
    trial = added(fit, repeated(general, DOSE_TRIES), margins)
    return added(
        repeated(trial, n_trials),
        fit if not n_trials else {},
        repeated(general, DOSE_TRIES * len(config.kls)),
        repeated(confirmed, len(config.kls)),
        in_full,
    )


def _nulls(counter: WorkCounter, config: ComparisonConfig, data: ImproveData, arms: Sequence[Arm]) -> Amounts:
    """Flips of the best arm of each kind that knows labels and chooses something."""
    best: dict[Kind, Arm] = {}
    for arm in arms:
        if arm.uses_labels and arm.choices:
            best[arm.kind] = arm
    # A flip is fitted, brought to the arm's KL, and measured.
    general = counter.measured(data.choosing[2:], with_kl=True)
    dosed = repeated(general, DOSE_TRIES)
    parts = []
    for kind, arm in best.items():
        null = added(_fit(counter, data, arm), dosed, counter.state(data.confirming))
        parts.append(repeated(null, config.n_flips_of(kind)))
    return added(*parts)


def _fit(counter: WorkCounter, data: ImproveData, arm: Arm) -> Amounts:
    """The passes that an arm makes of its own: training goes forward and back, with the gradients of its adapter."""
    if arm.kind != "fine-tuning":
        return {}
    return counter.scored(data.scoring[:2], "neurons", target="margin")
