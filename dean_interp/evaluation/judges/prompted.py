"""A chat model as a judge, through the same loading and generation as the model that is studied.

What is judged cannot end its own turn: special tokens in it are parted (`forms.as_data`), and a conversation that still
has more of them than an innocent one is a fault. The verdict is read from the new tokens alone.
"""

from collections.abc import Sequence

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
        self.model, self.form, self.batch_size = model, form, batch_size
        self.in_parts = next((some for some in (False, True) if _shows_both(tokenizer, form, in_parts=some)), None)
        if self.in_parts is None:
            raise InputError(
                f"the chat template of {model.cfg.model_name} leaves out the prompt or the answer of the form "
                f"'{form.name}': it could only judge nothing"
            )

    @property
    def name(self) -> str:
        """The form and the model."""
        return f"{self.form.name} by {self.model.cfg.model_name}"

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer; a conversation longer than the judge's context has none."""
        refuse_unpaired(prompts, answers)
        tokenizer, options = native_tokenizer(self.model), {"in_parts": bool(self.in_parts)}
        special = special_tokens(tokenizer)
        own = _n_special(tokenizer, _render(tokenizer, self.form, *_INNOCENT, **options), special)
        asked = [
            _render(tokenizer, self.form, as_data(prompt, list(special)), as_data(answer, list(special)), **options)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        faults = [self._fault(tokenizer, text, special, own) for text in asked]
        fits = [text for text, fault in zip(asked, faults, strict=True) if fault is None]
        n_new = self.form.max_new_tokens
        how = {"max_new_tokens": n_new, "batch_size": self.batch_size, "template": "rendered", "label": "judging"}
        said = iter(generate(self.model, fits, **how) if fits else ())
        return [Verdict(None, "", fault) if fault else self.form.verdict(next(said)) for fault in faults]

    def _fault(
        self, tokenizer: PreTrainedTokenizerBase, text: str, special: dict[str, int], n_special: int
    ) -> str | None:
        if len(_ids(tokenizer, text)) > self.model.cfg.n_ctx - self.form.max_new_tokens:
            return "too long"
        return None if _n_special(tokenizer, text, special) == n_special else "special token in the text"


def _render(tokenizer: PreTrainedTokenizerBase, form: Form, prompt: str, answer: str, *, in_parts: bool) -> str:
    messages = form.messages(prompt, answer)
    if form.around:
        begins = list(tokenizer("").input_ids[:1]) == [tokenizer.bos_token_id]
        return f"{tokenizer.bos_token if begins else ''}{form.around[0]}{messages[0]['content']}{form.around[1]}"
    conversation = [
        {**one, "content": [{"type": "text", "text": one["content"]}] if in_parts else one["content"]}
        for one in messages
    ]
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
