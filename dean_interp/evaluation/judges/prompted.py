"""A chat model as a judge, through the same loading and generation as the model that is studied.

What is judged cannot end its own turn: special tokens in it are parted (`forms.as_data`), and a conversation that still
has more of them than an innocent one is a fault. The verdict is read from the new tokens alone.
"""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dean_interp.errors import InputError
from dean_interp.evaluation.judges.forms import Form, as_data, special_tokens
from dean_interp.evaluation.judges.protocol import Verdict, refuse_unpaired
from dean_interp.models.generate import generate
from dean_interp.models.load import HookedModel, native_tokenizer

_INNOCENT = ("Which colour is the sky?", "It is blue by day.")


class PromptedJudge:
    """A loaded model that is asked by a form; greedy, only its new tokens are read."""

    def __init__(self, model: HookedModel, form: Form, *, batch_size: int = 16) -> None:
        """Raises `InputError` where the model has no chat template to ask with, or one that drops what is judged."""
        tokenizer = native_tokenizer(model)
        if not form.around and not tokenizer.chat_template:
            raise InputError(f"{model.cfg.model_name} has no chat template, so it cannot be asked as a judge")
        self.model = model
        self.form = form
        self.batch_size = batch_size
        # most templates take a message as plain text, some as a list of parts
        shown = [in_parts for in_parts in (False, True) if _shows_both(tokenizer, form, in_parts=in_parts)]
        if not shown:
            raise InputError(
                f"the chat template of {model.cfg.model_name} leaves out the prompt or the answer of the form "
                f"'{form.name}': it could only judge nothing"
            )
        self.in_parts = shown[0]

    @property
    def name(self) -> str:
        """The form and the model."""
        return f"{self.form.name} by {self.model.cfg.model_name}"

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer; a conversation longer than the judge's context has none."""
        refuse_unpaired(prompts, answers)
        # special tokens in what is judged are parted; more of them than an innocent conversation has are a fault
        tokenizer = native_tokenizer(self.model)
        special = special_tokens(tokenizer)
        parted = list(special)
        innocent = _render(tokenizer, self.form, *_INNOCENT, in_parts=self.in_parts)
        n_special = _n_special(tokenizer, innocent, special)
        conversations, faults = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            judged = as_data(prompt, parted), as_data(answer, parted)
            text = _render(tokenizer, self.form, *judged, in_parts=self.in_parts)
            conversations.append(text)
            faults.append(self._fault(tokenizer, text, special, n_special))
        # the judge answers the conversations without a fault
        asked = [text for text, fault in zip(conversations, faults, strict=True) if fault is None]
        replies = iter(self._replies(asked))
        return [Verdict(None, "", fault) if fault else self.form.verdict(next(replies)) for fault in faults]

    def _replies(self, conversations: Sequence[str]) -> list[str]:
        if not conversations:
            return []
        return generate(
            self.model,
            conversations,
            max_new_tokens=self.form.max_new_tokens,
            batch_size=self.batch_size,
            template="rendered",
            label="judging",
        )

    def _fault(
        self, tokenizer: PreTrainedTokenizerBase, text: str, special: dict[str, int], n_special: int
    ) -> str | None:
        if len(_ids(tokenizer, text)) > self.model.cfg.n_ctx - self.form.max_new_tokens:
            return "too long"
        return None if _n_special(tokenizer, text, special) == n_special else "special token in the text"


def _render(tokenizer: PreTrainedTokenizerBase, form: Form, prompt: str, answer: str, *, in_parts: bool) -> str:
    """The conversation as the judge reads it, up to where its own words begin."""
    messages = form.messages(prompt, answer)
    if form.around:
        # no chat template: the checkpoint was trained on one message between two marks
        before, after = form.around
        begins = list(tokenizer("").input_ids[:1]) == [tokenizer.bos_token_id]
        bos = tokenizer.bos_token if begins else ""
        return f"{bos}{before}{messages[0]['content']}{after}"
    conversation: list[dict[str, Any]] = [dict(message) for message in messages]
    if in_parts:
        for message in conversation:
            message["content"] = [{"type": "text", "text": message["content"]}]
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))


def _shows_both(tokenizer: PreTrainedTokenizerBase, form: Form, *, in_parts: bool) -> bool:
    """Whether both texts reach the judge. Llama-Guard-3-1B's template takes a list of parts and drops plain text."""
    try:
        text = _render(tokenizer, form, *_INNOCENT, in_parts=in_parts)
    except (TemplateError, TypeError):
        return False
    return all(part in text for part in _INNOCENT)


def _n_special(tokenizer: PreTrainedTokenizerBase, text: str, special: dict[str, int]) -> int:
    known = set(special.values())
    return sum(i in known for i in _ids(tokenizer, text))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
