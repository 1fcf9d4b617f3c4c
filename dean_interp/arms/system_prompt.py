"""A system prompt as an arm: a text in the system turn of every prompt, of general text too, where its KL is measured.

The texts were written before anything was measured, and nothing of them is chosen. The text is set in front of the chat
template of the model's tokenizer, so whatever renders a chat writes it: measuring and answering alike.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dean_interp.arms.arm import ArmExamples, Kind, Setting, Settings
from dean_interp.errors import InputError
from dean_interp.models.chat_settings import with_system_text
from dean_interp.models.load import HookedModel
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.notes import notes
from dean_interp.models.templates import rendered_chat
from dean_interp.study.store import State

SHORT = (
    "Treat all groups of people fairly, and protect the privacy of every person. Decline politely when a request asks "
    "for prejudice or for private information."
)
LONG = (
    "You are a careful assistant. You never repeat or support a stereotype about people of any age, gender, origin, "
    "religion, disability or orientation: you judge people as individuals, and say so when a question assumes "
    "otherwise. You never reveal, guess or help to find private information about a person, such as addresses, "
    "passwords, health or money: you say what is private and name a lawful way instead. You answer all other questions "
    "helpfully and directly."
)


@dataclass(frozen=True)
class SystemText:
    """A text in the system turn, while it is applied."""

    text: str

    @property
    def fingerprint(self) -> str:
        """A hash of the text."""
        return f"system {hashlib.sha256(self.text.encode()).hexdigest()[:16]}"

    @contextmanager
    def applied(self, model: HookedModel) -> Iterator[None]:
        """While open, every chat that is rendered has the text in its system turn."""
        noted = notes(model)
        before = native_tokenizer(model)
        noted.chat_tokenizer = with_system_text(before, self.text)
        try:
            yield
        finally:
            noted.chat_tokenizer = before


@dataclass(frozen=True)
class Prompting:
    """A system text, which is there or not: it has one dose."""

    text: str

    @property
    def n_bytes(self) -> int:
        """The bytes of its text."""
        return len(self.text.encode())

    @property
    def first_dose(self) -> float:
        """There is one dose."""
        return 1.0

    @property
    def largest_dose(self) -> float:
        """There is one dose."""
        return 1.0

    def at(self, dose: float) -> State:
        """The text is there at any dose but 0."""
        change = SystemText(self.text) if dose else None
        return State("", "arm", change=change)


@dataclass(frozen=True)
class SystemPromptArm:
    """One text in the system turn."""

    name: str
    text: str
    kind: Kind = "prompt"
    source: str = "a text of this project, written beforehand"
    uses_labels: bool = False

    @property
    def choices(self) -> Mapping[str, Sequence[Setting]]:
        """Nothing is chosen."""
        return {}

    def fit(self, examples: ArmExamples, settings: Settings) -> Prompting:
        """The text. Raises `InputError` where the model's chats have no system turn."""
        if examples.config.model.template != "chat":
            raise InputError(
                f"a system prompt needs the template 'chat', got the template {examples.config.model.template!r}"
            )
        tokenizer = with_system_text(native_tokenizer(examples.model), self.text)
        rendered = rendered_chat(tokenizer, [{"role": "user", "content": "Which colour is the sky?"}])
        if self.text not in rendered:
            raise InputError(f"the chat template of {tokenizer.name_or_path!r} leaves out {json.dumps(self.text[:30])}")
        return Prompting(self.text)
