"""An adapter's way through its training as a change of the model that is followed farther or less far, and undone.

LoRA (arXiv 2106.09685, section 4.1) adds `scaling * x A' B'` to what a matrix writes. IA3 (arXiv 2205.05638, section
3.3) rescales what `k` and `v` write, and what the MLP's `out` reads: a multiplier for every neuron. Hooks do so, and no
parameter is touched. The dose is the number of training steps.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.arms.arm import BYTES_OF_NUMBER
from dean_interp.editing.ablation import gated
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import OnProduct, on_products
from dean_interp.models.scored_prompts import noting_scored_prompts
from dean_interp.models.sites import Site
from dean_interp.selection.gates import Gates
from dean_interp.study.store import State

AdapterKind = Literal["lora", "ia3"]
AdapterNumbers = Mapping[Site, tuple[Tensor, ...]]
"""float32 on the CPU, by matrix: LoRA's `A` (rank, d_in) and `B` (d_out, rank); IA3's multipliers."""
LORA_SCALING = 2
"""What the product of LoRA's two matrices is multiplied by: its alpha over its rank."""


@dataclass(frozen=True)
class AdapterAtDose:
    """An adapter as it was after some training steps (`study.store.ModelChange`)."""

    kind: AdapterKind
    numbers: AdapterNumbers = field(repr=False)
    prompt_hashes: frozenset[str] = field(default=frozenset(), repr=False)
    """The prompts that it was trained on: `measure` refuses them while it is applied."""

    @property
    def fingerprint(self) -> str:
        """The kind, and SHA-256 of sites and numbers, its first 16 digits."""
        digest = hashlib.sha256()
        for site, tensors in sorted(self.numbers.items()):
            shapes = [tuple(tensor.shape) for tensor in tensors]
            digest.update(f"{site} {shapes}".encode())
            for tensor in tensors:
                digest.update(tensor.float().contiguous().numpy().tobytes())
        return f"{self.kind} {digest.hexdigest()[:16]}"

    @contextmanager
    def applied(self, model: HookedModel) -> Iterator[None]:
        """While open, the model computes with the adapter."""
        products: dict[Site, OnProduct] = {}
        multipliers: dict[Site, Tensor] = {}
        for site, tensors in self.numbers.items():
            if self.kind == "lora":
                products[site] = _adding(*tensors)
            elif site == site.neurons.out:
                multipliers[site.neurons] = tensors[0]
            else:
                products[site] = _rescaling(tensors[0])
        gates = Gates(multipliers, self.prompt_hashes)
        with noting_scored_prompts(model, self.prompt_hashes), on_products(model, products):
            # Gates that are all 1 are refused.
            if len(gates):
                with gated(model, gates):
                    yield
            else:
                yield


def _adding(a: Float[Tensor, "rank d_in"], b: Float[Tensor, "d_out rank"]) -> OnProduct:
    """A hook that adds what LoRA writes, computed in float32 as `peft` does."""

    def add(x: Tensor, product: Tensor) -> Tensor:
        low = x.to(torch.float32) @ a.to(x.device).T
        written = low @ b.to(x.device).T
        return (product + LORA_SCALING * written).to(product.dtype)

    return add


def _rescaling(multiplier: Float[Tensor, " d_out"]) -> OnProduct:
    """A hook that rescales what a matrix writes, its bias with it."""

    def rescale(x: Tensor, product: Tensor) -> Tensor:
        rescaled = product * multiplier.to(product.device)
        return rescaled.to(product.dtype)

    return rescale


@dataclass(frozen=True)
class AdapterPath:
    """An adapter before its first training step and after every few, with all states between (`arms.arm.Change`)."""

    kind: AdapterKind
    steps: tuple[int, ...]
    """The steps that are kept, ascending; the first is 0."""
    numbers: AdapterNumbers = field(repr=False)
    """Each tensor stacked over `steps`."""
    prompt_hashes: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def n_bytes(self) -> int:
        """Four bytes are kept of each number that was trained."""
        n_numbers = 0
        for tensors in self.numbers.values():
            # Every tensor is stacked over the steps, and one step is kept.
            n_numbers += sum(stacked[0].numel() for stacked in tensors)
        return BYTES_OF_NUMBER * n_numbers

    @property
    def first_dose(self) -> float:
        """The search begins at a quarter of the steps."""
        return self.largest_dose / 4

    @property
    def largest_dose(self) -> float:
        """Training ends with its last step."""
        return float(self.steps[-1])

    def at(self, dose: float) -> State:
        """The model after so many steps. Between two that are kept, the adapter's numbers are interpolated.

        Raises `InputError` for a dose that is below 0 or beyond the last step.
        """
        if not 0 <= dose <= self.steps[-1]:
            raise InputError(f"dose must be from 0 to {self.steps[-1]} training steps, got {dose}")
        if dose == 0:
            return State("", "arm")
        after = bisect_left(self.steps, dose)
        before = after - 1
        step_before = self.steps[before]
        step_after = self.steps[after]
        share = (dose - step_before) / (step_after - step_before)
        numbers = {}
        for site, tensors in self.numbers.items():
            # `lerp` gives the end exactly at share 1.
            numbers[site] = tuple(torch.lerp(stacked[before], stacked[after], share) for stacked in tensors)
        change = AdapterAtDose(self.kind, numbers, self.prompt_hashes)
        return State("", "arm", growth=dose, change=change)
