"""What is in data sets, and what one holds of another: duplicates, leakage, lengths.

Prompts are compared as they stand (`verbatim`), and as `leakage` compares them (`exact` and `near`).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from itertools import permutations

import numpy as np

from dean_interp.data.audit_results import Audit, Leak, Quartiles, SetAudit
from dean_interp.data.examples import Behaviour
from dean_interp.data.leakage import NEAR, Likeness, PromptIndex, check_threshold, normalised
from dean_interp.errors import InputError

_TEMPLATES = {
    "ChatML": r"<\|im_(start|end)\|>",
    "Llama 2": r"\[/?INST\]|<</?SYS>>",
    "Llama 3": r"<\|(start_header_id|eot_id)\|>",
    "Gemma": r"<(start|end)_of_turn>",
    "Zephyr": r"<\|(user|assistant)\|>",
    "Alpaca": r"(?m)^### (Instruction|Response)\b",
    "Human and Assistant": r"(?m)^\s*(Human|Assistant|USER|ASSISTANT): ",
}
Refused = Callable[[Sequence[str]], Sequence[bool]]
Tokenize = Callable[[str], Sequence[int]]


def audit(
    behaviours: Sequence[Behaviour],
    *,
    refused: Refused,
    threshold: float = NEAR,
    tokenize: Tokenize | None = None,
    licences: Mapping[str, str] | None = None,
) -> Audit:
    """Look at data sets and at what each holds of the others.

    Args:
        refused: says which answers are refusals (the lexical judge, say).
        threshold: Jaccard similarity of word trigrams, in (0, 1].
        tokenize: the tokens of a text (`tokenizer.encode`), for lengths in tokens.
        licences: by name; others are "not stated".

    Raises:
        InputError: a threshold outside (0, 1], or two data sets of one name.
    """
    check_threshold(threshold)
    names = [behaviour.name for behaviour in behaviours]
    if len(set(names)) < len(names):
        raise InputError(f"each data set needs a name of its own (load_behaviour has name=...), got {names}")
    indices = [PromptIndex(behaviour.prompts, threshold) for behaviour in behaviours]
    sets = []
    for behaviour, prompts in zip(behaviours, indices, strict=True):
        licence = (licences or {}).get(behaviour.name, "not stated")
        sets.append(_set_audit(behaviour, prompts, refused, tokenize=tokenize, licence=licence))
    leaks = []
    for first, second in permutations(range(len(behaviours)), 2):
        likeness = indices[first].likeness(indices[second])
        leaks.append(_leak(behaviours[first], behaviours[second], likeness))
    return Audit(threshold, tuple(sets), tuple(leaks))


def _set_audit(
    behaviour: Behaviour,
    prompts: PromptIndex,
    refused: Refused,
    *,
    tokenize: Tokenize | None,
    licence: str,
) -> SetAudit:
    answers: list[str] = []
    for example in behaviour.examples:
        answers += example.answers.values()
    n_prompts = len(prompts.trigrams)
    n_templated, template = _chat_template(behaviour)
    prompt_tokens = None
    answer_tokens = None
    if tokenize is not None:
        prompt_tokens = _quartiles(map(tokenize, behaviour.prompts))
        if answers:
            answer_tokens = _quartiles(map(tokenize, answers))
    kinds_of_prompts = _answer_kinds(behaviour).values()
    n_both = sum({"safe", "unsafe"} <= kinds for kinds in kinds_of_prompts)
    return SetAudit(
        name=behaviour.name,
        n_rows=len(behaviour),
        n_verbatim=len(set(behaviour.prompts)),
        n_prompts=n_prompts,
        n_repeats=len(behaviour) - n_prompts,
        n_near=prompts.n_near,
        n_both=n_both,
        n_answers=len(answers),
        n_refusals=sum(refused(answers)) if answers else 0,
        prompt_length=_quartiles(behaviour.prompts),
        answer_length=_quartiles(answers),
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        n_templated=n_templated,
        template=template,
        licence=licence,
    )


def _chat_template(behaviour: Behaviour) -> tuple[int, str | None]:
    """How many rows hold the marks of a chat template, and the template that most of them hold marks of."""
    n_templated = 0
    counts = Counter[str]()
    for example in behaviour.examples:
        text = "\n".join((example.prompt, *example.answers.values()))
        names = [name for name, pattern in _TEMPLATES.items() if re.search(pattern, text)]
        n_templated += bool(names)
        counts.update(names)
    if not counts:
        return 0, None
    ((template, _),) = counts.most_common(1)
    return n_templated, template


def _leak(first: Behaviour, second: Behaviour, likeness: Mapping[str, Likeness | None]) -> Leak:
    all_kinds_first = _answer_kinds(first)
    all_kinds_second = _answer_kinds(second)
    n_opposite = 0
    for key in all_kinds_first.keys() & all_kinds_second.keys():
        kinds_first = all_kinds_first[key]
        kinds_second = all_kinds_second[key]
        safe_then_unsafe = "safe" in kinds_first and "unsafe" in kinds_second
        unsafe_then_safe = "unsafe" in kinds_first and "safe" in kinds_second
        n_opposite += safe_then_unsafe or unsafe_then_safe
    by_prompt = list(likeness.values())
    by_row = [likeness[normalised(prompt)] for prompt in second.prompts]
    return Leak(
        first=first.name,
        second=second.name,
        n_verbatim=len(set(first.prompts) & set(second.prompts)),
        n_exact=by_prompt.count("exact"),
        n_near=by_prompt.count("near"),
        n_exact_rows=by_row.count("exact"),
        n_rows=len(by_row) - by_row.count(None),
        n_opposite=n_opposite,
    )


def _answer_kinds(behaviour: Behaviour) -> dict[str, set[str]]:
    """The kinds of answers of each prompt; the name of a set of single answers, `..._safe` say, tells their kind."""
    kind_of_single = _kind_in_name(behaviour.name)
    kinds_of_prompt: dict[str, set[str]] = {}
    for example in behaviour.examples:
        kinds = kinds_of_prompt.setdefault(normalised(example.prompt), set())
        for kind in example.answers:
            kinds.add(kind_of_single if kind == "response" else kind)
    return kinds_of_prompt


def _kind_in_name(name: str) -> str:
    words = re.findall(r"[^\W\d_]+", name.lower())
    for kind in ("unsafe", "safe"):
        if kind in words:
            return kind
    return "response"


def _quartiles(texts: Iterable[Sized]) -> Quartiles:
    """The quartiles of the lengths of texts, in characters or tokens; zeros without texts."""
    lengths = [len(text) for text in texts]
    if not lengths:
        return 0, 0, 0
    low, middle, high = np.quantile(lengths, [0.25, 0.5, 0.75])
    return round(low), round(middle), round(high)
