"""Text becomes tokens: templates, and batches that know where every answer token is predicted.

A batch is a list of rows, and a row is a tree of branches: a token sees its own branch and the branches it grew from.
One branch a row is the ordinary padded batch. A prompt with its two answers is a trunk with two branches, so that the
prompt is computed once for both; prompts that begin alike (the chat template's system turn) share that trunk too.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dean_interp.errors import InputError
from dean_interp.models.templates import Template, n_common, token_ids

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
        tokenizer: the checkpoint's own.
        prompt: what is asked.
        answers: texts that follow it.
        template: one of the four above.
        answer_tokens: keep only that many tokens of each answer.
        n_ctx: the model's context; a longer text is refused, never cut.

    Raises:
        InputError: an unknown template, no chat template or one that changes the prompt, a prompt or an answer without
            tokens, a text longer than `n_ctx`.
    """
    prompt_ids, answer_ids = token_ids(tokenizer, prompt, answers, template)
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
    """Answers cut at their end so that prompt and answer have at most `max_tokens`; and how many were cut.

    Raises `InputError` where a prompt alone leaves no room for an answer.
    """
    room = max_tokens - len(encoded.prompt)
    if room < 1:
        raise InputError(f"a prompt has {len(encoded.prompt)} tokens, which leaves none of max_tokens={max_tokens}")
    answers = tuple(answer[:room] for answer in encoded.answers)
    return Encoded(encoded.prompt, answers), sum(len(answer) > room for answer in encoded.answers)


@dataclass(frozen=True)
class Branch:
    """Tokens of a row that follow each other."""

    tokens: tuple[int, ...]
    parent: int = -1
    """The branch of the same row that they follow; -1 where they begin the row."""
    answer: int = -1
    """The number of the answer that they are; -1 where they are none."""
    prompt: int = -1
    """The number of the prompt that ends with them; -1 where none does."""


Row = tuple[Branch, ...]


@dataclass(frozen=True)
class Batch:
    """Padded rows, and for every answer token where it is predicted."""

    tokens: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    """Each token's position in its own text, from 0."""
    real: Bool[Tensor, "batch pos"]
    """Whether it is a token, not padding."""
    is_answer: Bool[Tensor, "batch pos"]
    """Whether it is a token of an answer."""
    attend: Bool[Tensor, "batch pos pos"] | None
    """Whether the first may look at the second; None where every row is a single path, and the model's own causal mask
    is right."""
    read_row: Int[Tensor, " answer_token"]
    read_pos: Int[Tensor, " answer_token"]
    """With `read_row`, the token before an answer token, where that is predicted."""
    target: Int[Tensor, " answer_token"]
    """The answer token."""
    answer: Int[Tensor, " answer_token"]
    """The number of its answer."""
    prompt: Int[Tensor, " prompt"]
    """Numbers of the prompts."""
    prompt_row: Int[Tensor, " prompt"]
    prompt_pos: Int[Tensor, " prompt"]
    """With `prompt_row`, the last token of each prompt."""
    ended: Int[Tensor, " ended"]
    """Numbers of the answers."""
    ended_row: Int[Tensor, " ended"]
    ended_pos: Int[Tensor, " ended"]
    """With `ended_row`, the last token of each answer."""

    def predicting_nothing(self) -> "Batch":
        """The same rows with no answer token to be predicted: nothing is unembedded."""
        none = self.target[:0]
        return replace(self, read_row=none, read_pos=none, target=none, answer=none)

    def rows(self, start: int, stop: int) -> "Batch":
        """The same for some of the rows, padded as they are."""
        read = (self.read_row >= start) & (self.read_row < stop)
        prompts = (self.prompt_row >= start) & (self.prompt_row < stop)
        answers = (self.ended_row >= start) & (self.ended_row < stop)
        return Batch(
            tokens=self.tokens[start:stop],
            positions=self.positions[start:stop],
            real=self.real[start:stop],
            is_answer=self.is_answer[start:stop],
            attend=None if self.attend is None else self.attend[start:stop],
            read_row=self.read_row[read] - start,
            read_pos=self.read_pos[read],
            target=self.target[read],
            answer=self.answer[read],
            prompt=self.prompt[prompts],
            prompt_row=self.prompt_row[prompts] - start,
            prompt_pos=self.prompt_pos[prompts],
            ended=self.ended[answers],
            ended_row=self.ended_row[answers] - start,
            ended_pos=self.ended_pos[answers],
        )


def paths(encoded: Sequence[Encoded]) -> list[Row]:
    """One row an answer: prompt, then answer. Answers are numbered in order over all prompts."""
    rows = []
    for i, text in enumerate(encoded):
        for answer in text.answers:
            rows.append((Branch(text.prompt, prompt=i), Branch(answer, parent=0, answer=len(rows))))
    return rows


def trees(encoded: Sequence[Encoded], *, row_tokens: int = 256) -> list[Row]:
    """Rows of about `row_tokens` tokens in which prompts share their common beginning, and answers their prompt.

    Attention grows with the square of a row, the sharing with its length.
    """
    trunk = _shared_beginning(encoded)
    first_answer = list(itertools.accumulate((len(text.answers) for text in encoded), initial=0))
    rows: list[Row] = []
    row, length = [], 0
    for i in sorted(range(len(encoded)), key=lambda i: -_n_tokens(encoded[i])):
        # The next row begins where this text would make the row too long.
        n_added = _n_tokens(encoded[i]) - len(trunk)
        if row and length + n_added > row_tokens:
            rows.append(tuple(row))
            row = []
        if not row:
            row, length = [Branch(trunk)] if trunk else [], len(trunk)
        # The prompt grows from the trunk, and its answers from the prompt.
        row.append(Branch(encoded[i].prompt[len(trunk) :], parent=0 if trunk else -1, prompt=i))
        prompt_branch = len(row) - 1
        for number, answer in enumerate(encoded[i].answers, first_answer[i]):
            row.append(Branch(answer, parent=prompt_branch, answer=number))
        length += n_added
    return [*rows, tuple(row)] if row else rows


def batches(rows: Sequence[Row], *, batch_tokens: int, together: int = 1) -> list[list[Row]]:
    """Rows in batches of at most `batch_tokens` tokens, padding counted; long rows come first.

    `together` rows that follow each other stay in one batch, in their order.
    """
    groups = [rows[i : i + together] for i in range(0, len(rows), together)]
    planned: list[list[Row]] = []
    longest = 0
    for group in sorted(groups, key=lambda group: -max(map(row_length, group))):
        if planned and longest * (len(planned[-1]) + len(group)) <= batch_tokens:
            planned[-1] += group
        else:
            planned.append([*group])
            longest = max(map(row_length, group))
    return planned


def collate(rows: Sequence[Row], *, device: torch.device | str, padding: Padding = "right") -> Batch:
    """Rows side by side, padded with token 0, which nothing real attends to. Trees are padded on the right only."""
    n_pos = max(row_length(row) for row in rows)
    shape = (len(rows), n_pos)
    tokens, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    real, is_answer = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    attend = torch.zeros(len(rows), n_pos, n_pos, dtype=torch.bool)
    reads, prompts, ended = [], [], []
    for r, row in enumerate(rows):
        begin = n_pos - row_length(row) if padding == "left" else 0
        end = begin + row_length(row)
        real[r, begin:end] = True
        positions[r, end:] = torch.arange(end, n_pos)
        for branch, before, columns in _laid_out(row, begin):
            here, path = slice(columns.start, columns.stop), [*before, *columns]
            tokens[r, here] = torch.tensor(branch.tokens)
            positions[r, here] = torch.arange(len(before), len(path))
            # A token sees the branches that its own grew from, and its own up to itself.
            attend[r, here, torch.tensor(before, dtype=torch.long)] = True
            attend[r, here, here] = torch.ones(len(columns), len(columns), dtype=torch.bool).tril()
            if branch.answer >= 0:
                is_answer[r, here] = True
                # Each token is predicted by the one before it on its path.
                for k, token in enumerate(branch.tokens):
                    reads.append((r, path[len(before) + k - 1], token, branch.answer))
                ended.append((branch.answer, r, path[-1]))
            if branch.prompt >= 0:
                prompts.append((branch.prompt, r, path[-1]))
    attend |= torch.eye(n_pos, dtype=torch.bool)  # a padded position sees itself, or its softmax has no support
    read_row, read_pos, target, answer = _columns(reads, 4, device)
    prompt, prompt_row, prompt_pos = _columns(prompts, 3, device)
    ended_answer, ended_row, ended_pos = _columns(ended, 3, device)
    return Batch(
        tokens=tokens.to(device),
        positions=positions.to(device),
        real=real.to(device),
        is_answer=is_answer.to(device),
        attend=None if all(map(_is_path, rows)) else attend.to(device),
        read_row=read_row,
        read_pos=read_pos,
        target=target,
        answer=answer,
        prompt=prompt,
        prompt_row=prompt_row,
        prompt_pos=prompt_pos,
        ended=ended_answer,
        ended_row=ended_row,
        ended_pos=ended_pos,
    )


def _laid_out(row: Row, begin: int) -> Iterator[tuple[Branch, list[int], range]]:
    """Each branch, the columns of all that it grew from, and its own columns."""
    paths: list[list[int]] = []
    for branch in row:
        before = paths[branch.parent] if branch.parent >= 0 else []
        columns = range(begin, begin + len(branch.tokens))
        yield branch, before, columns
        paths.append([*before, *columns])
        begin = columns.stop


def _columns(lines: Sequence[tuple[int, ...]], n_columns: int, device: torch.device | str) -> Int[Tensor, "column _"]:
    return torch.tensor(lines, dtype=torch.long).reshape(-1, n_columns).T.to(device)


def _is_path(row: Row) -> bool:
    """Whether every branch follows the one before it."""
    return all(branch.parent == i - 1 for i, branch in enumerate(row))


def _shared_beginning(encoded: Sequence[Encoded]) -> tuple[int, ...]:
    """The longest beginning of all prompts that leaves each of them at least one token."""
    if len(encoded) < 2:
        return ()
    prompts = [text.prompt for text in encoded]
    # What the first and the last have in common, in the order of their tokens, all have in common.
    first, last = min(prompts), max(prompts)
    return first[: min(n_common(first, last), min(map(len, prompts)) - 1)]


def _n_tokens(text: Encoded) -> int:
    return len(text.prompt) + sum(len(answer) for answer in text.answers)


def row_length(row: Row) -> int:
    """Tokens of a row."""
    return sum(len(branch.tokens) for branch in row)
