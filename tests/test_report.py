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
    information_per_layer,
    to_svg,
    verdicts_by_state,
)
from dean_interp.report.html import write_report

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
    assert text.count('<svg role="img"') == 9


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
    draws = (effect_against_controls, coupled_per_layer, coupling_against_chance, information_per_layer)
    drawn = [draw(one) for one in finished[1].units for draw in draws]
    for figure in (*drawn, verdicts_by_state(finished[1].spoken)):
        assert to_svg(figure, "title").startswith('<svg role="img" aria-label="title"')


def test_a_study_of_one_unit_without_answers_has_a_report_too(finished, tmp_path):  # noqa: F811
    results = finished[1]
    weights = dataclasses.replace(results, units=results.units[1:], spoken=None, neurons=(), texts=())
    text = write_report(weights, tmp_path).read_text()
    assert text.count("<svg") == 4 and "What the model answers" not in text


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
