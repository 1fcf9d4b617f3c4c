"""The pages of studies, sweeps, estimates and arms: one HTML file each, from results alone, nothing from a network."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_type_hints

import numpy as np
from markupsafe import Markup

from dean_interp.files import write_json, write_text
from dean_interp.information.estimands import HEADLINES
from dean_interp.information.shifts import MutualInformation
from dean_interp.report.figures import changes_by_arm
from dean_interp.report.information_figures import information_per_layer
from dean_interp.report.page import rendered
from dean_interp.report.pictures import Picture, figure_element, file_stem, write_picture
from dean_interp.report.study_figures import (
    coupled_per_layer,
    coupling_against_chance,
    effect_against_controls,
    labels_by_state,
)
from dean_interp.report.sweep_figures import sweep_plane
from dean_interp.report.tables import control_rows, line_groups, metric_tables, single_row, unit_rows
from dean_interp.selection.stability import STABLE_PROBABILITY
from dean_interp.statistics import Interval
from dean_interp.study.arm_results import ArmResults
from dean_interp.study.controls import is_random
from dean_interp.study.results import RESULTS_FILE, InformationResults, Results, UnitResults
from dean_interp.study.sweep import Sweep, objectives, sweep_headline


def write_report(results: Results, folder: Path) -> Path:
    """Write `report.html` into the folder and return its path."""
    neurons = [kind for kind in results.units if kind.unit == "neuron"]
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
        labels=_labels(results),
        neuron_view=activations_view(results) if results.neurons else "",
        unequal_layers=any(kind.n_units_per_layer < results.d_mlp for kind in neurons),
        command=_command(results),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def write_comparison(runs: Mapping[str, Results], path: Path) -> Path:
    """Write a page of several runs side by side, by name; return its path."""
    behaviours: list[str] = []
    for results in runs.values():
        behaviours += [name for name in results.behaviours if name not in behaviours]
    picture = changes_by_arm(_changes_by_run(runs), "change (nats per token)")
    page = rendered(
        "comparison.html.j2",
        title=f"{len(runs)} runs side by side" if len(runs) > 1 else "One run",
        runs=runs,
        behaviours=behaviours,
        figure=figure_element(picture, "Changes of margins by run"),
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
        figure=figure_element(sweep_plane(sweep), "Edits by their change of both behaviours and ability"),
        front=front,
        tables=metric_tables({point.name: point.confirmed_on.lines for point in sweep.points}),
    )
    path = folder / "sweep.html"
    write_text(path, page)
    return path


def write_information_report(results: InformationResults, folder: Path) -> Path:
    """Write `information.html`, and an SVG and a CSV file a figure, into the folder; return the page's path."""
    drawn = []
    for information in results.informations:
        for variant in information.variants:
            picture = information_per_layer(information, variant)
            title = f"{information.estimand} per layer {variant}".strip()
            suffix = f".{variant.replace(' ', '_')}" if variant else ""
            write_picture(picture, folder, f"{information.name}{suffix}", title)
            drawn.append((information, variant, figure_element(picture, title)))
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


def write_figure_page(path: Path, *, title: str, text: str, picture: Picture) -> Path:
    """Write a page of one picture and what it shows, with SVG and CSV beside it; return the page's path."""
    write_picture(picture, path.parent, path.stem, title)
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    page = rendered("figure.html.j2", title=title, paragraphs=paragraphs, figure=figure_element(picture, title))
    write_text(path, page)
    return path


def write_arms_report(results: ArmResults, folder: Path, pictures: Mapping[str, Picture]) -> Path:
    """Write `results.json`, `report.html`, and each picture as SVG and CSV, into the folder; return the page.

    Args:
        results: what the page says.
        folder: it is there.
        pictures: by their titles, which also name the files.
    """
    write_json(folder / RESULTS_FILE, results)
    figures = []
    for title, picture in pictures.items():
        write_picture(picture, folder, file_stem(title), title)
        figures.append(figure_element(picture, title))
    page = rendered("arms.html.j2", results=results, figures=figures, tables=metric_tables(results.arms))
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


def _figures(results: UnitResults) -> dict[str, Markup]:
    units = f"{results.unit}s"
    return {
        "effect": figure_element(
            effect_against_controls(results), f"Effect of the {results.unit} edit against its controls"
        ),
        "layers": figure_element(coupled_per_layer(results), f"Coupled {units} per layer"),
        "chance": figure_element(coupling_against_chance(results), f"Coupled {units} between floor and ceiling"),
    }


def _labels(results: Results) -> Markup:
    """The labels of the answers as a picture; empty where nothing was answered."""
    if results.answers is None:
        return Markup()
    return figure_element(labels_by_state(results.answers), "Labels of the answers")


@dataclasses.dataclass(frozen=True)
class ShownInformation:
    """Mutual information before and under one ablation, as a page shows it."""

    title: str
    """What is ablated."""
    estimates: list[tuple[MutualInformation, Markup]]
    """Each estimand with its picture per layer; empty where it could not be estimated."""


def shown_information(title: str, informations: Sequence[MutualInformation]) -> ShownInformation:
    """Estimands before and under one ablation, with their pictures."""
    estimates = []
    for information in informations:
        figure = Markup()
        if not information.not_estimated(information.variants[0]):
            name = f"{information.estimand} per layer, {title}"
            figure = figure_element(information_per_layer(information), name)
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
