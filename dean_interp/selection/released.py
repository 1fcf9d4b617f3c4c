"""The selection of the released code, for comparison only: it is not an intersection.

The authors' procedure, matrix by matrix: take the three tops as ascending lists of flat indices. Mark in each
behaviour's list the *positions* whose index is not in general's top. Keep the first behaviour's indices at the
positions that are marked in both lists. Position `k` of one list has nothing to do with position `k` of the other, so
the result holds indices that the second behaviour never chose, misses some that both chose, and changes when the two
are swapped.
"""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.scoring.scores import Scores
from dean_interp.scoring.top import highest
from dean_interp.selection.selection import Selection


def released_selection(
    first: Float[Tensor, "d_out d_in"],
    second: Float[Tensor, "d_out d_in"],
    general: Float[Tensor, "d_out d_in"],
    *,
    fraction: float | tuple[float, float],
) -> Int[Tensor, " unit"]:
    """Flat indices that the released code would silence in one matrix, ascending; the order of the sets matters.

    Args:
        first: scores of one matrix in Hugging Face layout, `(d_out, d_in)` for `nn.Linear`. The flattening order
            decides which units are chosen: pass `scores[site].T` for ours.
        second: the same for the second behaviour.
        general: the same for general text.
        fraction: fraction of the matrix in each top, `int(fraction * columns * rows)` units.

    Raises:
        InputError: shapes that differ, two different fractions (the released code crashes there), or a fraction that
            selects no unit (there it silently does nothing).

    Warns:
        UserWarning: always; use `couple` for an intersection.
    """
    if isinstance(fraction, tuple):
        if len(set(fraction)) > 1:
            raise InputError(f"the released code takes one fraction for both behaviours and general, got {fraction}")
        fraction = fraction[0]
    if not 0 < fraction <= 1:
        raise InputError(f"fraction must be in (0, 1], got {fraction}")
    if not first.shape == second.shape == general.shape:
        shapes = [tuple(scores.shape) for scores in (first, second, general)]
        raise InputError(f"scores of one matrix have one shape, got {shapes}")
    n_rows, n_columns = first.shape
    count = int(fraction * n_columns * n_rows)
    if not count:
        raise InputError(
            f"fraction {fraction} selects none of {first.numel()} weights, and the released code does nothing"
        )
    warnings.warn("released_selection replicates the released code, which is not an intersection", stacklevel=2)
    return _at_common_positions(
        first=highest(first.flatten(), count),
        second=highest(second.flatten(), count),
        general=highest(general.flatten(), count),
    )


def released_coupling(
    first: Scores,
    second: Scores,
    general: Scores,
    *,
    fraction: float,
) -> Selection:
    """The released procedure on every matrix of three scores of weights, in Hugging Face layout and back.

    The arguments, errors and the warning are those of `released_selection`. The order of `first` and `second` matters.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction must be in (0, 1], got {fraction}")
    if first.units != ("weight",):
        raise InputError(f"the released code selects weights, got scores of {' and '.join(first.units)}s")
    warnings.warn("released_coupling replicates the released code, which is not an intersection", stacklevel=2)
    units = {}
    for site, (d_in, d_out) in first.shapes.items():
        count = int(fraction * d_in * d_out)
        # The released code's positions are those of its own layout, (d_out, d_in).
        chosen = _at_common_positions(
            first=_transposed(first.top(site, count), d_out, d_in),
            second=_transposed(second.top(site, count), d_out, d_in),
            general=_transposed(general.top(site, count), d_out, d_in),
        )
        units[site] = _transposed(chosen, d_in, d_out)
    if not any(map(len, units.values())):
        raise InputError(f"fraction {fraction} selects no weight, and the released code does nothing")
    prompt_hashes = first.prompt_hashes | second.prompt_hashes | general.prompt_hashes
    return Selection(units, first.shapes, prompt_hashes)


def _at_common_positions(
    first: Int[Tensor, " top"],
    second: Int[Tensor, " top"],
    general: Int[Tensor, " top"],
) -> Int[Tensor, " unit"]:
    """The first's indices at positions where neither of two ascending lists has an index of general."""
    is_marked_in_first = ~torch.isin(first, general)
    is_marked_in_second = ~torch.isin(second, general)
    return first[is_marked_in_first & is_marked_in_second]


def _transposed(
    indices: Int[Tensor, " unit"],
    n_columns: int,
    n_rows: int,
) -> Int[Tensor, " unit"]:
    """Flat indices in a matrix of `n_columns` columns as ascending flat indices in its transpose (`n_rows` columns)."""
    row = indices // n_columns
    column = indices % n_columns
    return (column * n_rows + row).sort().values
