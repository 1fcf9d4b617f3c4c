"""What goes through a model, counted: the numbers that the time of its passes depends on."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dean_interp.models.tokens import Row, batches, row_length

PassKind = Literal["forward", "neurons", "weights", "answer"]
"""`forward`: a pass that measures. `neurons`, `weights`: forward and back, with what scoring adds up; weights with
neurons. `answer`: one new token of every row, from the cache."""
Count = int | float
"""A number of things, or their mean."""


@dataclass(frozen=True)
class Amount:
    """What goes through the model in some passes of one kind, padding counted."""

    n_calls: Count = 0
    """Batches."""
    n_rows: Count = 0
    n_tokens: Count = 0
    n_pairs: Count = 0
    """Tokens times the length of their rows: attention grows with it."""
    n_logits: Count = 0
    """Places that are unembedded."""

    @property
    def values(self) -> tuple[Count, Count, Count, Count, Count]:
        """All five numbers."""
        return self.n_calls, self.n_rows, self.n_tokens, self.n_pairs, self.n_logits

    def __add__(self, other: "Amount") -> "Amount":
        """Both, one after the other."""
        return Amount(*map(operator.add, self.values, other.values))

    def __mul__(self, times: Count) -> "Amount":
        """The same so many times."""
        return Amount(*(times * value for value in self.values))


def amount_of(rows: Sequence[Row], *, batch_tokens: int, together: int = 1) -> Amount:
    """What rows are in batches of so many padded tokens. `together` rows that follow each other stay in one batch."""
    total = Amount()
    for batch in batches(rows, batch_tokens=batch_tokens, together=together):
        total += amount_of_batch(batch)
    return total


def amount_of_batch(rows: Sequence[Row]) -> Amount:
    """What one batch is."""
    length = max(map(row_length, rows))
    n_tokens = len(rows) * length
    # Only the tokens of answers are unembedded.
    n_logits = 0
    for row in rows:
        n_logits += sum(len(branch.tokens) for branch in row if branch.answer >= 0)
    return Amount(
        n_calls=1,
        n_rows=len(rows),
        n_tokens=n_tokens,
        n_pairs=n_tokens * length,
        n_logits=n_logits,
    )
