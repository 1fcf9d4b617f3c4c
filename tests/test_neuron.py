"""One neuron from all sides: a planted neuron's page says what was planted."""

import dataclasses
import json
import re

import pytest
import torch
from architectures import build
from browser import needs_browser, opened
from conftest import unchecked
from page_figures import figures_of
from planted_coupling import LAYER, ONLY_G, SHARED, behaviour, planted_model

from dean_interp import (
    Example,
    InputError,
    ScoringConfig,
    Selection,
    Site,
    couple,
    importance,
    load_model,
    neuron_page,
)
from dean_interp.circuits.lens import logit_differences, written
from dean_interp.circuits.neuron import parse_neuron, read_texts, strongest_neurons, top_texts
from dean_interp.cli.main import main
from dean_interp.data.examples import draw
from dean_interp.report.page import power
from dean_interp.selection.gains import damage_of, gains_of

SITE = Site(LAYER, "neurons")
NAMES = ("fairness", "privacy", "general")


@pytest.fixture(scope="module")
def planted(tokenizer):
    return load_model(planted_model(tokenizer, shared=-2.0), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def tests():
    return [behaviour(letter, 500, 16) for letter in "fpg"]


@pytest.fixture(scope="module")
def scores(planted):
    return [importance(planted, behaviour(letter, 0, 24), config=ScoringConfig(template="raw")) for letter in "fpg"]


def look(model, index, examples, **options):
    return neuron_page(model, SITE, index, examples, template="raw", **options)


def test_a_planted_neuron_shows_its_ranks_its_effect_what_it_writes_and_who_holds_it(planted, tests, scores):
    held = {
        "coupled": couple(*scores, fraction=0.075).coupled,
        "other": Selection({SITE: torch.tensor([ONLY_G])}, {SITE: (planted.cfg.d_mlp,)}),
    }
    page = look(planted, SHARED, tests, scores=scores, selections=held, n_texts=5)
    view = page.view
    assert view.name == f"L{LAYER}.{SHARED}" and view.held_by == {"coupled": True, "other": False}
    assert view.scores.rank["fairness"] == view.scores.rank["privacy"] == 1 < view.scores.rank["general"]
    moved = {line.on: line.change for line in view.effect if line.metric.startswith("margin")}
    assert set(moved) == {"fairness", "privacy"} and all(one.low > 0.3 for one in moved.values())
    assert {line.on for line in view.effect if line.metric.startswith("KL")} == {"general"}
    assert (view.written.promoted[0][0], view.written.suppressed[0][0]) == ("N", "Y")
    assert len(view.texts) == 5 and {text.behaviour for text in view.texts} <= {"fairness", "privacy"}
    assert view.firing["fairness"] > view.firing["general"]
    assert all(sum(view.activations[one.name]) > 16 for one in tests), "every token is in the distribution"
    assert "silenced alone it moves the margin on fairness by +" in page.headline
    html = page.html()
    assert "In the selection <code>coupled</code>" in html and "Not in the selection <code>other</code>" in html
    assert not re.search(r"(src|href)=[\"']?http", html)
    (figure,) = figures_of(html)
    for name, counts in view.activations.items():
        assert figure.numbers("n_tokens", behaviour=name) == list(counts)
        assert f"{sum(counts):,} tokens of {name}" in figure.caption
    assert [*figure.numbers("activation_from", behaviour="fairness"), view.bins[-1]] == list(view.bins)


def test_a_neuron_of_another_behaviour_moves_no_margin(planted, tests):
    page = look(planted, ONLY_G, tests)
    assert "silenced alone it moves no margin clearly: each interval holds 0" in page.headline
    (loss,) = (line for line in page.view.effect if line.metric.startswith("loss"))
    assert loss.change.low > 0.1
    assert "No scores were given" in page.html()


def test_scores_that_hold_gains_are_shown_as_gains_with_their_sign(planted, tests):
    """The planted neuron lowers both margins: its gain is below 0, and to silence it raises them."""
    config = ScoringConfig(template="raw", target="margin", signed=True, groups="cluster")
    scores = [importance(planted, behaviour(letter, 0, 24), config=config) for letter in "fp"]
    fisher = ScoringConfig(template="raw", target="fisher", groups="cluster")
    scores.append(importance(planted, behaviour("g", 0, 24), config=fisher))
    page = look(planted, SHARED, tests[:2], scores=scores)
    shown = page.view.scores
    assert shown.measured_by == {"fairness": "gain", "privacy": "gain", "general": "damage"}
    moved = {line.on: line.change.mean for line in page.view.effect if line.metric.startswith("margin")}
    for of_one in scores[:2]:
        name, gains = of_one.behaviour, gains_of(of_one)
        assert shown.score[name] == float(gains.mean[SITE][SHARED]) < 0 < moved[name]
        assert shown.error[name] == float(gains.error[SITE][SHARED]) and shown.rank[name] == 1
        assert (
            f"<td>gain</td><td>{power(shown.score[name], signed=True)} ± {power(shown.error[name])}</td>" in page.html()
        )
    assert shown.score["general"] == float(damage_of(scores[2]).diagonal[SITE][SHARED]) >= 0
    assert "moves the margin by minus the gain" in page.html() and "score (nats)" not in page.html()


def test_calibration_examples_are_read_and_never_measured(planted):
    page = look(
        planted, SHARED, [behaviour("f", 0, 8), dataclasses.replace(behaviour("p", 900, 8), split="calibration")]
    )
    assert page.view.effect == () and page.view.texts and "Not measured" in page.html()


def test_text_of_examples_stays_text(planted):
    rows = tuple(Example(f"<script>alert({i})</script>", {"response": "gO"}) for i in range(4))
    page = look(planted, ONLY_G, [dataclasses.replace(behaviour("g", 0, 4), examples=rows)])
    assert page.html().count("<script") == 1, "the page's own"
    assert "<script" not in page._repr_html_()


@needs_browser
def test_a_browser_draws_the_page_and_a_notebooks_frame(planted, tests, tmp_path):
    page = look(planted, SHARED, tests[:1])
    assert opened(page.save(tmp_path / "neuron.html"), tmp_path).count('class="up"') > 3
    (tmp_path / "cell.html").write_text(f"<body>{page._repr_html_()}</body>")
    assert "<iframe" in opened(tmp_path / "cell.html", tmp_path)


def test_what_does_not_exist_is_named(planted, tests):
    with pytest.raises(InputError, match=r"no neuron L1\.40: this model has layers 0 to 2 of 40 neurons \(0 to 39\)"):
        look(planted, 40, tests)
    with pytest.raises(InputError, match=r"no neuron L9\.0"):
        neuron_page(planted, Site(9, "neurons"), 0, tests)
    with unchecked(), pytest.raises(InputError, match=r"the site of a neuron must be a Site, .*; got 24"):
        neuron_page(planted, 24, 3, tests)
    with pytest.raises(InputError, match=r"L1\.out is a matrix of weights, and neurons are at the parts"):
        neuron_page(planted, Site(1, "out"), 3, tests)
    with pytest.raises(
        InputError, match=r"no part of a layer is named 'neuron' \(did you mean 'neurons'\?\): parts are"
    ):
        Site(1, "neuron")
    with pytest.raises(InputError, match="at least one behaviour"):
        look(planted, 1, [])
    with pytest.raises(InputError, match="at least one behaviour"):
        read_texts(planted, [(SITE, 1)], [], template="raw")
    with pytest.raises(InputError, match="at least one neuron"):
        top_texts(planted, [], tests, n_texts=1, template="raw")
    with pytest.raises(InputError, match=r"no neuron L1\.40"):
        top_texts(planted, [(SITE, 40)], tests, n_texts=1, template="raw")
    with pytest.raises(InputError, match=r"no neuron L1\.-1"):
        written(planted, [(SITE, -1)])
    for n in (-1, 0, 10**6):
        with pytest.raises(InputError, match=f"n_tokens must be from 1 to {planted.W_U.shape[1]} .*, got {n}"):
            written(planted, [(SITE, 1)], n_tokens=n)
    assert parse_neuron("L17.1042") == (Site(17, "neurons"), 1042)
    for name in ("17.1042", "L17", "L1.x", "L1.2.3"):
        with pytest.raises(InputError, match=r"as L17\.1042; got"):
            parse_neuron(name)


def test_a_text_longer_than_the_context_is_refused_before_any_pass(checkpoints):
    model = load_model(checkpoints["gpt2"], device="cpu")
    example = Example("a" * model.cfg.n_ctx, {"safe": "b", "unsafe": "c"})
    long = dataclasses.replace(behaviour("f", 0, 2), examples=(example,))
    with pytest.raises(InputError, match=f"tokens; the model takes {model.cfg.n_ctx}"):
        read_texts(model, [(Site(0, "neurons"), 1)], [long], template="raw")


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_what_a_neuron_writes_is_what_it_adds_to_the_logits_before_the_final_norm_divides(checkpoints, name):
    """A LayerNorm takes the mean of what is added off, an RMS norm does not."""
    model = load_model(checkpoints[name], device="cpu")
    layer = len(model.blocks) - 1
    row = model.blocks[layer].mlp.out.weight.detach()
    row = (row if name == "gpt2" else row.T)[7].double()
    residual = torch.linspace(-1, 2, len(row), dtype=torch.float64).flip(0).sin()
    norm = model.original_model.transformer.ln_f if name == "gpt2" else model.original_model.model.norm

    def undivided(residual):
        """The logits of a residual, times what the norm divides it by."""
        if name == "gpt2":
            residual = residual - residual.mean()
        return (residual * norm.weight.double()) @ model.W_U.double()

    expected = (undivided(residual + row) - undivided(residual)).detach()
    (look,) = written(model, [(Site(layer, "neurons"), 7)], n_tokens=5)
    assert [size for _, size in look.promoted] == pytest.approx(expected.topk(5).values.tolist(), rel=1e-4)
    tokens = [model.tokenizer.decode([token]) for token in expected.topk(5).indices.tolist()]
    assert [token for token, _ in look.promoted] == tokens
    best, worst = int(expected.argmax()), int(expected.argmin())
    differences = logit_differences(model, [best], [worst])[Site(layer, "neurons")]
    assert float(differences[7]) == pytest.approx(float(expected[best] - expected[worst]), rel=1e-4)


def test_the_logit_lens_needs_no_final_norm_and_refuses_an_unembedding_of_another_width(tokenizer):
    without_norm = build("openai-gpt", tokenizer)
    (look,) = written(without_norm, [(Site(0, "neurons"), 0)], n_tokens=3)
    assert len(look.promoted) == 3
    narrow = build("opt, narrow embeddings and norms behind", tokenizer)
    with pytest.raises(InputError, match=r"reads the residual stream: that of .* reads 10 numbers"):
        written(narrow, [(Site(0, "neurons"), 0)])


def test_a_number_below_1_is_refused_where_a_negative_one_would_take_all_but_the_last(planted, tests, scores):
    selection = couple(*scores, fraction=0.075).coupled
    for n in (0, -1):
        with pytest.raises(InputError, match=f"n_texts must be at least 1, got {n}"):
            look(planted, SHARED, tests, n_texts=n)
        with pytest.raises(InputError, match=f"n_texts must be at least 1, got {n}"):
            top_texts(planted, [(SITE, SHARED)], tests, n_texts=n, template="raw")
        with pytest.raises(InputError, match=f"n_neurons must be at least 1, got {n}"):
            strongest_neurons(selection, *scores[:2], n_neurons=n)
        with pytest.raises(InputError, match=f"n_examples must be at least 1, got {n}"):
            draw(tests[0], n)


@pytest.fixture
def run_folder(planted, tokenizer, scores, tmp_path):
    """What `dean-interp run` leaves of a study of the planted model."""
    planted_model(tokenizer, shared=-2.0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model, data = {"name": str(tmp_path / "model"), "template": "raw", "dtype": "float32"}, {}
    (tmp_path / "run" / "scores").mkdir(parents=True)
    for name, place, letter, one in zip(NAMES, ("first", "second", "general"), "fpg", scores, strict=True):
        rows = [{"prompt": e.prompt, **e.answers, "split": "test"} for e in behaviour(letter, 500, 16).examples]
        data[place] = str(tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        one.save(tmp_path / "run" / "scores" / f"{name}.safetensors")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": {"model": model, "data": data}, "data": {}}))
    couple(*scores, fraction=0.075).coupled.save(tmp_path / "run" / "selection.neuron.safetensors")
    return tmp_path / "run"


def test_the_command_takes_a_studys_model_data_scores_and_selections(run_folder, tmp_path, capsys):
    page = tmp_path / "pages" / "neuron.html"
    command = ["neuron", f"L{LAYER}.{SHARED}", "--run", str(run_folder), "--n-test", "12", "--out", str(page)]
    assert main([*command, "--json", "--answer-tokens", "None"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["held_by"] == {"selection.neuron": True} and record["scores"]["rank"]["fairness"] == 1
    assert f"dean-interp neuron L{LAYER}.{SHARED} --run {run_folder}" in page.read_text()
    assert main(["neuron", "L1.7", "--run", str(tmp_path)]) == 2
    assert "config.json is missing" in capsys.readouterr().err
