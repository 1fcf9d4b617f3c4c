"""Neuron activations at the end of each prompt: the last token before the answer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch


class PromptReads:
    """Collects the chosen neurons' activations at prompt ends of `batch`: set it before each pass that counts."""

    def __init__(self, units: Mapping[Site, Int[Tensor, " unit"]]) -> None:
        self.units = units
        self.batch: Batch | None = None
        self._rows: dict[Site, dict[int, Tensor]] = {site: {} for site in units}

    def hook(self, site: Site) -> Callable[..., None]:
        """A forward hook for the site's hook point. It reads and returns nothing."""

        def read(activation: Tensor, hook: object) -> None:
            batch = self.batch
            if batch is None:
                return
            ends = activation.detach()[batch.prompt_row, batch.prompt_pos][:, self.units[site]].float().cpu()
            self._rows[site].update(zip(batch.prompt.tolist(), ends, strict=True))

        return read

    def values(self) -> dict[Site, Float[Tensor, "prompt unit"]]:
        """Activations by site, in the order of the prompts' numbers."""
        return {site: torch.stack([rows[i] for i in sorted(rows)]) for site, rows in self._rows.items()}


@contextmanager
def prompt_reads(model: HookedModel, units: Mapping[Site, Int[Tensor, " unit"]]) -> Iterator[PromptReads]:
    """While open, every forward pass leaves the chosen neurons' activations at prompt ends in what is yielded."""
    reads = PromptReads({site: indices for site, indices in units.items() if len(indices)})
    with model.hooks(fwd_hooks=[(site.hook_name, reads.hook(site)) for site in reads.units]):
        yield reads
