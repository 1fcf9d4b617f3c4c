"""What is degenerate but legal ends in a report that says what could not be estimated, or in a sentence."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dean_interp import (
    GatingConfig,
    InputError,
    Selection,
    closed_form_gates,
    load_behaviour,
    load_model,
    trace_circuit,
)
from dean_interp.cli import main
from dean_interp.files import write_json
from dean_interp.information.activations import Activations
from dean_interp.information.before_after import BeforeAfter
from dean_interp.information.estimands import InformationArm, MutualInformationConfig
from dean_interp.models.sites import Site
from dean_interp.report.circuit_page import circuit_page
from dean_interp.selection.gains import Damage, Gains
from dean_interp.selection.size_at_kl import size_at_kl
from dean_interp.study.controls import refuse_without_controls
from dean_interp.study.results import StateResults, load_record, load_results

SHARED_TOPS = "no neuron that is left is in the top of one behaviour alone"


def written(path, name, columns="prompt,safe,unsafe"):
    answers = columns.count(",")
    rows = [f"{name} {i * 7919 % 1009} {i}?" + "".join(f",{word} {i % 5}" for word in ("yes", "no")[:answers])
            for i in range(60)]  # fmt: skip
    path.write_text("\n".join([columns, *rows]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def dead(one_layer, tmp_path_factory):
    """A checkpoint of one layer whose neurons are always 0."""
    folder = Path(shutil.copytree(one_layer, tmp_path_factory.mktemp("dead") / "model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    model.save_pretrained(folder)
    return folder


def selected(*neurons, n=40):
    return Selection({Site(0, "neurons"): torch.tensor(neurons, dtype=torch.int64)}, {Site(0, "neurons"): (n,)})


@pytest.mark.parametrize("second", ["a copy", "another"])
def test_behaviours_that_share_their_top_neurons_end_in_a_report_that_says_so(second, one_layer, tmp_path, capsys):
    first, general = written(tmp_path / "one.csv", "one"), written(tmp_path / "rest.csv", "rest", "prompt,response")
    other = tmp_path / "two.csv"
    if second == "a copy":
        shutil.copy(first, other)
    else:
        written(other, "two")
    sizes = "--n-calibration 8 --n-test 12 --n-general-test 4 --n-random 2 --n-equal-kl 0 --n-answers 0".split()
    units = ["--unit", "neuron", "--neuron-fraction", "0.4", "0.4", "0.1", "--information-fraction", "1"]
    sources = ["--first", first, "--second", str(other), "--general", general]
    out = tmp_path / "run"
    assert main.main(["run", "--model", str(one_layer), *sources, *sizes, *units, "--out", str(out)]) == 0
    sentence = f"downstream_mi: not estimated, since {SHARED_TOPS}"
    assert f"neurons: {sentence}" in capsys.readouterr().out
    for information in load_results(out / "results.json").of("neuron").information:
        assert all(information.not_estimated(variant) for variant in information.variants)
        assert all(not shift.is_estimated and shift.change == 0 for shift in information.shifts)
    page = " ".join((out / "report.html").read_text().split())
    assert "not estimated, since no neuron that is left is in the top of one behaviour alone" in page
    assert main.main(["verify", str(out)]) == 0


def activations(values):
    """Activations of some layers of two neurons each: 24 prompts of two behaviours."""
    units = {Site(layer, "neurons"): torch.arange(each.shape[1]) for layer, each in enumerate(values)}
    groups = ("one",) * 12 + ("two",) * 12
    shapes = {site: (4,) for site in units}
    by_site = {Site(layer, "neurons"): each for layer, each in enumerate(values)}
    return Activations(by_site, Selection(units, shapes), groups, tuple(f"{g} {i}" for i, g in enumerate(groups)))


def test_a_layer_without_an_estimate_is_not_the_one_of_the_largest_fall():
    generator = torch.Generator().manual_seed(0)
    alive = torch.randn(24, 4, generator=generator)
    before, after = activations([torch.zeros(24, 4), alive]), activations([torch.zeros(24, 4), alive * 2 + 1])
    sites = [Site(layer, "neurons") for layer in range(2)]
    first, second, gone = (
        Selection({site: torch.tensor(units) for site in sites}, dict.fromkeys(sites, (4,)))
        for units in ([0, 1], [2], [3])
    )
    config = MutualInformationConfig(k=2, n_shuffles=9, n_null=9, n_subsamples=4)
    information = BeforeAfter(config, before, InformationArm(gone, first, second), ["one", "two"]).information(
        after, []
    )
    flags = {shift.place: shift.is_estimated for shift in information.of("")}
    assert flags["layer 0"] is False and flags["layer 1"] is True
    assert information.largest_fall_layer[""] == 1
    assert not information.not_estimated("") and not information.missing


def test_neurons_that_never_vary_give_a_record_that_says_so():
    constant = activations([torch.full((24, 4), 0.5)])
    config = MutualInformationConfig(k=2, n_shuffles=9, n_null=9, n_subsamples=4)
    arm = InformationArm(selected(3, n=4), selected(0, n=4), selected(1, n=4))
    information = BeforeAfter(config, constant, arm, ["one", "two"]).information(constant, [])
    reason = "every layer has a side without neurons, or whose neurons are the same on every prompt"
    assert information.missing == [f"downstream_mi: not estimated, since {reason}."]
    assert information.headline == information.missing[0] and str(information) == information.missing[0]


def test_an_edit_that_leaves_no_room_for_a_control_of_its_size_is_refused():
    refuse_without_controls(selected(*range(20)))
    with pytest.raises(InputError, match=r"holds 21 units and leaves 19 others .* take a smaller fraction"):
        refuse_without_controls(selected(*range(21)))


def test_a_circuit_of_dead_neurons_is_drawn(dead, tmp_path):
    model = load_model(dead, device="cpu")
    example = load_behaviour(written(tmp_path / "one.csv", "one"), n_examples=1, split="test").examples[0]
    circuit = trace_circuit(model, selected(0, 3), example, n_targets=2, n_sources=2, n_checked=2)
    assert not any(edge.predicted for edge in circuit.edges)
    page = circuit_page(model, selected(0, 3), example, n_targets=2, n_sources=2, n_checked=2)
    page.save(tmp_path / "circuit.html")
    assert "nan" not in (tmp_path / "circuit.html").read_text().lower().split("<svg")[1].split("</svg>")[0]


def gains(name, values):
    site = Site(0, "neurons")
    return Gains(name, {site: torch.tensor(values)}, {site: torch.zeros(len(values))}, 8, frozenset())


def test_a_behaviour_whose_answers_are_the_same_is_named_where_gates_are_asked_for():
    site = Site(0, "neurons")
    damage = Damage({site: torch.ones(2, 3)}, torch.tensor([4, 4]))
    alive, still = gains("one", [0.1, -0.2, 0.3]), gains("two", [0.0, 0.0, 0.0])
    for pair in ((alive, still), (still, alive)):
        with pytest.raises(InputError, match="no neuron moves the margin of two: every gain is 0"):
            closed_form_gates(*pair, damage)
    # a register set that no neuron tells apart has nothing to subtract
    plain = closed_form_gates(alive, alive, damage)
    against = closed_form_gates(alive, alive, damage, register=still, config=GatingConfig(against_register=1.0))
    assert torch.equal(plain.multipliers[site], against.multipliers[site])


@pytest.mark.parametrize("target", [0.0, 1e-9, 0.01])
def test_a_change_whose_kl_is_no_number_is_too_large(target):
    size, _ = size_at_kl(lambda size: math.nan if size > 0.5 else 0.02 * size, target, bounds=(0.05, 10.0))
    assert 0.05 <= size <= 10.0
    tried = []
    assert size_at_kl(lambda size: tried.append(size) or math.nan, target, bounds=(0.05, 10.0)) == (0.05, False)
    # Nothing smaller may be tried, and no size that is no number.
    assert tried == [1.0, 0.05]


def test_an_infinite_perplexity_is_read_back(tmp_path):
    results = StateResults("edit", "edit", 3, 1.0, (), perplexity=math.inf, kl=math.nan)
    write_json(tmp_path / "state.json", results)
    read = load_record(StateResults, tmp_path / "state.json", "state")
    assert read.perplexity == math.inf and math.isnan(read.kl)
    assert replace(read, kl=0.0) == replace(results, kl=0.0)
