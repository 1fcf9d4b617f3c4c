"""Whether two ways of computing the same numbers agree, beyond what the number format rounds."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.models.adapters import adapter_of
from dean_interp.models.hooked_model import HookedModel

_STEPS = 64
"""So many steps of the number format are rounding: half of the spread in bfloat16, a sixteenth in float16.

In bfloat16 rounding alone moved logits by up to a quarter of their spread. A wrong mask moved them by one and a half
times their spread, and a KV cache that had lost one of eight tokens by 0.76 to 3.4 times.
"""


def equal_but_for_rounding(
    model: HookedModel, values: Float[Tensor, "*any"], expected: Float[Tensor, "*any"], *, least: float
) -> bool:
    """Whether no number differs by more than rounding, as a share of the spread of what is expected.

    Args:
        model: its number format says how much rounding there may be.
        values: logits or log-probabilities, computed in one way.
        expected: the same, computed in the other way.
        least: the share that may differ in any format.
    """
    rounding = torch.finfo(next(model.parameters()).dtype).eps
    tolerance = max(least, _STEPS * rounding)
    difference = (values.float() - expected.float()).abs().max()
    return bool(difference <= tolerance * expected.float().std())


def tokens_of_all_kinds(model: HookedModel, n_tokens: int) -> Int[Tensor, "1 pos"]:
    """Tokens from all of the vocabulary. The first ones are often special tokens, whose logits rounding moves far."""
    n_vocabulary = adapter_of(model).vocabulary_size
    step = max(1, n_vocabulary // (n_tokens + 1))
    numbers = torch.arange(1, 1 + n_tokens, device=model.cfg.device)[None]
    return step * numbers % n_vocabulary
