"""What a chat template writes beside the messages: the day, and whether the model shall think.

Some templates write the day into every prompt (Llama 3.2, Granite, SmolLM3, Mistral Small), so tomorrow's prompts would
be other ones; some have a switch for thinking (Qwen3 `enable_thinking`, Granite `thinking`, Command A `reasoning`).
Both are set in front of the template's own text, in a copy of the tokenizer, so that whatever renders a chat with it
writes the same.
"""

import copy
import datetime
import re
from dataclasses import dataclass
from typing import Literal, get_args

import jinja2
from jinja2 import meta
from transformers import PreTrainedTokenizerBase

from dean_interp.errors import InputError
from dean_interp.models.templates import rendered_chat
from dean_interp.models.thoughts import MARKS, opened_thought

Thinking = Literal["on", "off"]
_SWITCHES = ("enable_thinking", "thinking", "reasoning")
_DIRECTIVES, _UNPADDED = "aAbBcdDeFfGHIjmMpRSTuUVwWxXyYzZ", "dmjHIMS"
# A doubled per cent sign is put aside first, and put back last.
_ASIDE = "\x00"


@dataclass(frozen=True)
class ChatSettings:
    """What a chat template is told beside the messages."""

    date: str | None = None
    """The day that it writes, as 2026-11-28. None: it writes none, or nobody has said which."""
    thinking: Thinking | None = None
    """Whether the model shall think before it answers. None: as the template has it."""

    def check(self) -> None:
        """Raise `InputError` where the date is none, or thinking is neither on nor off."""
        if self.thinking not in (None, *get_args(Thinking)):
            raise InputError(f"thinking must be on or off, got {self.thinking!r}")
        try:
            datetime.date.fromisoformat(self.date or today())
        except ValueError as error:
            raise InputError(f"date must be a day such as 2026-11-28, got {self.date!r}") from error

    @property
    def parts(self) -> list[str]:
        """What of this changes prompts, for fingerprints: nothing where nothing is set."""
        parts = []
        if self.date:
            parts.append(f"date {self.date}")
        if self.thinking:
            parts.append(f"thinking {self.thinking}")
        return parts


def today() -> str:
    """The day of today, as a setting."""
    return datetime.date.today().isoformat()


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes the day of today."""
    return "strftime_now" in _asks_for(tokenizer)


def with_settings(
    tokenizer: PreTrainedTokenizerBase,
    settings: ChatSettings,
) -> tuple[PreTrainedTokenizerBase, ChatSettings]:
    """A tokenizer whose chat template keeps to the settings, and those of them that its prompts depend on.

    A date that is not set becomes that of today, where the template writes one; a template that writes none has none.
    The tokenizer itself is given back where nothing is to be set.

    Raises `InputError` for settings out of their range, and for a template that has no switch for thinking.
    """
    settings.check()
    if settings.thinking and not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so it has no switch for thinking"
        )
    asked = _asks_for(tokenizer)
    date = None
    before = ""
    after = ""
    if "strftime_now" in asked:
        date = settings.date or today()
        before += _clock_of(datetime.datetime.fromisoformat(date))
    if settings.thinking:
        switches = asked & set(_SWITCHES)
        value = "true" if settings.thinking == "on" else "false"
        for name in sorted(switches):
            before += f"{{% set {name} = {value} %}}"
        switched = _with_template(tokenizer, before, "")
        after = _closing(switched, settings.thinking, is_switched=bool(switches))
    kept = ChatSettings(date, settings.thinking)
    if not before and not after:
        return tokenizer, kept
    return _with_template(tokenizer, before, after), kept


def with_system_text(tokenizer: PreTrainedTokenizerBase, text: str) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer whose chats begin with a system turn of this text, where they have none of their own.

    Raises `InputError` where there is no chat template. One that knows no system turn refuses chats when it is used.
    """
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so it has no system turn")
    turn = f"[{{'role': 'system', 'content': {_quoted(text)}}}]"
    before = f"{{% if messages[0]['role'] != 'system' %}}{{% set messages = {turn} + messages %}}{{% endif %}}"
    return _with_template(tokenizer, before, "")


def _quoted(text: str) -> str:
    """A text as a string of a template."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def _asks_for(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The names that the chat template looks up."""
    if not tokenizer.chat_template:
        return set()
    try:
        # This tag of transformers' own stands around what trainers learn from, and asks for nothing.
        text = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", tokenizer.get_chat_template())
        syntax = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (jinja2.TemplateSyntaxError, ValueError):
        # Whoever renders a chat with it is told what is wrong.
        return set()
    return meta.find_undeclared_variables(syntax)


def _clock_of(moment: datetime.datetime) -> str:
    """A macro in place of transformers' function, which takes no other one: it writes midnight of one day."""
    written = {"%%": _ASIDE}
    for directive in _DIRECTIVES:
        written[f"%{directive}"] = moment.strftime(f"%{directive}")
    # Windows knows no "%-d".
    for directive in _UNPADDED:
        written[f"%-{directive}"] = str(int(written[f"%{directive}"]))
    written[_ASIDE] = "%"
    return (
        "{% macro strftime_now(format) %}{% set written = namespace(text=format) %}"
        f"{{% for directive, value in {written!r}.items() %}}"
        "{% set written.text = written.text.replace(directive, value) %}{% endfor %}{{ written.text }}{% endmacro %}"
    )


def _closing(tokenizer: PreTrainedTokenizerBase, thinking: Thinking, *, is_switched: bool) -> str:
    """What ends a thought that the template itself begins, where the model shall not think.

    Raises `InputError` where the template neither has a switch nor begins a thought.
    """
    question = {"role": "user", "content": "Which colour is the sky?"}
    opened = opened_thought(rendered_chat(tokenizer, [question]))
    if not opened and not is_switched:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path!r} has no switch for thinking: leave thinking unset"
        )
    if not opened or thinking == "on":
        return ""
    end = dict(MARKS)[opened.rstrip()]
    return f"{{% if add_generation_prompt %}}{{{{ '\\n{end}\\n\\n' }}}}{{% endif %}}"


def _with_template(tokenizer: PreTrainedTokenizerBase, before: str, after: str) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer with blocks before and after the template's own text, which is rendered as it was."""
    text = tokenizer.get_chat_template()
    # A newline at the end of a template is not rendered, and now that would be its end no more.
    if after:
        text = text.removesuffix("\n") + after
    # Nor is one behind a block.
    if before:
        text = f"{before}\n{text}"
    changed = copy.copy(tokenizer)
    changed.chat_template = text
    return changed
