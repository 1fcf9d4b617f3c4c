"""`dean-interp score` and `couple`: how much each unit matters to a behaviour, and which units are chosen."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

from dean_interp.cli.step_result import StepResult
from dean_interp.data.examples import Behaviour, ResponseKind, load_behaviour
from dean_interp.errors import InputError, refuse_below
from dean_interp.files import check_writable
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Modules, Unit
from dean_interp.planning.scoring import plan
from dean_interp.resume import discard
from dean_interp.scoring import methods
from dean_interp.scoring.importance import importance
from dean_interp.scoring.integrated_gradients import integrated_gradients
from dean_interp.scoring.preparation import ScoringConfig, Target
from dean_interp.scoring.scores import KEPT_FRACTION, Scores, load_scores, refuse_keep
from dean_interp.selection.coupling import couple, refuse_empty
from dean_interp.selection.expression import select_each
from dean_interp.selection.selection import Selection, Within, top_count, top_fraction
from dean_interp.selection.whole_experts import top_experts
from dean_interp.study import day
from dean_interp.study.settings import FRACTION, CalibrationConfig, DataConfig, ModelConfig

ScoringMethod = Literal["importance", "integrated_gradients", "wanda", "activation_contrast", "magnitude", "random"]
ONLY_UNIT: dict[ScoringMethod, Unit] = {
    "integrated_gradients": "neuron",
    "activation_contrast": "neuron",
    "wanda": "weight",
}
"""The methods that score one kind of unit."""


@dataclass(frozen=True)
class ScoreUnits:
    """Score every unit for one behaviour. A killed command goes on from the last finished batch."""

    behaviour: Positional[str]
    """Behaviour to score for: a built-in name, a CSV or JSONL file, or a hub data set."""
    out: Path
    """Score file to write."""
    unit: tuple[Unit, ...] = ("neuron",)
    """Kinds of units to score: MLP neurons, single MLP weights, or both in one pass."""
    n_calibration: int = CalibrationConfig.n_calibration
    """Number of examples that are scored, from the calibration split."""
    response: ResponseKind = CalibrationConfig.response
    """Which of the two answers is scored."""
    seed: int = DataConfig.seed
    """Seed for sampling examples, and for the method `random`."""
    method: ScoringMethod = "importance"
    """How units are scored: `importance` is DEAN's method, by gradients; the others are other notions of importance."""
    target: Target = "response"
    """What the gradient is taken of: the loss of the scored answer, or the margin between safe and unsafe answer."""
    signed: bool = False
    """Keep the sign of each score instead of its absolute value."""
    modules: Modules = "mlp"
    """Which matrices' weights are scored: those of the MLPs, of attention, both (all), or of a mixture's routers."""
    max_tokens: int | None = None
    """Number of tokens that a text may have; longer answers are cut. Unset: texts beyond the context are refused."""
    score_tokens: int | None = None
    """Number of padded tokens a batch. Unset: 512 on the CPU, 4096 elsewhere, and fewer where memory is short."""
    keep: float = KEPT_FRACTION
    """Top fraction of each matrix's weights whose scores the file keeps; 1 keeps all. Neurons are always kept."""
    dry_run: bool = False
    """Print the memory, time and batches that scoring will take, and stop."""
    model: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class CoupleUnits:
    """Select units by set algebra over the top units of several behaviours.

    Three score files without an expression give the coupled units: important to the first two behaviours, and not to
    the third.
    """

    scores: Positional[tuple[Path, ...]]
    """Score files. An expression calls each by its behaviour's name; letters that a name cannot hold become _."""
    out: Path
    """Selection file to write."""
    expression: str | None = None
    """What to select: behaviours, &, |, - and parentheses. Unset, with three files: (first & second) - third."""
    unit: Unit = "neuron"
    """Kind of unit to select."""
    fraction: tuple[float, ...] = ()
    """Top fraction that counts as important, one or one a score file. Unset: 0.01 of neurons, 0.0001 of weights."""
    count: int | None = None
    """Number of units that count as important, in place of a fraction."""
    within: Within = "matrix"
    """Which units are ranked together: those of one matrix (or layer of neurons), of one layer, or of the model."""
    whole_experts: bool = False
    """In a mixture: rank whole experts by the sum over their neurons. --fraction is then of each layer's experts."""


def do_score(step: ScoreUnits) -> StepResult:
    """Score the units and write the file, or say what that will take."""
    refuse_below(step, {"n_calibration": 1, "max_tokens": 1, "score_tokens": 1, "seed": 0})
    check_writable(step.out)
    refuse_keep(step.keep)
    _refuse_method(step)
    behaviour = load_behaviour(step.behaviour, n_examples=step.n_calibration, seed=step.seed, response=step.response)
    config = ScoringConfig(
        template=step.model.template,
        target=step.target,
        signed=step.signed,
        modules=step.modules,
        max_tokens=step.max_tokens,
        batch_tokens=step.score_tokens,
    )
    model = step.model.load()
    # The plan finds the batches and passes that fit, where the user left them open.
    if step.method == "importance" and (step.dry_run or step.score_tokens is None):
        scoring_plan = plan(model, behaviour, unit=step.unit, config=config)
        if step.dry_run:
            return StepResult(dataclasses.asdict(scoring_plan), str(scoring_plan))
        config = scoring_plan.apply(config)
    unfinished = step.out.with_suffix(".unfinished")
    scores = _scores(step, model, behaviour, config, unfinished)
    scores.save(step.out, keep=step.keep)
    discard(unfinished)
    return _scored(step.out, scores)


def _refuse_method(step: ScoreUnits) -> None:
    allowed = ONLY_UNIT.get(step.method)
    if allowed and step.unit != (allowed,):
        raise InputError(f"{step.method} scores one kind of unit: --unit {allowed}, got {' '.join(step.unit)}")
    if step.dry_run and step.method != "importance":
        raise InputError(f"--dry-run plans the method 'importance', got {step.method!r}")


def _scores(
    step: ScoreUnits, model: HookedModel, behaviour: Behaviour, config: ScoringConfig, unfinished: Path
) -> Scores:
    match step.method:
        case "importance":
            return importance(model, behaviour, unit=step.unit, config=config, keep=step.keep, unfinished=unfinished)
        case "integrated_gradients":
            return integrated_gradients(model, behaviour, config=config, unfinished=unfinished)
        case "wanda":
            return methods.wanda(model, behaviour, config=config, unfinished=unfinished)
        case "activation_contrast":
            return methods.activation_contrast(model, behaviour, config=config, unfinished=unfinished)
        case "magnitude":
            return methods.magnitude(model, behaviour, unit=step.unit, config=config)
        case "random":
            return methods.random(model, behaviour, unit=step.unit, seed=step.seed, config=config)


def _scored(path: Path, scores: Scores) -> StepResult:
    # `magnitude` and `random` look at no example, so that they have no loss.
    loss = float(scores.loss.mean()) if len(scores.loss) else None
    record = {
        "out": str(path),
        "behaviour": scores.behaviour,
        "units": list(scores.units),
        "mean_loss_nats": loss,
        "fingerprint": scores.fingerprint,
        **scores.facts,
    }
    loss_text = "no example was looked at" if loss is None else f"mean loss {loss:.3f} nats per token"
    return StepResult(record, f"{scores!r}\n{loss_text}\nscores: {path.resolve()}")


def do_couple(step: CoupleUnits) -> StepResult:
    """Select the units and write the file."""
    check_writable(step.out)
    scores = [load_scores(path).of(step.unit) for path in step.scores]
    day.warn_of_days(scores)
    names = _names(scores)
    if step.expression is None and len(names) != 3:
        raise InputError(f"{len(names)} score files need an --expression; three do without: (first & second) - third")
    expression = step.expression or f"({names[0]} & {names[1]}) - {names[2]}"

    # The top of each behaviour, then every part of the expression; the last part is the whole.
    fractions = _fractions(step)
    tops: dict[str, Selection] = {}
    for name, behaviour_scores, fraction in zip(names, scores, fractions, strict=True):
        tops[name] = _top(behaviour_scores, fraction, step)
    parts = select_each(expression, tops)
    sizes = {name: len(selection) for name, selection in {**tops, **parts}.items()}
    selection = list(parts.values())[-1]

    if not len(selection):
        if step.expression is None and step.count is None and step.within == "matrix" and not step.whole_experts:
            # The plain case can say which fraction would give a unit.
            refuse_empty(couple(*scores, fraction=(fractions[0], fractions[1], fractions[2])), *scores)
        raise InputError(f"no unit is in {expression!r} (sizes {sizes}): raise --fraction or --count")
    selection.save(step.out)
    size_option = {"fractions": list(fractions)} if step.count is None else {"count": step.count}
    record = {
        "out": str(step.out),
        "unit": step.unit,
        "expression": expression,
        "sizes": sizes,
        "within": step.within,
        **({"whole_experts": True} if step.whole_experts else {}),
        "selected_per_site": {str(site): n for site, n in selection.counts().items() if n},
        **size_option,
    }
    width = max(map(len, sizes))
    lines = "\n".join(f"{name:>{width}}  {n}" for name, n in sizes.items())
    return StepResult(record, f"{step.unit}s in each set:\n{lines}\nselection: {step.out.resolve()}")


def _top(scores: Scores, fraction: float, step: CoupleUnits) -> Selection:
    """The units of one behaviour that count as important."""
    if step.whole_experts:
        if step.count is not None or step.unit != "neuron" or step.within != "matrix":
            raise InputError("--whole-experts takes a --fraction of the experts of each layer, and no other size")
        return top_experts(scores, fraction)
    if step.count is None:
        return top_fraction(scores, fraction, within=step.within)
    return top_count(scores, step.count, within=step.within)


def _names(scores: Sequence[Scores]) -> list[str]:
    """What an expression calls each score file."""
    names = [re.sub(r"\W", "_", behaviour_scores.behaviour) for behaviour_scores in scores]
    if len(set(names)) < len(names):
        raise InputError(f"every score file must be of another behaviour, got {', '.join(names)}")
    return names


def _fractions(step: CoupleUnits) -> tuple[float, ...]:
    """The top fraction of each score file."""
    if step.fraction and step.count is not None:
        raise InputError(f"give --fraction or --count, not both; got {step.fraction} and {step.count}")
    given = step.fraction or (FRACTION[step.unit],)
    n_files = len(step.scores)
    fractions = given * n_files if len(given) == 1 else given
    if len(fractions) != n_files:
        raise InputError(f"--fraction takes one value, or one for each of {n_files} score files, got {fractions}")
    return fractions
