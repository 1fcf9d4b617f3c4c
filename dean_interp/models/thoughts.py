"""Where a thinking model's thought ends and its answer begins.

A thought stands between two marks. Some chat templates write the first one themselves, so that an answer begins inside
a thought; some tokenizers hold the marks as special tokens, which decoding leaves out: both are put back, so that an
answer's text alone says where its thought ends.
"""

import itertools
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
)
"""What begins and what ends a thought: Qwen, DeepSeek, SmolLM and most others; Mistral; Cohere; EXAONE; Seed."""

# Tokens at a prompt's end that hold the longest mark, even where a token is a byte.
_N_LAST = 32


def behind_thought(answer: str) -> str | None:
    """What an answer says behind its thought, all of it where there is none; None where it ends inside of it."""
    text = answer.lstrip()
    for begin, end in MARKS:
        before, closed, behind = text.partition(end)
        if text.startswith(begin):
            return behind_thought(behind) if closed else None
        # The thought was begun by the prompt.
        if closed and begin not in before:
            return behind_thought(behind)
    return answer


def opened_thought(rendered: str) -> str:
    """The mark with which a rendered chat begins the model's thought itself, with what follows it; empty for none."""
    for begin, _ in MARKS:
        if rendered.rstrip().endswith(begin):
            start = rendered.rindex(begin)
            return rendered[start:]
    return ""


def begun_thought(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str:
    """What stands before an answer's own words where its prompt ends in the beginning of a thought; else nothing."""
    last = list(prompt[-_N_LAST:])
    text = str(tokenizer.decode(last, skip_special_tokens=False))
    return opened_thought(text)


def decoded(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """The text of an answer without special tokens, but for the marks of a thought."""
    special = set(map(str, tokenizer.all_special_tokens))
    marks = special.intersection(itertools.chain.from_iterable(MARKS))
    mark_of = {tokenizer.convert_tokens_to_ids(mark): mark for mark in marks}

    def without_special(part: list[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=True))

    text = ""
    start = 0
    for i, token in enumerate(token_ids):
        if token in mark_of:
            text += without_special(token_ids[start:i])
            text += mark_of[token]
            start = i + 1
    return text + without_special(token_ids[start:])
