"""A change at any dose: what the view shows is what `measure` and `generate` give under the change."""

import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
from browser import needs_browser, opened
from units import some_neurons, some_weights

from dean_interp import (
    Behaviour,
    Example,
    ExploreConfig,
    Gates,
    InputError,
    Scores,
    ablate,
    create_edit,
    explore,
    explore_page,
    gated,
    generate,
    measure,
)
from dean_interp.cli.main import main
from dean_interp.editing.edit_at_dose import as_hooks, at_dose
from dean_interp.exploring import explorer as explorer_module
from dean_interp.exploring.explorer import Explorer, ViewRequest
from dean_interp.exploring.held_out import held_out, unscored
from dean_interp.exploring.unit_table import Switches, unit_table
from dean_interp.exploring.view_state import view_state
from dean_interp.models.generate import answer_stream
from dean_interp.models.matrices import neuron_sites
from dean_interp.models.native_tokenizer import native_tokenizer

TESTS = Path(__file__).parent
LENGTH = 6
CONFIG = ExploreConfig(template="raw", answer_tokens=4, answer_length=LENGTH)
PROMPTS = ("Hello?", "And now?")
PAIRS = [
    Behaviour(
        name,
        tuple(Example(f"{name} {i}?", {"safe": f"no, {i}", "unsafe": f"yes {i}"}) for i in range(2)),
        split="test",
    )
    for name in ("first", "second")
]
TEXT = Behaviour("text", tuple(Example(f"tell {i}", {"response": f"once {i} upon"}) for i in range(3)), split="test")


def some_gates(model, seed=0, prompt_hashes=frozenset()):
    """Gates from 0.5 to 1.5, which change answers."""
    generator = torch.Generator().manual_seed(seed)
    gates = {site: 0.5 + torch.rand(model.cfg.d_mlp, generator=generator) for site in neuron_sites(model)}
    return Gates(gates, prompt_hashes)


def logits_of(model, text):
    ids = torch.tensor([native_tokenizer(model)(text).input_ids])
    with torch.inference_mode():
        return model(ids, return_type="logits")


def some_scores(model, behaviour, seed):
    generator = torch.Generator().manual_seed(seed)
    values = {site: torch.rand(model.cfg.d_mlp, generator=generator) for site in neuron_sites(model)}
    return Scores(behaviour, values, {}, {}, {}, torch.zeros(0), frozenset(), "", {"method": "random"})


def measured(model, change):
    return held_out(model, change, PAIRS, TEXT, config=CONFIG)


def shown(model, change, dose, units=None):
    units = as_hooks(change)[0] if units is None else units
    return view_state(model, change, measured(model, change), PROMPTS, dose=dose, units=units)


def margins(state):
    return [margin.edited for margin in state.margins]


def probabilities(state):
    return [{token.token: token.edited for token in following.tokens} for following in state.following]


@pytest.fixture(scope="module")
def original(llama):
    return measure(llama, [*PAIRS, TEXT], template="raw", answer_tokens=4)


def margins_now(model):
    now = measure(model, PAIRS, template="raw", answer_tokens=4)
    return [margin for behaviour in PAIRS for margin in now[behaviour.name].margin.tolist()]


# What is measured


def test_at_dose_0_the_state_is_the_originals_and_costs_nothing(llama):
    state = shown(llama, some_gates(llama), 0.0)
    assert margins(state) == [margin.original for margin in state.margins] == pytest.approx(margins_now(llama))
    assert state.kl == 0
    for following in state.following:
        assert all(token.original == token.edited for token in following.tokens)


@pytest.mark.parametrize("kind", ["gates", "neurons", "weights", "edit"])
def test_at_dose_1_the_state_is_that_of_the_changed_model(llama, original, kind):
    weights = some_weights(llama, n=40)
    change, by_hooks = {
        "gates": lambda: (some_gates(llama), gated(llama, some_gates(llama))),
        "neurons": lambda: (some_neurons(llama, n=30), ablate(llama, some_neurons(llama, n=30))),
        "weights": lambda: (weights, ablate(llama, weights)),
        "edit": lambda: (create_edit(llama, weights), ablate(llama, weights)),
    }[kind]()
    state = shown(llama, change, 1.0)
    with by_hooks:
        expected = margins_now(llama)
        kl = measure(llama, [TEXT], original=original, template="raw", answer_tokens=4)["text"].mean_kl
        logits = [logits_of(llama, f"{prompt}\n") for prompt in PROMPTS]
    assert margins(state) == pytest.approx(expected, abs=1e-5)
    assert margins(state) != pytest.approx([margin.original for margin in state.margins], abs=1e-4)
    assert state.kl == pytest.approx(kl, abs=1e-6) and state.kl > 0
    for logit, following in zip(logits, state.following, strict=True):
        likeliest = int(logit[0, -1].argmax())
        best = max(following.tokens, key=lambda token: token.edited)
        assert best.token == native_tokenizer(llama).decode([likeliest])
        assert best.edited == pytest.approx(float(logit[0, -1].softmax(-1)[likeliest]), abs=1e-5)


def test_next_tokens_are_the_likeliest_of_both_models(llama):
    for following in shown(llama, some_gates(llama), 1.0).following:
        either = [max(token.original, token.edited) for token in following.tokens]
        assert either == sorted(either, reverse=True) and 0 < sum(token.original for token in following.tokens) <= 1


def test_with_all_units_off_the_state_is_the_originals(llama):
    gates = some_gates(llama)
    layers = frozenset(range(llama.cfg.n_layers))
    none = unit_table(llama, gates).on(Switches(layers=layers))
    state = shown(llama, gates, 2.0, none)
    assert state.n_on == 0 and state.kl == 0
    assert margins(state) == [margin.original for margin in state.margins]


def test_with_some_units_off_the_others_alone_change_the_model(llama):
    gates = some_gates(llama)
    table = unit_table(llama, gates)
    off = table.listed[0]
    on = table.on(Switches(layers=frozenset({1}), units=frozenset({off.name})))
    multipliers = {site: gate.clone() for site, gate in gates.multipliers.items()}
    multipliers[neuron_sites(llama)[1]].fill_(1.0)
    multipliers[off.site][off.unit] = 1.0
    state = shown(llama, gates, 1.0, on)
    with gated(llama, Gates(multipliers)):
        assert margins(state) == pytest.approx(margins_now(llama), abs=1e-5)
    assert state.n_on == len(gates) - llama.cfg.d_mlp - 1


def test_a_part_of_an_edit_of_weights_is_the_ablation_of_that_part(llama):
    weights = some_weights(llama, n=40)
    part = dataclasses.replace(weights, units={site: units[::2] for site, units in weights.units.items()})
    with ablate(llama, part):
        expected = logits_of(llama, "hello")
    for change in (weights, create_edit(llama, weights)):
        with at_dose(llama, change, 1.0, units=part):
            torch.testing.assert_close(logits_of(llama, "hello"), expected, atol=1e-5, rtol=1e-4)


# Units


def test_units_are_switched_by_layer_by_behaviour_and_one_by_one(llama):
    gates = some_gates(llama)
    scores = [some_scores(llama, "first", 1), some_scores(llama, "second", 2)]
    table = unit_table(llama, gates, scores)
    n_layers, d_mlp = llama.cfg.n_layers, llama.cfg.d_mlp
    assert table.n_by_layer == dict.fromkeys(range(n_layers), d_mlp)
    assert sum(table.n_by_behaviour.values()) == len(gates) == len(table.on(Switches()))
    on = table.on(Switches(layers=frozenset({0}), behaviours=frozenset({"first"})))
    for site in neuron_sites(llama):
        values = [each[site] for each in scores]
        rank_of = [value.argsort(descending=True).argsort() for value in values]
        expected = (rank_of[1] < rank_of[0]).nonzero()[:, 0] if site.layer else torch.zeros(0, dtype=torch.int64)
        assert on.units[site].tolist() == expected.tolist()
    one = table.listed[3]
    (off,) = (unit for unit in table.listed if unit.name == one.name)
    left = table.on(Switches(units=frozenset({one.name})))
    assert len(left) == len(gates) - 1 and off.unit not in left.units[off.site]


def test_the_rows_of_a_layer_begin_with_its_largest_change(llama):
    table = unit_table(llama, some_gates(llama))
    for site in neuron_sites(llama):
        changes = [abs(unit.change) for unit in table.listed if unit.site == site]
        largest = float((some_gates(llama).multipliers[site] - 1).abs().max())
        assert changes == sorted(changes, reverse=True) and changes[0] == pytest.approx(largest)


def test_units_that_the_change_does_not_hold_cannot_be_switched(llama):
    table = unit_table(llama, some_gates(llama))
    for switches in (
        Switches(layers=frozenset({9})),
        Switches(behaviours=frozenset({"first"})),
        Switches(units=frozenset({"L0.999"})),
    ):
        with pytest.raises(InputError, match="so it cannot be switched off"):
            table.on(switches)
    with pytest.raises(InputError, match="one set of scores a behaviour"):
        unit_table(llama, some_gates(llama), [some_scores(llama, "first", 1)] * 2)
    with pytest.raises(InputError, match="of the shape that the change has"):
        unit_table(llama, some_weights(llama), [some_scores(llama, "first", 1)])


# Scored prompts


def test_prompts_that_made_the_change_are_refused_left_out_or_marked(llama):
    gates = some_gates(llama, prompt_hashes=PAIRS[0].prompt_hashes)
    with pytest.raises(InputError, match="prompts of 'first' were scored"):
        measured(llama, gates)
    whole = unscored("privacy", 20, frozenset())
    made_from = dataclasses.replace(whole, examples=whole.examples[:12]).prompt_hashes
    left = unscored("privacy", 20, made_from)
    assert not left.prompts_among(made_from) and len(left) == 20
    gates = some_gates(llama, prompt_hashes=TEXT.prompt_hashes | {"other"})
    held = held_out(llama, some_gates(llama), PAIRS, TEXT, config=CONFIG)
    held = dataclasses.replace(held, scored=gates.prompt_hashes)
    state = view_state(llama, gates, held, ["Tell 1!", "hello"], dose=0.0, units=gates.selection)
    assert [following.was_scored for following in state.following] == [True, False]


def test_what_cannot_be_measured_is_refused(llama, one_layer):
    from dean_interp import load_model

    gates = some_gates(llama)
    with pytest.raises(InputError, match="at least one behaviour"):
        held_out(llama, gates, [], TEXT, config=CONFIG)
    with pytest.raises(InputError, match="'text' has prompts without a safe and an unsafe answer"):
        held_out(llama, gates, [TEXT], TEXT, config=CONFIG)
    with pytest.raises(InputError, match="general text has one answer a prompt"):
        held_out(llama, gates, PAIRS, PAIRS[0], config=CONFIG)
    with pytest.raises(InputError, match="is not of this model"):
        measured(load_model(one_layer, device="cpu"), gates)
    with pytest.raises(InputError, match="answer_length must be at least 1"):
        held_out(llama, gates, PAIRS, TEXT, config=ExploreConfig(answer_length=0))
    held = measured(llama, gates)
    for prompt, said in (("  ", "the prompt is blank"), ("a" * 1020, "more than the 1024 that the model takes")):
        with pytest.raises(InputError, match=said):
            view_state(llama, gates, held, [prompt], dose=1.0, units=gates.selection)


# Answers, token by token


def test_an_answer_grows_to_what_generate_gives_and_leaves_the_model_alone_between_tokens(tiny):
    gates = some_gates(tiny) * 2
    before = logits_of(tiny, "hello")
    with gated(tiny, gates):
        expected = generate(tiny, ["Hello?"], max_new_tokens=LENGTH, template="raw")[0]
    plain = generate(tiny, ["Hello?"], max_new_tokens=LENGTH, template="raw")[0]
    options = {"max_new_tokens": LENGTH, "template": "raw"}
    edited = answer_stream(tiny, "Hello?", under=at_dose(tiny, gates, 1.0), **options)
    original = answer_stream(tiny, "Hello?", under=at_dose(tiny, gates, 0.0), **options)
    texts = []
    for pair in zip(edited, original, strict=True):
        texts.append(pair)
        assert torch.equal(logits_of(tiny, "hello"), before)
    assert texts[-1] == (expected, plain)
    with at_dose(tiny, gates, 1.0):
        assert not torch.allclose(logits_of(tiny, "hello"), before, atol=0.01)
    assert len(texts) == LENGTH and len(texts[0][0]) <= len(texts[-1][0])


# Requests


@pytest.fixture
def widget(llama):
    made = explore(llama, some_gates(llama), behaviours=PAIRS, general=TEXT, dose=0.5, config=CONFIG,
                   scores=[some_scores(llama, "first", 1), some_scores(llama, "second", 2)])  # fmt: skip
    yield made
    made.close()


def sent(widget, name, value):
    """What a browser sends when it changes a trait."""
    widget._handle_msg({"content": {"data": {"method": "update", "state": {name: value}}}, "buffers": []})


def request(number, dose=1.0, prompt="Hello?", **switches):
    off = {"layers_off": [], "behaviours_off": [], "units_off": []}
    return {"number": number, "dose": dose, "prompt": prompt, **off, **switches}


def test_the_widget_answers_a_message_with_the_numbers_of_view_state(widget, llama):
    gates = some_gates(llama)
    assert widget.state["dose"] == 0.5 and widget.state["request"] == 1
    for number, (dose, layers) in enumerate([(1, [1]), (1.5, []), (0, [0])], 2):
        sent(widget, "request", request(number, dose, layers_off=layers))
        units = unit_table(llama, gates).on(Switches(layers=frozenset(layers)))
        expected = shown(llama, gates, float(dose), units)
        state = widget.state
        assert (state["request"], state["dose"], state["n_on"]) == (number, dose, len(units))
        assert state["kl"] == pytest.approx(expected.kl, abs=1e-6)
        assert [margin["edited"] for margin in state["margins"]] == pytest.approx(margins(expected), abs=1e-5)
        assert state["following"][0]["prompt"] == "Hello?"
        tokens = {token["token"]: token["edited"] for token in state["following"][0]["tokens"]}
        assert tokens == pytest.approx(probabilities(expected)[0], abs=1e-5)


def test_an_older_request_is_dropped(widget):
    sent(widget, "request", request(9, 2.0))
    state = widget.state
    sent(widget, "request", request(8, 0.0))
    assert widget.state == state and state["dose"] == 2.0
    sent(widget, "wanted", {"request": 8, "step": 1})
    assert widget.answers == {}


def test_both_answers_grow_by_a_token_a_message_to_what_generate_gives(widget, llama):
    sent(widget, "request", request(2, 1.0))
    texts = []
    for step in range(1, LENGTH + 2):
        sent(widget, "wanted", {"request": 2, "step": step})
        texts.append(widget.answers)
    plain = generate(llama, ["Hello?"], max_new_tokens=LENGTH, template="raw")[0]
    with gated(llama, some_gates(llama)):
        changed = generate(llama, ["Hello?"], max_new_tokens=LENGTH, template="raw")[0]
    assert (texts[-1]["original"], texts[-1]["edited"], texts[-1]["is_done"]) == (plain, changed, True)
    assert not texts[0]["is_done"] and texts[0]["edited"] != changed
    # The original's answer stays where the dose alone changes.
    sent(widget, "request", request(3, 0.0))
    sent(widget, "wanted", {"request": 3, "step": 1})
    assert widget.answers["original"] == plain != widget.answers["edited"]


def test_margins_are_measured_once_for_a_dose_and_its_switches(llama, monkeypatch):
    calls, gates = [], some_gates(llama)
    explorer = Explorer(llama, gates, measured(llama, gates), unit_table(llama, gates))

    def watched(*args, **options):
        calls.append(options["known"])
        return view_state(*args, **options)

    monkeypatch.setattr(explorer_module, "view_state", watched)
    for number, (dose, prompt) in enumerate([(1.0, "a"), (1.0, "b"), (0.5, "b"), (1.0, "c")], 1):
        state = explorer.state(ViewRequest(number, dose, prompt))
        assert state.following[0].prompt == prompt
    assert [known is None for known in calls] == [True, False, True, False]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (request(5, prompt=" "), "the prompt is blank"),
        (request(5, dose=1e9), "dose must be from"),
        (request(5, layers_off=[77]), "lists no layer 77"),
        ({"number": 5}, "validation error"),
    ],
)
def test_a_wrong_request_is_told_in_the_view_and_what_was_shown_stays(widget, message, said):
    before = widget.state
    sent(widget, "request", message)
    assert said in widget.state["error"] and widget.state["margins"] == before["margins"]
    sent(widget, "request", request(6))
    assert "error" not in widget.state


def test_without_anywidget_the_error_says_how_to_install_it(llama, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "anywidget" else find(name))
    with pytest.raises(InputError, match=r"pip install 'dean_interp\[notebook\]'"):
        explore(llama, some_gates(llama))


# What a saved notebook holds


def test_a_reader_without_widgets_gets_the_state_as_html(widget):
    sent(widget, "request", request(2, 1.5, prompt="<script>alert(1)</script>"))
    data, _ = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    text = data["text/html"]
    assert "dose 1.50" in text and f"{widget.state['kl']:.4f}" in text
    assert "<script" not in text and "&lt;script&gt;" in text
    for margin in widget.state["margins"]:
        assert margin["prompt"] in text and f"{margin['edited']:+.3f}".replace("-", "−") in text


NOTEBOOK = """
from test_explore import *
from dean_interp import load_model
model, gates = load_model({model!r}, device="cpu"), load_gates({gates!r})
view = explore(model, gates, behaviours=PAIRS, general=TEXT, config=CONFIG)
"""


@pytest.mark.slow
def test_a_saved_notebook_shows_the_last_state_without_a_kernel(llama, checkpoints, tmp_path):
    """The copy follows the widget, and nbconvert shows it, with and without the state of the widgets."""
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter

    some_gates(llama).save(tmp_path / "gates")
    setting = NOTEBOOK.format(model=str(checkpoints["llama-gqa"]), gates=str(tmp_path / "gates"))
    sources = [f"import sys; sys.path.insert(0, {str(TESTS)!r})\nfrom dean_interp import load_gates{setting}", "view",
               "view.request = {'number': 2, 'dose': 1.75, 'prompt': 'Hello?'}",
               "import json; print(json.dumps(view.state))"]  # fmt: skip
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=300, kernel_name="python3", store_widget_state=True).execute()
    state = json.loads(notebook.cells[3].outputs[0]["text"])
    kept = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    (traits,) = (model["state"] for model in kept.values() if "facts" in model["state"])
    assert traits["state"] == state and state["dose"] == 1.75 and "export default" in traits["_esm"]
    for keeps_state in (True, False):
        if not keeps_state:
            del notebook.metadata["widgets"]
        page, _ = HTMLExporter().from_notebook_node(notebook)
        text = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
        assert "dose 1.75" in text and f"{state['kl']:.4f}" in text and "dose 1.00" not in text


# The script


FAKE = """
<div id="view"></div><script type="module">
// A browser that is not seen draws frames when it likes, and under a clock of its own sometimes none.
window.requestAnimationFrame = call => setTimeout(call, 16);
{script}
{{
const values = {traits}, calls = {{}}, asked = [];
const model = {{
  get: name => values[name], on: (event, call) => {{ calls[event] = call; }}, off: () => {{}},
  set: (name, value) => {{ values[name] = value; if (name === "request") asked.push(value); }},
  save_changes: () => {{}},
}};
const answer = (number, dose, kl) => {{
  values.state = {{ ...values.state, request: number, dose, kl }};
  calls["change:state"]();
}};
render({{ model, el: document.getElementById("view") }});
const slider = document.querySelector("input[type=range]");
const move = dose => {{ slider.value = dose; slider.dispatchEvent(new Event("input")); }};
const wait = time => new Promise(done => setTimeout(done, time));
{then}
}}
</script></body>
"""


def with_a_kernel_that(widget, then, folder):
    """The DOM of the widget's script beside a kernel that does what `then` says."""
    traits = {name: getattr(widget, name) for name in ("facts", "request", "state", "answers")}
    script = str(widget._esm)
    page = folder / "widget.html"
    page.write_text(
        "<!doctype html><meta charset=utf-8><body>" + FAKE.format(script=script, traits=json.dumps(traits), then=then)
    )
    return re.sub(r"<script.*?</script>", "", opened(page, folder), flags=re.DOTALL)


@needs_browser
def test_moves_are_asked_once_they_rest_one_at_a_time_and_old_answers_are_not_drawn(widget, tmp_path):
    drawn = with_a_kernel_that(widget, """
        for (const dose of [0.6, 0.7, 0.8]) move(dose);
        await wait(400);
        document.body.dataset.first = JSON.stringify(asked.map(each => each.dose));
        move(1.2);
        await wait(400);
        document.body.dataset.busy = asked.length;
        answer(asked[0].number, 0.8, 0.0812);
        document.body.dataset.second = JSON.stringify(asked.map(each => each.dose));
        answer(asked[1].number, 1.2, 0.1234);
        answer(asked[0].number, 0.8, 0.9999);
        """, tmp_path)  # fmt: skip
    assert 'data-first="[0.8]"' in drawn and 'data-busy="1"' in drawn and 'data-second="[0.8,1.2]"' in drawn
    assert "0.1234" in drawn and "0.9999" not in drawn
    assert 'role="status">dose 1.20' in drawn


@needs_browser
def test_switches_say_what_is_off_and_the_filter_hides_other_rows(widget, tmp_path):
    name = widget.facts["listed"][0]["name"]
    drawn = with_a_kernel_that(widget, """
        const boxes = [...document.querySelectorAll("fieldset input")];
        const labelled = text => boxes.find(box => box.parentElement.textContent.startsWith(text));
        labelled("first").click();
        labelled("2 ").click();
        const own = document.querySelector(`input[aria-label="NAME"]`);
        if (!own.disabled) own.click();
        const filter = document.querySelector("input[type=search]");
        filter.value = "layer 1";
        filter.dispatchEvent(new Event("input"));
        await wait(400);
        document.body.dataset.off = JSON.stringify([asked[0].behaviours_off, asked[0].layers_off]);
        const rows = [...document.querySelectorAll(".units tbody tr")];
        document.body.dataset.rows = rows.filter(row => !row.hidden).every(row => row.dataset.text.includes("layer 1"));
        const under = rows.filter(row => row.dataset.text.includes("layer 2")).map(row => row.querySelector("input"));
        document.body.dataset.under = under.length > 0 && under.every(box => box.disabled && !box.checked);
        """.replace("NAME", name), tmp_path)  # fmt: skip
    assert 'data-off="[[&quot;first&quot;],[2]]"' in drawn
    assert 'data-rows="true"' in drawn and 'data-under="true"' in drawn


@needs_browser
@pytest.mark.parametrize(("colour", "theme"), [("oklch(0.98 0 0)", "light"), ("color(srgb 0.1 0.1 0.1)", "dark")])
def test_the_background_may_be_a_colour_of_any_notation(widget, tmp_path, colour, theme):
    drawn = with_a_kernel_that(widget, f"""
        document.body.style.background = "{colour}";
        document.getElementById("view").replaceChildren();
        render({{ model, el: document.getElementById("view") }});
        await wait(100);
        document.body.dataset.seen = document.querySelector("section").dataset.theme;
        """, tmp_path)  # fmt: skip
    assert f'data-seen="{theme}"' in drawn


@needs_browser
def test_keys_that_move_a_control_are_kept_from_the_notebook_around_it(widget, tmp_path):
    drawn = with_a_kernel_that(widget, """
        const heard = [];
        document.addEventListener("keydown", event => heard.push(event.key));
        for (const options of [{ key: "ArrowLeft" }, { key: "d" }, { key: "s", ctrlKey: true }])
          slider.dispatchEvent(new KeyboardEvent("keydown", { ...options, bubbles: true }));
        document.body.dataset.heard = heard.join();
        document.body.dataset.suppressed = slider.closest("[data-lm-suppress-shortcuts]") !== null;
        """, tmp_path)  # fmt: skip
    assert 'data-heard="s"' in drawn and 'data-suppressed="true"' in drawn


@needs_browser
def test_every_control_has_a_name_and_the_view_follows_its_background(widget, tmp_path):
    drawn = with_a_kernel_that(widget, """
        const every = [...document.querySelectorAll("input, select, textarea")];
        const unnamed = every.filter(each => !each.labels?.length && !each.getAttribute("aria-label"));
        document.body.dataset.unnamed = unnamed.length;
        await wait(100);
        document.body.dataset.light = document.querySelector("section").dataset.theme;
        document.body.style.background = "#111";
        document.getElementById("view").replaceChildren();
        render({ model, el: document.getElementById("view") });
        await wait(100);
        document.body.dataset.dark = document.querySelector("section").dataset.theme;
        """, tmp_path)  # fmt: skip
    assert 'data-unnamed="0"' in drawn and 'data-light="light"' in drawn and 'data-dark="dark"' in drawn


# The page


@pytest.fixture(scope="module")
def page(llama):
    scores = [some_scores(llama, "first", 1), some_scores(llama, "second", 2)]
    return explore_page(
        llama, some_gates(llama), behaviours=PAIRS, general=TEXT, scores=scores, prompts=PROMPTS, config=CONFIG
    )


def test_a_page_holds_the_states_and_answers_of_fixed_doses(page, llama):
    assert [each.state.dose for each in page.recorded] == [step / 4 for step in range(-4, 9)]
    for place in (2, 4, 8):
        recorded = page.recorded[place]
        assert recorded.state == shown(llama, some_gates(llama), recorded.state.dose)
    with gated(llama, some_gates(llama)):
        assert list(page.recorded[8].answers) == generate(llama, PROMPTS, max_new_tokens=LENGTH, template="raw")
    assert f"KL on general text is {page.recorded[8].state.kl:.4f}" in page.headline
    first, second = (pair.name for pair in PAIRS)
    assert re.search(rf"changes by [+-][\d.]+ for {first} and by [+-][\d.]+ for {second}\. The KL", page.headline)
    assert f"<title>Gates of {page.facts.model}, by dose</title>" in page.html()


@needs_browser
def test_the_slider_of_a_page_redraws_everything_with_what_was_measured(page, tmp_path):
    path = page.save(tmp_path / "page.html")
    assert not re.search(r"(src|href)=[\"']?http|@import|url\(", path.read_text())
    for place, prompt in ((0, 0), (6, 1), (12, 1)):
        then = """
            const wait = time => new Promise(done => setTimeout(done, time));
            addEventListener("load", async () => {
              await wait(200);
              const slider = document.querySelector("input[type=range]"), choice = document.querySelector("select");
              slider.value = PLACE;
              slider.dispatchEvent(new Event("input"));
              choice.selectedIndex = PROMPT;
              choice.dispatchEvent(new Event("change"));
              document.body.dataset.requests = performance.getEntriesByType("resource").length;
            });
            """.replace("PLACE", str(place)).replace("PROMPT", str(prompt))  # fmt: skip
        drawn = opened(path, tmp_path, then=then)
        recorded = page.recorded[place]
        view = re.search(r'<section class="dean-explore".*?</section>', drawn, re.DOTALL)[0]
        assert 'data-requests="0"' in drawn
        assert f"<b>{recorded.state.kl:.4f}</b>" in view
        dose = f"dose {recorded.state.dose:.2f}".replace("-", "−")
        assert f'aria-valuetext="{dose}"' in view and f"Edited, {dose}</h3>" in view
        for margin in recorded.state.margins:
            assert f"<td>{margin.edited:.3f}</td>".replace("-", "−") in view
        for token in recorded.state.following[prompt].tokens:
            assert f"{100 * token.edited:.1f} %" in view
        assert view.count("<circle") == 3 * 13


@needs_browser
def test_text_that_would_be_markup_stays_text_on_the_page(llama, tmp_path):
    attack = "</script><img src=x onerror=\"document.body.id='hit'\"><script>document.body.id='hit'</script>"
    pairs = [Behaviour("first", (Example(attack, {"safe": "no", "unsafe": attack}),), split="test")]
    hostile = explore_page(llama, some_gates(llama), behaviours=pairs, general=TEXT, prompts=[attack], config=CONFIG)
    hostile = dataclasses.replace(hostile, command=attack)
    drawn = opened(hostile.save(tmp_path / "hostile.html"), tmp_path)
    assert 'id="hit"' not in drawn and "<img" not in drawn and "&lt;img" in drawn


def test_a_number_that_is_not_finite_breaks_no_page(page):
    broken = dataclasses.replace(page.recorded[0], state=dataclasses.replace(page.recorded[0].state, kl=math.nan))
    html = dataclasses.replace(page, recorded=(broken, *page.recorded[1:])).html()
    record = json.loads(re.search(r'id="record">(.*?)</script>', html, re.DOTALL)[1])
    assert record["recorded"][0]["state"]["kl"] is None


def test_the_command_writes_the_page_and_prints_its_states(llama, checkpoints, tmp_path, capsys):
    some_gates(llama).save(tmp_path / "gates")
    out = tmp_path / "pages" / "page.html"
    sizes = ["--n-test", 2, "--n-general-test", 2, "--answer-length", 4, "--answer-tokens", 3]
    model = ["--model", checkpoints["llama-gqa"], "--device", "cpu"]
    command = ["explore", tmp_path / "gates", *sizes, *model, "--prompts", "Hello?", "--out", out]
    assert main([*map(str, command), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [state["dose"] for state in record["states"]] == [step / 4 for step in range(-4, 9)]
    assert {margin["behaviour"] for margin in record["states"][0]["margins"]} == {"fairness", "privacy"}
    assert f"dean-interp explore {tmp_path / 'gates'} --n-test 2" in out.read_text()
    assert main(["explore", str(tmp_path / "gates"), "--prompts", " "]) == 2
    assert "prompts must not be blank" in capsys.readouterr().err
