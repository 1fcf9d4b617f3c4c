"""What a notebook has set in torch changes no number of ours, and is as it was afterwards."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dean_interp import (
    InputError,
    MutualInformationConfig,
    ScoringConfig,
    ablate,
    apply_edit,
    create_edit,
    gated,
    generate,
    importance,
    load_behaviour,
    load_model,
    measure,
    mutual_information,
    neuron_page,
    patch_activations,
    revert_edit,
    top_fraction,
    trace_circuit,
)
from dean_interp.editing.edit_at_dose import at_dose
from dean_interp.models.sites import Site
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.scoring.per_example import example_scores
from dean_interp.selection.gates import Gates
from dean_interp.selection.selection import Selection

CONFIG = ScoringConfig(batch_tokens=512)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_device().type == device
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def gradients_off():
    torch.set_grad_enabled(False)
    try:
        yield
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


SETTINGS = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "gradients off for good": gradients_off,
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "another device by default": lambda: default_device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic algorithms": deterministic,
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two behaviours of few prompts: what is scored, and what is measured."""
    folder = tmp_path_factory.mktemp("settings")
    sets = []
    for name in ("one", "two"):
        rows = "".join(f"{name} {i}?,yes {i % 7},no {i % 5},{'test' if i % 3 else 'calibration'}\n" for i in range(45))
        (folder / f"{name}.csv").write_text(f"prompt,safe,unsafe,split\n{rows}")
        sets.append([load_behaviour(folder / f"{name}.csv", n_examples=n, split=split)
                     for n, split in ((4, "calibration"), (16, "test"))])  # fmt: skip
    return sets


def everything(folder, data):
    """What every kind of public function says of a tiny model."""
    (scored, test), (_, other) = data
    model = load_model(folder, device="cpu")
    scores = importance(model, scored, unit=("neuron", "weight"), config=CONFIG)
    neurons = top_fraction(scores.of("neuron"), 0.1)
    weights = top_fraction(scores.of("weight"), 0.01)
    margins = [measure(model, [test])[test.name].log_prob]
    for selection in (neurons, weights):
        with ablate(model, selection):
            margins.append(measure(model, [test])[test.name].log_prob)
    answers = generate(model, test.prompts[:2], max_new_tokens=4)
    edit = create_edit(model, neurons)
    apply_edit(model, edit)
    margins.append(measure(model, [test])[test.name].log_prob)
    revert_edit(model, edit)
    circuit = trace_circuit(model, neurons, test.examples[0], n_targets=2, n_sources=2, n_checked=2)
    page = neuron_page(model, Site(0, "neurons"), 3, [test])
    halves = [Selection({site: units[i::2] for site, units in neurons.units.items()}, neurons.shapes) for i in (0, 1)]
    information = mutual_information(
        model,
        [test, other],
        first_neurons=halves[0],
        second_neurons=halves[1],
        ablated=weights,
        config=MutualInformationConfig(k=2, n_shuffles=9, n_null=9, n_subsamples=4),
    )
    numbers = [value.float().flatten() for value in scores.of("neuron").values.values()]
    numbers += [margin.double().flatten() for margin in margins]
    numbers += [effect.flatten() for effect in example_scores(model, scored, neurons.units, config=CONFIG).values()]
    effects = [circuit.margin, *(edge.predicted for edge in circuit.edges), *information.changes]
    return [number.tolist() for number in numbers], effects, answers, edit.digest, page.headline


@pytest.fixture(scope="module")
def expected(checkpoints, data):
    return everything(checkpoints["llama-gqa"], data)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_setting_of_torch_changes_a_number(setting, checkpoints, data, expected):
    with SETTINGS[setting]():
        found = everything(checkpoints["llama-gqa"], data)
    assert found == expected


def test_settings_are_put_back_after_an_error():
    with default_dtype(torch.float64), torch.autocast("cpu"), torch.inference_mode():
        with pytest.raises(KeyError), own_torch_settings():
            assert torch.get_default_dtype() == torch.float32
            assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()
            raise KeyError
        assert torch.get_default_dtype() == torch.float64
        assert torch.is_autocast_enabled("cpu") and torch.is_inference_mode_enabled()


def test_a_model_made_inside_inference_mode_is_refused_by_name(checkpoints):
    folder = checkpoints["gpt2"]
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager")
    with pytest.raises(InputError, match=r"was made inside torch.inference_mode.*make it outside"):
        load_model(model, tokenizer=AutoTokenizer.from_pretrained(folder))


def _contexts(model):
    neurons = Selection({Site(layer, "neurons"): torch.tensor([layer, 7]) for layer in range(3)},
                        {Site(layer, "neurons"): (40,) for layer in range(3)})  # fmt: skip
    gates = Gates({site: 1 - neurons.mask(site).float() * 0.5 for site in neurons.units})
    tokens = torch.tensor([[5, 6, 7]])
    return {
        "ablate": ablate(model, neurons),
        "gated": gated(model, gates),
        "at_dose": at_dose(model, gates, 0.5),
        "patch_activations": patch_activations(model, neurons, source=tokens),
    }


@pytest.mark.filterwarnings("ignore:the ablation of .* changed nothing")
@pytest.mark.parametrize("name", ["ablate", "gated", "at_dose", "patch_activations"])
def test_a_context_opens_again_and_inside_itself(name, llama):
    tokens = torch.tensor([[9, 8, 4]])

    def logits():
        with torch.inference_mode():
            return llama(tokens, return_type="logits")

    before = logits()
    context = _contexts(llama)[name]
    with context:
        once = logits()
    with context:
        again = logits()
        with context if name in ("ablate", "patch_activations") else nullcontext():
            inside = logits()
        after_inner = logits()
    assert not torch.equal(once, before)
    assert torch.equal(again, once) and torch.equal(inside, once) and torch.equal(after_inner, once)
    with pytest.raises(KeyError), context:
        raise KeyError
    assert torch.equal(logits(), before)
