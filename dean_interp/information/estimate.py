"""What an estimator takes and gives: two matrices whose rows are the same examples, and a number with its limits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from dean_interp.errors import InputError

Units = Literal["nats", "index"]
_TwoAxes = Num[Tensor, "example _"] | Num[np.ndarray, "example _"]
_OneAxis = Num[Tensor, " example"] | Num[np.ndarray, " example"]
Side = _TwoAxes | _OneAxis
"""One side of a pair. Each row is an example; a vector counts as one column."""
Matrix = Float[Tensor, "example _"]
"""A side as estimators compute with it: each row is an example, each column a dimension."""
Pairings = Int[Tensor, "pairing example"]
"""Each row pairs all examples: row `i` of the first side with row `pairing[i]` of the second."""

_LARGEST = 1e150
CONSTANT = "constant side"
DUPLICATES = "duplicates"
PER_DIMENSION = 8
"""Examples that an estimate in nats needs for each dimension of both sides before it can be relied on."""


@dataclass(frozen=True)
class Estimate:
    """A number with its units, and what is doubtful about it. It is never clipped: nats may be negative."""

    value: float
    units: Units
    """`nats` of mutual information, or an `index` of dependence that is no information."""
    flags: tuple[str, ...] = ()
    """Why the value should not be relied on; empty where nothing is known against it."""
    null_mean: float | None = None
    """Mean over all shuffles of the pairing, in closed form; only kernel estimators have one."""
    null_sd: float | None = None
    """Standard deviation over all shuffles, in closed form."""

    @property
    def z(self) -> float | None:
        """Standard deviations above the shuffle mean: a screen, not a p-value."""
        if self.null_mean is None or not self.null_sd:
            return None
        return (self.value - self.null_mean) / self.null_sd


def as_matrices(x: Side, y: Side, *, least: int = 4) -> tuple[Matrix, Matrix]:
    """Both sides as float64 matrices on one device.

    Raises `InputError` for sides of different length, fewer than `least` examples, or a value that is not finite.
    """
    first = _matrix(x, "first")
    second = _matrix(y, "second")
    if len(first) != len(second):
        raise InputError(f"both sides must hold the same examples, got {len(first)} and {len(second)} rows")
    if len(first) < least:
        raise InputError(f"an estimate needs at least {least} examples, got {len(first)}")
    return first, second.to(first.device)


def _matrix(side: Side, which: str) -> Matrix:
    if isinstance(side, Tensor):
        matrix = side.detach().double()
    else:
        # a copy: an array that is reversed or read-only cannot become a tensor as it is
        matrix = torch.from_numpy(np.array(side, dtype=np.float64))
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2 or not matrix.shape[1]:
        shape = tuple(matrix.shape)
        raise InputError(f"a side is a matrix (example, dim) with at least one column, got shape {shape}")
    is_finite = torch.isfinite(matrix).all(1)
    if not bool(is_finite.all()):
        n_bad = len(matrix) - int(is_finite.sum())
        raise InputError(f"the {which} side holds NaN or infinity in {n_bad} of {len(matrix)} rows")
    largest = float(matrix.abs().max()) if len(matrix) else 0.0
    if largest > _LARGEST:
        raise InputError(f"the {which} side holds values up to {largest:.1g}, whose squares overflow")
    return matrix


def is_constant(x: Matrix) -> bool:
    """Whether no column varies, beyond rounding."""
    span = x.amax(0) - x.amin(0)
    rounding = 1e-12 * x.abs().amax(0)
    return bool((span <= rounding).all())


def doubts(x: Matrix, y: Matrix) -> list[str]:
    """What is wrong with a pair of sides whatever the estimator."""
    flags = []
    if is_constant(x) or is_constant(y):
        flags.append(CONSTANT)
    n_examples = len(x)
    both = torch.cat([x, y], 1)
    n_repeated = n_examples - len(_equal_rows(both))
    if n_repeated:
        flags.append(f"{DUPLICATES}: {n_repeated} of {n_examples} examples repeat another")
    return flags


def few(n_examples: int, n_dims: int) -> list[str]:
    """The flag of an estimate in nats with fewer than 8 examples a dimension; none where it has as many."""
    wanted = PER_DIMENSION * n_dims
    if n_examples >= wanted:
        return []
    return [f"few examples: {n_examples} for {n_dims} dimensions, {wanted} are wanted"]


def most_coincide(x: Matrix) -> bool:
    """Whether more than half of the distances between two examples of a side are zero."""
    n_distances = _n_ordered_pairs(len(x))
    n_zero = sum(map(_n_ordered_pairs, _equal_rows(x).values()))
    return 2 * n_zero > n_distances


def _n_ordered_pairs(n: int) -> int:
    return n * (n - 1)


def _equal_rows(x: Matrix) -> Counter[bytes]:
    """How often each row occurs, by its bytes."""
    # adding 0 turns -0 into 0, whose bytes differ
    rows = x.add(0.0).cpu().numpy()
    return Counter(row.tobytes() for row in rows)


def in_nats(value: float, n_examples: int, flags: Sequence[str]) -> Estimate:
    """An estimate in nats; beyond `ln n`, which no sample of `n` can show, it is flagged."""
    limit = float(np.log(n_examples))
    if value > limit:
        flags = [*flags, f"above ln n = {limit:.2f} nats, more than {n_examples} examples can show"]
    return Estimate(value, "nats", tuple(flags))
