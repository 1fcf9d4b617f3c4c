"""The report: one HTML file from results alone, with nothing to load from a network."""

import dataclasses
import html
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from circuitsvis.activations import text_neuron_activations
from jinja2 import Environment, FunctionLoader, StrictUndefined
from matplotlib.figure import Figure

from dean_interp.evaluation.outcomes import Line, p_text
from dean_interp.files import write_text
from dean_interp.information.estimands import HEADLINES
from dean_interp.report.figures import (
    changes_by_arm,
    coupled_per_layer,
    coupling_against_chance,
    effect_against_controls,
    information_per_layer,
    sweep_plane,
    to_svg,
    verdicts_by_state,
)
from dean_interp.selection.stability import STABLE
from dean_interp.statistics import Interval
from dean_interp.study.arms import ArmResults
from dean_interp.study.outcome import RANDOM_KINDS
from dean_interp.study.results import AnswerSet, InformationResults, Results, State, UnitResults, save_record
from dean_interp.study.sweep import Sweep, sweep_headline


class Page:
    """A page that a notebook shows in a frame of its own, and that can be kept as a file."""

    frame_rem = 40
    """Height of the frame."""

    def html(self) -> str:
        """The page: nothing in it is loaded from a network."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, its folder too; return its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.html())
        return path

    def _repr_html_(self) -> str:
        style = f"width:100%;height:{self.frame_rem}rem;border:0"
        return f'<iframe srcdoc="{html.escape(self.html())}" style="{style}"></iframe>'


def write_report(results: Results, folder: Path) -> Path:
    """Write `report.html` into the folder and return its path."""
    page = rendered(
        "report.html.j2",
        results=results,
        behaviours=results.behaviours,
        groups={one.unit: _groups(one) for one in results.units},
        n_controls=results.config.n_random + results.config.n_equal_kl,
        least_stable=STABLE,
        figures={one.unit: _figures(one) for one in results.units},
        verdicts=to_svg(verdicts_by_state(results.spoken), "Verdicts on the answers") if results.spoken else "",
        neuron_view=activations_view(results) if results.neurons else "",
        command=_command(results),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def write_comparison(runs: Mapping[str, Results], path: Path) -> Path:
    """Write a page of several runs side by side, by name; return its path."""
    behaviours = list(dict.fromkeys(name for results in runs.values() for name in results.behaviours))
    changes = {
        f"{behaviour} margin": {
            f"{name}, {one.unit}s": one.state("edit").change[behaviour]
            for name, results in runs.items() for one in results.units if behaviour in results.behaviours
        } for behaviour in behaviours
    }  # fmt: skip
    settings = {name: vars(results.config) for name, results in runs.items()}
    differing = {
        setting: [some[setting] for some in settings.values()]
        for setting in next(iter(settings.values())) if len({str(some[setting]) for some in settings.values()}) > 1
    }  # fmt: skip
    page = rendered(
        "comparison.html.j2",
        title=f"{len(runs)} runs side by side" if len(runs) > 1 else "One run",
        runs=runs,
        behaviours=behaviours,
        figure=to_svg(changes_by_arm(changes, "change (nats per token)"), "Changes of both margins by run"),
        differing=differing,
        commands={name: _command(results) for name, results in runs.items()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def write_sweep_report(sweep: Sweep, folder: Path) -> Path:
    """Write `sweep.html` into the folder and return its path."""
    page = rendered(
        "sweep.html.j2",
        sweep=sweep,
        objectives=sweep.objectives,
        headline=sweep_headline(sweep),
        figure=to_svg(sweep_plane(sweep), "Edits by their change of both behaviours and ability"),
    )
    path = folder / "sweep.html"
    write_text(path, page)
    return path


def write_information_report(results: InformationResults, folder: Path) -> Path:
    """Write `information.html` and one SVG file a figure into the folder; return the page's path."""
    drawn = {
        f"{one.name}{'.' if variant else ''}{variant.replace(' ', '_')}": (
            one, variant, to_svg(information_per_layer(one, variant), f"{one.estimand} per layer {variant}")
        )
        for one in results.informations
        for variant in one.variants
    }  # fmt: skip
    for name, (_, _, figure) in drawn.items():
        write_text(folder / f"{name}.svg", figure)
    page = rendered(
        "information.html.j2",
        results=results,
        drawn=drawn.values(),
        headlines=HEADLINES,
        verdict=" ".join(one.headline for one in results.informations if one.estimand in HEADLINES and one.is_default),
    )
    path = folder / "information.html"
    write_text(path, page)
    return path


def write_figure_page(path: Path, *, title: str, text: str, figure: Figure) -> Path:
    """Write a page of one figure and what it shows, and the figure as SVG beside it; return the page's path."""
    drawn = to_svg(figure, title)
    write_text(path.with_suffix(".svg"), drawn)
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    page = rendered("figure.html.j2", title=title, paragraphs=paragraphs, figure=drawn)
    write_text(path, page)
    return path


def write_arms_report(results: ArmResults, folder: Path, figures: Mapping[str, Figure]) -> Path:
    """Write `results.json`, `report.html` and the figures as SVG (by their titles) into the folder; return the page."""
    save_record(results, folder / "results.json")
    drawn = {title: to_svg(figure, title) for title, figure in figures.items()}
    for title, figure in drawn.items():
        write_text(folder / f"{title.lower().replace(' ', '_')}.svg", figure)
    blocks: dict[str, dict[str, set[str]]] = {}
    for line in (line for lines in results.arms.values() for line in lines):
        blocks.setdefault(line.metric, {}).setdefault(line.on, set()).add(_level(line))
    page = rendered("arms.html.j2", results=results, figures=drawn, blocks=blocks)
    path = folder / "report.html"
    write_text(path, page)
    return path


def _level(line: Line) -> str:
    return _percent(line.before.mean) if line.unit.startswith("share") else f"{line.before.mean:.3f}"


def _changed(line: Line) -> str:
    return _points(line.change) if line.unit.startswith("share") else _interval(line.change)


def rendered(template: str, **values: object) -> str:
    """A page from its template, with the style of all pages."""
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FunctionLoader(_text), **options)
    environment.filters |= {
        "tiny": lambda value: f"{value:.2g}",
        "signed": _signed,
        "interval": _interval,
        "p": _p,
        "percent": _percent,
    }
    environment.filters |= {
        "percent_of": lambda fraction: f"{100 * fraction:g} %",
        "share_or_change": _share_or_change,
        "changed": _changed,
    }
    return environment.get_template(template).render(style=_text("style.css"), sorting=_text("sort.js"), **values)


def _text(name: str) -> str:
    return (files("dean_interp.report") / name).read_text(encoding="utf-8")


def _figures(results: UnitResults) -> dict[str, str]:
    return {
        "effect": to_svg(effect_against_controls(results), f"Effect of the {results.unit} edit against its controls"),
        "layers": to_svg(coupled_per_layer(results), f"Coupled {results.unit}s per layer"),
        "chance": to_svg(coupling_against_chance(results), f"Coupled {results.unit}s between floor and ceiling"),
        **{
            one.estimand: to_svg(information_per_layer(one), f"{one.estimand} per layer, {results.unit}s")
            for one in results.information
        },
    }


def activations_view(results: Results) -> str:
    """The circuitsvis view of the strongest coupled neurons over real text, script included."""
    view = text_neuron_activations(
        tokens=[
            [token.replace("<", "‹") for token in text.tokens] for text in results.texts
        ],  # "</script>" ends a page
        activations=[np.array(text.activations)[:, None, :] for text in results.texts],
        first_dimension_name="Set",
        first_dimension_labels=["coupled"],
        second_dimension_name="Neuron",
        second_dimension_labels=[neuron.name for neuron in results.neurons],
    )
    return view.local_src


def _groups(results: UnitResults) -> list[tuple[str, list[State]]]:
    """States as the table shows them: singles first, then each kind of random control as one group."""
    single = [(state.name, [state]) for state in results.states if state.kind not in RANDOM_KINDS]
    grouped = [(kind, [state for state in results.states if state.kind == kind]) for kind in RANDOM_KINDS]
    return [*single, *grouped]


def options_of(record: object, default: object) -> list[str]:
    """The words of a command line for every field that is not the default; records within it are left out."""
    words = []
    for name, value in vars(record).items():
        if value != getattr(default, name) and not dataclasses.is_dataclass(value):
            several = value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, several)]
    return words


def _command(results: Results) -> str:
    """The command that makes these results: every option that is not the default."""
    return shlex.join(["dean-interp", "run", *options_of(results.config, type(results.config)())])


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _interval(values: Interval | Sequence[float]) -> str:
    if isinstance(values, Interval):
        return str(values).replace("-", "−")
    return f"{_signed(sum(values) / len(values))} [{_signed(min(values))}, {_signed(max(values))}]"


def _share_or_change(answers: AnswerSet, verdict: str, kind: str) -> str:
    """The original's share; of any other state the paired change in points."""
    if kind == "original":
        return _percent(answers.share[verdict].mean)
    return _points(answers.change[verdict])


def _points(change: Interval) -> str:
    mean, low, high = (f"{100 * value:+.0f}".replace("-", "−") for value in (change.mean, change.low, change.high))
    return f"{mean} [{low}, {high}]"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _p(value: float) -> str:
    return p_text(value) if value < 0.1 else f"{value:.2f}"
