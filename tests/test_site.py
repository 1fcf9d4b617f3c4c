"""Pages of a run's strongest units: linked to each other, found by a search, made once, and open to everybody."""

import csv
import dataclasses
import html
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import asked, axe, needs_browser, opened
from mixtures import save_mixture
from test_improve import pairs

import dean_interp
from dean_interp import (
    AnswerConfig,
    CalibrationConfig,
    ControlConfig,
    DataConfig,
    ImproveConfig,
    InputError,
    ModelConfig,
    StudyConfig,
    run_improve,
    run_study,
)
from dean_interp.circuits.neuron_view import view_neuron
from dean_interp.cli.main import main
from dean_interp.files import read_json, write_json
from dean_interp.models.neuron_names import neuron_of, parse_name
from dean_interp.report.improve_page import look_at
from dean_interp.report.page import power
from dean_interp.report.site import write_pages
from dean_interp.study import site_records
from dean_interp.study.improve_data import improve_data
from dean_interp.study.improvement import load_improvement
from dean_interp.study.site_records import CircuitRecord, PagesConfig, UnitRecord

FILES = Path(dean_interp.__file__).parent / "report"
FEW = PagesConfig(n_units=8, n_prompts=3, n_traced=1, n_checked=4, n_texts=3, answer_tokens=6)
NO_ANSWERS = AnswerConfig(n_answers=0, n_answer_controls=0)


def write_csv(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, str]:
    """Two sets of pairs, the first with a name that links and markup would trip over, and plain answers."""
    folder = tmp_path_factory.mktemp("sets")
    plain = [{"prompt": row["prompt"], "response": row["safe"], "topic": row["topic"]} for row in pairs("general text")]
    return {
        "first": write_csv(folder / 'a #1? <b>"%20.csv', pairs("one", n_each=1)),
        "second": write_csv(folder / "two.csv", pairs("two", n_each=1)),
        "general": write_csv(folder / "plain.csv", plain),
    }


def improve_run(model: Path, sets: dict[str, str], folder: Path) -> Path:
    config = ImproveConfig(
        model=ModelConfig(str(model), device="cpu"),
        **sets,
        register=None,
        max_kl=0.002,
        n_score=12,
        n_choose=4,
        n_confirm=8,
        n_flips=0,
        n_random=0,
        answers=NO_ANSWERS,
    )
    run_improve(config, folder)
    return folder


@pytest.fixture(scope="module")
def improved(checkpoints, sets, tmp_path_factory) -> Path:
    return improve_run(checkpoints["llama-gqa"], sets, tmp_path_factory.mktemp("improved") / "run")


@pytest.fixture(scope="module")
def site(improved, tmp_path_factory) -> Path:
    """The pages of an improvement. Tests leave them as they found them."""
    out = tmp_path_factory.mktemp("site")
    assert write_pages(improved, out, FEW) == out / "index.html"
    return out


class Anchors(HTMLParser):
    """The links of a page, what it loads, and its headings."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "a":
            self.links.append(values["href"])
        elif "src" in values or tag == "link":
            self.loaded.append(tag)


def refuse_broken_links(out: Path) -> int:
    """Every link leads to a file, and nothing is loaded; return the number of links."""
    n_links = 0
    for page in out.rglob("*.html"):
        found = Anchors(page)
        assert not found.loaded
        for link in found.links:
            # The data of a picture stand in the link itself.
            if link.startswith("data:text/csv"):
                continue
            assert (page.parent / unquote(link)).resolve().is_file(), f"{page.name}: {link}"
            n_links += 1
    return n_links


def units(out: Path) -> list[str]:
    return [name.removesuffix(".html") for name in re.findall(r'<td><a href="neurons/(.*?)"', text_of(out))]


def text_of(out: Path) -> str:
    return (out / "index.html").read_text(encoding="utf-8")


def circuits(out: Path) -> list[CircuitRecord]:
    return [read_json(path, CircuitRecord) for path in sorted((out / "records").glob("circuit.*.json"))]


def test_every_link_leads_to_a_file_and_nothing_is_loaded(site):
    assert refuse_broken_links(site) > 30
    assert len(units(site)) == len(set(units(site))) == 8
    assert {path.stem for path in (site / "neurons").glob("*.html")} == set(units(site))
    assert {path.name for path in (site / "circuits").glob("*.html")} == {"1.1.html", "2.1.html"}
    text = text_of(site)
    assert "<b>" not in text and 'a #1? <b>"%20' in html.unescape(text), "a behaviour's name stays text"


def test_an_edge_links_the_pages_of_both_its_units(site):
    linked = 0
    for record in circuits(site):
        for edge in record.circuit.inward:
            source, target = edge.source.name, edge.target.name
            assert f'<a href="{source}.html">' in (site / "neurons" / f"{target}.html").read_text()
            assert f'<a href="{target}.html">' in (site / "neurons" / f"{source}.html").read_text()
            linked += 1
    assert linked >= 8
    page = (site / "circuits" / "1.1.html").read_text()
    assert {name for name in units(site) if f'href="../neurons/{name}.html"' in page}


def test_prompts_are_the_first_ones_that_the_run_confirmed_on(site, improved):
    data = improve_data(load_improvement(improved).config)
    for record, behaviour in zip(circuits(site), data.confirming[:2], strict=True):
        assert (record.behaviour, record.number) == (behaviour.name, 1)
        assert record.prompt == behaviour.examples[0].prompt
    for path in (site / "records").glob("L*.json"):
        tokens = ["".join(text.tokens) for text in read_json(path, UnitRecord).view.texts]
        first = [example.prompt for behaviour in data.confirming for example in behaviour.examples[:3]]
        assert len(tokens) == 3 and all(any(prompt in text for prompt in first) for text in tokens)


def test_one_pass_for_all_units_says_what_a_look_at_each_says(site, improved):
    config = load_improvement(improved).config
    model = config.model.load()
    tests = [dataclasses.replace(each, examples=each.examples[:3]) for each in improve_data(config).confirming]
    for name in units(site)[:2]:
        kept = read_json(site / "records" / f"{name}.json", UnitRecord).view
        alone = view_neuron(model, neuron_of(model, parse_name(name)), tests, n_texts=3, answer_tokens=6)
        assert dataclasses.replace(kept, effect=(), scores=None) == dataclasses.replace(alone, effect=())
        changes = [[line.change.mean for line in view.effect] for view in (kept, alone)]
        assert changes[0] == pytest.approx(changes[1], abs=1e-6) and any(changes[0])


def test_an_improvements_units_are_those_its_report_names_with_their_gates(site, improved):
    neurons = load_improvement(improved).neurons
    assert units(site) == [neuron.name for neuron in neurons[:8]]
    for neuron in neurons[:8]:
        page = (site / "neurons" / f"{neuron.name}.html").read_text()
        assert f"Its gate is {neuron.multiplier:.2f}" in page
        assert all(f"<td>gain</td><td>{power(gain, signed=True)} ±" in page for gain in neuron.gain.values())


def test_the_command_of_the_report_shows_the_gains_that_the_site_shows(site, improved, tmp_path, capsys):
    improvement = load_improvement(improved)
    strongest = improvement.neurons[0]
    command = shlex.split(look_at(strongest, improved))[1:-1]
    assert main([*command, str(tmp_path / "neuron.html"), "--n-test", "4", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["scores"]
    assert list(shown["score"]) == [*improvement.behaviours, "plain"], "in the order of the run"
    assert shown["measured_by"] == dict(zip(shown["score"], ("gain", "gain", "damage"), strict=True))
    assert {name: shown["score"][name] for name in strongest.gain} == pytest.approx(strongest.gain)
    assert shown["score"]["plain"] == pytest.approx(strongest.damage)
    table = r'aria-label="How much it matters">.*?</table>'
    pages = [site / "neurons" / f"{strongest.name}.html", tmp_path / "neuron.html"]
    first, second = (re.search(table, page.read_text(), re.DOTALL) for page in pages)
    assert first and second and first[0] == second[0]


def test_titles_name_the_model_and_what_writes_nothing_is_not_said_to_write_less(site, improved):
    model = load_improvement(improved).config.model.title
    assert f"<h1>The 8 strongest units of {model}</h1>" in text_of(site)
    pages = "".join(page.read_text() for page in (site / "neurons").glob("*.html"))
    assert "Its gate is 0.00: it writes less" not in pages
    assert not re.search(r"<td>[+−]0\.0+</td>", pages), "0 has no sign"


@pytest.mark.slow
def test_a_studys_units_are_its_strongest_coupled_neurons_with_their_stability(checkpoints, tmp_path):
    config = StudyConfig(
        model=ModelConfig(str(checkpoints["llama-gqa"]), device="cpu"),
        data=DataConfig(n_test=12, n_general_test=12),
        calibration=CalibrationConfig(n_calibration=12),
        controls=ControlConfig(n_random=1, n_equal_kl=0),
        answers=NO_ANSWERS,
        unit=("neuron",),
        neuron_fraction=(0.2, 0.2, 0.05),
        information_fraction=0.3,
    )
    results = run_study(config, tmp_path / "run")
    out = write_pages(tmp_path / "run", tmp_path / "site", FEW).parent
    strongest = [neuron.name for neuron in results.neurons]
    assert units(out) == strongest and refuse_broken_links(out) > 20
    probability = results.of("neuron").chance.probability
    for name in strongest:
        page = (out / "neurons" / f"{name}.html").read_text()
        assert "It is silenced" in page and f"selected in {100 * probability[name]:.0f} % of the draws" in page
        assert "No scores were given" not in page


@pytest.mark.slow
def test_neurons_of_experts_have_pages_under_their_own_names(tokenizer, sets, tmp_path):
    model = save_mixture("qwen2_moe", tokenizer, tmp_path / "model")
    run = improve_run(model, sets, tmp_path / "run")
    out = write_pages(run, tmp_path / "site", dataclasses.replace(FEW, n_units=24)).parent
    names = units(out)
    assert any(re.fullmatch(r"L\d\.E\d\.\d+", name) for name in names)
    assert refuse_broken_links(out) > 60 and {path.stem for path in (out / "neurons").iterdir()} == {*names}


class Killed(Exception):
    """The process is gone."""


def killed_after(n_records: int, run: Path, out: Path) -> None:
    """Write pages until so many records are saved."""
    n_saved = 0

    def save(path: Path, record: object) -> None:
        nonlocal n_saved
        if n_saved == n_records:
            raise Killed
        n_saved += 1
        write_json(path, record)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(site_records, "write_json", save)
        write_pages(run, out, FEW)


def contents(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def times(out: Path) -> dict[str, int]:
    files = [path for path in out.rglob("*") if path.suffix in (".json", ".html") and path.name != "index.html"]
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in files}


def test_a_killed_call_goes_on_to_the_same_bytes_and_makes_no_record_twice(improved, tmp_path):
    out = tmp_path / "site"
    write_pages(improved, out, FEW)
    whole = contents(out)
    assert not [name for name in whole if "unfinished" in name]
    shutil.rmtree(out)
    for n_records in (0, 3, 5, 1):
        before = times(out)
        killed_after(n_records, improved, out)
        assert before.items() <= times(out).items() and len(times(out)) == len(before) + n_records
    write_pages(improved, out, FEW)
    assert contents(out) == whole


def test_what_is_made_is_not_made_again_and_loads_no_model(site, improved, monkeypatch):
    before = times(site)

    def load(_: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(ModelConfig, "load", load)
    write_pages(improved, site, FEW)
    assert times(site) == before and len(before) == 20


def test_what_changed_is_made_anew_and_nothing_else(site, improved, tmp_path, caplog):
    out = shutil.copytree(site, tmp_path / "site")
    (out / "neurons" / "mine.html").write_text("my own page")
    (out / "records" / f"{units(out)[2]}.json").write_text("{")
    damaged, before = units(out)[2], times(out)
    write_pages(improved, out, FEW)
    assert {name for name, time in times(out).items() if time != before[name]} == {f"records/{damaged}.json"}
    assert caplog.text.count(f"{damaged}.json is damaged") == 1
    # Fewer units: edges are traced among these, and the pages of the others go.
    gone, before = units(out)[-1], times(out)
    write_pages(improved, out, dataclasses.replace(FEW, n_units=7))
    after = times(out)
    assert f"neurons/{gone}.html" not in after and "neurons/mine.html" in after
    changed = {name for name, time in after.items() if time != before[name]}
    assert {f"records/circuit.{place}.1.json" for place in (1, 2)} <= changed
    assert not [name for name in changed if name.startswith("records/L")]
    assert refuse_broken_links(out) > 30


def test_a_run_whose_model_changed_is_refused(checkpoints, improved, tmp_path):
    run = shutil.copytree(improved, tmp_path / "run")
    for name in ("config.json", "results.json"):
        text = (run / name).read_text().replace(str(checkpoints["llama-gqa"]), str(checkpoints["qwen2"]))
        (run / name).write_text(text)
    with pytest.raises(InputError, match="are not those that the run was made with"):
        write_pages(run, tmp_path / "site", FEW)


def test_the_command_says_where_the_pages_are_and_what_cannot_be_done(site, improved, tmp_path, capsys):
    options = ["--n-units", "8", "--n-prompts", "3", "--n-traced", "1", "--n-checked", "4", "--n-texts", "3",
               "--answer-tokens", "6"]  # fmt: skip
    out = shutil.copytree(site, tmp_path / "site")
    assert main(["pages", str(improved), *options, "--out", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == {"index": str(out / "index.html"), "units": sorted(units(site))}
    assert f"dean-interp pages {improved} --n-units 8" in text_of(out)
    for arguments, said in (
        ([tmp_path], "no results in"),
        ([improved, "--n-units", "0"], "--n-units must be at least 1, got 0"),
        ([improved, "--n-traced", "9"], "--n-traced must be at most n_prompts (8), got 9"),
    ):
        assert main(["pages", *map(str, arguments), "--out", str(tmp_path / "none")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


SEEN = "const seen = [...rows].filter(row => !row.hidden).map(row => row.cells[0].textContent);"


@needs_browser
def test_search_and_filters_leave_the_units_that_were_asked_for(site, tmp_path):
    table = asked(
        site / "index.html",
        tmp_path,
        "return rows.map(row => ({...row.dataset, name: row.cells[0].textContent}))",
    )
    by_gate = [row["name"] for row in table if row["gate"] == "raised"]
    layer = table[0]["layer"]
    by_both = [row["name"] for row in table if row["gate"] == "raised" and row["layer"] == layer]
    assert 0 < len(by_gate) < 8
    answers = asked(
        site / "index.html",
        tmp_path,
        f"""
        const answers = [], put = (name, value) => {{
          form.elements[name].value = value;
          form.dispatchEvent(new Event("input"));
          {SEEN}
          answers.push([seen, count.textContent, location.hash]);
        }};
        put("gate", "raised"); put("layer", "{layer}"); put("words", "{by_gate[0].lower()} nothing");
        form.reset(); await new Promise(done => setTimeout(done)); put("words", "{table[1]["name"]}");
        return answers;
        """,
    )
    assert answers[0] == [by_gate, f"{len(by_gate)} of 8 units", "#gate=raised"]
    assert answers[1] == [by_both, f"{len(by_both)} of 8 units", f"#layer={layer}&gate=raised"]
    assert answers[2][:2] == [[], "0 of 8 units"]
    assert table[1]["name"] in answers[3][0] and len(answers[3][0]) < 8


@needs_browser
def test_an_address_that_holds_filters_opens_with_them(site, tmp_path):
    drawn = opened(site / "index.html", tmp_path, after="#gate=lowered")
    rows = re.findall(r'<tr data-layer="\d+" data-gate="(\w+)"[^>]*?( hidden="")?>', drawn)
    assert len(rows) == 8 and all((gate != "lowered") == bool(hidden) for gate, hidden in rows)


PAGE = "document.documentElement"


@needs_browser
@pytest.mark.parametrize("width", [1400, 390])
def test_a_circuit_is_as_wide_as_its_page_and_scrolls_inside_it_where_that_is_narrow(width, site, tmp_path):
    script = f"return [graph.getBoundingClientRect().width, frame.clientWidth, {PAGE}.clientWidth, narrowest]"
    graph, frame, page, narrowest = asked(site / "circuits" / "1.1.html", tmp_path, script, width=width)
    assert graph == max(frame, narrowest) and frame > page - 45
    assert (graph == frame) == (width == 1400)


@needs_browser
@pytest.mark.parametrize("page", ["index.html", "neuron", "circuits/1.1.html"])
def test_no_page_is_wider_than_a_phone(page, site, tmp_path):
    path = site / page if page != "neuron" else site / "neurons" / f"{units(site)[0]}.html"
    wide, page_width = asked(path, tmp_path, f"return [{PAGE}.scrollWidth, {PAGE}.clientWidth]", width=390)
    assert wide == page_width <= 390


@needs_browser
def test_a_circuit_is_worked_by_keyboard_and_leads_to_the_units_page(site, tmp_path):
    said = asked(
        site / "circuits" / "1.1.html",
        tmp_path,
        """
        const node = document.querySelector(".node.coupled"), status = document.getElementById("kept");
        const press = key => node.dispatchEvent(new KeyboardEvent("keydown", { key }));
        node.focus(); press("Enter");
        const link = status.querySelector("a").getAttribute("href");
        const on = node.getAttribute("aria-pressed");
        press(" ");
        return [on, link, node.dataset.key, node.getAttribute("aria-pressed"), status.textContent];
        """,
    )
    assert said[:2] == ["true", f"../neurons/{said[2].partition('@')[0]}.html"]
    assert said[3:] == ["false", "No unit is kept."]


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", ["index.html", "neuron", "circuits/1.1.html"])
def test_nothing_keeps_people_out_of_a_page(page, dark, site, tmp_path):
    """Labels, landmarks, roles, names and contrast, by axe-core."""
    path = site / page if page != "neuron" else site / "neurons" / f"{units(site)[0]}.html"
    faults = asked(
        path,
        tmp_path,
        f"""
        {axe()}
        const found = await axe.run();
        return [matchMedia("(prefers-color-scheme: dark)").matches, found.passes.map(rule => rule.id),
                found.violations.map(rule => [rule.id, rule.nodes.map(node => node.html + node.failureSummary)])];
        """,
        dark=dark,
    )
    assert faults[0] == dark and "color-contrast" in faults[1] and "region" in faults[1]
    assert not faults[2], faults[2]


def luminance(colour: str) -> float:
    """The relative luminance of a colour (WCAG 2.2)."""
    digits = colour.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(digit * 2 for digit in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_enough_on_both_backgrounds_of_both_schemes():
    """The colours of the style, those of a circuit's labels among them, which axe-core does not look at."""
    sheet = (FILES / "style.css").read_text(encoding="utf-8")
    schemes = re.findall(r":root \{([^}]*--ink.*?)\}", sheet)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w+)", scheme))
        for text in ("ink", "quiet", "edit", "holds", "link"):
            for paper in ("paper", "tint"):
                dark, light = sorted(luminance(colours[name]) for name in (text, paper))
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, paper, colours)
