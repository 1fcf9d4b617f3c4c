"""The same conversation twice, with a model as it is and with an edit at a dose, which may change between turns.

Both sides hear the same user. Each side remembers its own answers, as it would if it were talked to alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dean_interp.editing.edit_at_dose import AnyEdit, at_dose, refuse_dose, refuse_other_base
from dean_interp.errors import InputError
from dean_interp.models.generate import generate
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.templates import rendered_chat


@dataclass(frozen=True)
class Turn:
    """What the user said, and what both sides answered."""

    prompt: str
    original: str
    edited: str
    dose: float


class Conversation:
    """Two conversations of one model side by side: `Conversation(model, edit).say("Who are you?").edited`.

    Answers are greedy. The edit is applied by hooks while its side answers, so there is one model in memory, and it is
    left as it was.
    """

    def __init__(
        self,
        model: HookedModel,
        edit: AnyEdit,
        *,
        dose: float = 1.0,
        system: str | None = None,
        answer_length: int = 128,
    ) -> None:
        """Begin a conversation.

        Args:
            model: from `load_model`; its tokenizer needs a chat template.
            edit: gates, an edit, or a selection, which is silenced.
            dose: 0 is the original, 1 the edit, -1 the opposite (`editing.edit_at_dose`).
            system: message that stands before the first turn.
            answer_length: the most tokens of an answer.

        Raises:
            InputError: an edit of another model or one that changes nothing, a dose out of range, a model without a
                chat template, a template that knows no system message.
        """
        if not native_tokenizer(model).chat_template:
            raise InputError(f"{model.cfg.model_name} has no chat template, so nobody can talk to it")
        refuse_other_base(model, edit)
        self.model = model
        self.edit = edit
        self.system = system
        self.answer_length = answer_length
        self.dose = dose
        self._turns: list[Turn] = []
        # A template that refuses the system message does so now, not when the user has said something.
        self._rendered([], "")

    @property
    def dose(self) -> float:
        """The dose of the next turn. Setting it raises `InputError` where it is out of range."""
        return self._dose

    @dose.setter
    def dose(self, dose: float) -> None:
        refuse_dose(dose)
        self._dose = dose

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was said since the beginning, or since the last `reset`."""
        return tuple(self._turns)

    def reset(self) -> None:
        """Forget all turns. The dose stays."""
        self._turns.clear()

    def say(self, prompt: str) -> Turn:
        """Both sides' answers to a prompt and all that came before it.

        Raises `InputError` where the conversation leaves no room for an answer in the model's context.
        """
        original_answers = [turn.original for turn in self._turns]
        edited_answers = [turn.edited for turn in self._turns]
        original = self._answer(original_answers, prompt, label="original")
        with at_dose(self.model, self.edit, self.dose):
            edited = self._answer(edited_answers, prompt, label="edited")
        turn = Turn(prompt, original, edited, self.dose)
        self._turns.append(turn)
        return turn

    def _answer(self, answers: Sequence[str], prompt: str, *, label: str) -> str:
        text = self._rendered(answers, prompt)
        (answer,) = generate(
            self.model,
            [text],
            max_new_tokens=self.answer_length,
            template="rendered",
            label=label,
        )
        return answer

    def _rendered(self, answers: Sequence[str], prompt: str) -> str:
        """One side's conversation as the model reads it, up to where its next answer begins.

        `answers` are that side's, one for each earlier turn.
        """
        messages = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for turn, answer in zip(self._turns, answers, strict=True):
            messages.append({"role": "user", "content": turn.prompt})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": prompt})
        return rendered_chat(native_tokenizer(self.model), messages)
