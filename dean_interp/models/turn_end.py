"""Which tokens end an answer: the tokenizer's end of text, those of the settings, and the template's end of turn.

A chat template closes an assistant's turn with a token of its own (`<|im_end|>`, `<end_of_turn>`, `<|eot_id|>`,
`<|end|>`) that many checkpoints name in no setting. It is found by rendering a conversation.
"""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# Words that no template adds by itself, and that none shortens or changes.
_ASKED = "asked-here-first"
_ANSWERED = "answered-here"
_ASKED_AGAIN = "asked-here-again"


def end_tokens(tokenizer: PreTrainedTokenizerBase, settings: int | Sequence[int] | None = None) -> list[int]:
    """The tokens that end an answer, each once.

    Args:
        tokenizer: the checkpoint's own.
        settings: `eos_token_id` of the checkpoint's generation settings.
    """
    ends: list[int] = []
    if isinstance(settings, int):
        ends.append(settings)
    elif settings is not None:
        ends += settings
    for token in (tokenizer.eos_token_id, end_of_turn(tokenizer)):
        if isinstance(token, int):
            ends.append(token)
    return list(dict.fromkeys(ends))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template writes behind what the assistant said; None where it writes none.

    A template may open the next turn in any case. What opens a turn ends none, so a token of the prompt counts only if
    it follows an answer in mid-conversation too.
    """
    if not tokenizer.chat_template:
        return None
    asked = [{"role": "user", "content": _ASKED}]
    answered = [*asked, {"role": "assistant", "content": _ANSWERED}]
    again = [*answered, {"role": "user", "content": _ASKED_AGAIN}]
    try:
        prompt = _rendered(tokenizer, asked, open_turn=True)
        behind_last = _behind_answer(_rendered(tokenizer, answered))
        behind_earlier = _behind_answer(_rendered(tokenizer, again))
    # A template that refuses such a conversation.
    except (TemplateError, TypeError, ValueError):
        return None
    last = _markers_of(tokenizer, behind_last)[:1]
    earlier = _markers_of(tokenizer, behind_earlier)[:1]
    if not last:
        return None
    opens_a_turn = last[0] in _markers_of(tokenizer, prompt)
    if opens_a_turn and last != earlier:
        return None
    return last[0]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, open_turn: bool = False) -> str:
    """What the chat template makes of messages, with the beginning of the next turn where it is asked for."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn))


def _behind_answer(rendered: str) -> str:
    """What follows the answer; nothing where the template left the answer out."""
    _, found, behind = rendered.rpartition(_ANSWERED)
    return behind if found else ""


def _markers_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that mark and say nothing, in order."""
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    all_markers = markers(tokenizer)
    return [token for token in token_ids if token in all_markers]


def markers(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that mark and say nothing: special and added ones, but for blanks, which some tokenizers add too."""
    # The tokenizer's class declares this method as an attribute.
    typed: Any = tokenizer
    vocabulary = typed.get_added_vocab()
    added = {token for text, token in vocabulary.items() if text.strip()}
    return {*tokenizer.all_special_ids, *added}
