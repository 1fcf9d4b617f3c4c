"""Text that would be markup stays text on every page, and a server's key stands in nothing that a command writes."""

import dataclasses
import json
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browser import needs_browser, opened
from page_figures import figures_of
from test_judges import KEY, completion, server

from dean_interp import (
    CircuitPage,
    Example,
    InputError,
    Selection,
    Site,
    load_behaviour,
    load_model,
    trace_circuit,
)
from dean_interp.cli.main import main
from dean_interp.evaluation.judges import make_judge
from dean_interp.report.figures import changes_by_arm
from dean_interp.report.html import (
    write_arms_report,
    write_comparison,
    write_figure_page,
    write_information_report,
    write_report,
    write_sweep_report,
)
from dean_interp.report.neuron_page import neuron_page
from dean_interp.study.arm_results import ArmResults
from dean_interp.study.config import StudyConfig, SweepConfig
from dean_interp.study.results import InformationResults
from dean_interp.study.run import run_study
from dean_interp.study.settings import AnswerConfig, CalibrationConfig, ControlConfig, DataConfig, ModelConfig
from dean_interp.study.study_data import test_sets
from dean_interp.study.sweep import run_sweep

pytestmark = pytest.mark.slow

ATTACKS = ("<script>document.body.id='hit'</script>", "</script><img src=x onerror=\"document.body.id='hit'\">",
           "\" onload=\"document.body.id='hit'", "' onmouseover='x", "{{7*7}}", "{% raw %}", "javascript:alert(1)",
           "<!--", "]]>", "&lt;i&gt;", "$\\frac{$", "\u2028</title></style></svg><b>")  # fmt: skip
NAMES = ("<script>{{7*7}}", '" onload="x\' $a$ &amp;', "<img src=x onerror=x>")
"""Of behaviours; a name holds no slash."""
CONTROLS = ControlConfig(n_random=1, n_equal_kl=1)


class Parsed(HTMLParser):
    """What a browser would take for markup, and for text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "a":
            self.links.append(str(dict(attrs).get("href")))

    def handle_data(self, data):
        self.text.append(data)


def refuse_markup(page: str, n_scripts: int) -> Parsed:
    """The page holds so many scripts of its own, and nothing that text brought in."""
    found = Parsed(page)
    assert found.tags.count("script") == n_scripts and found.tags.count("body") <= 1
    assert not [link for link in found.links if not link.startswith("data:text/csv;charset=utf-8,")]
    assert not {"img", "i", "iframe", "object", "base", "link", "form"} & {*found.tags}
    assert all(re.fullmatch("(?!on)[a-z0-9:_-]+", name) for name, _ in found.attributes)
    assert not [value for name, value in found.attributes if name in ("href", "src") and "javascript" in str(value)]
    return found


def rows(kind: str, n: int, split: str) -> list[dict[str, str]]:
    draw, found = random.Random(f"{kind} {split}"), []
    for i in range(n):
        words = " ".join("".join(draw.choices("abcdefghij", k=5)) for _ in range(10))
        answers = {"response": f"{ATTACKS[i % len(ATTACKS)]} {words[:9]}"} if kind == NAMES[2] else {
            "safe": f"No {ATTACKS[i % len(ATTACKS)]}", "unsafe": f"Yes {ATTACKS[-i % len(ATTACKS)]}"}  # fmt: skip
        found.append(
            {"prompt": f"{words} {ATTACKS[i % len(ATTACKS)]}", "topic": ATTACKS[i % 5], "split": split, **answers}
        )
    return found


@pytest.fixture(scope="module")
def hostile(one_layer, tmp_path_factory):
    """A study's settings: model, behaviours, prompts and answers are all named to break a page."""
    folder = tmp_path_factory.mktemp("hostile")
    model = folder / '<script>{{7*7}} " onload="x'
    shutil.copytree(one_layer, model)
    for name in NAMES:
        some = rows(name, 6, "calibration") + rows(name, 14, "test")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    first, second, general = (str(folder / f"{name}.jsonl") for name in NAMES)
    return StudyConfig(
        model=ModelConfig(str(model), device="cpu"),
        data=DataConfig(first, second, general, n_test=12, n_general_test=12, answer_tokens=4),
        calibration=CalibrationConfig(n_calibration=4),
        controls=CONTROLS,
        answers=AnswerConfig(over_refusal=(), n_answers=2, answer_lengths=(4,), n_answer_controls=1),
        neuron_fraction=0.1,
        weight_fraction=0.05,
        information_fraction=0.3,
    )


@pytest.fixture(scope="module")
def study(hostile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run_study(hostile, folder)


@pytest.fixture(scope="module")
def model(hostile):
    return load_model(hostile.model.name, device="cpu")


@pytest.fixture(scope="module")
def pages(hostile, study, model, tmp_path_factory) -> dict[str, Path]:
    """Every kind of page that the package writes."""
    folder, (run, results) = tmp_path_factory.mktemp("pages"), study
    everything, short = " ".join(ATTACKS), "</script><img src=x>{{7*7}}"
    texts = tuple(
        dataclasses.replace(one, tokens=tuple(ATTACKS[i % len(ATTACKS)] for i in range(len(one.tokens))))
        for one in results.texts
    )
    results = dataclasses.replace(results, texts=texts)
    tests, _ = test_sets(hostile.data)
    site = Site(0, "neurons")
    chosen = Selection({site: torch.tensor([1, 3])}, {site: (model.cfg.d_mlp,)})
    neuron = neuron_page(model, site, 3, tests, selections={everything: chosen}, answer_tokens=4)
    example = Example(ATTACKS[0], {"safe": ATTACKS[1], "unsafe": ATTACKS[2]})
    circuit = trace_circuit(model, chosen, example, n_targets=2, n_checked=6)
    tried = SweepConfig(
        model=hostile.model,
        data=hostile.data,
        calibration=hostile.calibration,
        neuron_fractions=(0.1,),
        weight_fractions=(0.05,),
        controls=CONTROLS,
    )
    sweep = run_sweep(tried, folder / "sweep")
    lines = tuple(dataclasses.replace(line, metric=everything, on=everything) for line in neuron.view.effect[:1])
    arms = ArmResults(everything, everything, {everything: everything, "command": everything}, (everything,),
                      {everything: lines})  # fmt: skip
    picture = changes_by_arm({short: {short: lines[0].change}}, short)
    facts = {"silenced": everything, everything: everything, "command": everything}
    information = InformationResults(everything, facts, results.of("neuron").information)
    return {
        "report": write_report(results, run),
        "comparison": write_comparison({short: results, "b": results}, folder / "comparison.html"),
        "sweep": write_sweep_report(sweep, folder),
        "information": write_information_report(information, folder),
        "arms": write_arms_report(arms, folder, {"Margins <script>": picture}),
        "figure": write_figure_page(folder / "figure.html", title=everything, text=everything, picture=picture),
        "neuron": dataclasses.replace(neuron, command=everything).save(folder / "neuron.html"),
        "circuit": CircuitPage(circuit, title=everything, command=everything).save(folder / "circuit.html"),
    }


KINDS = {"report": 2, "comparison": 1, "sweep": 1, "information": 1, "arms": 1, "figure": 1, "neuron": 1, "circuit": 1}
"""Pages, and how many scripts they hold: one sorts tables, and the report has circuitsvis' own."""


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_would_be_markup_stays_text(kind, pages):
    found = refuse_markup(pages[kind].read_text(), KINDS[kind])
    text = "".join(found.text)
    assert "{{7*7}}" in text and "<script>" in text, "nothing was calculated, nothing was lost"
    assert "mathdefault" not in text, "labels of axes are no mathematics"
    for figure in pages[kind].parent.glob("*.svg"):
        refuse_markup(figure.read_text(), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_of_every_page_has_its_n_and_its_data(kind, pages):
    n_pictures = {"report": 11, "information": 3, "circuit": 2}
    assert len(figures_of(pages[kind].read_text())) == n_pictures.get(kind, 1)


@needs_browser
@pytest.mark.parametrize("kind", ["report", "neuron", "circuit"])
def test_a_real_browser_runs_nothing_that_text_brought_in(kind, pages, tmp_path):
    drawn = opened(pages[kind], tmp_path)
    assert "<body>" in drawn and 'id="hit"' not in drawn


def test_tables_in_notebooks_are_text_too(hostile, study):
    behaviour = load_behaviour(hostile.data.first, n_examples=4)
    for shown in (behaviour, study[1], study[1].units[0]):
        refuse_markup(shown._repr_html_(), 0)
    assert "&lt;script&gt;" in behaviour._repr_html_()


def test_a_servers_key_is_in_nothing_that_a_command_writes(one_layer, tmp_path, monkeypatch, capfd, caplog):
    """Not where the server refuses it, nor where it repeats it."""
    for name in ("OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, KEY)
    site = Site(0, "neurons")
    Selection({site: torch.tensor([1, 3])}, {site: (40,)}).save(tmp_path / "selection.safetensors")
    text = tmp_path / "text.txt"
    text.write_text("A pawn that reaches the last rank becomes a queen. " * 20)
    said = [completion(f"no, {KEY}"), (401, json.dumps({"error": {"message": f"wrong key {KEY}"}})), completion("yes")]
    with caplog.at_level("DEBUG"), server(lambda n, _: said[n % 3]) as served:
        step = ["evaluate", tmp_path / "selection.safetensors", "--out", tmp_path / "out", "--model", one_layer,
                "--device", "cpu", "--n-test", 12, "--n-general-test", 4, "--answer-tokens", 4, "--n-answers", 4,
                "--answer-lengths", 2, "--text", text, "--window", 200, "--judges", f"server:m@{served.url}",
                "--debug"]  # fmt: skip
        assert main([*map(str, step)]) == 0
    assert {*served.keys} == {f"Bearer {KEY}"}
    told = [*capfd.readouterr(), caplog.text, *(str(path) for path in tmp_path.rglob("*"))]
    told += [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert any("[key]" in text for text in told) and not any(KEY in text for text in told)


@pytest.mark.parametrize("url", [f"http://me:{KEY}@localhost:1/v1", f"http://localhost:1/v1?key={KEY}"])
def test_an_address_that_holds_a_key_is_refused_without_repeating_it(url):
    with pytest.raises(InputError, match="must hold no user, password or query") as error:
        make_judge(f"server:m@{url}")
    assert KEY not in str(error.value)
