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
from dean_interp.evaluation.judges.server import Replies, connect, kind_of, without_key
from dean_interp.models.generate import refuse_nothing_to_answer
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
    given = on_rank0(lambda: _answers(served, tokenizer, prompts, max(lengths), template, replies))
    tokens = [tokenizer(answer, add_special_tokens=False).input_ids for answer in given]
    cut = {n: [str(tokenizer.decode(ids[:n], skip_special_tokens=True)) for ids in tokens] for n in lengths}
    return cut | {max(lengths): list(given)}


def _answers(
    served: Served,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    n_new: int,
    template: Template,
    replies: Path | None,
) -> list[str]:
    client, failures = connect(served.base_url, served.key_variable, served.timeout, served.max_retries)
    known, faults = Replies(served.base_url, replies), Counter[str]()
    try:
        name = served.model or next(iter(client.models.list())).id
    except (*failures, StopIteration) as error:
        raise InputError(f"{served.base_url} does not say which model it serves ({kind_of(error)})") from error

    def answer(prompt: str) -> str | None:
        ids = list(encode(tokenizer, prompt, [], template=template).prompt)
        request: dict[str, Any] = {"model": name, "prompt": ids, "temperature": 0, "max_tokens": n_new}
        said = known.get(request)
        if said is not None:
            return said
        try:
            said = client.completions.create(**request).choices[0].text
        except failures as error:
            faults[kind_of(error)] += 1
            return None
        except (AttributeError, IndexError, TypeError, KeyError):  # a page or an object that is no completion
            said = None
        if not isinstance(said, str):  # an empty answer is one: the model may end at once
            faults["not a completion"] += 1
            return None
        said = without_key(client, said)
        known.keep(request, said)
        return said

    with ThreadPoolExecutor(served.concurrency) as pool:
        found = list(
            progress_bar(pool.map(answer, prompts), total=len(prompts), desc=f"answers from {name}", unit="answer")
        )
    if faults:
        counted = ", ".join(f"{kind} {n}" for kind, n in faults.items())
        raise InputError(
            f"{served.base_url} failed on {faults.total()} of {len(prompts)} prompts ({counted}); the other answers "
            "are kept: start again"
        )
    return [one for one in found if one is not None]
