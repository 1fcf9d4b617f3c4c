"""The pages of studies, sweeps, estimates and arms: one HTML file each, from results alone, nothing from a network."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_type_hints

import numpy as np
from matplotlib.figure import Figure

from dean_interp.files import write_text
from dean_interp.information.estimands import HEADLINES
from dean_interp.information.shifts import MutualInformation
from dean_interp.report.figures import changes_by_arm, to_svg
from dean_interp.report.page import rendered
from dean_interp.report.study_figures import (
    coupled_per_layer,
    coupling_against_chance,
    effect_against_controls,
    information_per_layer,
    labels_by_state,
    sweep_plane,
)
from dean_interp.report.tables import control_rows, line_groups, metric_tables, single_row, unit_rows
from dean_interp.selection.stability import STABLE_PROBABILITY
from dean_interp.statistics import Interval
from dean_interp.study.arm_results import ArmResults
from dean_interp.study.controls import is_random
from dean_interp.study.results import InformationResults, Results, UnitResults, save_record
from dean_interp.study.sweep import Sweep, objectives, sweep_headline


def write_report(results: Results, folder: Path) -> Path:
    """Write `report.html` into the folder and return its path."""
    answers = results.answers
    page = rendered(
        "report.html.j2",
        results=results,
        behaviours=results.behaviours,
        rows={kind.unit: unit_rows(kind) for kind in results.units},
        lines={kind.unit: line_groups(kind.edit.lines) for kind in results.units},
        n_controls={kind.unit: _n_random_controls(kind) for kind in results.units},
        least_stable=STABLE_PROBABILITY,
        information=[shown_information(f"{kind.unit}s", kind.information) for kind in results.units],
        figures={kind.unit: _figures(kind) for kind in results.units},
        labels=to_svg(labels_by_state(answers), "Labels of the answers") if answers else "",
        neuron_view=activations_view(results) if results.neurons else "",
        unequal_layers=any(kind.n_units_per_layer < results.d_mlp for kind in results.units if kind.unit == "neuron"),
        command=_command(results),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def write_comparison(runs: Mapping[str, Results], path: Path) -> Path:
    """Write a page of several runs side by side, by name; return its path."""
    page = rendered(
        "comparison.html.j2",
        title=f"{len(runs)} runs side by side" if len(runs) > 1 else "One run",
        runs=runs,
        behaviours=list(dict.fromkeys(name for results in runs.values() for name in results.behaviours)),
        figure=to_svg(changes_by_arm(_changes_by_run(runs), "change (nats per token)"), "Changes of margins by run"),
        differing=_differing_settings(runs),
        commands={name: _command(results) for name, results in runs.items()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def write_sweep_report(sweep: Sweep, folder: Path) -> Path:
    """Write `sweep.html` into the folder and return its path."""
    front = {}
    for point in sweep.points:
        if point.on_front:
            chosen = single_row(point.chosen_on, "where it was chosen", objectives)
            confirmed = single_row(point.confirmed_on, "confirmed", objectives)
            front[point.name] = [confirmed, chosen, *control_rows(point.controls, objectives)]
    page = rendered(
        "sweep.html.j2",
        sweep=sweep,
        objectives=sweep.objectives,
        headline=sweep_headline(sweep),
        figure=to_svg(sweep_plane(sweep), "Edits by their change of both behaviours and ability"),
        front=front,
        tables=metric_tables({point.name: point.confirmed_on.lines for point in sweep.points}),
    )
    path = folder / "sweep.html"
    write_text(path, page)
    return path


def write_information_report(results: InformationResults, folder: Path) -> Path:
    """Write `information.html` and one SVG file a figure into the folder; return the page's path."""
    drawn = []
    for information in results.informations:
        for variant in information.variants:
            figure = to_svg(information_per_layer(information, variant), f"{information.estimand} per layer {variant}")
            suffix = f".{variant.replace(' ', '_')}" if variant else ""
            write_text(folder / f"{information.name}{suffix}.svg", figure)
            drawn.append((information, variant, figure))
    headlines = []
    for information in results.informations:
        if information.estimand in HEADLINES and information.is_default:
            headlines.append(information.headline)
    page = rendered(
        "information.html.j2",
        results=results,
        drawn=drawn,
        headlines=HEADLINES,
        verdict=" ".join(headlines),
    )
    path = folder / "information.html"
    write_text(path, page)
    return path


def write_figure_page(path: Path, *, title: str, text: str, figure: Figure) -> Path:
    """Write a page of one figure and what it shows, and the figure as SVG beside it; return the page's path."""
    drawn = to_svg(figure, title)
    write_text(path.with_suffix(".svg"), drawn)
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    write_text(path, rendered("figure.html.j2", title=title, paragraphs=paragraphs, figure=drawn))
    return path


def write_arms_report(results: ArmResults, folder: Path, figures: Mapping[str, Figure]) -> Path:
    """Write `results.json`, `report.html` and the figures as SVG (by their titles) into the folder; return the page."""
    save_record(results, folder / "results.json")
    drawn = {title: to_svg(figure, title) for title, figure in figures.items()}
    for title, figure in drawn.items():
        write_text(folder / f"{title.lower().replace(' ', '_')}.svg", figure)
    page = rendered("arms.html.j2", results=results, figures=drawn, tables=metric_tables(results.arms))
    path = folder / "report.html"
    write_text(path, page)
    return path


def settings_of(record: object) -> dict[str, object]:
    """Every setting of a record and of the groups within it, by its name on the command line."""
    settings: dict[str, object] = {}
    hints = get_type_hints(type(record), include_extras=True)
    for name, value in vars(record).items():
        if dataclasses.is_dataclass(value):
            settings |= settings_of(value)
        else:
            settings[_option_name(name, hints[name])] = value
    return settings


def _option_name(field: str, hint: object) -> str:
    """The name of a field on the command line: its own, unless its type gives another (`tyro.conf.arg`)."""
    for mark in getattr(hint, "__metadata__", ()):
        if getattr(mark, "name", None):
            return mark.name
    return field


def options_of(record: object, default: object) -> list[str]:
    """The words of a command line for every setting that is not the default's."""
    words = []
    defaults = settings_of(default)
    for name, value in settings_of(record).items():
        if value != defaults[name]:
            words.append(f"--{name.replace('_', '-')}")
            # A switch takes no value.
            if value is not True:
                words += map(str, value) if isinstance(value, tuple) else [str(value)]
    return words


def _command(results: Results) -> str:
    """The command that makes these results."""
    return shlex.join(["dean-interp", "run", *options_of(results.config, type(results.config)())])


def activations_view(results: Results) -> str:
    """The circuitsvis view of the strongest coupled neurons over real text, script included."""
    # It is slow to import, and only this view needs it.
    from circuitsvis.activations import text_neuron_activations

    # A "</script>" among the tokens would end the page.
    tokens = []
    for text in results.texts:
        tokens.append([token.replace("<", "‹") for token in text.tokens])
    view = text_neuron_activations(
        tokens=tokens,
        activations=[np.array(text.activations)[:, None, :] for text in results.texts],
        first_dimension_name="Set",
        first_dimension_labels=["coupled"],
        second_dimension_name="Neuron",
        second_dimension_labels=[neuron.name for neuron in results.neurons],
    )
    return view.local_src


def _figures(results: UnitResults) -> dict[str, str]:
    units = f"{results.unit}s"
    figures = {
        "effect": to_svg(effect_against_controls(results), f"Effect of the {results.unit} edit against its controls"),
        "layers": to_svg(coupled_per_layer(results), f"Coupled {units} per layer"),
        "chance": to_svg(coupling_against_chance(results), f"Coupled {units} between floor and ceiling"),
    }
    return figures


@dataclasses.dataclass(frozen=True)
class ShownInformation:
    """Mutual information before and under one ablation, as a page shows it."""

    title: str
    """What is ablated."""
    estimates: list[tuple[MutualInformation, str]]
    """Each estimand with its figure per layer, as SVG; empty where it could not be estimated."""


def shown_information(title: str, informations: Sequence[MutualInformation]) -> ShownInformation:
    """Estimands before and under one ablation, with their figures."""
    estimates = []
    for information in informations:
        figure = ""
        if not information.not_estimated(information.variants[0]):
            figure = to_svg(information_per_layer(information), f"{information.estimand} per layer, {title}")
        estimates.append((information, figure))
    return ShownInformation(title, estimates)


def _n_random_controls(results: UnitResults) -> int:
    return sum(is_random(state.kind) for state in results.states)


def _changes_by_run(runs: Mapping[str, Results]) -> dict[str, dict[str, Interval]]:
    """The change of each behaviour's margin under every edit of every run."""
    changes: dict[str, dict[str, Interval]] = {}
    for name, results in runs.items():
        for kind in results.units:
            for behaviour, change in kind.edit.change.items():
                changes.setdefault(f"{behaviour} margin", {})[f"{name}, {kind.unit}s"] = change
    return changes


def _differing_settings(runs: Mapping[str, Results]) -> dict[str, list[object]]:
    """The settings that are not the same in all runs, with their values in the order of the runs."""
    settings = [settings_of(results.config) for results in runs.values()]
    differing = {}
    for name in settings[0]:
        values = [config[name] for config in settings]
        if len({str(value) for value in values}) > 1:
            differing[name] = values
    return differing
