"""The slots of a pass through routed experts, and each slot's product with the matrix of its expert."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Slots:
    """The slots of a pass in two orders: as the tokens stand, and sorted by expert."""

    def __init__(self, ids: Int[Tensor, "batch pos slot"], n_experts: int) -> None:
        flat = ids.flatten()
        self.shape = ids.shape
        self.order = flat.argsort(stable=True)
        self.back = self.order.argsort()
        self.experts = flat[self.order]
        self.ends = flat.bincount(minlength=n_experts).cumsum(0)

    def as_tokens_stand(self, by_expert: Float[Tensor, "place width"]) -> Float[Tensor, "batch pos slot width"]:
        """From sorted by expert to the order of the tokens."""
        return by_expert[self.back].unflatten(0, self.shape)

    def sorted(self, as_tokens_stand: Float[Tensor, "batch pos slot width"]) -> Float[Tensor, "place width"]:
        """From the order of the tokens to sorted by expert."""
        return as_tokens_stand.flatten(0, 2)[self.order]

    def product(
        self,
        read: Float[Tensor, "place d_in"],
        stack: Float[Tensor, "expert _ _"],
        bias: Float[Tensor, "expert d_out"] | None,
        *,
        is_transposed: bool,
    ) -> Float[Tensor, "place d_out"]:
        """Each slot's product with the matrix of its expert."""
        matrices = stack if is_transposed else stack.mT
        if _multiplies_all(read, stack):
            products = nn.functional.grouped_mm(read, matrices, offs=self.ends.int())
        else:
            rows = read.tensor_split(self.ends[:-1].tolist())
            # One `unbind` for all experts: a gradient of the stack is put together once.
            of_all = zip(rows, matrices.unbind(), strict=True)
            products = torch.cat([own @ matrix for own, matrix in of_all if len(own)])
        if bias is None:
            return products
        return products + bias[self.experts]


def _multiplies_all(read: Tensor, stack: Tensor) -> bool:
    """Whether torch has one product for all experts here: its kernels want places in memory that 16 bytes divide."""
    if not hasattr(nn.functional, "grouped_mm"):
        return False
    if stack.is_cuda and torch.cuda.get_device_capability(stack.device) < (8, 0):
        return False
    # In bytes.
    places = [tensor.data_ptr() for tensor in (read, stack)]
    widths = [width * stack.element_size() for width in stack.shape[1:]]
    return all(n_bytes % 16 == 0 for n_bytes in places + widths)
