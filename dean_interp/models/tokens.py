"""Text becomes tokens: templates, and batches that know where every answer token is predicted.

A batch is a list of rows, and a row is a tree of branches: a token sees its own branch and the branches it grew from.
One branch a row is the ordinary padded batch. A prompt with its two answers is a trunk with two branches, so that the
prompt is computed once for both; prompts that begin alike (the chat template's system turn) share that trunk too.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dean_interp.errors import InputError
from dean_interp.models.rows import Branch, PaddedRows, Row, is_path, row_length
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
        n_tokens = len(prompt_ids) + len(ids)
        if n_ctx is not None and n_tokens > n_ctx:
            raise InputError(
                f"the prompt {prompt[:40]!r} and its answer have {n_tokens} tokens; the model takes {n_ctx}"
            )
    kept = [tuple(ids[:answer_tokens]) for ids in answer_ids]
    return Encoded(tuple(prompt_ids), tuple(kept))


def cut(encoded: Encoded, max_tokens: int) -> tuple[Encoded, int]:
    """Answers cut at their end so that prompt and answer have at most `max_tokens`; and how many were cut.

    Raises `InputError` where a prompt alone leaves no room for an answer.
    """
    room = max_tokens - len(encoded.prompt)
    if room < 1:
        n_prompt = len(encoded.prompt)
        raise InputError(f"a prompt has {n_prompt} tokens, which leaves none of max_tokens={max_tokens}")
    answers = tuple(answer[:room] for answer in encoded.answers)
    n_cut = sum(len(answer) > room for answer in encoded.answers)
    return Encoded(encoded.prompt, answers), n_cut


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

        def are_inside(rows: Int[Tensor, " _"]) -> Bool[Tensor, " _"]:
            return (rows >= start) & (rows < stop)

        read = are_inside(self.read_row)
        prompts = are_inside(self.prompt_row)
        answers = are_inside(self.ended_row)
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
            prompt_branch = Branch(text.prompt, prompt=i)
            answer_branch = Branch(answer, parent=0, answer=len(rows))
            rows.append((prompt_branch, answer_branch))
    return rows


def trees(encoded: Sequence[Encoded], *, row_tokens: int = 256) -> list[Row]:
    """Rows of about `row_tokens` tokens in which prompts share their common beginning, and answers their prompt.

    Attention grows with the square of a row, the sharing with its length.
    """
    trunk = _shared_beginning(encoded)
    # Answers are numbered in order over all prompts, rows are filled with the longest texts first.
    n_answers = [len(text.answers) for text in encoded]
    first_answers = list(itertools.accumulate(n_answers, initial=0))
    lengths = [_n_tokens(text) for text in encoded]
    order = sorted(range(len(encoded)), key=lambda i: -lengths[i])
    rows: list[Row] = []
    row: list[Branch] = []
    length = 0
    for i in order:
        # The next row begins where this text would make the row too long.
        n_added = lengths[i] - len(trunk)
        if row and length + n_added > row_tokens:
            rows.append(tuple(row))
            row = []
        if not row:
            row = [Branch(trunk)] if trunk else []
            length = len(trunk)
        # The prompt grows from the trunk, and its answers from the prompt.
        own_prompt = encoded[i].prompt[len(trunk) :]
        parent = 0 if trunk else -1
        row.append(Branch(own_prompt, parent=parent, prompt=i))
        prompt_branch = len(row) - 1
        for number, answer in enumerate(encoded[i].answers, first_answers[i]):
            row.append(Branch(answer, parent=prompt_branch, answer=number))
        length += n_added
    if row:
        rows.append(tuple(row))
    return rows


def batches(rows: Sequence[Row], *, batch_tokens: int, together: int = 1) -> list[list[Row]]:
    """Rows in batches of at most `batch_tokens` tokens, padding counted; long rows come first.

    `together` rows that follow each other stay in one batch, in their order.
    """
    groups = []
    for start in range(0, len(rows), together):
        groups.append(rows[start : start + together])
    groups.sort(key=lambda group: -_longest(group))
    planned: list[list[Row]] = []
    # The first group of a batch is its longest, to which all its rows are padded.
    length = 0
    for group in groups:
        n_rows = len(planned[-1]) + len(group) if planned else 0
        if planned and n_rows * length <= batch_tokens:
            planned[-1] += group
        else:
            planned.append([*group])
            length = _longest(group)
    return planned


def _longest(rows: Sequence[Row]) -> int:
    """The tokens of the longest of some rows."""
    return max(map(row_length, rows))


def collate(
    rows: Sequence[Row],
    *,
    device: torch.device | str,
    padding: Padding = "right",
) -> Batch:
    """Rows side by side, padded with token 0, which nothing real attends to. Trees are padded on the right only."""
    n_pos = _longest(rows)
    padded = PaddedRows(len(rows), n_pos)
    for number, row in enumerate(rows):
        n_padding = n_pos - row_length(row)
        begin = n_padding if padding == "left" else 0
        padded.add(number, row, begin)
    read_row, read_pos, target, answer = _columns(padded.reads, 4, device)
    prompt, prompt_row, prompt_pos = _columns(padded.prompts, 3, device)
    ended, ended_row, ended_pos = _columns(padded.ended, 3, device)
    # The model's own causal mask is right for paths.
    are_paths = all(map(is_path, rows))
    return Batch(
        tokens=padded.tokens.to(device),
        positions=padded.positions.to(device),
        real=padded.real.to(device),
        is_answer=padded.is_answer.to(device),
        attend=None if are_paths else padded.attend.to(device),
        read_row=read_row,
        read_pos=read_pos,
        target=target,
        answer=answer,
        prompt=prompt,
        prompt_row=prompt_row,
        prompt_pos=prompt_pos,
        ended=ended,
        ended_row=ended_row,
        ended_pos=ended_pos,
    )


def _columns(
    lines: Sequence[tuple[int, ...]],
    n_columns: int,
    device: torch.device | str,
) -> Int[Tensor, "column _"]:
    """Lines of numbers by column, also where there is no line."""
    table = torch.tensor(lines, dtype=torch.long).reshape(-1, n_columns)
    return table.T.to(device)


def _shared_beginning(encoded: Sequence[Encoded]) -> tuple[int, ...]:
    """The longest beginning of all prompts that leaves each of them at least one token."""
    if len(encoded) < 2:
        return ()
    prompts = [text.prompt for text in encoded]
    # What the first and the last have in common, in the order of their tokens, all have in common.
    first = min(prompts)
    last = max(prompts)
    shortest = min(map(len, prompts))
    n_shared = min(n_common(first, last), shortest - 1)
    return first[:n_shared]


def _n_tokens(text: Encoded) -> int:
    """Tokens of a prompt and of all its answers."""
    return len(text.prompt) + sum(map(len, text.answers))
