"""Records show themselves: a short repr, a table with the right rows, both in a notebook cell."""

import pytest
import torch
from planted_coupling import behaviour, planted_model

from dean_interp import Behaviour, Example, ScoringConfig, Selection, Site, couple, importance, load_model, measure
from dean_interp.evaluation.lines import compare
from dean_interp.evaluation.outcomes import likelihoods
from dean_interp.study.arm_results import ArmResults


@pytest.fixture(scope="module")
def model(tokenizer):
    return load_model(planted_model(tokenizer), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def scores(model):
    how = ScoringConfig(template="raw")
    return [importance(model, behaviour(letter, 0, 8), unit=("neuron", "weight"), config=how) for letter in "fpg"]


def test_scores_are_a_row_a_unit_highest_first_and_of_weights_what_was_kept(scores):
    table = scores[0].of("neuron").to_pandas()
    assert list(table) == ["layer", "part", "index", "score"] and len(table) == 3 * 40
    assert table.score.abs().is_monotonic_decreasing
    top = table.iloc[0]
    assert top.score == scores[0][Site(top.layer, "neurons")][top["index"]].item()
    kept = scores[0].of("weight").kept(0.01).to_pandas()
    assert list(kept) == ["layer", "part", "row", "column", "score"] and len(kept) == 9 * 9
    weight = kept.iloc[0]
    assert weight.score == scores[0][Site(weight.layer, weight.part)][weight.row, weight.column].item()


def test_a_selection_is_a_row_a_unit_and_an_empty_one_is_an_empty_table():
    one = Selection({Site(2, "out"): torch.tensor([5, 9])}, {Site(2, "out"): (3, 4)})
    assert one.to_pandas().to_dict("list") == {
        "layer": [2, 2], "part": ["out", "out"], "row": [1, 2], "column": [1, 1]}  # fmt: skip
    assert len((one - one).to_pandas()) == 0 and "0 of 12 units" in (one - one)._repr_html_()


def test_a_coupling_is_a_row_a_layer(scores):
    found = couple(*(one.of("neuron") for one in scores), fraction=0.075)
    table = found.to_pandas()
    assert list(table.layer) == [0, 1, 2] and table.coupled.sum() == len(found.coupled) > 0
    assert repr(found).startswith(f"Coupling({len(found.coupled)} coupled of {len(found.both)} in both tops")


def test_measurements_lines_and_arms_agree_with_their_numbers(model):
    tests = [behaviour(letter, 500, 12) for letter in "fg"]
    one = measure(model, tests, template="raw")
    table = one.to_pandas()
    margins = table[table.behaviour == "fairness"].margin
    assert len(table) == 24 and margins.mean() == pytest.approx(float(one["fairness"].margin.mean()))
    lines = tuple(compare(likelihoods(one, tests), likelihoods(one, tests)))
    arms = ArmResults("Nothing changes", "tiny", {}, ("Nothing.",), {"same": lines}).to_pandas()
    assert list(arms["metric"]) == [line.metric for line in lines] and set(arms.arm) == {"same"}
    assert (arms.change == 0).all()
    assert ArmResults("t", "m", {}, ("a", "b"), {}).to_pandas().conclusions.tolist() == ["a", "b"]


def test_reprs_are_short_and_cells_escape_text(model, scores):
    row = Example("<script>x</script>", {"response": "gO"})
    one = Behaviour("<b>", (row,) * 40)
    shown = one._repr_html_()
    assert "<script>" not in shown and "<b>" not in shown and "&lt;script&gt;" in shown
    measured = measure(model, [behaviour("f", 700, 4)], template="raw")
    for record in (one, *scores, measured, measured["fairness"]):
        assert len(repr(record)) < 200 and record._repr_html_().count("<tr") < 20, repr(record)
