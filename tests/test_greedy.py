"""Greedy is argmax whatever a checkpoint's generation settings say, and an answer ends where a turn ends."""

import copy
import math
from collections import Counter

import pandas as pd
import pytest
import torch
from architectures import BUILD, build
from conftest import CHAT
from hooked import as_hooked_transformer
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig, WatermarkingConfig

from dean_interp import InputError, Selection, Site, ablate, generate, load_model
from dean_interp.models.adapters import adapter_of
from dean_interp.models.cache_check import cache_is_right
from dean_interp.models.matrices import shape
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.tokens import encode
from dean_interp.models.turn_end import end_of_turn, end_tokens

pytestmark = pytest.mark.hooks

PROMPTS = ["hello there", "one"]
N_NEW = 12  # more than are written at a time

# A legal value of each field that is not its default.
FIELDS = {
    "max_length": 3, "max_new_tokens": 2, "min_length": 40, "min_new_tokens": 30, "early_stopping": True,
    "max_time": 1e-9, "stop_strings": ["e", "o", "I"], "do_sample": True, "num_beams": 3, "use_mtp": True,
    "use_cache": False, "cache_implementation": "static", "cache_config": {"nbits": 4}, "max_cache_len": 4,
    "temperature": 9.0, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "top_h": 0.1, "typical_p": 0.1, "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5, "repetition_penalty": 1.9, "encoder_repetition_penalty": 1.9, "length_penalty": 3.0,
    "no_repeat_ngram_size": 1, "bad_words_ids": [[token] for token in range(4, 120)], "renormalize_logits": True,
    "forced_bos_token_id": 7, "forced_eos_token_id": 1, "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 9.0), "suppress_tokens": list(range(4, 120)),
    "begin_suppress_tokens": list(range(4, 200)), "sequence_bias": [[[9], 99.0]], "token_healing": True,
    "guidance_scale": 3.0, "watermarking_config": WatermarkingConfig(bias=50.0), "num_return_sequences": 2,
    "output_attentions": True, "output_hidden_states": True, "output_scores": True, "output_logits": True,
    "return_dict_in_generate": False, "pad_token_id": 9, "bos_token_id": 9, "eos_token_id": "holds",
    "encoder_no_repeat_ngram_size": 1, "decoder_start_token_id": 9, "is_assistant": True, "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.9, "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 3, "assistant_early_exit": 1, "assistant_lookbehind": 3, "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.9, "speculation_type": "mtp", "compile_config": CompileConfig(),
    "disable_compile": True, "continuous_batching_config": {"block_size": 2}, "low_memory": True, "penalty_alpha": 0.6,
    "dola_layers": "low", "diversity_penalty": 0.5, "num_beam_groups": 2, "constraints": ["a"],
    "force_words_ids": [[9]], "prefill_chunk_size": 2,
}  # fmt: skip
ABOUT_THE_FILE = {"transformers_version"}


def likeliest(model, tokenizer, prompts, ends, n_new=N_NEW):
    """The readable twin: one prompt, one pass and one argmax at a time, without padding and without a cache."""
    answers = []
    for prompt in prompts:
        ids, new = list(encode(tokenizer, prompt, []).prompt), []
        while len(new) < n_new:
            logits = model(torch.tensor([ids + new]), return_type="logits")
            new.append(int(logits[0, -1].argmax()))
            if new[-1] in ends:
                break
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
    return answers


@pytest.fixture(scope="module")
def expected(llama):
    with torch.inference_mode():
        return likeliest(llama, native_tokenizer(llama), PROMPTS, {1})


def test_every_field_of_the_generation_settings_is_tried():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - ABOUT_THE_FILE
    assert fields <= set(FIELDS), "a new version of transformers has more: give each a value here"


def test_one_text_is_no_list_of_texts_and_a_column_is(llama, untyped):
    with pytest.raises(InputError, match="prompts must be a list of texts, got one text"):
        generate(llama, "May I?", max_new_tokens=2)
    column = pd.Series(["May I?", "Who won?"])
    assert generate(llama, column, max_new_tokens=2) == generate(llama, list(column), max_new_tokens=2)


def with_settings(checkpoints, **settings):
    plain = AutoModelForCausalLM.from_pretrained(checkpoints["llama-gqa"])
    for name, value in settings.items():
        setattr(plain.generation_config, name, value)
    return plain


@pytest.mark.parametrize("field", sorted(set(FIELDS) - {"eos_token_id"}))
def test_greedy_is_argmax_whatever_the_settings_of_the_checkpoint_say(llama, expected, monkeypatch, field):
    settings = llama.original_model.generation_config
    monkeypatch.setattr(settings, field, FIELDS[field], raising=False)
    assert generate(llama, PROMPTS, max_new_tokens=N_NEW) == expected
    assert llama.original_model.generation_config is settings and getattr(settings, field) is FIELDS[field]


@pytest.mark.parametrize("kind", ["dynamic", "offloaded", "quantized", "hybrid", "sliding_window", "offloaded_static"])
def test_no_kind_of_cache_breaks_it(llama, expected, monkeypatch, kind):
    monkeypatch.setattr(llama.original_model.generation_config, "cache_implementation", kind)
    assert generate(llama, PROMPTS, max_new_tokens=N_NEW) == expected


def test_settings_that_old_checkpoints_keep_in_their_configuration_do_not_come_in(checkpoints, tokenizer, expected):
    plain = with_settings(checkpoints)
    for name, value in {"repetition_penalty": 1.9, "num_beams": 3, "use_cache": False, "min_length": 40}.items():
        setattr(plain.config, name, value)
    assert generate(load_model(plain, tokenizer=tokenizer), PROMPTS, max_new_tokens=N_NEW) == expected


def test_the_settings_come_back_after_an_exception(checkpoints, tokenizer):
    model = load_model(with_settings(checkpoints, repetition_penalty=1.9), tokenizer=tokenizer)
    before = model.original_model.generation_config
    generate(model, PROMPTS, max_new_tokens=1)

    def fail(activation, hook):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError), model.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", fail)]):
        generate(model, PROMPTS)
    assert model.original_model.generation_config is before


def test_a_model_without_generation_settings_answers(checkpoints, tokenizer, expected):
    plain = with_settings(checkpoints)
    plain.generation_config = None
    assert generate(load_model(plain, tokenizer=tokenizer), PROMPTS, max_new_tokens=N_NEW) == expected


@pytest.mark.parametrize("ending", [int, list])
def test_an_end_in_the_settings_ends_answers_beside_the_tokenizers_own(checkpoints, tokenizer, expected, ending):
    model = load_model(with_settings(checkpoints, eos_token_id=9), tokenizer=tokenizer)
    (end,) = tokenizer(expected[1][3], add_special_tokens=False).input_ids
    model.original_model.generation_config.eos_token_id = end if ending is int else [9, end]
    ends = adapter_of(model).end_tokens(tokenizer)
    assert {end, tokenizer.eos_token_id} <= set(ends)
    found = generate(model, PROMPTS, max_new_tokens=N_NEW)
    with torch.inference_mode():
        assert found == likeliest(model, tokenizer, PROMPTS, set(ends))
    assert found != expected


MARKED = {  # the end of a turn by the template, and by what the tokenizer calls it
    "<|im_end|>": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "<end_of_turn>": "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "<|eot_id|>": "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "<|end|>": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "[/TURN]": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} "
    "{{ m.content }} [/TURN]{% endif %}{% endfor %}",
    "<sep>": "{% for m in messages %}{{ m.content }}<sep>{% endfor %}",
}


def test_padding_that_the_model_has_no_embedding_for_reaches_no_model(checkpoints, tokenizer, llama, expected):
    """As the `[PAD]` that many training scripts added to a tokenizer, and not to the model."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"pad_token": "[PAD]"})
    assert made.pad_token_id >= adapter_of(llama).vocabulary_size
    (end,) = tokenizer(expected[1][3], add_special_tokens=False).input_ids
    model = load_model(with_settings(checkpoints, eos_token_id=end), tokenizer=made)
    answers = generate(model, PROMPTS, max_new_tokens=N_NEW)
    with torch.inference_mode():
        assert answers == likeliest(llama, tokenizer, PROMPTS, {end, tokenizer.eos_token_id})
    assert len(answers[1]) < len(expected[1])


UNMARKED = {
    "nothing behind a turn": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "the next turn is opened always": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>",
    "words alone": "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}",
    "one turn alone": "{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}"
    "{{ messages[0].content }}",
    "the answer is left out": "{{ messages[0].content }}<|user|>",
    "parts": "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}<|user|>",
}


def marked(tokenizer, end, *, special):
    made = copy.deepcopy(tokenizer)
    names = ["<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "<|end_header_id|>", end]
    made.add_tokens(names, special_tokens=special)
    made.chat_template = MARKED[end]
    return made


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("end", MARKED)
def test_the_end_of_a_turn_is_what_the_template_writes_behind_an_answer(tokenizer, end, special):
    made = marked(tokenizer, end, special=special)
    assert end_of_turn(made) == made.convert_tokens_to_ids(end)
    assert end_tokens(made, [7, 1]) == [7, 1, made.convert_tokens_to_ids(end)]


@pytest.mark.parametrize("template", UNMARKED)
def test_a_template_that_marks_no_end_gives_none(tokenizer, template):
    made = copy.deepcopy(tokenizer)
    made.chat_template = UNMARKED[template]
    assert end_of_turn(made) is None
    assert end_tokens(made) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", ["bridge", "HookedTransformer"])
def test_an_answer_ends_with_its_turn_and_does_not_show_the_mark(checkpoints, tokenizer, special, kind):
    folder = checkpoints["llama-gqa"]
    model = load_model(folder, device="cpu") if kind == "bridge" else as_hooked_transformer(folder, tokenizer)
    asked = ["hello there", "one", "two", "many more words"]
    free = generate(model, asked, max_new_tokens=40)
    # a letter that some answer writes in its middle is made the template's end of a turn
    written = Counter(letter for answer in free for letter in set(answer[4:]) - set(answer[:4]))
    end = next(letter for letter, _ in written.most_common() if letter.isascii() and letter.isprintable())
    made = copy.deepcopy(tokenizer)
    made.add_tokens([end], special_tokens=special)
    behind = "{% if m.role == 'assistant' %}" + end + "{% endif %}"
    made.chat_template = CHAT.replace("{% endfor %}", behind + "{% endfor %}")
    load_model(model, tokenizer=made)
    assert end_of_turn(made) == tokenizer.convert_tokens_to_ids(end)
    kept = {prompt: answer.partition(end)[0] for prompt, answer in zip(asked, free, strict=True) if end not in prompt}
    assert generate(model, list(kept), max_new_tokens=40) == list(kept.values())
    assert list(kept.values()) != free


# Windows shorter than an answer.
CHANGED = {"mistral": {"sliding_window": 6}, "gemma-3": {"sliding_window": 6}}


@pytest.mark.parametrize("name", BUILD)
def test_cached_answers_are_those_of_the_plain_loop_on_every_architecture(tokenizer, name, monkeypatch):
    config, kind, settings = BUILD[name]
    monkeypatch.setitem(BUILD, name, (config, kind, {**settings, **CHANGED.get(name, {})}))
    model = build(name, tokenizer)
    assert cache_is_right(model), "or all would go without a cache"
    site = Site(1, "out")
    half = Selection({site: torch.arange(0, math.prod(shape(model, site)), 2)}, {site: shape(model, site)})
    with torch.inference_mode():
        ends = set(adapter_of(model).end_tokens(tokenizer))
        assert generate(model, PROMPTS, max_new_tokens=N_NEW) == likeliest(model, tokenizer, PROMPTS, ends)
        with ablate(model, half):
            assert generate(model, PROMPTS, max_new_tokens=N_NEW) == likeliest(model, tokenizer, PROMPTS, ends)


def test_attention_that_hooks_look_into_reads_the_cache(llama):
    """The fused attention stands aside for hooks: then it is the bridge that has to find the cache."""
    seen, ends = [], {1}
    hooks = [
        (f"blocks.{layer}.attn.hook_pattern", lambda p, hook: seen.append(p.shape[-2:]) or None) for layer in (0, 1)
    ]
    with torch.inference_mode():
        expected = likeliest(llama, native_tokenizer(llama), PROMPTS[:1], ends)
        generate(llama, PROMPTS[:1], max_new_tokens=1)
        with llama.hooks(fwd_hooks=hooks):
            assert generate(llama, PROMPTS[:1], max_new_tokens=N_NEW) == expected
    assert seen[-1][0] == 1 and seen[-1][1] > N_NEW, "one token looks back at all before it"


def test_a_brought_bridge_has_a_cache_too(checkpoints, llama):
    from transformer_lens.model_bridge import TransformerBridge

    brought = TransformerBridge.boot_transformers(str(checkpoints["llama-gqa"]), device="cpu")
    assert cache_is_right(brought)
    assert generate(brought, PROMPTS, max_new_tokens=N_NEW) == generate(llama, PROMPTS, max_new_tokens=N_NEW)
