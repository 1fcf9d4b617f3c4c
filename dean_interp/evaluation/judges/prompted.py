"""A chat model as a judge, through the same loading and generation as the model that is studied."""

from collections.abc import Sequence

from dean_interp.errors import InputError
from dean_interp.evaluation.judges.forms import Form, as_data
from dean_interp.evaluation.judges.protocol import Verdict, refuse_unpaired
from dean_interp.models.generate import generate
from dean_interp.models.load import HookedModel, native_tokenizer


class PromptedJudge:
    """A loaded model that is asked by a form; greedy, only its new tokens are read."""

    def __init__(self, model: HookedModel, form: Form, *, batch_size: int = 16) -> None:
        """Raises `InputError` where the model's tokenizer has no chat template to ask with."""
        if not native_tokenizer(model).chat_template:
            raise InputError(f"{model.cfg.model_name} has no chat template, so it cannot be asked as a judge")
        self.model, self.form, self.batch_size = model, form, batch_size

    @property
    def name(self) -> str:
        """The form and the model."""
        return f"{self.form.name} by {self.model.cfg.model_name}"

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer; a conversation longer than the judge's context has none."""
        refuse_unpaired(prompts, answers)
        tokenizer = native_tokenizer(self.model)
        special = [*map(str, tokenizer.all_special_tokens), *getattr(tokenizer, "get_added_vocab", dict)()]
        asked = [
            str(tokenizer.apply_chat_template(
                self.form.messages(as_data(prompt, special), as_data(answer, special)),
                tokenize=False, add_generation_prompt=True,
            ))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]  # fmt: skip
        room = self.model.cfg.n_ctx - self.form.max_new_tokens
        fits = [len(tokenizer(text, add_special_tokens=False).input_ids) <= room for text in asked]
        said = iter(
            generate(
                self.model,
                [text for text, fit in zip(asked, fits, strict=True) if fit],
                max_new_tokens=self.form.max_new_tokens,
                template="rendered",
                batch_size=self.batch_size,
                label="judging",
            )
            if any(fits)
            else ()
        )
        return [self.form.verdict(next(said)) if fit else Verdict(None, "", "too long") for fit in fits]
