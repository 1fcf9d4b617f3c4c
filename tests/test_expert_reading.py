"""Mixtures of experts: whoever reads or names neurons knows those of routed and of shared experts."""

import dataclasses

import numpy as np
import pytest
import torch

from dean_interp import InputError, ModelConfig, Selection, Site, load_model, neuron_page, trace_circuit
from dean_interp.arms.affine_maps import LinearTransport, displacement
from dean_interp.arms.answer_statistics import AnswerStatistics, answer_statistics
from dean_interp.arms.arm import ArmExamples
from dean_interp.arms.auroc_damping import AurocDamping
from dean_interp.arms.pair_trainer import AdapterTraining
from dean_interp.arms.peft_training import adapted_modules
from dean_interp.circuits.answer_pair import answer_pair, margins
from dean_interp.circuits.attribution import effects_on
from dean_interp.circuits.kept_pass import kept_pass
from dean_interp.circuits.lens import logit_differences, written
from dean_interp.circuits.neuron import TextActivations, parse_neuron, read_texts
from dean_interp.circuits.neuron_view import view_from_texts
from dean_interp.data.examples import Behaviour, Example
from dean_interp.editing.ablation import ablate
from dean_interp.editing.values import Scale
from dean_interp.evaluation.guard import held_super_weights, super_weights
from dean_interp.information.activations import read_activations
from dean_interp.information.compare import mutual_information
from dean_interp.information.estimands import MutualInformationConfig
from dean_interp.models.experts import routed_experts
from dean_interp.models.loss import answer_positions, forward
from dean_interp.models.matrices import neuron_sites, parameter, weight
from dean_interp.models.neuron_names import NeuronName, name_of, neuron_of, parse_name
from dean_interp.models.sizes import neuron_shapes
from dean_interp.models.tokens import encode
from dean_interp.report.circuit_page import CircuitPage
from dean_interp.report.neuron_page import NeuronPage
from dean_interp.study.improvement import ImproveConfig
from tests.mixtures import D_EXPERT, D_MODEL, FAMILIES, N_EXPERTS, mixture

EACH = Site(1, "experts", N_EXPERTS)
WORDS = ("who won", "it is so", "tell me more", "the old street", "abc abc", "why not", "Ann lives here", "so what")


def pairs(name, *, n=14, split="test"):
    examples = []
    for i in range(n):
        answers = {"safe": f"I will not say {WORDS[i % 7]}.", "unsafe": f"It is {i}, {WORDS[i % 5]}."}
        examples.append(Example(f"{name} {WORDS[i % 8]} {i}?", answers, topic=f"{name} {i // 2}"))
    return Behaviour(name, tuple(examples), "safe", split)


FIRST, SECOND = pairs("first"), pairs("second")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family, tokenizer):
    return load_model(mixture(family, len(tokenizer)), tokenizer=tokenizer)


def everything(model):
    shapes = neuron_shapes(model)
    return Selection({site: torch.arange(width) for site, (width,) in shapes.items()}, shapes)


def some_of_each(model, n=2):
    """Neurons of every site: of routed experts those of all experts."""
    neurons = []
    for site, (width,) in neuron_shapes(model).items():
        step = D_EXPERT if site.is_of_experts else width // n
        neurons += [(site, index) for index in range(3, width, step)]
    return neurons


# --- names


def test_a_name_is_written_and_read_back_and_belongs_to_one_neuron(model):
    names = set()
    for site, (width,) in neuron_shapes(model).items():
        for index in range(width):
            name = name_of((site, index), width)
            assert parse_name(str(name)) == name
            names.add(str(name))
            if index % 37 == 0:
                assert neuron_of(model, name) == parse_neuron(str(name), model) == (site, index)
    assert len(names) == sum(width for (width,) in neuron_shapes(model).values())
    assert str(name_of((EACH, 5 * D_EXPERT + 4), N_EXPERTS * D_EXPERT)) == "L1.E5.4"


def test_a_name_has_one_form_and_what_is_not_there_is_named(model, family):
    assert parse_name(" l17.e05.42 ") == NeuronName(17, 42, "E5")
    assert parse_neuron("L2.shared.7") == (Site(2, "shared"), 7)
    for wrong in ("L1.E.4", "L1.E4", "L1.F4.3", "L1.shared", "L1.Shared.3x", "L1.2.3"):
        with pytest.raises(InputError, match=r"as L17\.E5\.42 or as L17\.1042; got"):
            parse_name(wrong)
    with pytest.raises(InputError, match=r"L1\.E5\.4 is a neuron of a routed expert: give the model"):
        parse_neuron("L1.E5.4")
    has = r"this model has in layer 1 experts E0 to E7 of 20 neurons \(0 to 19\)"
    for absent in ("L1.E8.0", "L1.E0.20", "L1.40", "L1.shared.99"):
        with pytest.raises(InputError, match=f"no neuron {absent}: {has}"):
            parse_neuron(absent, model)
    with pytest.raises(InputError, match=r"no neuron L9\.E0\.0: this model has layers 0 to 2"):
        parse_neuron("L9.E0.0", model)
    with pytest.raises(InputError, match=r"no neuron L1\.E8\.0: this model has in layer 1 experts E0 to E7"):
        neuron_page(model, EACH, N_EXPERTS * D_EXPERT, [FIRST])
    if family in ("qwen2_moe", "deepseek_v3"):
        with pytest.raises(InputError, match="and a shared expert of"):
            parse_neuron("L1.E8.0", model)


# --- where a neuron fires


@torch.no_grad()
def activations_by_hand(family, tokenizer, ids):
    """Of the plain model: what the neurons of the experts of layer 1 make of the tokens, 0 where these are not sent."""
    plain = mixture(family, len(tokenizer))
    (experts,) = [module for module in plain.model.layers[1].modules() if "_is_expert_parallel" in vars(module)]
    read = []
    experts.register_forward_pre_hook(lambda _, args: read.append(args))
    plain(ids)
    hidden, chosen = read[0][:2]
    values = torch.zeros(len(hidden), N_EXPERTS, D_EXPERT)
    for token in range(len(hidden)):
        for expert in chosen[token].tolist():
            stack = experts.gate_up_proj[expert]
            if family == "gpt_oss":
                both = hidden[token] @ stack + experts.gate_up_proj_bias[expert]
                gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
                values[token, expert] = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            else:
                gate, up = (stack @ hidden[token]).chunk(2)
                values[token, expert] = torch.nn.functional.silu(gate) * up
    return values.flatten(1), chosen


def test_texts_show_what_the_plain_model_computes_and_nothing_where_it_routes_elsewhere(family, tokenizer, model):
    neurons = [neuron for neuron in some_of_each(model) if neuron[0] == EACH]
    units = torch.tensor([index for _, index in neurons])
    behaviour = dataclasses.replace(FIRST, examples=FIRST.examples[:3])
    texts = read_texts(model, neurons, [behaviour], template="raw")
    for text, example in zip(texts, behaviour.examples, strict=True):
        encoded = encode(tokenizer, example.prompt, [example.answers["safe"]], template="raw")
        expected, chosen = activations_by_hand(
            family, tokenizer, torch.tensor([[*encoded.prompt, *encoded.answers[0]]])
        )
        shown = torch.tensor(text.activations)
        assert torch.allclose(shown, expected[:, units], atol=2e-4, rtol=1e-4)
        is_routed = (chosen[:, None] == (units // D_EXPERT)[None, :, None]).any(-1)
        assert torch.equal(torch.tensor(text.routed), is_routed)
        assert (shown[~is_routed] == 0).all() and (shown[is_routed] != 0).float().mean() > 0.9


def test_the_page_says_how_often_the_expert_is_routed(model):
    behaviours = [dataclasses.replace(each, examples=each.examples[:4]) for each in (FIRST, SECOND)]
    index = 3 * D_EXPERT + 7
    page = neuron_page(model, EACH, index, behaviours, template="raw", n_texts=2)
    (texts,) = (read_texts(model, [(EACH, index)], behaviours, template="raw"),)
    for name in ("first", "second"):
        sent = [row[0] for text in texts if text.behaviour == name for row in text.routed]
        assert page.view.routed[name] == pytest.approx(np.mean(sent))
        assert sum(page.view.activations[name]) == sum(sent)
    assert page.view.name == "L1.E3.7" and str(page.view.written).startswith("L1.E3.7 raises")
    html = page.html()
    assert "tokens sent to its expert" in html and 'title="not sent to its expert"' in html
    assert {line.metric.split()[0] for line in page.view.effect} >= {"margin"}


def test_neurons_of_every_token_have_no_share_and_a_name_of_their_own(model):
    others = [site for site in neuron_sites(model) if not site.is_of_experts]
    behaviour = dataclasses.replace(FIRST, examples=FIRST.examples[:2])
    for site in others[:2]:
        view = neuron_page(model, site, 5, [behaviour], template="raw").view
        assert view.name == f"L{site.layer}.{'shared.' if site.part == 'shared' else ''}5"
        assert not view.routed and not view.texts[0].routed


def test_an_expert_that_no_token_reaches_is_said_to_be_unreached(model):
    text = TextActivations("first", ("a", "b"), ((0.0,), (0.0,)), ((False,), (False,)))
    page = NeuronPage(view_from_texts(model, (EACH, 4), [text]))
    assert page.headline.startswith("no token of the texts is sent to the expert of L1.E0.4")
    assert "0.0 %" in page.html()


def test_what_an_expert_neuron_writes_is_its_row_of_its_experts_matrix(model):
    experts = routed_experts(model, 1)
    expert, neuron = 5, 11
    stack = experts.stack("out")[expert]
    row = stack[neuron] if experts.module.is_transposed else stack[:, neuron]
    (look,) = written(model, [(EACH, expert * D_EXPERT + neuron)], n_tokens=2)
    gain = model.ln_final.weight
    logits = ((row * gain) @ model.W_U).detach()
    assert [size for _, size in look.promoted] == pytest.approx(logits.topk(2).values.tolist(), rel=1e-4)
    best, worst = int(logits.argmax()), int(logits.argmin())
    differences = logit_differences(model, [best], [worst])
    assert set(differences) == set(neuron_sites(model))
    size = float(logits[best] - logits[worst])
    assert float(differences[EACH][expert * D_EXPERT + neuron]) == pytest.approx(size, rel=1e-4)


# --- circuits


def test_first_order_effects_are_those_of_a_small_change(model):
    """Where the change sends no token to another expert: there the margin jumps, which no gradient knows."""
    pair, step = answer_pair(model, FIRST.examples[0], "raw", 3), 3e-4
    batch, selection, routes = pair.batch(1), everything(model), []
    watched = [site.ids_hook_name for site in neuron_sites(model) if site.is_of_experts]
    hooks = [(name, lambda ids, hook: routes[-1].append(ids.sort(-1).values)) for name in watched]

    def margin():
        routes.append([])
        with torch.inference_mode(), answer_positions(model, batch), model.hooks(fwd_hooks=hooks):
            log_prob = forward(model, batch)[0].double().log_softmax(-1).gather(-1, batch.target[:, None])[:, 0]
        safe, unsafe = (log_prob[batch.answer == answer].mean() for answer in (0, 1))
        return float(safe - unsafe)

    with kept_pass(pair) as kept:
        names = [site.hook_name for site in neuron_sites(model)]
        effects = effects_on(kept, kept.margin, names)
        predicted = {name: effects.of(name) for name in names}
    n_compared = 0
    for site in neuron_sites(model):
        for units in (selection.units[site], selection.units[site][::3]):
            alone = Selection({site: units}, {site: selection.shapes[site]})
            changes = []
            for sign in (-1, 1):
                with ablate(model, alone, value=Scale(1 + sign * step)):
                    changes.append(sign * margin())
            if all(map(torch.equal, routes[-1], routes[-2])):
                measured = -sum(changes) / (2 * step)
                by_first_order = float(predicted[site.hook_name][:, units].sum())
                assert by_first_order == pytest.approx(measured, rel=0.02, abs=0.01), site
                n_compared += 1
    assert n_compared > len(names)


def test_a_circuit_is_traced_through_experts_and_names_its_nodes(model):
    site = [site for site in neuron_sites(model) if site.is_of_experts][-1]
    selection = Selection({site: torch.arange(0, 160, 3)}, {site: (160,)})
    circuit = trace_circuit(
        model, selection, FIRST.examples[1], template="raw", n_targets=4, n_sources=6, n_checked=12, answer_tokens=3
    )
    assert len(circuit.outward) == 4 and len(circuit.random) == 12
    for edge in circuit.outward:
        assert edge.source.owner and edge.source.name == f"L{site.layer}.{edge.source.owner}.{edge.source.index}"
        assert parse_neuron(edge.source.name, model)[1] in selection.units[site]
    sources = {edge.source.owner[:1] for edge in (*circuit.inward, *circuit.random) if edge.source.kind == "neuron"}
    has_earlier_experts = any(other.is_of_experts and other.layer < site.layer for other in neuron_sites(model))
    assert ("E" in sources) == has_earlier_experts
    measured = [edge for edge in circuit.outward if abs(edge.predicted) > 1e-3]
    assert measured and all(np.sign(edge.measured) == np.sign(edge.predicted) for edge in measured[:1])
    assert circuit.outward[0].source.name in CircuitPage(circuit).html()
    again = trace_circuit(
        model, selection, FIRST.examples[1], template="raw", n_targets=4, n_sources=6, n_checked=12, answer_tokens=3
    )
    assert again == circuit


def test_a_measured_edge_is_the_margin_without_the_neuron_at_its_token(model):
    """By hand: the column of the neuron's expert is set to 0 at one token, with a hook of ours on slots."""
    site = [site for site in neuron_sites(model) if site.is_of_experts][-1]
    selection = Selection({site: torch.arange(160)}, {site: (160,)})
    example = FIRST.examples[2]
    circuit = trace_circuit(
        model, selection, example, template="raw", n_targets=2, n_sources=1, n_checked=1, answer_tokens=3
    )
    edge = circuit.outward[0]
    pair = answer_pair(model, example, "raw", 3)
    batch, (rows, position) = pair.batch(1), pair.rows(edge.source.position)
    ids = []

    def cut(activation, hook):
        changed = activation.clone()
        for row in rows:
            slot = ids[-1][row, position].tolist().index(int(edge.source.owner[1:]))
            changed[row, position, slot, edge.source.index] = 0
        return changed

    hooks = [(site.ids_hook_name, lambda value, hook: ids.append(value)), (site.hook_name, cut)]
    with torch.inference_mode(), model.hooks(fwd_hooks=hooks), answer_positions(model, batch):
        without = float(margins(forward(model, batch)[0].float(), batch)[0])
    assert without - circuit.margin == pytest.approx(edge.measured, abs=1e-5)


def test_a_set_that_the_example_does_not_reach_is_refused(model):
    pair = answer_pair(model, FIRST.examples[0], "raw", 1)
    with kept_pass(pair) as kept:
        seen = set(kept.ids[EACH].unique().tolist())
    unseen = [expert for expert in range(N_EXPERTS) if expert not in seen]
    if not unseen:
        pytest.skip("this example reaches all experts")
    selection = Selection({EACH: torch.tensor([unseen[0] * D_EXPERT])}, {EACH: (N_EXPERTS * D_EXPERT,)})
    with pytest.raises(InputError, match="no token of this example is sent to an expert"):
        trace_circuit(model, selection, FIRST.examples[0], template="raw", answer_tokens=1)


# --- information


def test_activations_at_text_ends_are_0_exactly_where_the_token_was_not_sent(model, tokenizer):
    found = read_activations(model, [FIRST], everything(model), answers=True, template="raw")
    for i, example in enumerate(FIRST.examples[:2]):
        encoded = encode(tokenizer, example.prompt, [example.answers["safe"]], template="raw")
        _, cache = model.run_with_cache(torch.tensor([[*encoded.prompt, *encoded.answers[0]]]))
        for site in neuron_sites(model):
            if site.is_of_experts:
                for values, at in ((found.values[site][i], len(encoded.prompt) - 1), (found.answers[site][i, 0], -1)):
                    sent = cache[site.ids_hook_name][0, at]
                    is_sent = torch.isin(torch.arange(N_EXPERTS), sent).repeat_interleave(D_EXPERT)
                    assert (values[~is_sent] == 0).all() and (values[is_sent] != 0).float().mean() > 0.9


def test_mutual_information_takes_all_sites_of_a_layer(model):
    selection = everything(model)
    first = Selection({site: units[::2] for site, units in selection.units.items()}, selection.shapes)
    second = Selection({site: units[1::2] for site, units in selection.units.items()}, selection.shapes)
    ablated = Selection(
        {site: units[:3] if site.layer < 2 else units[:0] for site, units in selection.units.items()}, selection.shapes
    )
    config = MutualInformationConfig(k=2, n_shuffles=19, n_null=9, n_subsamples=5)
    found = mutual_information(
        model, [FIRST, SECOND], first_neurons=first, second_neurons=second, ablated=ablated, config=config,
        template="raw",
    )  # fmt: skip
    single = [shift for shift in found.shifts if not shift.is_joint]
    assert [shift.layers for shift in single] == [(0,), (1,), (2,)]
    widths = {}
    for site, units in (first - ablated).units.items():
        widths[site.layer] = widths.get(site.layer, 0) + len(units)
    assert [shift.n_units[0] for shift in single] == [widths[layer] for layer in range(3)]
    assert "nothing that is changed lies upstream" in single[0].flags
    assert "nothing that is changed lies upstream" not in single[2].flags


# --- arms


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens, return_type="logits")


@pytest.fixture(scope="module")
def given(model, tmp_path_factory):
    """What an arm gets. Its answers are read once."""
    folder = tmp_path_factory.mktemp("arm")
    config = ImproveConfig(model=ModelConfig("a folder", template="raw", device="cpu"))
    return ArmExamples(
        model=model,
        config=config,
        scoring=(pairs("first", n=8, split="calibration"), pairs("second", n=8, split="calibration")),
        folder=folder,
        own_folder=folder / "own",
    )


def seen_at(model, name, tokens):
    kept = []
    with model.hooks(fwd_hooks=[(name, lambda value, hook: kept.append(value.detach().clone()))]), torch.no_grad():
        model(tokens)
    return kept[0]


def test_answers_are_summed_over_their_tokens_and_the_share_of_an_expert_is_known(model, tokenizer, given):
    statistics, _ = answer_statistics(given, "neurons")
    mean, largest = (statistics.of(summary, EACH.hook_name) for summary in ("mean", "largest"))
    for i, example in enumerate(given.scoring[0].examples[:2]):
        for column, kind in enumerate(("safe", "unsafe")):
            encoded = encode(tokenizer, example.prompt, [example.answers[kind]], template="raw")
            tokens = torch.tensor([[*encoded.prompt, *encoded.answers[0]]])
            ids = seen_at(model, EACH.ids_hook_name, tokens)[0, len(encoded.prompt) :]
            slots = seen_at(model, EACH.hook_name, tokens)[0, len(encoded.prompt) :]
            values = torch.zeros(len(ids), N_EXPERTS, D_EXPERT).scatter(
                1, ids[..., None].expand(-1, -1, D_EXPERT), slots
            )
            assert torch.allclose(mean[i, column], values.mean(0).flatten(), atol=1e-5)
            assert torch.allclose(largest[i, column], values.amax(0).flatten(), atol=1e-5)
            sent = torch.stack([(ids == expert).any(-1).float().mean() for expert in range(N_EXPERTS)])
            assert torch.allclose(statistics.reached(EACH)[i, column], sent)


def test_a_displacement_of_an_experts_neuron_is_that_of_the_tokens_that_it_sees(model, given):
    statistics, _ = answer_statistics(given, "neurons")
    slope, shift = displacement(statistics, EACH)
    mean, reached = statistics.of("mean", EACH.hook_name).double(), statistics.reached(EACH).double()
    n_moved = 0
    for unit in range(2, N_EXPERTS * D_EXPERT, 7):
        share = reached[:, :, unit // D_EXPERT]
        safe, unsafe = (mean[share[:, k] > 0, k, unit] / share[share[:, k] > 0, k] for k in (0, 1))
        if len(safe) == 0 or len(unsafe) == 0:
            assert slope[unit] == shift[unit] == 0
        elif slope[unit] != 0:
            ratio = safe.std(correction=0) / unsafe.std(correction=0)
            assert float(slope[unit]) == pytest.approx(float(ratio - 1), rel=1e-6)
            moved = unsafe.mean() + slope[unit] * unsafe.mean() + shift[unit]
            assert float(moved) == pytest.approx(float(safe.mean()), rel=1e-6, abs=1e-9)
            n_moved += 1
    assert n_moved > 5


def test_a_neuron_of_an_expert_that_few_answers_reach_is_only_shifted():
    site = Site(0, "experts", 2)
    mean = torch.randn(9, 2, 2, generator=torch.Generator().manual_seed(0))
    share = torch.ones(9, 2, 2)
    # Expert 0 has neuron 0: two unsafe answers that hardly differ reach it.
    share[2:, 1, 0], mean[2:, 1, 0], mean[:2, 1, 0] = 0, 0, torch.tensor([1.0, 1.01])
    tensors = {f"mean/{site.hook_name}": mean, f"share/{site.hook_name}": share}
    statistics = AnswerStatistics(tensors, torch.arange(9), torch.zeros(9, dtype=torch.bool))
    slope, shift = displacement(statistics, site)
    ratio = mean[:, 0, 1].std() / mean[:, 1, 1].std()
    assert slope.tolist() == pytest.approx([0, float(ratio) - 1], rel=1e-5)
    assert float(shift[0]) == pytest.approx(float(mean[:, 0, 0].mean()) - 1.005, rel=1e-5)


def test_affine_maps_move_the_neurons_that_a_token_has(model, given):
    maps = LinearTransport().fit(given, {"layers": "second half"})
    assert {site.layer for site in maps.slopes} == {1, 2}
    tokens = torch.tensor([[2, 70, 80, 90, 100, 3, 60], [2, 9, 8, 7, 6, 5, 4]])
    before, ids = seen_at(model, EACH.hook_name, tokens), seen_at(model, EACH.ids_hook_name, tokens)
    with maps.at(0.5).change.applied(model):
        after = seen_at(model, EACH.hook_name, tokens)
        assert torch.equal(seen_at(model, EACH.ids_hook_name, tokens), ids), "layer 1 is the first that is mapped"
    slope, shift = (each[EACH].reshape(N_EXPERTS, D_EXPERT)[ids] for each in (maps.slopes, maps.shifts))
    assert torch.allclose(after, before + 0.5 * (slope * before + shift), atol=1e-5)
    assert not torch.allclose(after, before) and torch.equal(seen_at(model, EACH.hook_name, tokens), before)


def test_auroc_damping_damps_neurons_of_experts(model, given):
    arm = AurocDamping().fit(given, {"pooling": "max", "share": 1.0})
    multipliers = arm.direction.multipliers
    assert set(multipliers) == set(neuron_sites(model))
    assert (multipliers[EACH] < 1).any() and (multipliers[EACH] <= 1).all()
    tokens = torch.tensor([[2, 70, 80, 90, 100, 3, 60]])
    before = logits_of(model, tokens)
    with arm.at(1.0).applied(model):
        assert not torch.allclose(logits_of(model, tokens), before, atol=1e-3)
    assert torch.equal(logits_of(model, tokens), before)


def test_adapters_of_peft_are_refused_with_what_they_would_not_reach(model):
    training = AdapterTraining(kind="lora", loss="cross-entropy", where="all", learning_rate=1e-3, n_steps=1)
    with pytest.raises(InputError, match=r"routed experts of .* are stacks .*L\d\.experts\.gate:8"):
        adapted_modules(model, training)


# --- super weights


def test_a_super_weight_of_an_expert_is_found_and_known_by_its_neuron(family, tokenizer):
    if family == "gpt_oss":
        pytest.skip("its activations are clamped")
    model = load_model(mixture(family, len(tokenizer)), tokenizer=tokenizer)
    assert super_weights(model, "who won it?") == []
    ids = seen_at(model, EACH.ids_hook_name, torch.tensor([tokenizer("who won it?")["input_ids"]]))
    expert, neuron, channel = int(ids[0, -1, 0]), 6, 4
    experts = routed_experts(model, 1)
    with torch.no_grad():
        experts.stack("in")[expert, D_EXPERT + neuron] *= 1e4
        experts.stack("out")[expert, channel, neuron] = 1e4
    unit, width = expert * D_EXPERT + neuron, N_EXPERTS * D_EXPERT
    assert float(weight(model, EACH.out).detach()[unit, channel]) == 1e4
    found = [each for each in super_weights(model, "who won it?") if each.site == EACH.out]
    assert [str(each) for each in found] == [f"L1.experts.out:8[{unit}, {channel}]"]
    by_neuron = Selection({EACH: torch.tensor([unit])}, {EACH: (width,)})
    by_weight = Selection({EACH.out: torch.tensor([unit * D_MODEL + channel])}, {EACH.out: (width, D_MODEL)})
    other = Selection({EACH: torch.tensor([unit + 1])}, {EACH: (width,)})
    assert held_super_weights(by_neuron, found) == held_super_weights(by_weight, found) == found
    assert held_super_weights(other, found) == []
    assert parameter(model, EACH.out)[0] is experts.stack("out")
