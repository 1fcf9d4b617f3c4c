"""Rows of tokens, each a tree of branches, and how they are laid side by side with padding."""

from dataclasses import dataclass

import torch


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


def row_length(row: Row) -> int:
    """Tokens of a row."""
    return sum(len(branch.tokens) for branch in row)


def is_path(row: Row) -> bool:
    """Whether every branch follows the one before it."""
    return all(branch.parent == i - 1 for i, branch in enumerate(row))


class PaddedRows:
    """Rows side by side, on the CPU: zeros, until each row is added.

    The fields are those of `models.tokens.Batch`; what that holds as columns is a list of lines here.
    """

    def __init__(self, n_rows: int, n_pos: int) -> None:
        shape = (n_rows, n_pos)
        self.tokens = torch.zeros(shape, dtype=torch.long)
        self.positions = torch.zeros(shape, dtype=torch.long)
        self.real = torch.zeros(shape, dtype=torch.bool)
        self.is_answer = torch.zeros(shape, dtype=torch.bool)
        # A padded position sees itself, or its softmax has no support.
        sees_itself = torch.eye(n_pos, dtype=torch.bool)
        self.attend = sees_itself.repeat(n_rows, 1, 1)
        self.reads: list[tuple[int, ...]] = []
        """Of each answer token: row and position where it is predicted, the token, the number of its answer."""
        self.prompts: list[tuple[int, ...]] = []
        """Of each prompt: its number, and row and position of its last token."""
        self.ended: list[tuple[int, ...]] = []
        """The same of each answer."""

    def add(self, number: int, row: Row, begin: int) -> None:
        """Fill in row `number`, whose first token stands at the column `begin`."""
        n_pos = self.tokens.shape[1]
        end = begin + row_length(row)
        self.real[number, begin:end] = True
        self.positions[number, end:] = torch.arange(end, n_pos)
        # Of each branch the columns from the row's first token to its own last.
        paths: list[list[int]] = []
        for branch in row:
            before = paths[branch.parent] if branch.parent >= 0 else []
            columns = range(begin, begin + len(branch.tokens))
            self._add_branch(number, branch, before=before, columns=columns)
            paths.append([*before, *columns])
            begin = columns.stop

    def _add_branch(
        self,
        number: int,
        branch: Branch,
        *,
        before: list[int],
        columns: range,
    ) -> None:
        """Fill in a branch at its own columns, behind the columns of all that it grew from."""
        here = slice(columns.start, columns.stop)
        path = [*before, *columns]
        n_before = len(before)
        n_own = len(columns)
        self.tokens[number, here] = torch.tensor(branch.tokens)
        self.positions[number, here] = torch.arange(n_before, n_before + n_own)
        # A token sees the branches that its own grew from, and its own up to itself.
        grown_from = torch.tensor(before, dtype=torch.long)
        up_to_itself = torch.ones(n_own, n_own, dtype=torch.bool).tril()
        self.attend[number, here, grown_from] = True
        self.attend[number, here, here] = up_to_itself
        if branch.answer >= 0:
            self.is_answer[number, here] = True
            # Each token is predicted by the one before it on its path.
            for place, token in enumerate(branch.tokens, n_before):
                predicted_at = path[place - 1]
                self.reads.append((number, predicted_at, token, branch.answer))
            self.ended.append((branch.answer, number, path[-1]))
        if branch.prompt >= 0:
            self.prompts.append((branch.prompt, number, path[-1]))
