"""Circuits: attribution finds what was planted, and every checked edge is what an intervention by hand gives."""

import json
import re

import pytest
import torch
from architectures import build
from browser import needs_browser, opened
from page_figures import figures_of
from planted_coupling import LAYER, ONLY_G, SHARED, behaviour, planted_model

from dean_interp import CircuitPage, Example, InputError, Selection, Site, load_model, trace_circuit
from dean_interp.circuits.graph import Node
from dean_interp.circuits.trace import trace_links
from dean_interp.cli.main import main
from dean_interp.models.sizes import site_shape
from dean_interp.models.tokens import encode
from dean_interp.report.page import percent_in_two_digits

SITE = Site(LAYER, "neurons")
EXAMPLE = behaviour("f", 500, 1).examples[0]


@pytest.fixture(scope="module")
def planted(tokenizer):
    return load_model(planted_model(tokenizer, shared=-2.0), tokenizer=tokenizer)


def holding(model, *units, site=SITE):
    return Selection({site: torch.tensor(sorted(units))}, {site: site_shape(model, site)})


@pytest.fixture(scope="module")
def found(planted):
    return trace_circuit(planted, holding(planted, SHARED, ONLY_G), EXAMPLE, template="raw", n_targets=4, n_checked=12)


@pytest.fixture(scope="module")
def attentive(checkpoints):
    """A model with attention, and a circuit through a neuron of its last layer."""
    model = load_model(checkpoints["llama"], device="cpu")
    site = Site(model.cfg.n_layers - 1, "neurons")
    example = Example("May I ask the old owner?", {"safe": "Yes, do.", "unsafe": "No, never do."})
    chosen = holding(model, *range(8), site=site)
    return model, example, trace_circuit(model, chosen, example, template="raw", n_targets=6, n_checked=24)


def test_the_planted_neuron_moves_the_margin_most_where_its_letter_stands(planted, found):
    first = next(edge for edge in found.edges if edge.target is None)
    assert (first.source.layer, first.source.index) == (LAYER, SHARED)
    assert found.tokens[first.source.position] == "f" and first.predicted > 0 and first.measured > 0.3
    assert first.source.position in (found.n_prompt, found.n_prompt + found.n_safe), "the letter before Y or N"
    assert "".join(found.tokens).endswith("fYfN") and found.n_safe == 2


def test_largest_edges_do_more_than_random_ones_and_as_predicted(attentive):
    _, _, circuit = attentive
    largest, random, margin = circuit.checks.values()
    assert (largest.n, random.n, margin.n) == (24, 24, 6)
    assert largest.rank_correlation > 0.8 and largest.mean_size > 3 * random.mean_size and circuit.p < 1e-4
    assert margin.rank_correlation > 0.9
    shares = [percent_in_two_digits(check.mean_size) for check in (largest, random)]
    sizes = f"by {shares[0]} on average, random edges by {shares[1]}."
    assert sizes in CircuitPage(circuit).headline
    kinds = {edge.source.kind for edge in circuit.edges if edge.target}
    assert kinds == {"neuron", "head"}


def test_sources_come_before_their_targets_in_the_same_text(attentive):
    _, _, circuit = attentive
    safe = range(circuit.n_prompt, circuit.n_prompt + circuit.n_safe)
    edges = [edge for edge in (*circuit.edges, *circuit.random) if edge.target is not None]
    assert len(edges) > 24 and any(edge.target.position >= safe.stop for edge in edges)
    for edge in edges:
        source, target = edge.source, edge.target
        assert source.position <= target.position
        assert source.layer < target.layer or (source.kind == "head" and source.layer == target.layer)
        if target.position >= safe.stop:
            assert source.position not in safe, "the unsafe answer never saw the safe one"


def by_hand(model, example, node, read):
    """Margin, and activation of a node, with another set to 0 in both texts, one plain pass a text."""
    encoded = encode(model.tokenizer, example.prompt, [example.answers[k] for k in ("safe", "unsafe")], template="raw")
    n, (safe, unsafe) = len(encoded.prompt), encoded.answers
    log_prob, seen = [], None
    for which, answer in enumerate((safe, unsafe)):
        begin = n + len(safe) if which else n

        def place(one, begin=begin, answer=answer):  # its column in this text, or None
            return one.position if one.position < n else (
                one.position - begin + n if begin <= one.position < begin + len(answer) else None)  # fmt: skip

        def cut(activation, hook, place=place):
            if node and place(node) is not None:
                flat = activation.view(*activation.shape[:2], -1)
                width = flat.shape[-1] // model.cfg.n_heads if node.kind == "head" else 1
                flat[:, place(node), node.index * width : (node.index + 1) * width] = 0
            return activation

        def keep(activation, hook, place=place):
            nonlocal seen
            if read and place(read) is not None and seen is None:
                seen = float(activation[0, place(read), read.index])

        hooks = []
        if node:
            part = "attn.hook_z" if node.kind == "head" else "mlp.hook_post"
            hooks.append((f"blocks.{node.layer}.{part}", cut))
        if read:
            hooks.append((f"blocks.{read.layer}.mlp.hook_post", keep))
        with torch.inference_mode(), model.hooks(fwd_hooks=hooks):
            logits = model(torch.tensor([[*encoded.prompt, *answer]]), return_type="logits")[0].log_softmax(-1)
        log_prob.append(float(sum(logits[n + i - 1, token] for i, token in enumerate(answer[:12])) / len(answer[:12])))
    return log_prob[0] - log_prob[1], seen


def test_measured_effects_are_those_of_an_intervention_by_hand(attentive):
    model, example, circuit = attentive
    assert by_hand(model, example, None, None)[0] == pytest.approx(circuit.margin, abs=1e-5)
    outward = [edge for edge in circuit.edges if edge.target is None][:3]
    for edge in outward:
        after, _ = by_hand(model, example, edge.source, None)
        assert after - circuit.margin == pytest.approx(edge.measured, abs=1e-5)
    inward = [edge for edge in circuit.edges if edge.target and edge.measured is not None]
    chosen = [next(edge for edge in inward if edge.source.kind == kind) for kind in ("neuron", "head")]
    for edge in (*chosen, *inward[-2:]):
        _, was = by_hand(model, example, None, edge.target)
        _, now = by_hand(model, example, edge.source, edge.target)
        assert (now - was) / abs(was) == pytest.approx(edge.measured, rel=1e-3, abs=1e-5)


def test_tracing_leaves_the_model_as_it_was(attentive):
    model, example, circuit = attentive
    again = trace_circuit(model, holding(model, *range(8), site=Site(model.cfg.n_layers - 1, "neurons")), example,
                          template="raw", n_targets=6, n_checked=24)  # fmt: skip
    assert again == circuit, "same seed, same circuit"
    assert all(one.grad is None for one in model.parameters())


def test_links_are_the_edges_of_a_whole_trace_that_lie_between_selected_neurons(attentive):
    model, example, _ = attentive
    units = {Site(layer, "neurons"): torch.tensor([1, 5, 9]) for layer in range(model.cfg.n_layers)}
    chosen = Selection(units, dict.fromkeys(units, (model.cfg.d_mlp,)))
    links = trace_links(model, chosen, example, template="raw", n_sources=10**5, n_checked=4)
    names = {f"L{site.layer}.{index}" for site, indices in units.items() for index in indices.tolist()}
    assert {edge.source.name for edge in links.outward} == names and len(links.outward) == len(names)
    assert {edge.source.name for edge in links.inward} < names, "nothing comes before the first layer"
    last = max(units)
    alone = Selection({last: units[last]}, {last: (model.cfg.d_mlp,)})
    whole = trace_circuit(model, alone, example, template="raw", n_targets=1, n_sources=10**5, n_checked=4)
    (target,) = (edge.source for edge in whole.outward)
    between = {edge.source: edge.predicted for edge in whole.inward if edge.source.name in names}
    assert len(between) > 20 and target == next(
        edge.source for edge in links.outward if edge.source.layer == last.layer
    )
    assert {edge.source: edge.predicted for edge in links.inward if edge.target == target} == pytest.approx(between)
    for edges in (links.outward, links.inward):
        assert [edge.measured is not None for edge in edges[:5]] == [True] * 4 + [False]


@pytest.fixture(scope="module")
def hybrid(tokenizer):
    """A model whose first layer mixes tokens by a short convolution, and whose second one has attention."""
    return build("lfm 2 (a width that is rounded)", tokenizer)


def test_a_layer_without_attention_has_no_heads_and_what_passes_it_counts(hybrid):
    site, example = Site(1, "neurons"), Example("May I ask him?", {"safe": "Yes, do.", "unsafe": "No, never."})
    options = {"template": "raw", "n_targets": 4, "n_sources": 40, "n_checked": 24}
    circuit = trace_circuit(hybrid, holding(hybrid, *range(8), site=site), example, **options)
    sources = {(edge.source.kind, edge.source.layer) for edge in (*circuit.inward, *circuit.random)}
    assert sources == {("neuron", 0), ("head", 1)}
    largest, _, margin = circuit.checks.values()
    assert largest.rank_correlation > 0.8 and margin.rank_correlation > 0.7
    # Of its own first layer a neuron has no source at all, and its edge to the margin is still measured.
    first = trace_circuit(hybrid, holding(hybrid, *range(8), site=Site(0, "neurons")), example, **options)
    assert len(first.outward) == 4 and not first.inward and not first.random
    assert all(edge.measured is not None for edge in first.outward)
    assert "L0." in CircuitPage(first).html()


def test_what_cannot_be_traced_is_named(planted):
    weights = Selection({Site(1, "out"): torch.tensor([0])}, {Site(1, "out"): (40, 24)})
    for selection, example, options, said in (
        (weights, EXAMPLE, {}, "traced through neurons"),
        (holding(planted, 1) - holding(planted, 1), EXAMPLE, {}, "at least one; got Selection"),
        (Selection({SITE: torch.tensor([1])}, {SITE: (400,)}), EXAMPLE, {}, "the selection is not of this model"),
        (
            holding(planted, 1),
            behaviour("g", 0, 1).examples[0],
            {},
            "needs a safe and an unsafe answer; it has response",
        ),
        (holding(planted, 1), EXAMPLE, {"n_targets": 0}, "n_targets must be at least 1, got 0"),
    ):
        with pytest.raises(InputError, match=said):
            trace_circuit(planted, selection, example, **options)


def test_the_page_holds_every_edge_and_loads_nothing(found):
    html = CircuitPage(found).html()
    assert html.count('class="edge') == len(found.edges) and not re.search(r"(src|href)=[\"']?http", html)
    assert f"Silencing L{LAYER}.{SHARED} at 'f' alone moves the margin" in html.replace("&#39;", "'")
    graph, checked = figures_of(html)
    assert graph.numbers("predicted") == [edge.predicted for edge in found.edges]
    assert f"n: {len(found.inward)} edges into the set and {len(found.outward)} to the margin" in graph.caption
    measured = [edge.measured for edge in (*found.inward, *found.random, *found.outward) if edge.measured is not None]
    assert checked.numbers("measured") == measured
    table = found.to_pandas()
    assert len(table) == len(found.edges) + len(found.random) and table.random.sum() == len(found.random)
    assert Node("head", 3, 2, 0).name == "L3.H2" and "Circuit(" in repr(found)


@needs_browser
def test_a_click_on_a_unit_keeps_its_edges_alone(found, tmp_path):
    page = CircuitPage(found).save(tmp_path / "circuit.html")
    key = f"L{LAYER}.{SHARED}@{next(e for e in found.edges if e.target is None).source.position}"
    click = f"document.querySelector('[data-key=\"{key}\"]').dispatchEvent(new MouseEvent('click'));"
    drawn = opened(page, tmp_path, then=f"least.value = 0; {click}")
    edges = re.findall(r'class="edge (?:up|down)( dim)?"[^>]*data-ends="([^"]*)"', drawn)
    assert len(edges) == len(found.edges)
    assert all(bool(dim) != (key in ends.split()) for dim, ends in edges)


def test_the_command_writes_a_page_and_its_record(planted, tokenizer, tmp_path, capsys):
    planted_model(tokenizer, shared=-2.0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": e.prompt, **e.answers, "split": "test"} for e in behaviour("f", 500, 3).examples]
    (tmp_path / "fairness.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    holding(planted, SHARED).save(tmp_path / "chosen.safetensors")
    page = tmp_path / "pages" / "circuit.html"
    command = ["circuit", str(tmp_path / "chosen.safetensors"), "--model", str(tmp_path / "model"), "--template", "raw",
               "--behaviour", str(tmp_path / "fairness.jsonl"), "--out", str(page), "--n-checked", "6"]  # fmt: skip
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["edges"] and record["page"] == str(page) and page.is_file()
    assert main([*command, "--example", "3"]) == 2
    assert "example must be from 0 to 2" in capsys.readouterr().err
