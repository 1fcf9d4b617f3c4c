"""Answers of a checkpoint that a server holds (vLLM, or another with OpenAI's completions), for generation at scale.

Prompts are sent as the very tokens that `models.generate` would feed, so no server's chat template comes in between.
A server may fill in what a request leaves open from the checkpoint's generation settings: so it leaves nothing open.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dean_interp.distributed import on_rank0
from dean_interp.errors import InputError
from dean_interp.evaluation.judges.server import Replies, connect, hint_of, key_of
from dean_interp.evaluation.judges.server_words import NOT_A_COMPLETION, ServerReply, failed, text_reply
from dean_interp.models.generate import refuse_nothing_to_answer
from dean_interp.models.thoughts import begun_thought, decoded
from dean_interp.models.tokens import Template, encode
from dean_interp.models.turn_end import end_tokens, markers
from dean_interp.progress import progress_bar

log = logging.getLogger(__name__)

_MOST_STOPS = 4  # strings that OpenAI's `stop` takes
_REFUSED = (400, 422)  # statuses of a request that has something the server does not take


@dataclass(frozen=True)
class Served:
    """Where a checkpoint is served. The key, where one is needed, comes from the environment alone."""

    base_url: str
    """Where `/completions` is, e.g. `http://localhost:8000/v1`."""
    model: str | None = None
    """Its name there; None: the first that the server lists."""
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 32
    """Requests at a time; the server makes batches of them."""
    timeout: float = 600.0
    max_retries: int = 4


def generate_served(
    served: Served,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    lengths: Sequence[int],
    template: Template = "chat",
    ends: Sequence[int] | None = None,
    replies: Path | None = None,
) -> dict[int, list[str]]:
    """Greedy answers of several lengths (new tokens), as `models.generate.generate_to` gives them.

    Args:
        ends: the tokens that end an answer; None: those that the tokenizer and its chat template name.
        tokenizer: the checkpoint's own; the longest answer is cut into the shorter ones by its tokens.
        replies: a JSON lines file that gets each answer as it comes; what is in it is not asked again.

    Raises:
        InputError: no prompts or lengths, a server that cannot be reached or lists no model, or one that failed on some
            prompts to the end: those are counted by kind, the other answers are kept.
    """
    refuse_nothing_to_answer(prompts, lengths, served.concurrency)
    ends = end_tokens(tokenizer) if ends is None else ends
    stops = [str(tokenizer.decode([token])) for token in ends if token in markers(tokenizer)]
    n_new = max(lengths)
    requests = []
    for prompt in prompts:
        encoded = encode(tokenizer, prompt, [], template=template)
        requests.append(_greedy_request(encoded.prompt, n_new, ends, stops))
    whole = on_rank0(lambda: _answers(served, requests, replies))
    longest = [_up_to(stops, answer) for answer in whole]
    # a greedy answer begins as every longer one does: shorter ones are cut out of the longest
    tokens = [tokenizer(answer, add_special_tokens=False).input_ids for answer in longest]
    answers = {}
    for length in lengths:
        answers[length] = [decoded(tokenizer, ids[:length]) for ids in tokens]
    answers[n_new] = list(longest)
    # a template may begin the answer's thought: it belongs to the answer
    begun = [begun_thought(tokenizer, request["prompt"]) for request in requests]
    for length, given in answers.items():
        answers[length] = list(map(str.__add__, begun, given))
    return answers


def _greedy_request(
    prompt: Sequence[int], max_tokens: int, ends: Sequence[int], stops: Sequence[str]
) -> dict[str, Any]:
    """All that decides what comes next: OpenAI's own parameters, and in `extra_body` those of vLLM and llama.cpp."""
    extra = {
        "repetition_penalty": 1.0,
        "repeat_penalty": 1.0,
        "min_p": 0.0,
        "stop_token_ids": list(ends),
        "ignore_eos": False,
    }
    request: dict[str, Any] = {
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "extra_body": extra,
    }
    if stops:
        request["stop"] = list(stops[:_MOST_STOPS])
    return request


def _up_to(stops: Sequence[str], answer: str) -> str:
    """The answer up to where a turn ends, for servers that write special tokens out and go on."""
    for stop in stops:
        answer = answer.partition(stop)[0]
    return answer


class _Completions:
    """A served model, asked for completions. Parameters that it refused once are not sent again."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.client, self.failures = connect(served.base_url, served.key_variable, served.timeout, served.max_retries)
        self.name = served.model or self._first_model()
        self.takes_more = True
        """Whether it takes parameters that are not OpenAI's."""

    def reply(self, request: Mapping[str, Any]) -> ServerReply:
        """What the server says to a request, which names its model."""
        key = key_of(self.client, self.name)
        try:
            return text_reply(self._completion(request), key)
        except self.failures as error:
            return failed(error, key)

    def hint(self, reply: ServerReply, model: str | None) -> str:
        """What to try where it failed."""
        return hint_of(self.client, self.failures, reply, key_variable=self.served.key_variable, model=model)

    def _completion(self, request: Mapping[str, Any]) -> Any:  # noqa: ANN401 - whatever the server sends
        create = self.client.completions.create
        plain = {name: value for name, value in request.items() if name != "extra_body"}
        if not self.takes_more:
            return create(**plain)
        try:
            return create(**request)
        except self.failures as error:
            if getattr(error, "status_code", None) not in _REFUSED:
                raise
        completion = create(**plain)
        if self.takes_more:
            log.warning(
                "%s takes OpenAI's parameters only: a repetition penalty of the checkpoint's settings may hold there, "
                "and what ends a turn is the server's choice",
                self.client.base_url,
            )
        self.takes_more = False
        return completion

    def _first_model(self) -> str:
        """The first model that the server lists. Raises `InputError` where it lists none."""
        try:
            return str(next(iter(self.client.models.list())).id)
        except (*self.failures, *NOT_A_COMPLETION, StopIteration) as error:
            reply = failed(error, key_of(self.client, None))
            hint = self.hint(reply, self.served.model)
            address = self.served.base_url
            raise InputError(f"{address} does not say which model it serves ({reply.failure}){hint}") from error


def _answers(served: Served, requests: Sequence[dict[str, Any]], replies: Path | None) -> list[str]:
    """The answers to all requests. Raises `InputError` where the server failed on some."""
    completions = _Completions(served)
    kept = Replies(served.base_url, replies)
    # how often the server failed, and its first words, by the kind of failure
    faults = Counter[str]()
    words: dict[str, str] = {}

    def answer(request: dict[str, Any]) -> str | None:
        request = {"model": completions.name, **request}
        known = kept.get(request)
        if known is not None:
            return known
        reply = completions.reply(request)
        if reply.text is None:
            fault = str(reply.fault)
            faults[fault] += 1
            words.setdefault(fault, reply.words)
            return None
        kept.keep(request, reply.text)
        return reply.text

    with ThreadPoolExecutor(served.concurrency) as pool:
        arriving = pool.map(answer, requests)
        answers = list(
            progress_bar(arriving, total=len(requests), desc=f"answers from {completions.name}", unit="answer")
        )
    if faults:
        counted = []
        for fault, n in faults.items():
            said = f": {words[fault]!r}" if words[fault] else ""
            counted.append(f"{fault} {n}{said}")
        raise InputError(
            f"{served.base_url} failed on {faults.total()} of {len(requests)} prompts ({', '.join(counted)}); the "
            "other answers are kept: start again"
        )
    return [text for text in answers if text is not None]


def refuse_silent_server(served: Served) -> None:
    """Ask for one token, before anything long. Raises `InputError`, with the server's words, where none comes."""

    def ask() -> None:
        completions = _Completions(served)
        name = completions.name
        # the prompt is a token, as those of answers are
        request = {"model": name, "prompt": [1], "temperature": 0, "max_tokens": 1}
        reply = completions.reply(request)
        if reply.text is None:
            hint = completions.hint(reply, name)
            raise InputError(f"{served.base_url} does not answer as {name!r}: {reply.failure}{hint}")

    on_rank0(ask)
