"""A judge behind an OpenAI-compatible server (vLLM, llama.cpp, a hosted one), through the `openai` package.

Failures are retried with backoff, then counted; replies are cached by content, so a second call asks nothing. The key
comes from an environment variable and goes nowhere but to the server; a reply that repeats it is kept without it, where
it can be a secret (`secret`).
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from dean_interp.distributed import on_rank0
from dean_interp.errors import InputError, refuse_below_one
from dean_interp.evaluation.judges.forms import QUESTION, Form, Messages, as_data
from dean_interp.evaluation.judges.protocol import Verdict, refuse_unpaired
from dean_interp.evaluation.judges.secret import without_login
from dean_interp.evaluation.judges.server_words import NOT_A_COMPLETION, THOUGHT_ALONE, ServerReply, chat_reply, failed
from dean_interp.progress import progress_bar

log = logging.getLogger(__name__)

Failures = tuple[type[Exception], ...]
_TRIAL = ("Which colour is the sky?", "It is blue by day.")


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
        refuse_below_one(concurrency=concurrency)
        self.client, self.failures = connect(base_url, key_variable, timeout, max_retries)
        self.model = model
        self.form = form
        self.concurrency = concurrency
        self.name = f"{form.name} by {model} on a server"
        self.fingerprint = f"{self.name} at {base_url}"
        self.replies = Replies(base_url, cache)
        self.key_variable = key_variable
        # what the number of new tokens is called: servers that refuse the first name are asked by the second
        self.limit = "max_tokens"
        self.told: set[str] = set()

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer; where the server failed to the end, the fault names the failure."""
        refuse_unpaired(prompts, answers)
        conversations = []
        for prompt, answer in zip(prompts, answers, strict=True):
            messages = self.form.messages(as_data(prompt), as_data(answer))
            conversations.append(messages)
        # rank 0 asks, and hands its verdicts to the other processes as JSON
        records = on_rank0(lambda: self._ask_all(conversations))
        return [Verdict(**record) for record in records]

    def refuse_silent(self) -> None:
        """Ask once, before anything long. Raises `InputError`, with the server's words, where no answer comes."""

        def ask() -> None:
            messages = self.form.messages(*_TRIAL)
            reply = self._reply(self._request(messages))
            if reply.text is None:
                self._refuse(reply)

        on_rank0(ask)

    def _refuse(self, reply: ServerReply) -> None:
        """Raise `InputError` with the server's words and what may help."""
        hint = hint_of(self.client, self.failures, reply, key_variable=self.key_variable, model=self.model)
        if reply.fault == THOUGHT_ALONE:
            hint = (
                f"; it thinks for longer than the {self.form.max_new_tokens} tokens of '{self.form.name}': switch "
                "its thinking off on the server"
            )
        raise InputError(f"{self.replies.base_url} does not answer as judge {self.model!r}: {reply.failure}{hint}")

    def _ask_all(self, conversations: Sequence[Messages]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            verdicts = pool.map(self._ask, conversations)
            shown = progress_bar(verdicts, total=len(conversations), desc="judging", leave=False)
            return [asdict(verdict) for verdict in shown]

    def _request(self, messages: Messages) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self.form.max_new_tokens,
        }

    def _ask(self, messages: Messages) -> Verdict:
        request = self._request(messages)
        known = self.replies.get(request)
        if known is not None:
            return self.form.verdict(known)
        reply = self._reply(request)
        if reply.text is None:
            self._tell(reply)
            return Verdict(None, "", reply.fault)
        # only a whole reply is kept: what failed is asked again by the next call
        self.replies.keep(request, reply.text)
        return self.form.verdict(reply.text)

    def _reply(self, request: Mapping[str, Any]) -> ServerReply:
        key = key_of(self.client, self.model)
        try:
            return chat_reply(self._completion(request), key)
        except self.failures as error:
            return failed(error, key)

    def _completion(self, request: Mapping[str, Any]) -> Any:  # noqa: ANN401 - whatever the server sends
        """What the server sends; where it refuses the name of the limit, to the request with the other name."""
        create = self.client.chat.completions.create
        asked = dict(request)
        n_tokens = asked.pop("max_tokens")
        limit = self.limit
        try:
            return create(**asked, **{limit: n_tokens})
        except self.failures as error:
            if limit != "max_tokens" or not _refuses_max_tokens(error):
                raise
        self.limit = "max_completion_tokens"
        return create(**asked, max_completion_tokens=n_tokens)

    def _tell(self, reply: ServerReply) -> None:
        """Log the server's words, once for each kind of failure."""
        if reply.words and reply.fault not in self.told:
            self.told.add(str(reply.fault))
            log.warning("%s gave no verdict: %s", self.name, reply.failure)


class Replies:
    """A server's replies by a hash of the request, so that nothing is asked twice; with `cache`, kept in a file."""

    def __init__(self, base_url: str, cache: Path | None) -> None:
        self.base_url = base_url
        self.cache = cache
        self.lock = Lock()
        self.known: dict[str, str] = {}
        if cache is not None and cache.is_file():
            self.known = _read_replies(cache)

    def get(self, request: Mapping[str, Any]) -> str | None:
        """The reply, or None."""
        return self.known.get(self._hash(request))

    def keep(self, request: Mapping[str, Any], reply: str) -> None:
        """Keep a reply. Raises `InputError` where the file cannot be written."""
        request_hash = self._hash(request)
        with self.lock:
            self.known[request_hash] = reply
            if self.cache is not None:
                line = json.dumps({"asked": request_hash, "said": reply})
                _append_line(self.cache, line)

    def _hash(self, request: Mapping[str, Any]) -> str:
        """A hash of address and request: local servers answer to any model's name."""
        content = json.dumps([self.base_url, request], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def connect(base_url: str, key_variable: str, timeout: float, max_retries: int) -> tuple[Any, Failures]:
    """A client of an OpenAI-compatible server, and what it raises where the server fails. Nothing is asked yet.

    Raises `InputError` where the package `openai` is missing, the address is none, or a number is out of range.
    """
    if timeout <= 0 or max_retries < 0:
        raise InputError(f"timeout must be above 0 and max_retries at least 0, got {timeout} and {max_retries}")
    refuse_address(base_url, key_variable)
    try:
        import openai
    except ImportError as error:
        raise InputError("a server is asked by the package openai: pip install 'dean_interp[judges]'") from error
    key = os.environ.get(key_variable, "").strip() or "none"
    client = openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=max_retries)
    return client, (openai.OpenAIError, ValueError)


def refuse_address(base_url: str, key_variable: str = "OPENAI_API_KEY") -> None:
    """Raise `InputError` where an address is none, or holds what must stand in no file: addresses stand in results."""
    if "@" in base_url or "?" in base_url:
        raise InputError(f"base_url must hold no user, password or query: put the key into {key_variable}")
    if not base_url.startswith(("http://", "https://")):
        raise InputError(f"base_url must begin with http:// or https://, got {without_login(base_url)!r}")


def key_of(client: Any, model: str | None) -> str:  # noqa: ANN401 - a class of openai's
    """The key as what it is cut out for; nothing where it is the model's name, which is no secret."""
    return "" if client.api_key == model else str(client.api_key)


def hint_of(client: Any, failures: Failures, reply: ServerReply, key_variable: str, model: str | None) -> str:  # noqa: ANN401
    """What may help where a server gave no reply: where the key is read, its models, the end of its address."""
    fault = str(reply.fault)
    if fault.endswith((" 401", " 403")):
        return f"; the key is read from {key_variable}"
    if "Connection" in fault:
        return "; is the server running there?"
    models = served_models(client, failures)
    if models:
        may_be_the_name = model not in models or fault.endswith((" 400", " 404", " 200"))
        return f"; it serves {', '.join(models)}" if may_be_the_name else ""
    address = str(client.base_url).rstrip("/")
    if re.search(r"/v\d+$", address):
        return ""
    return f"; should the address end in /v1 ({address}/v1)?"


def served_models(client: Any, failures: Failures) -> list[str]:  # noqa: ANN401 - a class of openai's
    """The names of the models that a server lists; none where it lists none."""
    try:
        return [str(model.id) for model in client.models.list()]
    except (*failures, *NOT_A_COMPLETION):
        return []


def _refuses_max_tokens(error: Exception) -> bool:
    is_refused = getattr(error, "status_code", None) in (400, 422)
    words = f"{error} {getattr(error, 'body', '')}"
    return is_refused and "max_tokens" in words


def _append_line(path: Path, line: str) -> None:
    """Add a line to a file. Raises `InputError` where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}. Replies before it are kept") from error


def _read_replies(path: Path) -> dict[str, str]:
    """The replies in a file by hash of the request; lines that are no replies are passed over."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    # a kill cut the last line off: what follows begins on a line of its own
    if lines[-1]:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    replies: dict[str, str] = {}
    for line in lines:
        try:
            record = json.loads(line)
            replies[str(record["asked"])] = str(record["said"])
        except (ValueError, RecursionError, KeyError, TypeError):
            continue
    return replies
