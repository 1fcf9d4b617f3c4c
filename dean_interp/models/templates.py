"""How a prompt and its answers become token ids."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dean_interp.errors import InputError

Template = Literal["chat", "raw", "released", "rendered"]


def token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str], template: Template
) -> tuple[list[int], list[list[int]]]:
    """Tokens of a prompt, and of each answer behind it; what the templates do stands at `tokens.encode`."""
    if template not in get_args(Template):
        raise InputError(f"template must be one of {get_args(Template)}, got {template!r}")
    if template == "released":
        return tokenizer(prompt).input_ids, [tokenizer(answer).input_ids[1:] for answer in answers]
    text = prompt
    if template == "chat":
        text = rendered_chat(tokenizer, [{"role": "user", "content": prompt}])
    elif template == "raw":
        text = f"{prompt}\n"
    # A rendered chat has its special tokens already.
    special = template == "raw"
    prompt_ids = tokenizer(text, add_special_tokens=special).input_ids
    whole = [tokenizer(text + answer, add_special_tokens=special).input_ids for answer in answers]
    # A token that straddles the border between prompt and answer is the answer's.
    n_shared = min((n_common(prompt_ids, ids) for ids in whole), default=len(prompt_ids))
    return prompt_ids[:n_shared], [ids[n_shared:] for ids in whole]


def n_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common, from their beginning on."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))


def rendered_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """What the chat template makes of messages, up to where the model's next words begin.

    A message has a `role` (`system`, `user`, `assistant`) and a `content`. The text is a prompt for the template
    `rendered`.

    Raises `InputError` where there is no chat template, or it refuses the messages (some know no system message).
    """
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use template='raw'")
    conversation = [dict(message) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the chat template of {tokenizer.name_or_path!r} refuses messages by {roles}: {error}"
        ) from error
