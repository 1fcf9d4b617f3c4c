import dataclasses
import json
import re

import pytest
import tyro
from browser import needs_browser, opened
from page_figures import figures_of

from dean_interp.cli.main import main
from dean_interp.files import write_json
from dean_interp.report.html import options_of, write_comparison, write_information_report, write_report
from dean_interp.report.page import INTERVALS, minus
from dean_interp.report.pictures import to_svg
from dean_interp.report.study_figures import effect_against_controls
from dean_interp.study.config import StudyConfig
from dean_interp.study.controls import RANDOM_CONTROLS, RandomControl, size_matched
from dean_interp.study.results import InformationResults, load_record
from dean_interp.study.settings import AnswerConfig, ControlConfig, DataConfig, ModelConfig

pytestmark = [pytest.mark.slow, pytest.mark.product]


@pytest.fixture(scope="module")
def report(finished_study, tmp_path_factory):
    return write_report(finished_study[1], tmp_path_factory.mktemp("report"))


def test_the_report_says_the_headline_and_every_state(report, finished_study):
    text = report.read_text()
    for one in finished_study[1].units:
        assert minus(one.headline) in text
        assert all(f"<td>{one.unit} {state.name}</td>" in text for state in one.states)
    edits = [state for state in finished_study[1].answers.states if state.kind == "edit"]
    assert len(edits) == 2 and all(f"<th>{state.title}</th>" in text for state in edits)
    assert text.count('<svg role="img"') == 11 and text.count(INTERVALS) == 1


def test_the_report_shows_every_line_of_every_edit(report, finished_study):
    text = report.read_text()
    table = text[text.index("Everything that was measured") : text.index("What the model answers")]
    lines = [line for unit in finished_study[1].units for line in unit.edit.lines]
    assert {"margin of safe over unsafe", "KL on answers"} < {line.metric for line in lines}
    assert any(line.metric.startswith("incoherent answers") for line in lines)
    assert all(f'colspan="10">{line.metric} <span' in table for line in lines)
    assert table.count("<tr><td>") == len(lines)


def test_a_new_kind_of_control_and_a_new_measurement_appear_by_themselves(finished_study, tmp_path, monkeypatch):
    monkeypatch.setitem(RANDOM_CONTROLS, "third", RandomControl(size_matched, "same third thing"))
    results = finished_study[1]
    neurons = results.of("neuron")
    control = next(state for state in neurons.states if state.kind == "random")
    line = dataclasses.replace(neurons.edit.lines[0], metric="a new metric", on="a new set")
    edit = dataclasses.replace(neurons.edit, lines=(*neurons.edit.lines, line))
    states = (edit, *neurons.states[1:], dataclasses.replace(control, name="third 1", kind="third"))
    changed = dataclasses.replace(neurons, states=states)
    text = write_report(dataclasses.replace(results, units=(changed, *results.units[1:])), tmp_path).read_text()
    assert "<td>1 random, same third thing</td>" in text and "a new metric" in text and "<td>a new set</td>" in text
    assert "random, same third thing" in to_svg(effect_against_controls(changed).figure, "title")
    assert "random, same third thing" not in to_svg(effect_against_controls(neurons).figure, "title")


def test_the_report_loads_nothing_from_a_network(report):
    text = report.read_text()
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?!#|data:text/csv)[^"]+"', markup)
    assert "@import" not in markup and "unpkg.com" not in text
    assert len(text.encode()) < 5_000_000


def test_text_from_data_cannot_break_out_of_the_page(finished_study, tmp_path):
    results = finished_study[1]
    evil = dataclasses.replace(results.texts[0], tokens=("</script><b>x", *results.texts[0].tokens[1:]))
    text = write_report(dataclasses.replace(results, texts=(evil,)), tmp_path).read_text()
    assert "</script><b>x" not in text


def test_every_picture_of_the_report_has_its_n_and_the_numbers_of_the_results(report, finished_study):
    results = finished_study[1]
    figures = {figure.file: figure for figure in figures_of(report.read_text())}
    assert len(figures) == 11
    for unit in results.units:
        effect = figures[f"effect_of_the_{unit.unit}_edit_against_its_controls.csv"]
        for state in unit.states:
            for name, change in state.change.items():
                for column, value in (("mean", change.mean), ("low", change.low), ("high", change.high)):
                    assert effect.numbers(f"{column}_nats_per_token", state=state.name, behaviour=name) == [value]
        assert f"n: {unit.design.n_prompts} prompts of" in effect.caption
        layers = figures[f"coupled_{unit.unit}s_per_layer.csv"]
        assert layers.numbers(f"n_coupled_{unit.unit}s") == list(unit.coupled_per_layer)
        for information in unit.information:
            shown = figures[f"{information.estimand}_per_layer_{unit.unit}s.csv"]
            assert shown.numbers("change_of_excess_nats") == list(information.changes)
    (labels,) = (figure for figure in figures.values() if figure.caption.startswith("Labels of the answers"))
    for state in results.answers.states:
        for name, given in zip(results.answers.prompts, state.sets, strict=True):
            (share,) = labels.numbers("share_percent", prompts=name, state=state.title, label="refusal")
            assert share == 100 * given.labels.count("refusal") / len(given.labels)


def test_the_page_of_estimands_holds_every_number_and_draws_every_variant(finished_study, tmp_path):
    informations = finished_study[1].of("neuron").information
    results = InformationResults("a model", {"silenced": "<b>some</b>", "command": "a command"}, informations)
    text = write_information_report(results, tmp_path).read_text()
    assert len(figures_of(text)) == 3 == len(list(tmp_path.glob("*.svg"))), "one and two variants"
    for path in tmp_path.glob("*.svg"):
        assert path.with_name(f"{path.stem}.csv").is_file(), "the data of a picture stand beside it"
    for figure, one in zip(figures_of(text), [informations[0], informations[1], informations[1]], strict=True):
        assert f"n: {one.n_prompts} prompts" in figure.caption
        assert [int(row["layer"]) for row in figure.rows] == [shift.layers[0] for shift in one.layers]
    assert "&lt;b&gt;some" in text and "<b>some" not in text
    for one in informations:
        assert minus(one.headline.split(";")[0]) in text.replace("&gt;", ">")
        assert all(f"<td>{shift.place}</td>" in text for shift in one.shifts)
    write_json(tmp_path / "information.json", results)
    assert load_record(InformationResults, tmp_path / "information.json", "results") == results


def test_a_study_of_one_unit_without_answers_has_a_report_too(finished_study, tmp_path):
    results = finished_study[1]
    weights = dataclasses.replace(results, units=results.units[1:], answers=None, neurons=(), texts=())
    text = write_report(weights, tmp_path).read_text()
    assert text.count("<svg") == 5 and "What the model answers" not in text


@needs_browser
def test_a_real_browser_draws_the_report_with_the_network_blocked(report, tmp_path):
    page = opened(report, tmp_path)
    view = page[page.index('class="view"') :]
    assert view.count("<span") > 20, "the circuitsvis view is empty"


def test_several_runs_stand_on_one_page_with_what_differs_between_them(finished_study, tmp_path):
    results = finished_study[1]
    data = dataclasses.replace(results.config.data, seed=7)
    other = dataclasses.replace(results, config=dataclasses.replace(results.config, data=data), units=results.units[:1])
    text = write_comparison({"one": results, "<b>two": other}, tmp_path / "comparison.html").read_text()
    assert all(f"<td>one</td><td>{unit.unit}</td>" in text for unit in results.units)
    assert "<td>seed</td><td>0</td><td>7</td>" in text and text.count("<td>seed</td>") == 1
    assert "<td>model</td>" not in text, "what is the same is not listed"
    assert "--seed 7" in text and "<b>two" not in text and "&lt;b&gt;two" in text
    (figure,) = figures_of(text)
    for name, run in (("one", results), ("<b>two", other)):
        for unit in run.units:
            for behaviour, change in unit.edit.change.items():
                cells = {"panel": f"{behaviour} margin", "arm": f"{name}, {unit.unit}s"}
                assert figure.numbers("mean_nats_per_token", **cells) == [change.mean]


def test_the_command_on_a_page_makes_the_same_settings_again():
    config = StudyConfig(
        model=ModelConfig("a model", dtype="bfloat16"),
        data=DataConfig(first="a b.csv", n_test=16, answer_tokens=None),
        controls=ControlConfig(n_random=99),
        answers=AnswerConfig(over_refusal=(), answer_lengths=(8, 16), window=200),
        unit=("neuron",),
        neuron_fraction=(0.01, 0.02, 0.03),
        report_leaked=True,
    )
    words = options_of(config, StudyConfig())
    assert words[:4] == ["--model", "a model", "--dtype", "bfloat16"] and "--n-equal-kl" not in words
    settings = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    assert tyro.cli(StudyConfig, args=words, config=settings) == config
    assert options_of(StudyConfig(), StudyConfig()) == []


def test_the_command_reports_one_run_or_compares_several(finished_study, tmp_path, capsys):
    folder = str(finished_study[0])
    assert main(["report", folder, folder, "--out", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").is_file() and "both.html" in capsys.readouterr().out
    assert main(["report", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(finished_study[0] / "report.html")}
    assert main(["report"]) == 2 and "name at least one run folder" in capsys.readouterr().err


@needs_browser
def test_a_click_on_a_heading_sorts_by_numbers_and_a_second_click_turns_it_round(finished_study, tmp_path):
    results = finished_study[1]
    page = write_comparison({"one": results}, tmp_path / "comparison.html")
    silenced = [one.state("edit").n_units for one in results.units]
    assert silenced != sorted(silenced, reverse=True) or silenced != sorted(silenced)
    click = "document.querySelectorAll('table.sortable th')[2].click();"
    for clicks, order in ((1, sorted(silenced, reverse=True)), (2, sorted(silenced))):
        table = opened(page, tmp_path, then=click * clicks).split('class="sortable"')[1].split("</table>")[0]
        rows = re.findall(r"<td>(?:neuron|weight)</td><td>(\d+)</td>", table)
        assert list(map(int, rows)) == order
