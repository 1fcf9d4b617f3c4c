"""Text becomes tokens: templates, and batches that know where every answer token is predicted.

A batch is a list of rows, and a row is a tree of branches: a token sees its own branch and the branches it grew from.
One branch a row is the ordinary padded batch. A prompt with its two answers is a trunk with two branches, so that the
prompt is computed once for both; prompts that begin alike (the chat template's system turn) share that trunk too.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dean_interp.errors import InputError

Template = Literal["chat", "raw", "released", "rendered"]
Padding = Literal["right", "left"]


@dataclass(frozen=True)
class Encoded:
    """One prompt and its answers as token ids, in the order the answers were given."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answers: Sequence[str],
    *,
    template: Template = "chat",
    answer_tokens: int | None = None,
    n_ctx: int | None = None,
) -> Encoded:
    """Token ids of a prompt and of each of its answers.

    `chat` renders the tokenizer's chat template, `raw` joins prompt and answer by a newline; both tokenise prompt and
    answer together, so no token straddles the border unseen. `released` tokenises them apart and drops the first
    answer token, as the released code does (a BOS for Llama 2, a real token for others). `rendered` adds nothing: the
    prompt is what a chat template gave.

    Args:
        answer_tokens: keep only that many tokens of each answer.
        n_ctx: the model's context; a longer text is refused, never cut.
    """
    if template not in get_args(Template):
        raise InputError(f"template must be one of {get_args(Template)}, got {template!r}")
    if template == "released":
        prompt_ids = tokenizer(prompt).input_ids
        answer_ids = [tokenizer(answer).input_ids[1:] for answer in answers]
    else:
        if template == "rendered":
            text, special = prompt, False
        else:
            text, special = (_render_chat(tokenizer, prompt), False) if template == "chat" else (f"{prompt}\n", True)
        whole = [tokenizer(text + answer, add_special_tokens=special).input_ids for answer in answers]
        prompt_ids = tokenizer(text, add_special_tokens=special).input_ids
        n_shared = min(_n_common(prompt_ids, ids) for ids in whole) if whole else len(prompt_ids)
        prompt_ids, answer_ids = prompt_ids[:n_shared], [ids[n_shared:] for ids in whole]
    for answer, ids in zip(answers, answer_ids, strict=True):
        if not ids:
            raise InputError(f"the answer {answer[:40]!r} has no tokens under the template '{template}'")
        if n_ctx is not None and len(prompt_ids) + len(ids) > n_ctx:
            raise InputError(
                f"the prompt {prompt[:40]!r} and its answer have {len(prompt_ids) + len(ids)} tokens; "
                f"the model takes {n_ctx}"
            )
    return Encoded(tuple(prompt_ids), tuple(tuple(ids[:answer_tokens]) for ids in answer_ids))


def cut(encoded: Encoded, max_tokens: int) -> tuple[Encoded, int]:
    """Answers cut at their end so that prompt and answer have at most `max_tokens`, and how many were.

    Raises `InputError` where a prompt alone leaves no room for an answer.
    """
    room = max_tokens - len(encoded.prompt)
    if room < 1:
        raise InputError(f"a prompt has {len(encoded.prompt)} tokens, which leaves none of max_tokens={max_tokens}")
    answers = tuple(answer[:room] for answer in encoded.answers)
    return Encoded(encoded.prompt, answers), sum(len(answer) > room for answer in encoded.answers)


@dataclass(frozen=True)
class Branch:
    """Tokens that follow the branch `parent` of the same row (-1: they begin it).

    `answer` numbers the answer that the tokens are, `prompt` the prompt that ends with them; else -1.
    """

    tokens: tuple[int, ...]
    parent: int = -1
    answer: int = -1
    prompt: int = -1


Row = tuple[Branch, ...]


@dataclass(frozen=True)
class Batch:
    """Padded rows, and for every answer token where it is predicted.

    `attend` is None where every row is a single path and the model's own causal mask is right.
    """

    tokens: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    is_answer: Bool[Tensor, "batch pos"]
    attend: Bool[Tensor, "batch pos pos"] | None
    read_row: Int[Tensor, " answer_token"]
    read_pos: Int[Tensor, " answer_token"]
    target: Int[Tensor, " answer_token"]
    answer: Int[Tensor, " answer_token"]
    prompt: Int[Tensor, " prompt"]
    prompt_row: Int[Tensor, " prompt"]
    prompt_pos: Int[Tensor, " prompt"]
    ended: Int[Tensor, " ended"]
    """Answers, and where the last token of each stands."""
    ended_row: Int[Tensor, " ended"]
    ended_pos: Int[Tensor, " ended"]

    def predicting_nothing(self) -> "Batch":
        """The same rows with no answer token to be predicted: nothing is unembedded."""
        none = self.target[:0]
        return dataclasses.replace(self, read_row=none, read_pos=none, target=none, answer=none)

    def rows(self, start: int, stop: int) -> "Batch":
        """The same for some of the rows, padded as they are."""
        read = (self.read_row >= start) & (self.read_row < stop)
        ends = (self.prompt_row >= start) & (self.prompt_row < stop)
        last = (self.ended_row >= start) & (self.ended_row < stop)
        return Batch(
            self.tokens[start:stop],
            self.positions[start:stop],
            self.real[start:stop],
            self.is_answer[start:stop],
            None if self.attend is None else self.attend[start:stop],
            self.read_row[read] - start,
            self.read_pos[read],
            self.target[read],
            self.answer[read],
            self.prompt[ends],
            self.prompt_row[ends] - start,
            self.prompt_pos[ends],
            self.ended[last],
            self.ended_row[last] - start,
            self.ended_pos[last],
        )


def paths(encoded: Sequence[Encoded]) -> list[Row]:
    """One row an answer: prompt, then answer. Answers are numbered in order over all prompts."""
    rows, number = [], 0
    for i, one in enumerate(encoded):
        for answer in one.answers:
            rows.append((Branch(one.prompt, prompt=i), Branch(answer, 0, answer=number)))
            number += 1
    return rows


def trees(encoded: Sequence[Encoded], *, row_tokens: int = 256) -> list[Row]:
    """Rows of about `row_tokens` tokens in which prompts share their common beginning, and answers their prompt.

    Attention grows with the square of a row, the sharing with its length (`make bench` tries other lengths).
    """
    trunk = _shared_beginning(encoded)
    first_answer = list(itertools.accumulate((len(one.answers) for one in encoded), initial=0))
    rows: list[Row] = []
    row, length = [], 0
    for i in sorted(range(len(encoded)), key=lambda i: -_n_tokens(encoded[i])):
        one = encoded[i]
        added = _n_tokens(one) - len(trunk)
        if row and length + added > row_tokens:
            rows.append(tuple(row))
            row = []
        if not row:
            row, length = [Branch(trunk)] if trunk else [], len(trunk)
        row.append(Branch(one.prompt[len(trunk) :], 0 if trunk else -1, prompt=i))
        end = len(row) - 1
        row += [Branch(answer, end, answer=first_answer[i] + k) for k, answer in enumerate(one.answers)]
        length += added
    return [*rows, tuple(row)] if row else rows


def batches(rows: Sequence[Row], *, batch_tokens: int, together: int = 1) -> list[list[Row]]:
    """Rows in batches of at most `batch_tokens` tokens, padding counted; long rows come first.

    `together` rows that follow each other stay in one batch, in their order.
    """
    groups = [rows[i : i + together] for i in range(0, len(rows), together)]
    made: list[list[Row]] = []
    longest = 0
    for group in sorted(groups, key=lambda group: -max(map(row_length, group))):
        if made and longest * (len(made[-1]) + len(group)) <= batch_tokens:
            made[-1] += group
        else:
            made.append([*group])
            longest = max(map(row_length, group))
    return made


def collate(rows: Sequence[Row], *, device: torch.device | str, padding: Padding = "right") -> Batch:
    """Rows side by side, padded with token 0, which nothing real attends to. Trees are padded on the right only."""
    n_pos = max(row_length(row) for row in rows)
    shape = (len(rows), n_pos)
    tokens, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    real, is_answer = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    attend = torch.zeros(len(rows), n_pos, n_pos, dtype=torch.bool)
    reads: list[tuple[int, int, int, int]] = []
    prompts: list[tuple[int, int, int]] = []
    ended: list[tuple[int, int, int]] = []
    for r, row in enumerate(rows):
        seen: list[list[int]] = []  # per branch: the places of everything on its path, itself included
        begin = start = n_pos - row_length(row) if padding == "left" else 0
        for branch in row:
            before = seen[branch.parent] if branch.parent >= 0 else []
            places = list(range(start, start + len(branch.tokens)))
            path = before + places
            tokens[r, start : start + len(places)] = torch.tensor(branch.tokens)
            positions[r, start : start + len(places)] = torch.arange(len(before), len(path))
            attend[r, start : start + len(places), torch.tensor(before, dtype=torch.long)] = True
            attend[r, start : start + len(places), start : start + len(places)] = torch.ones(
                len(places), len(places), dtype=torch.bool
            ).tril()
            if branch.answer >= 0:
                is_answer[r, start : start + len(places)] = True
                reads += [(r, path[len(before) + k - 1], t, branch.answer) for k, t in enumerate(branch.tokens)]
                ended.append((branch.answer, r, path[-1]))
            if branch.prompt >= 0:
                prompts.append((branch.prompt, r, path[-1]))
            seen.append(path)
            start += len(places)
        real[r, begin:start] = True
        positions[r, start:] = torch.arange(start, n_pos)
    attend |= torch.eye(n_pos, dtype=torch.bool)  # a padded position sees itself, or its softmax has no support
    single = all(branch.parent == i - 1 for row in rows for i, branch in enumerate(row))
    columns = torch.tensor(reads, dtype=torch.long).reshape(-1, 4).T.to(device)
    ends = [torch.tensor(some, dtype=torch.long).reshape(-1, 3).T.to(device) for some in (prompts, ended)]
    return Batch(
        tokens.to(device),
        positions.to(device),
        real.to(device),
        is_answer.to(device),
        None if single else attend.to(device),
        *columns,
        *ends[0],
        *ends[1],
    )


def _render_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use template='raw'")
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _n_common(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _shared_beginning(encoded: Sequence[Encoded]) -> tuple[int, ...]:
    """The longest beginning of all prompts that leaves each of them at least one token."""
    if len(encoded) < 2:
        return ()
    low, high = min(one.prompt for one in encoded), max(one.prompt for one in encoded)
    return low[: min(_n_common(low, high), min(len(one.prompt) for one in encoded) - 1)]


def _n_tokens(one: Encoded) -> int:
    return len(one.prompt) + sum(len(answer) for answer in one.answers)


def row_length(row: Row) -> int:
    """Tokens of a row."""
    return sum(len(branch.tokens) for branch in row)
