"""What a server said: a reply that is one, or why it is none, in the server's own words.

Servers differ in how they fail: an error with status 200, a reply in parts, a thought without an answer, a stream that
nobody asked for. Each is understood, or named.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dean_interp.evaluation.judges.secret import without_secret
from dean_interp.models.thoughts import behind_thought

NOT_A_COMPLETION = (AttributeError, IndexError, TypeError, KeyError)
"""Errors of reading a page or an object that is no completion."""
THOUGHT_ALONE = "a thought without an answer"
_LONGEST = 300


@dataclass(frozen=True)
class ServerReply:
    """A reply, or None and why there is none."""

    text: str | None
    fault: str | None = None
    """The kind of a failure, by which failures are counted."""
    words: str = ""
    """The server's own, in one line, without the key."""

    @property
    def failure(self) -> str:
        """The fault with the server's words."""
        return f"{self.fault}: {self.words!r}" if self.words else str(self.fault)


def kind_of(error: Exception) -> str:
    """The kind of a failure alone."""
    name = type(error).__name__
    status = getattr(error, "status_code", None)
    return f"{name} {status}" if status else name


def failed(error: Exception, key: str) -> ServerReply:
    """No reply, since asking raised an error."""
    said = getattr(error, "body", None)
    if said is None:
        response = getattr(error, "response", None)
        if response is not None:
            said = response.text
        else:
            said = error.__cause__ or error
    return ServerReply(None, kind_of(error), _one_line(said, key))


def chat_reply(completion: Any, key: str) -> ServerReply:  # noqa: ANN401 - a class of openai's, or whatever came
    """What a chat model says behind its thought."""
    try:
        choice = completion.choices[0]
        message, reason = choice.message, choice.finish_reason
        said = _joined(message.content)
    except NOT_A_COMPLETION:
        return no_completion(completion, key, "not a chat completion")
    # the thought stands in a field of its own, or in the text before the answer
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    answer = behind_thought(said)
    if answer is None or (thought and not said.strip()):
        words = said.strip() or thought
        return ServerReply(None, THOUGHT_ALONE, _one_line(words, key))
    if not answer.strip():
        return ServerReply(None, "empty")
    if reason == "content_filter":
        return ServerReply(None, "cut by the server's content filter")
    if answer != said:
        answer = answer.lstrip()
    return ServerReply(without_secret(answer, key))


def text_reply(completion: Any, key: str) -> ServerReply:  # noqa: ANN401 - as above
    """What a model goes on with. An empty answer is one: it may end at once."""
    try:
        said = completion.choices[0].text
    except NOT_A_COMPLETION:
        said = None
    if not isinstance(said, str):
        return no_completion(completion, key, "not a completion")
    return ServerReply(without_secret(said, key))


def no_completion(completion: object, key: str, otherwise: str) -> ServerReply:
    """Why what came with status 200 is no completion."""
    if isinstance(completion, str):
        is_stream = completion.startswith("data:")
        fault = "a stream, which was not asked for" if is_stream else otherwise
        return ServerReply(None, fault, _one_line(completion, key))
    if error := getattr(completion, "error", None):
        return ServerReply(None, "an error with status 200", _one_line(error, key))
    dumped = getattr(completion, "to_dict", None)
    said = dumped() if dumped else completion
    return ServerReply(None, otherwise, _one_line(said, key))


def _joined(content: object) -> str:
    """A message's text: some servers send it in parts, some send none. Raises `TypeError` where it is neither."""
    if content is None:
        return ""
    if isinstance(content, list):
        texts = [str(part["text"]) for part in content if part.get("type") == "text"]
        return "".join(texts)
    if not isinstance(content, str):
        raise TypeError(f"a message's content is text, got {type(content).__name__}")
    return content


def _one_line(said: object, key: str) -> str:
    """What stands where OpenAI's errors have their message, else all of it."""
    while isinstance(said, Mapping):
        inner = said.get("error") or said.get("message") or said.get("detail")
        if inner is None:
            break
        said = inner
    # an empty object says nothing
    words = str(said) if said else ""
    one_line = " ".join(without_secret(words, key).split())
    return one_line[:_LONGEST]
