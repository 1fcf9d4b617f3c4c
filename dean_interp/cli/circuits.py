"""`dean-interp neuron` and `dean-interp circuit`: a look at one neuron, and at what feeds a set of neurons."""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from tyro.conf import OmitArgPrefixes, Positional

from dean_interp.cli.step_result import StepResult
from dean_interp.data.examples import load_behaviour
from dean_interp.errors import InputError, refuse_below
from dean_interp.files import check_writable
from dean_interp.models.neuron_names import neuron_of, parse_name
from dean_interp.report.circuit_page import circuit_page
from dean_interp.report.html import options_of
from dean_interp.report.neuron_page import neuron_page
from dean_interp.scoring.scores import Scores, load_scores
from dean_interp.selection.selection import Selection, load_selection
from dean_interp.study.config import StudyConfig
from dean_interp.study.improvement import ImproveConfig, is_improvement
from dean_interp.study.run_folder import begun_with
from dean_interp.study.settings import DataConfig, ModelConfig


@dataclass(frozen=True)
class ShowNeuron:
    """Show one neuron: where it fires, what it writes, its ranks, and what happens when it alone is silenced."""

    neuron: Positional[str]
    """Layer and index of the neuron: L17.1042; in a mixture L17.E5.42 (neuron 42 of expert 5) or L17.shared.42."""
    run: Path | None = None
    """Run folder of `run` or of `improve`, from which model, behaviours, scores and selections are taken. The scores of
    `improve` are shown as gains and damage."""
    behaviours: tuple[str, ...] = (DataConfig.first, DataConfig.second, DataConfig.general)
    """Behaviours on whose test examples the neuron is read and measured: built-in names, files, or published sets."""
    n_test: int = DataConfig.n_test
    """Number of test examples of each behaviour."""
    n_texts: int = 8
    """Number of texts to show: those on which the neuron fires most."""
    answer_tokens: int | None = DataConfig.answer_tokens
    """Number of first tokens of each answer that are measured with the neuron silenced (None: all)."""
    scores: tuple[Path, ...] = ()
    """Score files, for the neuron's score and rank in each behaviour. Those of `--run` are added."""
    selections: tuple[Path, ...] = ()
    """Selection files; the page says which of them hold the neuron. Those of `--run` are added."""
    seed: int = DataConfig.seed
    """Seed for sampling examples."""
    out: Path | None = None
    """Page to write. Unset: neurons/NAME.html."""
    model: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class ShowCircuit:
    """Show what feeds the selected neurons on one example, what they feed, and how far to believe the attribution."""

    selection: Positional[Path]
    """Selection file, of neurons."""
    behaviour: str = "privacy"
    """Behaviour with safe and unsafe answers, whose test example is taken."""
    example: int = 0
    """Number of the test example, from 0."""
    n_targets: int = 10
    """Number of selected neurons (each at one token) to show: those with the largest effect on the margin."""
    n_sources: int = 8
    """Number of largest sources to show for each of them."""
    n_checked: int = 32
    """Number of largest edges into the set that are measured by intervention, beside as many random edges."""
    answer_tokens: int | None = DataConfig.answer_tokens
    """Number of first tokens of both answers that are measured (None: all)."""
    seed: int = DataConfig.seed
    """Seed for sampling the random edges."""
    out: Path = Path("circuits/circuit.html")
    """Page to write."""
    model: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)


def do_circuit(step: ShowCircuit) -> StepResult:
    """Trace the circuit and write its page. Raises `InputError` for what can be put right."""
    refuse_below(step, {"n_targets": 1, "n_sources": 1, "n_checked": 1, "answer_tokens": 1, "seed": 0})
    check_writable(step.out)
    selection = load_selection(step.selection)
    examples = load_behaviour(step.behaviour, n_examples=None, split="test").examples
    if not 0 <= step.example < len(examples):
        raise InputError(
            f"example must be from 0 to {len(examples) - 1} ('{step.behaviour}', test split), got {step.example}"
        )
    page = circuit_page(
        step.model.load(),
        selection,
        examples[step.example],
        n_targets=step.n_targets,
        n_sources=step.n_sources,
        n_checked=step.n_checked,
        answer_tokens=step.answer_tokens,
        template=step.model.template,
        seed=step.seed,
    )
    title = f"What feeds {step.selection.stem}, and what it feeds"
    command = _command("circuit", str(step.selection), step, ShowCircuit(step.selection))
    page = dataclasses.replace(page, title=title, command=command)
    page.save(step.out)
    record = {"page": str(step.out), **_record(page.circuit)}
    return StepResult(record, f"{page.headline}\npage: {step.out.resolve()}")


def do_neuron(step: ShowNeuron) -> StepResult:
    """Look at the neuron and write its page. Raises `InputError` for what can be put right."""
    refuse_below(step, {"n_test": 1, "n_texts": 1, "answer_tokens": 1, "seed": 0})
    name = parse_name(step.neuron)
    command = _command("neuron", step.neuron, step, ShowNeuron(step.neuron))
    if step.run:
        step = _with_run(step, step.run)
    out = step.out or Path("neurons") / f"{name}.html"
    check_writable(out)
    # What can be wrong is read before the model is.
    examples = [load_behaviour(name, n_examples=step.n_test, seed=step.seed, split="test") for name in step.behaviours]
    scores = _in_order_of([behaviour.name for behaviour in examples], step.scores)
    selections = _neuron_selections(step)
    model = step.model.load()
    site, index = neuron_of(model, name)
    page = neuron_page(
        model,
        site,
        index,
        examples,
        scores=scores,
        selections=selections,
        n_texts=step.n_texts,
        template=step.model.template,
        answer_tokens=step.answer_tokens,
    )
    page = dataclasses.replace(page, command=command)
    page.save(out)
    record = {"page": str(out), **_record(page.view)}
    return StepResult(record, f"{page.headline}\n{page.view.written}\npage: {out.resolve()}")


def _in_order_of(behaviours: Sequence[str], files: Sequence[Path]) -> list[Scores]:
    """The scores of these behaviours in their order, then those of others."""
    scores = [load_scores(path) for path in files]
    places = {name: place for place, name in enumerate(behaviours)}
    return sorted(scores, key=lambda of_one: places.get(of_one.behaviour, len(places)))


def _neuron_selections(step: ShowNeuron) -> dict[str, Selection]:
    """The selections of neurons by the names of their files. A run holds selections of weights, too."""
    selections = {path.stem: load_selection(path) for path in step.selections}
    return {name: selection for name, selection in selections.items() if next(iter(selection.shapes)).unit == "neuron"}


def _record(value: object) -> dict[str, Any]:
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def _with_run(step: ShowNeuron, folder: Path) -> ShowNeuron:
    """The step with what a run folder holds."""
    if dataclasses.replace(step.model, device=None) != ModelConfig():
        raise InputError("--run takes model, template and dtype from the run: give --device alone beside it")
    kind = ImproveConfig if is_improvement(folder) else StudyConfig
    config = begun_with(folder, kind).config
    has_default_behaviours = step.behaviours == ShowNeuron(step.neuron).behaviours
    return dataclasses.replace(
        step,
        model=dataclasses.replace(config.model, device=step.model.device),
        behaviours=config.data.sources if has_default_behaviours else step.behaviours,
        scores=(*step.scores, *sorted((folder / "scores").glob("*.safetensors"))),
        selections=(*step.selections, *sorted(folder.glob("selection.*.safetensors"))),
    )


def _command(name: str, subject: str, step: ShowNeuron | ShowCircuit, default: ShowNeuron | ShowCircuit) -> str:
    """The command that makes the page again: what it shows, and every option that is not the default."""
    return shlex.join(["dean-interp", name, subject, *options_of(step, default)])
