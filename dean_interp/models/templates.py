"""How a prompt and its answers become token ids, and that no template or tokenizer changes what was given."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dean_interp.errors import InputError
from dean_interp.models.thoughts import behind_thought

Template = Literal["chat", "raw", "released", "rendered"]

_Messages = Sequence[Mapping[str, str]]
# What a template raises by itself, and what becomes of content that it takes for something else.
_REFUSALS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)


def token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str], template: Template
) -> tuple[list[int], list[list[int]]]:
    """Tokens of a prompt, and of each answer behind it; what the templates do stands at `tokens.encode`."""
    if template not in get_args(Template):
        raise InputError(f"template must be one of {get_args(Template)}, got {template!r}")
    if template == "released":
        prompt_ids = text_ids(tokenizer, prompt)
        answer_ids = [text_ids(tokenizer, answer)[1:] for answer in answers]
    else:
        prompt_ids, answer_ids = _ids_together(tokenizer, prompt, answers, template)
    if not prompt_ids:
        raise InputError(
            f"the prompt {prompt[:40]!r} has no tokens of its own under the template '{template}', so nothing predicts "
            "what follows it"
        )
    return prompt_ids, answer_ids


def _ids_together(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str], template: Template
) -> tuple[list[int], list[list[int]]]:
    """Tokens of prompt and answers as one text, parted where they begin to differ."""
    text = prompt
    if template == "chat":
        text = rendered_chat(tokenizer, [{"role": "user", "content": prompt}])
    elif template == "raw":
        text = f"{prompt}\n"
    # A rendered chat has its special tokens already.
    special = template == "raw"
    prompt_ids = text_ids(tokenizer, text, special=special)
    whole = [text_ids(tokenizer, text + answer, special=special) for answer in answers]
    # A token that straddles the border between prompt and answer is the answer's.
    n_shared = min((n_common(prompt_ids, ids) for ids in whole), default=len(prompt_ids))
    return prompt_ids[:n_shared], [ids[n_shared:] for ids in whole]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Tokens of a text that something may follow: what a tokenizer puts before a text, and nothing behind it.

    Some tokenizers end every text with an end-of-text or separator token; no answer can follow that.

    Args:
        special: put what the tokenizer adds before a text (a BOS) there.
    """
    plain = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if not special:
        return plain
    return _before(tokenizer, text, plain) + plain


def appended(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts behind every text by itself."""
    text = "text"
    whole = list(tokenizer(text).input_ids)
    n_own = len(text_ids(tokenizer, text))
    return whole[n_own:]


def _before(tokenizer: PreTrainedTokenizerBase, text: str, plain: Sequence[int]) -> list[int]:
    """The tokens that a tokenizer puts before a text by itself, whose own tokens are `plain`."""
    whole = list(tokenizer(text, verbose=False).input_ids)
    # Without tokens of its own the text says nothing about where they stand.
    if not plain:
        has_bos = whole[:1] == [tokenizer.bos_token_id]
        return whole[:1] if has_bos else []
    n_added = len(whole) - len(plain)
    for start in range(n_added + 1):
        if whole[start : start + len(plain)] == list(plain):
            return whole[:start]
    raise InputError(
        f"the tokenizer of {tokenizer.name_or_path!r} makes other tokens of {text[:40]!r} when it adds its special ones"
    )


def n_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common, from their beginning on."""
    n_equal = 0
    for token, other in zip(first, second, strict=False):
        if token != other:
            break
        n_equal += 1
    return n_equal


def rendered_chat(tokenizer: PreTrainedTokenizerBase, messages: _Messages, *, generation_prompt: bool = True) -> str:
    """What the chat template makes of messages, up to where the model's next words begin.

    A message has a `role` (`system`, `user`, `assistant`) and a `content`. The text is a prompt for the template
    `rendered`. Most templates take a content as text, some as a list of parts, and some want a system message, which is
    empty then: the first of these forms under which everything that was said stands in the text is taken.

    Args:
        generation_prompt: end with what begins the model's turn; without it the last message stays open.

    Raises `InputError` where there is no chat template, it refuses the messages (some know no system message), or it
    leaves out, changes or repeats what was said.
    """
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use template='raw'")
    _warn_of_clock(tokenizer)
    # Unlike most prompts this one shows whether marks, quotes, newlines and other alphabets stay, and how often.
    probe = [dict(message, content=_probe(number)) for number, message in enumerate(messages)]
    faults = []
    for add_system, in_parts in itertools.product((False, True), (False, True)):
        if add_system and messages[0]["role"] == "system":
            continue
        render = partial(
            _rendered,
            tokenizer,
            generation_prompt=generation_prompt,
            add_system=add_system,
            in_parts=in_parts,
        )
        try:
            shown = render(probe)
            text = render(messages)
        except _REFUSALS as error:
            roles = ", ".join(message["role"] for message in messages)
            faults.append(f"refuses messages by {roles}: {error}")
            continue
        are_shown = _all_stand_in(shown, probe) and _all_stand_in(text, messages)
        n_times = max(shown.count(message["content"]) for message in probe)
        if are_shown and n_times == 1:
            return text
        fault = f"shows {n_times} times" if are_shown else "leaves out or changes"
        last = messages[-1]["content"]
        faults.append(f"{fault} what was said: {last[:40]!r}")
    raise InputError(f"the chat template of {tokenizer.name_or_path!r} {faults[0]}")


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: _Messages,
    *,
    generation_prompt: bool,
    add_system: bool,
    in_parts: bool,
) -> str:
    """The messages in one of the forms that templates take."""
    conversation: list[dict[str, Any]] = [dict(message) for message in messages]
    if add_system:
        conversation.insert(0, {"role": "system", "content": ""})
    if in_parts:
        for message in conversation:
            message["content"] = [{"type": "text", "text": message["content"]}]
    return str(
        tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            continue_final_message=not generation_prompt,
        )
    )


def _probe(number: int) -> str:
    """The content of a message that shows what a template does to what is said."""
    return f'Is <b>No. {number}</b> "fair" & right:\n1. Zoë\'s {{x}}, 2. 東京 [{number}]?'


def _all_stand_in(text: str, messages: _Messages) -> bool:
    """Whether all messages stand in the text, in their order. Blanks around a content may be taken away."""
    start = 0
    for message in messages:
        content = message["content"].strip()
        # Templates take thoughts out of earlier answers.
        if message["role"] == "assistant":
            answer = behind_thought(content) or ""
            content = answer.strip()
        place = text.find(content, start)
        if place < 0:
            return False
        start = place + len(content)
    return True


def _warn_of_clock(tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn where the template writes the day of today."""
    text = str(tokenizer.chat_template)
    # One that `chat_settings` has given a day holds a clock of its own.
    has_own_clock = "macro strftime_now" in text
    if "strftime_now" in text and not has_own_clock:
        warnings.warn(
            f"the chat template of {tokenizer.name_or_path!r} writes the day of today, so that tomorrow's prompts will "
            "be others: load_model keeps to one day (chat=ChatSettings(date=...))",
            stacklevel=4,
        )
