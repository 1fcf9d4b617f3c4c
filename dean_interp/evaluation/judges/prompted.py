"""A chat model as a judge, through the same loading and generation as the model that is studied.

What is judged cannot end its own turn: special tokens in it are parted (`forms.as_data`), and a conversation that still
has more of them than an innocent one is a fault. The verdict is read from the new tokens alone.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dean_interp.data.hub_names import shared_name
from dean_interp.errors import InputError, refuse_below_one
from dean_interp.evaluation.judges.forms import Form, as_data, special_tokens
from dean_interp.evaluation.judges.protocol import Verdict, refuse_unpaired
from dean_interp.models.generate import generate
from dean_interp.models.load import HookedModel, model_fingerprint
from dean_interp.models.native_tokenizer import chat_parts, native_tokenizer
from dean_interp.models.templates import rendered_chat
from dean_interp.resume import Unfinished

_INNOCENT = ("Which colour is the sky?", "It is blue by day.")


class PromptedJudge:
    """A loaded model that is asked by a form; greedy, only its new tokens are read."""

    def __init__(self, model: HookedModel, form: Form, *, batch_size: int = 16, folder: Path | None = None) -> None:
        """Nothing is asked yet.

        Args:
            batch_size: conversations a batch.
            folder: keeps what finished batches said while others are asked; a killed call goes on from there.

        Raises:
            InputError: the model has no chat template to ask with, or one that drops what is judged; a `batch_size`
                below 1.
        """
        refuse_below_one(batch_size=batch_size)
        tokenizer = native_tokenizer(model)
        if not form.around and not tokenizer.chat_template:
            raise InputError(f"{model.cfg.model_name} has no chat template, so it cannot be asked as a judge")
        self.model = model
        self.form = form
        self.batch_size = batch_size
        self.folder = folder
        try:
            _render(tokenizer, form, *_INNOCENT)
        except InputError as error:
            raise InputError(
                f"the chat template of {model.cfg.model_name} leaves out the prompt or the answer of the form "
                f"'{form.name}', so it could only judge nothing: {error}"
            ) from error

    @property
    def name(self) -> str:
        """The form and the model, with its number format in half precision: rounding can turn a verdict."""
        name = f"{self.form.name} by {shared_name(str(self.model.cfg.model_name))}"
        dtype = next(self.model.parameters()).dtype
        return name if dtype == torch.float32 else f"{name} in {str(dtype).removeprefix('torch.')}"

    @property
    def fingerprint(self) -> str:
        """The name, the weights, what the chat template is told, and how much of a reply is read."""
        parts = [self.name, model_fingerprint(self.model), str(self.form.max_new_tokens)]
        return " ".join([*parts, *chat_parts(self.model)])

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer; a conversation longer than the judge's context has none."""
        refuse_unpaired(prompts, answers)
        # special tokens in what is judged are parted; more of them than an innocent conversation has are a fault
        tokenizer = native_tokenizer(self.model)
        special = special_tokens(tokenizer)
        parted = list(special)
        innocent = _render(tokenizer, self.form, *_INNOCENT)
        n_special = _n_special(tokenizer, innocent, special)
        asked, faults = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            text = _render(tokenizer, self.form, as_data(prompt, parted), as_data(answer, parted))
            fault = self._fault(tokenizer, text, special, n_special)
            faults.append(fault)
            # the judge answers the conversations without a fault
            if fault is None:
                asked.append(text)
        replies = iter(self._replies(asked))
        verdicts = []
        for fault in faults:
            if fault is None:
                verdicts.append(self.form.verdict(next(replies)))
            else:
                verdicts.append(Verdict(None, "", fault))
        return verdicts

    def _replies(self, conversations: Sequence[str]) -> list[str]:
        if not conversations:
            return []
        unfinished = self._unfinished(conversations)
        replies = generate(
            self.model,
            conversations,
            max_new_tokens=self.form.max_new_tokens,
            batch_size=self.batch_size,
            template="rendered",
            label="judging",
            unfinished=unfinished,
        )
        if unfinished:
            unfinished.discard()
        return replies

    def _unfinished(self, conversations: Sequence[str]) -> Unfinished | None:
        """What finished batches of these conversations said; None where nothing is kept."""
        if self.folder is None:
            return None
        content = json.dumps([self.fingerprint, self.batch_size, *conversations])
        fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        return Unfinished(self.folder / f"judging.{fingerprint}.unfinished", fingerprint)

    def _fault(
        self, tokenizer: PreTrainedTokenizerBase, text: str, special: dict[str, int], n_special: int
    ) -> str | None:
        """Why a conversation is not asked; None where it can be."""
        longest = self.model.cfg.n_ctx - self.form.max_new_tokens
        if len(_ids(tokenizer, text)) > longest:
            return "too long"
        if _n_special(tokenizer, text, special) != n_special:
            return "special token in the text"
        return None


def _render(tokenizer: PreTrainedTokenizerBase, form: Form, prompt: str, answer: str) -> str:
    """The conversation as the judge reads it, up to where its own words begin."""
    messages = form.messages(prompt, answer)
    if form.around:
        # no chat template: the checkpoint was trained on one message between two marks
        before, after = form.around
        adds_bos = list(tokenizer("").input_ids[:1]) == [tokenizer.bos_token_id]
        bos = tokenizer.bos_token if adds_bos else ""
        return f"{bos}{before}{messages[0]['content']}{after}"
    return rendered_chat(tokenizer, messages)


def _n_special(tokenizer: PreTrainedTokenizerBase, text: str, special: dict[str, int]) -> int:
    """How many of a text's tokens are special ones."""
    special_ids = set(special.values())
    return sum(token_id in special_ids for token_id in _ids(tokenizer, text))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
