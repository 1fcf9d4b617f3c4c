"""Neuron activations at the end of each prompt: the last token before the answer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch


class PromptReads:
    """Collects the chosen neurons' activations at prompt ends of `batch`: set it before each pass that counts.

    `values[site]` is `(prompt, unit)`, on the CPU, in the order of the prompts' numbers.
    """

    def __init__(self, units: Mapping[Site, Int[Tensor, " unit"]], n_prompts: int) -> None:
        self.units = units
        self.batch: Batch | None = None
        self.values = {site: torch.zeros(n_prompts, len(indices)) for site, indices in units.items()}

    def hook(self, site: Site) -> Callable[..., None]:
        """A forward hook for the site's hook point. It reads and returns nothing."""

        def read(activation: Tensor, hook: object) -> None:
            batch = self.batch
            if batch is None:
                return
            activation = activation.reshape(*batch.tokens.shape, -1)  # some models (OPT) join batch and pos
            ends = activation.detach()[batch.prompt_row, batch.prompt_pos][:, self.units[site]]
            self.values[site][batch.prompt.cpu()] = ends.float().cpu()

        return read


@contextmanager
def prompt_reads(
    model: HookedModel, units: Mapping[Site, Int[Tensor, " unit"]], n_prompts: int
) -> Iterator[PromptReads]:
    """While open, every forward pass leaves the chosen neurons' activations at prompt ends in what is yielded."""
    reads = PromptReads({site: indices for site, indices in units.items() if len(indices)}, n_prompts)
    with model.hooks(fwd_hooks=[(site.hook_name, reads.hook(site)) for site in reads.units]):
        yield reads
