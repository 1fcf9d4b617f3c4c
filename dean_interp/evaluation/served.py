"""Answers of a checkpoint that a server holds (vLLM, or another with OpenAI's completions), for generation at scale.

Prompts are sent as the very tokens that `models.generate` would feed, so no server's chat template comes in between.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dean_interp.distributed import on_rank0
from dean_interp.errors import InputError
from dean_interp.evaluation.judges.server import NOT_A_COMPLETION, Replies, connect, kind_of, without_key
from dean_interp.models.generate import refuse_nothing_to_answer
from dean_interp.models.thoughts import begun_thought, decoded
from dean_interp.models.tokens import Template, encode
from dean_interp.progress import progress_bar


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
    replies: Path | None = None,
) -> dict[int, list[str]]:
    """Greedy answers of several lengths (new tokens), as `models.generate.generate_to` gives them.

    Args:
        tokenizer: the checkpoint's own; the longest answer is cut into the shorter ones by its tokens.
        replies: a JSON lines file that gets each answer as it comes; what is in it is not asked again.

    Raises:
        InputError: no prompts or lengths, a server that cannot be reached or lists no model, or one that failed on some
            prompts to the end: those are counted by kind, the other answers are kept.
    """
    refuse_nothing_to_answer(prompts, lengths, served.concurrency)
    requests = []
    for prompt in prompts:
        token_ids = list(encode(tokenizer, prompt, [], template=template).prompt)
        requests.append({"prompt": token_ids, "temperature": 0, "max_tokens": max(lengths)})
    longest = on_rank0(lambda: _answers(served, requests, replies))
    # a greedy answer begins as every longer one does: shorter ones are cut out of the longest
    tokens = [tokenizer(answer, add_special_tokens=False).input_ids for answer in longest]
    answers = {}
    for length in lengths:
        answers[length] = [decoded(tokenizer, ids[:length]) for ids in tokens]
    answers[max(lengths)] = list(longest)
    begun = [begun_thought(tokenizer, request["prompt"]) for request in requests]
    return {length: list(map(str.__add__, begun, given)) for length, given in answers.items()}


def _answers(served: Served, requests: Sequence[dict[str, Any]], replies: Path | None) -> list[str]:
    """The answers to all requests. Raises `InputError` where the server failed on some."""
    client, failures = connect(served.base_url, served.key_variable, served.timeout, served.max_retries)
    try:
        name = served.model or next(iter(client.models.list())).id
    except (*failures, StopIteration) as error:
        raise InputError(f"{served.base_url} does not say which model it serves ({kind_of(error)})") from error
    kept = Replies(served.base_url, replies)
    faults = Counter[str]()

    def answer(request: dict[str, Any]) -> str | None:
        request = {"model": name, **request}
        known = kept.get(request)
        if known is not None:
            return known
        try:
            text = client.completions.create(**request).choices[0].text
        except failures as error:
            faults[kind_of(error)] += 1
            return None
        except NOT_A_COMPLETION:
            text = None
        # an empty answer is one: the model may end at once
        if not isinstance(text, str):
            faults["not a completion"] += 1
            return None
        text = without_key(client, text)
        kept.keep(request, text)
        return text

    with ThreadPoolExecutor(served.concurrency) as pool:
        arriving = pool.map(answer, requests)
        answers = list(progress_bar(arriving, total=len(requests), desc=f"answers from {name}", unit="answer"))
    if faults:
        counted = ", ".join(f"{kind} {n}" for kind, n in faults.items())
        raise InputError(
            f"{served.base_url} failed on {faults.total()} of {len(requests)} prompts ({counted}); the other answers "
            "are kept: start again"
        )
    return [text for text in answers if text is not None]
