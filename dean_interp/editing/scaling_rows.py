"""How gates become a row scaling: the products are made, and what undoes each of them is kept."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.editing.rounded_products import chosen, is_next, narrowest_format, packed, same_bits
from dean_interp.editing.row_blocks import RowBlock
from dean_interp.editing.row_scaling import RowScaling
from dean_interp.editing.tensor_change import tensor_hash
from dean_interp.errors import InputError
from dean_interp.models.sites import Site


def row_scaling(
    stored: Float[Tensor, "..."],
    site: Site,
    rows: Int[Tensor, " neuron"],
    multipliers: Float[Tensor, " neuron"],
    *,
    is_transposed: bool,
    expert: int | None = None,
) -> RowScaling:
    """The change that multiplies some rows of `out`, whose tensor in the checkpoint's layout is `stored`.

    Products are rounded to the narrowest format that holds every number of the tensor, whatever it is loaded in: an
    edit of a bfloat16 checkpoint that was loaded in float32 fits the checkpoint.

    Raises:
        InputError: a product that is too large for the format.
    """
    dtype = narrowest_format(stored)
    d_model = stored.shape[0] if is_transposed else stored.shape[1]
    scaling = RowScaling(
        site=site,
        is_transposed=is_transposed,
        shape=(stored.shape[0], stored.shape[1]),
        dtype=dtype,
        rows=rows.cpu(),
        multipliers=multipliers.cpu().float(),
        n_bits=torch.zeros(len(rows), dtype=torch.int64),
        bits=torch.zeros(0, dtype=torch.uint8),
        kept_at=torch.zeros(0, dtype=torch.int64),
        kept=torch.zeros(0, dtype=dtype),
        silenced=torch.zeros(0, d_model, dtype=dtype),
        base=tensor_hash(stored),
        expert=expert,
    )
    return _with_corrections(scaling, stored)


def _with_corrections(scaling: RowScaling, stored: Float[Tensor, "..."]) -> RowScaling:
    """A scaling that holds nothing yet to undo it with, with all that."""
    are_two = torch.zeros(len(scaling.rows), scaling.d_model, dtype=torch.bool)
    is_second = torch.zeros_like(are_two)
    is_lost = torch.zeros_like(are_two)
    for block in scaling.blocks(stored):
        old = block.read(scaling.dtype)
        new = scaling.multiplied(block, old)
        _refuse_overflow(scaling, block, new)
        # A number is told by its bit, unless neither of its product's two sources is the number.
        candidates = scaling.candidates(block, new)
        bits = is_next(old, candidates)
        undone = chosen(candidates, bits, scaling.dtype)
        place = block.neurons, block.columns
        are_two[place] = candidates.are_two
        is_second[place] = bits
        is_lost[place] = ~same_bits(undone, old)
    # Silenced rows are kept whole, and not as single numbers.
    is_silenced = scaling.multipliers == 0
    is_kept = is_lost & ~is_silenced[:, None]
    row, column = is_kept.nonzero(as_tuple=True)
    matrix = stored.t() if scaling.is_transposed else stored
    return replace(
        scaling,
        n_bits=are_two.sum(1),
        bits=packed(is_second[are_two]),
        kept_at=row * scaling.d_model + column,
        kept=matrix[scaling.rows[row], column].to("cpu", scaling.dtype),
        silenced=matrix[scaling.rows[is_silenced]].to("cpu", scaling.dtype),
    )


def _refuse_overflow(
    scaling: RowScaling,
    block: RowBlock,
    new: Float[Tensor, "neuron column"],
) -> None:
    is_overflow = ~new.isfinite().all(dim=1)
    if not is_overflow.any():
        return
    place = block.neurons.start + int(is_overflow.nonzero()[0])
    multiplier = float(scaling.multipliers[place])
    neuron = f"neuron {int(scaling.rows[place])}"
    if scaling.expert is not None:
        neuron += f" of expert {scaling.expert}"
    raise InputError(
        f"{multiplier:.3g} times the row of {neuron} at {scaling.site} is not finite in {scaling.dtype}: a gate must "
        "leave every weight finite"
    )
