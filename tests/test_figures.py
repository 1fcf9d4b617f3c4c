"""Pictures: one look for all, readable in grey, each with its n and with the data that is drawn."""

import dataclasses
import itertools
import re
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from page_figures import figures_of
from samples import sample

from dean_interp.arms.comparison import ArmRecord
from dean_interp.arms.composition_results import Composition
from dean_interp.arms.frontier import Frontier, FrontierArm, FrontierPoint
from dean_interp.circuits.graph import Circuit, Edge, Node
from dean_interp.circuits.neuron_view import NeuronView
from dean_interp.evaluation.lines import Line
from dean_interp.evaluation.outcomes import LOSS, MARGIN
from dean_interp.information.estimands import MutualInformationConfig
from dean_interp.information.shifts import MutualInformation, Shift
from dean_interp.report.circuit_figures import activations_by_behaviour, predicted_against_measured
from dean_interp.report.composition_figures import shares_by_depth
from dean_interp.report.figures import (
    changes_along,
    changes_by_arm,
    estimates_beside_truth,
    power_by_prompts,
    shares_by_layer,
)
from dean_interp.report.frontier_figures import damage_and_rise
from dean_interp.report.improve_figures import effect_against_nulls, margins_and_kl_by_dose
from dean_interp.report.information_figures import information_per_layer
from dean_interp.report.look import FONT, LOOKS, PALETTE
from dean_interp.report.page import rendered
from dean_interp.report.pictures import csv_of, figure_element, file_stem, to_svg, write_picture
from dean_interp.report.study_figures import (
    LABEL_MARKS,
    coupled_per_layer,
    coupling_against_chance,
    effect_against_controls,
    labels_by_state,
)
from dean_interp.report.sweep_figures import sweep_plane
from dean_interp.selection.chance import Chance
from dean_interp.selection.stability import Floor, Halves
from dean_interp.statistics import Interval
from dean_interp.study.config import SweepConfig
from dean_interp.study.controls import RANDOM_CONTROLS
from dean_interp.study.improvement import CurvePoint, ImproveConfig, Improvement
from dean_interp.study.results import Answers, AnswerSet, StateAnswers, StateResults, UnitResults
from dean_interp.study.roles import RoleCount
from dean_interp.study.sweep import Point, Sweep

BEHAVIOURS = ("fairness", "privacy")
_DRAW = np.random.default_rng(0)


def interval() -> Interval:
    mean = float(_DRAW.normal())
    return Interval(mean, low=mean - 0.3, high=mean + 0.4, n_clusters=12)


def state(name: str, kind: str) -> StateResults:
    lines = [sample(Line, metric=MARGIN, on=on, n=48, n_clusters=12, change=interval()) for on in BEHAVIOURS]
    lines.append(sample(Line, metric=LOSS, on="general", n=16, n_clusters=16, change=interval()))
    return sample(StateResults, name=name, kind=kind, lines=tuple(lines))


def unit_results() -> UnitResults:
    states = [state("edit", "edit"), state("fairness alone", "named"), state("privacy alone", "named")]
    states += [state(f"{kind} {i}", kind) for kind in RANDOM_CONTROLS for i in range(3)]
    halves = Halves(mean=0.21, low=0.13, high=0.34)
    chance = sample(
        Chance,
        floor=Floor(n=8, expected=4.3, low=2.1, high=7.2, p=0.02),
        halves=halves,
        ceiling={name: halves for name in BEHAVIOURS},
    )
    return sample(
        UnitResults, unit="neuron", states=tuple(states), coupled_per_layer=(3, 1, 4), chance=chance, information=()
    )


def improvement() -> Improvement:
    kinds = ("edit", "opposite", "flip", "flip", "random gates", "paper's rule")
    names = (*BEHAVIOURS, "general")
    counts = {"score": 20, "choose": 8, "confirm": 10}
    roles = [RoleCount(name, "topic", n_examples=counts, n_topics=counts, n_left_out=0) for name in names]
    curve = [CurvePoint(dose, {name: interval() for name in BEHAVIOURS}, kl=dose**2) for dose in (-1.0, 0.5, 1.0)]
    return sample(
        Improvement,
        config=ImproveConfig(),
        roles=tuple(roles),
        states=tuple(state(kind, kind) for kind in kinds),
        curve=tuple(curve),
        information={},
        answers=None,
    )


def frontier() -> Frontier:
    arms = []
    for name, kind in (("first", "gates"), ("second", "gates"), ("prompt", "prompt"), ("random 1", "random")):
        points = []
        for kl in (0.05, 0.2):
            lines = state(name, "arm").lines
            reached = Interval(kl * 0.97, low=0.01, high=0.3, n_clusters=16)
            rises = {on: interval() for on in BEHAVIOURS}
            points.append(sample(FrontierPoint, kl_wanted=kl, kl=reached, rises=rises, smaller=interval(), lines=lines))
        record = sample(ArmRecord, name=name, kind=kind)
        area = None if kind == "prompt" else interval()
        nulls = ({"fairness": 0.017, "privacy": -0.02}, {"fairness": 0.031, "privacy": 0.05})
        arms.append(FrontierArm(record, tuple(points), area=area, p_holm=0.5, null_rises=nulls, null_p=0.3))
    return Frontier("a model", BEHAVIOURS, chosen_at=0.05, arms=tuple(arms), missing=())


def sweep() -> Sweep:
    points = []
    for i, unit in enumerate(("neuron", "neuron", "weight")):
        own = state(f"edit {i}", "edit")
        points.append(sample(Point, unit=unit, chosen_on=own, confirmed_on=own, on_front=i == 1))
    return Sweep(SweepConfig(), "a fingerprint", tuple(points), empty=())


def information() -> MutualInformation:
    shifts = []
    for layer in range(3):
        controls = tuple(float(value) for value in _DRAW.normal(size=4))
        own = interval()
        ends = {"change": own.mean, "low": own.low, "high": own.high}
        shifts.append(sample(Shift, layers=(layer,), variant="", control_changes=controls, flags=(), **ends))
    config = MutualInformationConfig().settled(48)
    return sample(MutualInformation, config=config, units="nats", n_prompts=48, shifts=tuple(shifts))


def circuit() -> Circuit:
    nodes = [Node("neuron", layer, 7, position=layer) for layer in range(3)]
    edges = [
        Edge(nodes[2], None, predicted=0.21, measured=0.19),
        Edge(nodes[0], nodes[2], predicted=-0.4, measured=-0.3),
    ]
    unchecked = Edge(nodes[1], nodes[2], predicted=0.11)
    random = (Edge(nodes[1], nodes[2], predicted=0.013, measured=0.017),)
    return sample(Circuit, tokens=("a", "b", "c"), edges=(*edges, unchecked), random=random)


def view() -> NeuronView:
    counts = {"fairness": (3, 5, 0), "privacy": (1, 4, 6), "general": (2, 2, 1)}
    return sample(NeuronView, bins=(-1.0, 0.3, 1.1, 2.7), activations=counts, texts=(), effect=())


def answers() -> Answers:
    labels = ("safe", "refusal", "unsafe", "incoherent", "safe")
    sets = tuple(AnswerSet(name, answers=labels, labels=labels) for name in BEHAVIOURS)
    states = tuple(StateAnswers(name, kind=name, unit=None, sets=sets) for name in ("original", "edit"))
    return Answers(("lexical",), {name: labels for name in BEHAVIOURS}, states)


def panels() -> dict[str, dict[str, Interval]]:
    return {f"{name} margin": {f"arm {i}": interval() for i in range(8)} for name in BEHAVIOURS}


def curves() -> dict[str, dict[str, list[tuple[float, Interval]]]]:
    steps = (4.0, 8.0, 16.0)
    return {"margin": {f"arm {i}": [(step, interval()) for step in steps] for i in range(9)}}


DRAWS = {
    "effect": lambda: effect_against_controls(unit_results()),
    "layers": lambda: coupled_per_layer(unit_results()),
    "chance": lambda: coupling_against_chance(unit_results()),
    "labels": lambda: labels_by_state(answers()),
    "nulls": lambda: effect_against_nulls(improvement()),
    "dose": lambda: margins_and_kl_by_dose(improvement()),
    "frontier": lambda: damage_and_rise(frontier()),
    "sweep": lambda: sweep_plane(sweep()),
    "information": lambda: information_per_layer(information()),
    "composition": lambda: shares_by_depth({name: sample(Composition) for name in ("one", "two", "three")}),
    "circuit": lambda: predicted_against_measured(circuit()),
    "neuron": lambda: activations_by_behaviour(view()),
    "arms": lambda: changes_by_arm(panels(), "change (nats per token)"),
    "splits": lambda: changes_by_arm(panels(), "change (nats per token)", counted="splits"),
    "curves": lambda: changes_along(curves(), "steps"),
    "doublings": lambda: changes_along(curves(), "examples of each behaviour", by_doubling=True),
    "shares": lambda: shares_by_layer({"neuron": {"both": [0.01, 0.03], "coupled": [0.02, 0.007]}}, n="9 neurons"),
    "power": lambda: power_by_prompts({"half": [0.21, 0.93], "all": [0.42, 0.99]}, [24, 48], n_trials=200),
    "truth": lambda: estimates_beside_truth({"one": (0.41, 0.3, 0.5)}, {"one": 0.43}, n="100 draws"),
}
"""Every picture that the package draws, from records that are made up."""


@pytest.fixture(scope="module")
def pictures():
    return {name: draw() for name, draw in DRAWS.items()}


@pytest.fixture(params=DRAWS)
def picture(request, pictures):
    return pictures[request.param]


def numbers_of(data: pd.DataFrame) -> np.ndarray:
    return data.select_dtypes("number").to_numpy(float).ravel()


def marks_of(axes) -> list[float]:
    """Where marks and bars stand. Lines that only guide the eye have no marks; bands are see-through."""
    places = []
    for line in axes.get_lines():
        if line.get_marker() not in ("None", "", None):
            places += [*np.asarray(line.get_xdata(), float), *np.asarray(line.get_ydata(), float)]
    for collection in axes.collections:
        if isinstance(collection, PathCollection):
            places += [*np.asarray(collection.get_offsets(), float).ravel()]
    for patch in axes.patches:
        if isinstance(patch, Rectangle) and patch.get_alpha() is None:
            places += [patch.get_width(), patch.get_height()]
    return places


def test_every_number_that_is_drawn_is_in_the_data(picture):
    known = numbers_of(picture.data)
    for axes in picture.figure.axes:
        if axes.get_label() == "<colorbar>":
            continue
        for place in marks_of(axes):
            # Rows and layers are counted from 0; bars are 0.8 wide.
            is_place = 0 <= place < 50 and (place == int(place) or place == 0.8)
            assert is_place or np.isclose(known, place, rtol=1e-12).any(), f"{place} is not in the data"


def test_every_picture_says_its_n_and_what_its_marks_are(picture):
    assert re.search(r"\d", picture.n) and picture.caption.endswith(".")
    assert len(picture.data) and not {name for name in picture.data if not re.fullmatch(r"[a-z_0-9A-Z]+", name)}


def look_of(handle) -> tuple[object, ...]:
    """What tells a series from another but its colour."""
    if isinstance(handle, ErrorbarContainer):
        handle = handle.lines[0]
    if isinstance(handle, Line2D):
        return (handle.get_marker(), handle.get_linestyle())
    if isinstance(handle, PathCollection):
        return ("marks", handle.get_paths()[0].vertices.tobytes())
    patch = handle.patches[0] if hasattr(handle, "patches") else handle
    return (type(patch).__name__, patch.get_hatch(), str(patch.get_linestyle()), str(patch.get_linewidth()))


def test_no_two_series_of_a_panel_differ_by_colour_alone(picture):
    for axes in picture.figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        looks = [look_of(handle) for handle in handles]
        assert len(set(looks)) == len(labels), f"alike in grey: {labels}"


def test_a_check_by_colour_alone_would_find_one():
    twins = changes_along({"margin": {f"arm {i}": [(1.0, interval())] for i in range(29)}}, "steps")
    handles, labels = twins.figure.axes[0].get_legend_handles_labels()
    assert len(labels) == 29 and len({look_of(handle) for handle in handles}) == 28, "the looks come again"


def test_every_axis_has_a_label_with_its_unit(picture):
    unit = re.compile(r"\(.+\)|layer|%|Jaccard|prompts|steps|examples|share of|^activation of|s in both tops")
    drawn = [axes for axes in picture.figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]
    for axes in drawn:
        for name, shared in (("x", axes.get_shared_x_axes()), ("y", axes.get_shared_y_axes())):
            # Panels on one scale are labelled once.
            panels = [other for other in drawn if other is axes or shared.joined(axes, other)]
            labels = [getattr(panel, f"get_{name}label")() for panel in panels]
            ticks = [tick.get_text() for panel in panels for tick in getattr(panel, f"get_{name}ticklabels")()]
            has_named_rows = any(re.search("[a-z]{3}", tick) for tick in ticks)
            assert has_named_rows or any(unit.search(label) for label in labels), labels


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2): 0 of black, 1 of white."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def contrast(first: str, second: str) -> float:
    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def test_what_is_alike_in_grey_differs_in_marker_or_dash_and_areas_in_their_hatch():
    alike = [pair for pair in itertools.combinations(LOOKS, 2) if contrast(pair[0].colour, pair[1].colour) < 3]
    assert len(alike) > 100, "most colours are alike in grey: colour alone says nothing on paper"
    assert not [pair for pair in alike if (pair[0].marker, pair[0].dash) == (pair[1].marker, pair[1].dash)]
    hatches = [hatch for _, hatch in LABEL_MARKS.values()]
    assert len(set(hatches)) == len(hatches)
    assert min(contrast(colour, "#FFFFFF") for colour in PALETTE.values()) > 2.2


def test_the_next_looks_differ_in_all_three():
    for first, second in itertools.pairwise(LOOKS):
        assert first.colour != second.colour and first.marker != second.marker and first.dash != second.dash


def test_pages_have_the_colours_and_the_font_of_the_pictures():
    page = rendered("figure.html.j2", title="a title", figure="", paragraphs=[])
    for name, colour in PALETTE.items():
        assert f"--{name}: {colour};" in page
    assert f"--font: {FONT};" in page
    circuit = files("dean_interp.report").joinpath("circuit.html.j2").read_text(encoding="utf-8")
    assert {"orange", "blue", "yellow", "font"} <= set(re.findall(r"var\(--(\w+)\)", circuit))
    for path in files("dean_interp.report").iterdir():
        if path.name.endswith((".j2", ".css", ".js")):
            text = path.read_text(encoding="utf-8")
            assert not re.search("|".join(PALETTE.values()), text, re.IGNORECASE), (
                f"{path.name} has a colour of its own"
            )
            assert "system-ui" not in text, f"{path.name} has a font of its own"


def test_the_live_view_has_the_colours_of_the_pictures():
    """It also stands in notebooks, where no page gives it variables."""
    text = files("dean_interp.exploring").joinpath("explore.css").read_text(encoding="utf-8")
    light, dark = (re.search(pattern, text)[0] for pattern in (r"\.dean-explore \{.*", r"\[data-theme=\"dark\"\] \{.*"))
    assert f"--first: {PALETTE['blue'].lower()};" in light and f"--first: {PALETTE['sky'].lower()};" in dark


def test_a_printed_page_is_dark_on_white_whatever_the_screen_is():
    style = files("dean_interp.report").joinpath("style.css").read_text(encoding="utf-8")
    assert "@media screen and (prefers-color-scheme: dark)" in style and style.count("prefers-color-scheme") == 1
    assert "@media print" in style and "color-scheme: light;" in style.partition("@media print")[2]


def test_an_element_holds_picture_caption_and_exactly_the_data(picture):
    element = str(figure_element(picture, "A <title> & more"))
    (figure,) = figures_of(element)
    assert figure.caption == f"A <title> & more. {picture.caption} n: {picture.n}."
    assert figure.file == "a_title_more.csv" and list(figure.rows[0]) == list(picture.data)
    for column in picture.data.select_dtypes("number"):
        written = [float(row[column] or "nan") for row in figure.rows]
        assert np.array_equal(written, picture.data[column].to_numpy(float), equal_nan=True), "not one digit is lost"
    assert element.startswith("<figure><svg ") and not re.findall(r'(?:src|href)="(?!#|data:)[^"]+"', element)


def test_text_in_a_picture_stays_text_and_has_the_font_of_pages(picture):
    svg = to_svg(picture.figure, "a title")
    styles = re.findall(r'<text style="([^"]*)', svg)
    assert len(styles) > 3 and all(FONT in style and "DejaVu" not in style for style in styles)
    assert min(float(re.search(r"([\d.]+)px", style)[1]) for style in styles) >= 8


def test_a_picture_as_a_file_has_its_data_beside_it(pictures, tmp_path):
    write_picture(pictures["arms"], tmp_path, "gaussian.k5", "Margins")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gaussian.k5.csv", "gaussian.k5.svg"]
    assert (tmp_path / "gaussian.k5.csv").read_text() == csv_of(pictures["arms"].data)
    read = pd.read_csv(tmp_path / "gaussian.k5.csv")
    assert list(read) == list(pictures["arms"].data) and len(read) == len(pictures["arms"].data)


@pytest.mark.parametrize(
    ("title", "stem"), [("Margins by arm", "margins_by_arm"), ("../<b>Ä", "b"), ("$", "figure"), ("x" * 99, "x" * 60)]
)
def test_a_title_becomes_a_plain_file_name(title, stem):
    assert file_stem(title) == stem


def test_the_data_of_a_study_are_those_of_its_results():
    results = unit_results()
    data = effect_against_controls(results).data.set_index(["state", "behaviour"])
    for shown in results.states:
        for name, change in shown.change.items():
            if name in BEHAVIOURS:
                row = data.loc[(shown.name, name)]
                assert (row["mean_nats_per_token"], row["low_nats_per_token"]) == (change.mean, change.low)
                assert (row["high_nats_per_token"], row["n_clusters"]) == (change.high, change.n_clusters)
    assert list(coupled_per_layer(results).data["n_coupled_neurons"]) == list(results.coupled_per_layer)
    assert effect_against_controls(results).n == (
        "48 prompts of fairness from 12 topics, 48 prompts of privacy from 12 topics; 6 random controls"
    )


def test_the_data_of_an_improvement_are_those_of_its_results():
    found = improvement()
    data = margins_and_kl_by_dose(found).data
    assert sorted(set(data["dose"])) == [-1.0, 0.0, 0.5, 1.0], "with the original, at dose 0"
    for point in found.curve:
        rows = data[data["dose"] == point.dose]
        assert set(rows["kl_nats_per_token"]) == {point.kl}
        assert dict(zip(rows["behaviour"], rows["mean_nats_per_token"], strict=True)) == {
            name: change.mean for name, change in point.change.items()
        }


def test_a_frontier_without_points_and_a_sweep_of_one_unit_are_drawn():
    whole = frontier()
    empty = dataclasses.replace(whole, arms=())
    assert damage_and_rise(empty).n == "0 arms" and len(damage_and_rise(empty).data) == 0
    found = sweep()
    assert len(sweep_plane(dataclasses.replace(found, points=found.points[:1])).data) == 3


def test_a_neuron_that_no_token_is_sent_to_is_drawn():
    unseen = dataclasses.replace(view(), activations={"fairness": (0, 0, 0)}, routed={"fairness": 0.0})
    assert activations_by_behaviour(unseen).n == "0 tokens of fairness"
