import dataclasses
import re
import shutil
import subprocess

import pytest
from test_study import config, finished  # noqa: F401 - fixtures

from dean_interp.report.figures import (
    coupled_per_layer,
    coupling_against_chance,
    effect_against_controls,
    estimates_beside_truth,
    information_per_layer,
    power_by_prompts,
    to_svg,
    verdicts_by_state,
)
from dean_interp.report.html import write_information_report, write_report
from dean_interp.study.results import InformationResults, load_record, save_record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def report(finished, tmp_path_factory):  # noqa: F811
    return write_report(finished[1], tmp_path_factory.mktemp("report"))


def test_the_report_says_the_headline_and_every_state(report, finished):  # noqa: F811
    text = report.read_text()
    for one in finished[1].units:
        assert one.headline in text
        assert all(f"<td>{one.unit} {state.name}</td>" in text for state in one.states)
    assert all(f"<td>{state.name}</td>" in text for state in finished[1].spoken.states)
    assert text.count('<svg role="img"') == 11


def test_the_report_loads_nothing_from_a_network(report):
    text = report.read_text()
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?!#)[^"]+"', markup)
    assert "@import" not in markup and "unpkg.com" not in text
    assert len(text.encode()) < 5_000_000


def test_text_from_data_cannot_break_out_of_the_page(finished, tmp_path):  # noqa: F811
    results = finished[1]
    evil = dataclasses.replace(results.texts[0], tokens=("</script><b>x", *results.texts[0].tokens[1:]))
    text = write_report(dataclasses.replace(results, texts=(evil,)), tmp_path).read_text()
    assert "</script><b>x" not in text


def test_every_figure_draws(finished):  # noqa: F811
    draws = (effect_against_controls, coupled_per_layer, coupling_against_chance)
    drawn = [draw(one) for one in finished[1].units for draw in draws]
    drawn += [information_per_layer(one) for unit in finished[1].units for one in unit.information]
    drawn.append(power_by_prompts({"a fall": [0.2, 0.9]}, [24, 48]))
    drawn.append(estimates_beside_truth([("one", 0.4, 0.41, 0.3, 0.5)], "nats"))
    for figure in (*drawn, verdicts_by_state(finished[1].spoken)):
        assert to_svg(figure, "title").startswith('<svg role="img" aria-label="title"')


def test_the_page_of_estimands_holds_every_number_and_draws_every_variant(finished, tmp_path):  # noqa: F811
    informations = finished[1].of("neuron").information
    results = InformationResults("a model", {"silenced": "<b>some</b>", "command": "a command"}, informations)
    text = write_information_report(results, tmp_path).read_text()
    assert text.count('<svg role="img"') == 3 == len(list(tmp_path.glob("*.svg"))), "one and two variants"
    assert "&lt;b&gt;some" in text and "<b>some" not in text
    for one in informations:
        assert one.headline.split(";")[0] in text.replace("&gt;", ">")
        assert all(f"<td>{shift.place}</td>" in text for shift in one.shifts)
    save_record(results, tmp_path / "information.json")
    assert load_record(InformationResults, tmp_path / "information.json", "results") == results


def test_a_study_of_one_unit_without_answers_has_a_report_too(finished, tmp_path):  # noqa: F811
    results = finished[1]
    weights = dataclasses.replace(results, units=results.units[1:], spoken=None, neurons=(), texts=())
    text = write_report(weights, tmp_path).read_text()
    assert text.count("<svg") == 5 and "What the model answers" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_real_browser_draws_the_report_with_the_network_blocked(report, tmp_path):
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--v=0",
        "--virtual-time-budget=8000", "--dump-dom", report.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    faults = [line for line in done.stderr.splitlines() if "CONSOLE" in line and ("rror" in line or "ailed" in line)]
    assert not faults
    view = done.stdout[done.stdout.index('class="view"') :]
    assert view.count("<span") > 20, "the circuitsvis view is empty"
