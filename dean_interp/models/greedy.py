"""Greedy generation of a `transformers` model by settings of ours: a checkpoint's own do not come in.

`transformers` fills what a caller left open from the model's `generation_config` (repetition penalties, forbidden and
forced tokens, beams, guidance, kinds of caches), so that a greedy answer would not be the likeliest token at each step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields

from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What the installed version calls a KV cache, among arguments and in outputs: from transformers 5.24 on `cache`."""


def greedy_settings(ends: Sequence[int], *, cached: bool) -> GenerationConfig:
    """The likeliest token at each step, until a token of `ends`, which then fills the row.

    A tokenizer's own padding may be a token that the model has no embedding for.

    Args:
        ends: the tokens that end an answer; there may be none.
        cached: use a KV cache, of the kind that transformers takes by itself.
    """
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=cached,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else None,
        return_dict_in_generate=True,
    )


@contextmanager
def without_its_settings(model: PreTrainedModel) -> Iterator[None]:
    """While open, the model has no generation settings of its own; then it has them again."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
