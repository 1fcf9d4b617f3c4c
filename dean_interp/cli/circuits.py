"""`dean-interp neuron` and `dean-interp circuit`: a look at single neurons, and at what feeds a set of them."""

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from tyro.conf import OmitArgPrefixes, Positional

from dean_interp.circuits.graph import trace_circuit
from dean_interp.circuits.neuron import parse_neuron
from dean_interp.cli.model import Model
from dean_interp.data.examples import load_behaviour
from dean_interp.errors import InputError
from dean_interp.files import check_writable, read_json
from dean_interp.models.tokens import Template
from dean_interp.report.circuit_page import CircuitPage
from dean_interp.report.html import options_of
from dean_interp.report.neuron_page import neuron_view
from dean_interp.scoring.scores import load_scores
from dean_interp.selection.selection import load_selection


@dataclass(frozen=True)
class NeuronStep:
    """Show one neuron: where it fires, what it writes, its ranks, what happens when it alone is silenced."""

    neuron: Positional[str]
    """Its layer and index: L17.1042."""
    run: Path | None = None
    """A study's folder: its model, data, scores and selections are taken, those given here besides."""
    on: tuple[str, ...] = ("fairness", "privacy", "general")
    """Behaviours (built-in names, files, published sets) on whose test examples it is read and measured."""
    n_examples: int = 32
    """Test examples of each."""
    n_texts: int = 8
    """Texts that are shown: those on which it fires most."""
    answer_tokens: int | None = 12
    """First tokens of each answer that are measured with the neuron silenced (None: all)."""
    scores: tuple[Path, ...] = ()
    """Score files, for its score and rank in each behaviour."""
    selections: tuple[Path, ...] = ()
    """Selection files; the page says which hold it."""
    seed: int = 0
    """Of the draws of examples."""
    out: Path | None = None
    """The page to write; unset: neurons/<name>.html."""
    model: OmitArgPrefixes[Model] = field(default_factory=Model)


@dataclass(frozen=True)
class CircuitStep:
    """Show what feeds the selected neurons on one example, what they feed, and how far to believe the attribution."""

    selection: Positional[Path]
    """A selection of neurons."""
    on: str = "privacy"
    """A behaviour with safe and unsafe answers."""
    example: int = 0
    """Which of its test examples, from 0."""
    n_targets: int = 10
    """Of the selected neurons at their tokens, those with the largest effect on the margin."""
    n_sources: int = 8
    """Largest sources of each."""
    n_checked: int = 32
    """Largest edges into the set that are measured by intervention, beside as many random ones."""
    answer_tokens: int | None = 12
    """First tokens of both answers (None: all)."""
    seed: int = 0
    """Of the random edges."""
    out: Path = Path("circuits/circuit.html")
    """The page to write."""
    model: OmitArgPrefixes[Model] = field(default_factory=Model)


def show_circuit(step: CircuitStep) -> tuple[dict[str, Any], str]:
    """Write the page; a record and a text for its user. Raises `InputError` for what can be put right."""
    check_writable(step.out)
    selection = load_selection(step.selection)
    examples = load_behaviour(step.on, n_examples=None, split="test").examples
    if not 0 <= step.example < len(examples):
        raise InputError(f"example must be from 0 to {len(examples) - 1} ('{step.on}', test split), got {step.example}")
    circuit = trace_circuit(
        step.model.loaded(), selection, examples[step.example], n_targets=step.n_targets, n_sources=step.n_sources,
        n_checked=step.n_checked, answer_tokens=step.answer_tokens, template=step.model.template, seed=step.seed,
    )  # fmt: skip
    page = CircuitPage(
        circuit,
        f"What feeds {step.selection.stem}, and what it feeds",
        _command("circuit", step, CircuitStep(step.selection)),
    )
    page.save(step.out)
    return {"page": str(step.out), **_record(circuit)}, f"{page.headline}\npage: {step.out.resolve()}"


def _record(value: object) -> dict[str, Any]:
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def show_neuron(step: NeuronStep) -> tuple[dict[str, Any], str]:
    """Write the page; a record and a text for its user. Raises `InputError` for what can be put right."""
    site, index = parse_neuron(step.neuron)
    command = _command("neuron", step, NeuronStep(step.neuron))
    if step.run:
        step = _of_run(step, step.run)
    out = step.out or Path("neurons") / f"L{site.layer}.{index}.html"
    check_writable(out)
    scores = [load_scores(path) for path in step.scores]
    selections = {path.stem: load_selection(path) for path in step.selections}
    selections = {name: one for name, one in selections.items() if next(iter(one.shapes)).unit == "neuron"}
    examples = [load_behaviour(name, n_examples=step.n_examples, seed=step.seed, split="test") for name in step.on]
    page = neuron_view(
        step.model.loaded(), site, index, examples, scores=scores, selections=selections, n_texts=step.n_texts,
        template=step.model.template, answer_tokens=step.answer_tokens,
    )  # fmt: skip
    page = dataclasses.replace(page, command=command)
    page.save(out)
    return {
        "page": str(out),
        **_record(page.view),
    }, f"{page.headline}\n{page.view.written}\npage: {out.resolve()}"


@dataclass(frozen=True)
class _Study:
    model: str
    template: Template
    dtype: Literal["float32", "float16", "bfloat16"]
    first: str
    second: str
    general: str


@dataclass(frozen=True)
class _Config:
    """What is taken of a study's `config.json`."""

    study: _Study


def _of_run(step: NeuronStep, folder: Path) -> NeuronStep:
    """The step with what a study's folder holds."""
    try:
        study = read_json(folder / "config.json", _Config).study
    except InputError as error:
        raise InputError(f"{folder} is no run folder: {error}") from error
    sources = (study.first, study.second, study.general)
    return dataclasses.replace(
        step,
        model=Model(study.model, study.template, step.model.device, study.dtype),
        on=sources if step.on == NeuronStep(step.neuron).on else step.on,
        scores=(*step.scores, *sorted((folder / "scores").glob("*.safetensors"))),
        selections=(*step.selections, *sorted(folder.glob("selection.*.safetensors"))),
    )


def _command(name: str, step: NeuronStep | CircuitStep, default: NeuronStep | CircuitStep) -> str:
    """The command that makes the page again: what was named, and every option that is not the default."""
    (named, *_) = vars(step).values()
    return shlex.join(
        ["dean-interp", name, str(named), *options_of(step, default), *options_of(step.model, default.model)]
    )
