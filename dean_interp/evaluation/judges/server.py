"""A judge behind an OpenAI-compatible server (vLLM, llama.cpp, a hosted one), through the `openai` package.

Failures are retried with backoff, then counted; replies are cached by content, so a second call asks nothing. The key
comes from an environment variable and goes nowhere but to the server; a reply that repeats it is kept without it.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from dean_interp.distributed import on_rank0
from dean_interp.errors import InputError
from dean_interp.evaluation.judges.forms import QUESTION, Form, as_data
from dean_interp.evaluation.judges.protocol import Verdict, refuse_unpaired
from dean_interp.progress import progress_bar


class ServerJudge:
    """A chat model on a server, asked by a form at temperature 0."""

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        form: Form = QUESTION,
        key_variable: str = "OPENAI_API_KEY",
        cache: Path | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 4,
    ) -> None:
        """Nothing is asked yet.

        Args:
            base_url: where the server's `/chat/completions` is, e.g. `http://localhost:8000/v1`. It is sent the key.
            key_variable: the environment variable that holds the key; local servers need none.
            cache: a JSON lines file with one reply a line; a line that a kill cut off is passed over.
            concurrency: requests at a time.
            timeout: seconds for one request.
            max_retries: of a request that timed out, was refused (429) or failed on the server's side, with
                exponential backoff.

        Raises:
            InputError: the package `openai` is missing, `base_url` is no http address, or a number is out of range.
        """
        if concurrency < 1:
            raise InputError(f"concurrency must be at least 1, got {concurrency}")
        self.client, self.failures = connect(base_url, key_variable, timeout, max_retries)
        self.model, self.form, self.concurrency = model, form, concurrency
        self.name = f"{form.name} by {model} on a server"
        self.replies = Replies(base_url, cache)

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer; where the server failed to the end, the fault names the failure."""
        refuse_unpaired(prompts, answers)
        asked = [self.form.messages(as_data(prompt), as_data(answer))
                 for prompt, answer in zip(prompts, answers, strict=True)]  # fmt: skip
        return [Verdict(**one) for one in on_rank0(lambda: self._all(asked))]

    def _all(self, asked: Sequence[list[dict[str, str]]]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            verdicts = list(progress_bar(pool.map(self._judged, asked), total=len(asked), desc="judging", leave=False))
        return [asdict(one) for one in verdicts]

    def _judged(self, messages: list[dict[str, str]]) -> Verdict:
        request: dict[str, Any] = {"model": self.model, "messages": messages, "temperature": 0,
                                   "max_tokens": self.form.max_new_tokens}  # fmt: skip
        known = self.replies.get(request)
        if known is not None:
            return self.form.verdict(known)
        try:
            choice = self.client.chat.completions.create(**request).choices[0]
            said, reason = choice.message.content, choice.finish_reason
        except self.failures as error:
            return Verdict(None, "", kind_of(error))
        except (AttributeError, IndexError, TypeError, KeyError):  # a page or an object that is no chat completion
            return Verdict(None, "", "not a chat completion")
        if not isinstance(said, str) or not said.strip():
            return Verdict(None, "", "empty")
        if reason == "content_filter":
            return Verdict(None, "", "cut by the server's content filter")
        said = without_key(self.client, said)
        self.replies.keep(request, said)
        return self.form.verdict(said)


class Replies:
    """What a server said, by a hash of what it was asked; in a file one line each, so that nothing is asked twice."""

    def __init__(self, base_url: str, cache: Path | None) -> None:
        self.base_url, self.cache, self.lock, self.known = base_url, cache, Lock(), _replies(cache)

    def get(self, request: dict[str, Any]) -> str | None:
        """The reply, or None."""
        return self.known.get(self._asked(request))

    def keep(self, request: dict[str, Any], said: str) -> None:
        """Note a reply."""
        asked = self._asked(request)
        with self.lock:
            self.known[asked] = said
            if self.cache is not None:
                try:
                    self.cache.parent.mkdir(parents=True, exist_ok=True)
                    with self.cache.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"asked": asked, "said": said}) + "\n")
                except OSError as error:
                    raise InputError(
                        f"cannot write {self.cache}: {error.strerror}. Replies before it are kept"
                    ) from error

    def _asked(self, request: dict[str, Any]) -> str:
        """With the address: local servers answer to any model's name."""
        return hashlib.sha256(json.dumps([self.base_url, request], sort_keys=True).encode()).hexdigest()


def connect(
    base_url: str, key_variable: str, timeout: float, max_retries: int
) -> tuple[Any, tuple[type[Exception], ...]]:
    """A client of an OpenAI-compatible server, and what it raises where the server fails. Nothing is asked yet.

    Raises `InputError` where the package `openai` is missing, the address is none, or a number is out of range.
    """
    if timeout <= 0 or max_retries < 0:
        raise InputError(f"timeout must be above 0 and max_retries at least 0, got {timeout} and {max_retries}")
    if not base_url.startswith(("http://", "https://")):
        raise InputError(f"base_url must begin with http:// or https://, got {base_url!r}")
    if "@" in base_url or "?" in base_url:  # addresses stand in results
        raise InputError(f"base_url must hold no user, password or query: put the key into {key_variable}")
    try:
        import openai
    except ImportError as error:
        raise InputError("a server is asked by the package openai: pip install 'dean_interp[judges]'") from error
    key = os.environ.get(key_variable) or "none"
    client = openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=max_retries)
    return client, (openai.OpenAIError, ValueError)


def kind_of(error: Exception) -> str:
    """The kind of a failure alone: the server's own words may repeat the key."""
    status = getattr(error, "status_code", None)
    return f"{type(error).__name__}{f' {status}' if status else ''}"


def without_key(client: Any, said: str) -> str:  # noqa: ANN401 - a class of openai's
    """A reply without the key that it may repeat."""
    return said if client.api_key == "none" else said.replace(client.api_key, "[key]")


def _replies(cache: Path | None) -> dict[str, str]:
    found: dict[str, str] = {}
    if cache is not None and cache.is_file():
        lines = cache.read_text(encoding="utf-8", errors="replace").split("\n")
        if lines[-1]:  # a kill in mid-line: what follows begins on a line of its own
            with cache.open("a", encoding="utf-8") as file:
                file.write("\n")
        for line in lines:
            try:
                reply = json.loads(line)
                found[str(reply["asked"])] = str(reply["said"])
            except (ValueError, RecursionError, KeyError, TypeError):
                continue
    return found
