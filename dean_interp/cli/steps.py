"""What each step of the command does: arguments in, files written, a record and a text out."""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any

from dean_interp.cli.arguments import (
    Ablate,
    Couple,
    Evaluate,
    Information,
    PlanStudy,
    Report,
    Run,
    RunSweep,
    Score,
    Step,
    Verify,
)
from dean_interp.cli.circuits import CircuitStep, NeuronStep, show_circuit, show_neuron
from dean_interp.cli.data import DataStep, data_action
from dean_interp.cli.edits import EditStep, edit_action
from dean_interp.data.examples import Behaviour, load_behaviour
from dean_interp.editing.ablation import ablate
from dean_interp.editing.values import Scale, Zero
from dean_interp.errors import InputError
from dean_interp.evaluation.judges.lexical import judge_name, lexical_labels
from dean_interp.files import check_writable, write_text
from dean_interp.models.generate import generate
from dean_interp.models.load import HookedModel, model_fingerprint
from dean_interp.progress import progress_bar
from dean_interp.report.html import write_comparison, write_report, write_sweep_report
from dean_interp.resume import Unfinished, discard
from dean_interp.scoring import methods
from dean_interp.scoring.importance import ScoringConfig, importance
from dean_interp.scoring.plan import plan
from dean_interp.scoring.scores import Scores, load_scores, refuse_keep
from dean_interp.selection.controls import random_like, strata
from dean_interp.selection.coupling import coupling, refuse_empty
from dean_interp.selection.expression import select_each
from dean_interp.selection.selection import Selection, load_selection, top_count, top_fraction
from dean_interp.study.comparison import information_change
from dean_interp.study.config import StudyConfig
from dean_interp.study.evaluation import evaluate_edit, said_of
from dean_interp.study.folder import locked
from dean_interp.study.forecast import forecast
from dean_interp.study.results import load_results
from dean_interp.study.run import run_study
from dean_interp.study.states import States, disjoint_neurons
from dean_interp.study.sweep import run_sweep, sweep_headline
from dean_interp.study.verify import verify_run


@dataclass(frozen=True)
class Said:
    """What a step tells its user, for programs and for people."""

    record: dict[str, Any]
    text: str
    holds: bool = True
    """False: the step did what it should, and what it looked at is not as it should be (exit code 1)."""


def do(step: Step) -> Said:
    """Do one step. Raises `InputError` for what its user can put right."""
    return _do(step)


@singledispatch
def _do(step: object) -> Said:
    raise TypeError(f"no step of the command: {step!r}")


@_do.register
def _(step: Score) -> Said:
    check_writable(step.out)
    refuse_keep(step.keep)
    behaviour = load_behaviour(step.behaviour, n_examples=step.n_examples, seed=step.seed, response=step.response)
    how = ScoringConfig(
        template=step.model.template,
        target=step.target,
        signed=step.signed,
        modules=step.modules,
        max_tokens=step.max_tokens,
        batch_tokens=step.batch_tokens,
    )
    model = step.model.loaded()
    if step.method == "importance" and (step.dry_run or step.batch_tokens is None):
        planned = plan(model, behaviour, unit=step.unit, config=how)
        if step.dry_run:
            return Said(dataclasses.asdict(planned), str(planned))
        how = planned.apply(how)
    elif step.dry_run:
        raise InputError(f"--dry-run plans the method 'importance', got {step.method!r}")
    unfinished = step.out.with_suffix(".unfinished")
    scores = _scored(model, behaviour, step, how, unfinished)
    scores.save(step.out, keep=step.keep)
    discard(unfinished)
    loss = float(scores.loss.mean()) if len(scores.loss) else None
    record = {"out": str(step.out), "behaviour": behaviour.name, "units": list(scores.units), "mean_loss_nats": loss,
              "fingerprint": scores.fingerprint, **scores.facts}  # fmt: skip
    lines = [repr(scores), f"mean loss {loss:.3f} nats per token" if loss is not None else "no example was looked at"]
    return Said(record, "\n".join([*lines, f"scores: {step.out.resolve()}"]))


def _scored(model: HookedModel, behaviour: Behaviour, step: Score, how: ScoringConfig, unfinished: Path) -> Scores:
    neurons_only, weights_only = ("integrated_gradients", "activation_contrast"), ("wanda",)
    if (step.method in neurons_only and step.unit != ("neuron",)) or (
        step.method in weights_only and step.unit != ("weight",)
    ):
        allowed = "neuron" if step.method in neurons_only else "weight"
        raise InputError(f"{step.method} scores one kind of unit: --unit {allowed}, got {' '.join(step.unit)}")
    match step.method:
        case "importance":
            return importance(model, behaviour, unit=step.unit, config=how, keep=step.keep, unfinished=unfinished)
        case "integrated_gradients":
            return methods.integrated_gradients(model, behaviour, config=how, unfinished=unfinished)
        case "wanda":
            return methods.wanda(model, behaviour, config=how, unfinished=unfinished)
        case "activation_contrast":
            return methods.activation_contrast(model, behaviour, config=how, unfinished=unfinished)
        case "magnitude":
            return methods.magnitude(model, behaviour, unit=step.unit, config=how)
        case "random":
            return methods.random(model, behaviour, unit=step.unit, seed=step.seed, config=how)


@_do.register
def _(step: Couple) -> Said:
    check_writable(step.out)
    scores = [load_scores(path).of(step.unit) for path in step.scores]
    names = [re.sub(r"\W", "_", one.behaviour) for one in scores]
    if len(set(names)) < len(names):
        raise InputError(f"every score file must be of another behaviour, got {', '.join(names)}")
    fractions = step.fraction * len(scores) if len(step.fraction) == 1 else step.fraction
    if len(fractions) != len(scores):
        raise InputError(f"--fraction takes one value, or one for each of {len(scores)} score files, got {fractions}")
    if step.expression is None and len(names) != 3:
        raise InputError(f"{len(names)} score files need an --expression; three do without: (first & second) - third")
    expression = step.expression or f"({names[0]} & {names[1]}) - {names[2]}"
    tops = {
        name: top_fraction(one, fraction, within=step.within)
        if step.count is None
        else top_count(one, step.count, within=step.within)
        for name, one, fraction in zip(names, scores, fractions, strict=True)
    }
    parts = select_each(expression, tops)
    sizes = {name: len(one) for name, one in {**tops, **parts}.items()}
    chosen = list(parts.values())[-1]
    if not len(chosen):
        if step.expression is None and step.count is None and step.within == "matrix":
            refuse_empty(coupling(*scores, fraction=(fractions[0], fractions[1], fractions[2])), *scores)
        raise InputError(f"no unit is in {expression!r} (sizes {sizes}): raise --fraction or --count")
    chosen.save(step.out)
    counts = {str(site): n for site, n in chosen.counts().items() if n}
    record = {"out": str(step.out), "unit": step.unit, "expression": expression, "sizes": sizes, "within": step.within,
              "selected_per_site": counts}  # fmt: skip
    record |= {"fractions": list(fractions)} if step.count is None else {"count": step.count}
    width = max(map(len, sizes))
    lines = "\n".join(f"{name:>{width}}  {n}" for name, n in sizes.items())
    return Said(record, f"{step.unit}s in each set:\n{lines}\nselection: {step.out.resolve()}")


@_do.register
def _(step: Ablate) -> Said:
    selection = load_selection(step.selection)
    if step.out:
        check_writable(step.out)
    prompts = step.prompts
    if not prompts:
        behaviour = load_behaviour(step.behaviour, n_examples=step.n_prompts, seed=step.seed, split="test")
        prompts = tuple(behaviour.prompts)
    model = step.model.loaded()
    options = {"max_new_tokens": step.max_new_tokens, "template": step.model.template, "batch_size": step.batch_size}
    how = f"alpha {step.alpha} at {step.positions} positions"
    key = f"{model_fingerprint(model)} {selection.fingerprint} {how} {prompts} {options}"
    kept = Unfinished(step.out.with_suffix(".unfinished"), key) if step.out else None
    before = generate(model, prompts, label="before", unfinished=kept.part("before") if kept else None, **options)
    value = Scale(step.alpha) if step.alpha else Zero()
    with ablate(model, selection, value=value, positions=step.positions):
        under = generate(model, prompts, label="under", unfinished=kept.part("under") if kept else None, **options)
    verdicts = lexical_labels(before), lexical_labels(under)
    rows = [
        {"prompt": prompt, "before": old, "under": new, "verdict_before": was, "verdict_under": now}
        for prompt, old, new, was, now in zip(prompts, before, under, *verdicts, strict=True)
    ]
    record = {"n_units": len(selection), "how": how, "judge": judge_name(), "answers": rows}
    if step.out and kept:
        write_text(step.out, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        kept.discard()
    return Said(record, "\n\n".join(
        f"{row['prompt']}\n  before ({row['verdict_before']}): {row['before']}\n"
        f"  under  ({row['verdict_under']}): {row['under']}" for row in rows
    ))  # fmt: skip


@_do.register
def _(step: Evaluate) -> Said:
    step.asked.check()
    with _measuring(step) as (states, ablated, _):
        found = evaluate_edit(states, ablated, step.asked, step.out)
    record = json.loads((step.out / "evaluation.json").read_text())
    return Said(record, said_of(found))


@_do.register
def _(step: Information) -> Said:
    if not step.tests.scores:
        raise InputError("information needs --scores, three files: the reads are the top neurons of the behaviours")
    with _measuring(step) as (states, ablated, reads):
        assert reads is not None
        found = information_change(states, ablated, lambda name: states.measured(name, ablated[name]), reads)
        record = {one.estimand: dataclasses.asdict(one) for one in found}
        write_text(step.out / "information.json", json.dumps(record, indent=1) + "\n")
    return Said(record, "\n\n".join(map(str, found)))


@_do.register
def _(step: DataStep) -> Said:
    return Said(*data_action(step.action))


@_do.register
def _(step: EditStep) -> Said:
    return Said(*edit_action(step.action))


@_do.register
def _(step: RunSweep) -> Said:
    sweep = run_sweep(step.sweep, step.out)
    report = write_sweep_report(sweep, step.out)
    front = [point.name for point in sweep.points if point.on_front]
    record = {"out": str(step.out), "headline": sweep_headline(sweep), "front": front, "report": str(report)}
    return Said(record, f"{sweep_headline(sweep)}\nreport: {report.resolve()}")


@_do.register
def _(step: NeuronStep) -> Said:
    return Said(*show_neuron(step))


@_do.register
def _(step: CircuitStep) -> Said:
    return Said(*show_circuit(step))


@_do.register
def _(step: PlanStudy) -> Said:
    found = forecast(step.study, step.devices)
    return Said(dataclasses.asdict(found), str(found))


@_do.register
def _(step: Run) -> Said:
    results = run_study(step.study, step.out)
    report = _report(step.out)
    headlines = {one.unit: one.headline for one in results.units}
    text = [f"{unit}s: {headline}" for unit, headline in headlines.items()]
    record = {"results": str(step.out / "results.json"), "report": str(report), "headlines": headlines}
    return Said(record, "\n".join([*text, f"report: {report.resolve()}"]))


@_do.register
def _(step: Verify) -> Said:
    found = verify_run(step.run, full=step.full)
    return Said({"holds": found.holds, **dataclasses.asdict(found)}, str(found), found.holds)


@_do.register
def _(step: Report) -> Said:
    if not step.folders:
        raise InputError("name at least one run folder")
    if len(step.folders) == 1 and step.out is None:
        report = _report(step.folders[0])
    else:
        runs = {str(folder): load_results(folder / "results.json") for folder in step.folders}
        report = write_comparison(runs, step.out or step.folders[0] / "comparison.html")
    return Said({"report": str(report)}, f"report: {report.resolve()}")


def _report(folder: Path) -> Path:
    return write_report(load_results(folder / "results.json"), folder)


@contextmanager
def _measuring(
    step: Evaluate | Information,
) -> Iterator[tuple[States, dict[str, Selection], tuple[Selection, Selection] | None]]:
    """The states of the model in `step.out`, what is silenced in each ablated one (the edit first), and the reads."""
    selection, asked = load_selection(step.selection), step.tests
    if len(asked.scores) not in (0, 3):
        raise InputError(f"--scores takes the files of first, second and general, got {len(asked.scores)}")
    scores = [load_scores(path) for path in asked.scores]
    config = StudyConfig(
        first=asked.first,
        second=asked.second,
        general=asked.general,
        n_test=asked.n_test,
        n_general_test=asked.n_general_test,
        answer_tokens=asked.answer_tokens,
        n_random=asked.n_random,
        information_fraction=asked.information_fraction,
        n_answers=0,
        seed=asked.seed,
        **dataclasses.asdict(step.model),
    )
    config.check()
    tests, _ = config.tests()
    with locked(step.out):
        model = step.model.loaded()
        ablated = {"edit": selection} | _controls(model, selection, scores, config)
        reads = disjoint_neurons(scores, config.information_fraction) if scores else None
        read = reads[0] | reads[1] if reads else None
        known = [model_fingerprint(model), *(one.fingerprint for one in (*tests, *scores)), str(config)]
        with progress_bar(total=1 + len(ablated), desc="states of the model", unit="state") as progress:
            yield States(config, step.out / "states", model, tests, read, known, progress), ablated, reads


def _controls(
    model: HookedModel, selection: Selection, scores: Sequence[Scores], config: StudyConfig
) -> dict[str, Selection]:
    if not scores:
        return {}
    site = next(iter(selection.shapes))
    matched = strata(model, [one.of(site.unit) for one in scores])
    return {
        f"random {i + 1}": random_like(selection, matched, seed=config.seed * 1000 + i) for i in range(config.n_random)
    }
