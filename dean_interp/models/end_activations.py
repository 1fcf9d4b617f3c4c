"""Activations where texts end: at the last token of each prompt, and of each answer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.neurons import experts_at, read_neurons
from dean_interp.models.tokens import Batch


class EndActivations:
    """Collects chosen coordinates of hook points for `batch`: set it before each pass that counts.

    `prompts[hook]` is `(prompt, unit)` and `answers[hook]` is `(answer, unit)`, on the CPU, in the order of the
    numbers that the batches give them.
    """

    def __init__(
        self,
        model: HookedModel,
        wanted: Mapping[str, Int[Tensor, " unit"]],
        n_prompts: int,
        n_answers: int,
    ) -> None:
        self.model = model
        self.wanted = wanted
        self.batch: Batch | None = None
        self.prompts: dict[str, Tensor] = {}
        self.answers: dict[str, Tensor] = {}
        for name, units in wanted.items():
            self.prompts[name] = torch.zeros(n_prompts, len(units))
            self.answers[name] = torch.zeros(n_answers, len(units))

    @property
    def sums(self) -> dict[str, Float[Tensor, "text unit"]]:
        """All of it by name, as `Unfinished` keeps it."""
        at_prompts = {f"reads/{name}": values for name, values in self.prompts.items()}
        at_answers = {f"answers/{name}": values for name, values in self.answers.items()}
        return at_prompts | at_answers

    def hook(self, name: str) -> Callable[..., None]:
        """A forward hook for a hook point. It reads and returns nothing."""

        def read(activation: Tensor, hook: object) -> None:
            batch = self.batch
            if batch is None:
                return
            activation = activation.detach()
            units = self.wanted[name].to(activation.device)
            experts = experts_at(self.model, name)
            # Of routed experts the units are chosen here, of other hook points at the ends alone.
            if experts is not None:
                activation = read_neurons(self.model, experts, activation, units)
            # Some models (OPT) join batch and pos.
            activation = activation.reshape(*batch.tokens.shape, -1)

            def keep(kept: Tensor, number: Tensor, row: Tensor, pos: Tensor) -> None:
                if not len(kept):
                    return
                at_ends = activation[row.to(units.device), pos.to(units.device)]
                chosen = at_ends if experts else at_ends[:, units]
                kept[number.cpu()] = chosen.float().cpu()

            keep(self.prompts[name], batch.prompt, batch.prompt_row, batch.prompt_pos)
            keep(self.answers[name], batch.ended, batch.ended_row, batch.ended_pos)

        return read


@contextmanager
def end_activations(
    model: HookedModel,
    wanted: Mapping[str, Int[Tensor, " unit"]],
    *,
    n_prompts: int,
    n_answers: int = 0,
) -> Iterator[EndActivations]:
    """While open, every forward pass leaves the chosen coordinates at text ends in what is yielded.

    Args:
        model: gets a hook for each name.
        wanted: hook names, and which coordinates of each to read.
        n_prompts: prompts of all batches.
        n_answers: answers of all batches; 0 reads nothing at the ends of answers.
    """
    not_empty = {name: units for name, units in wanted.items() if len(units)}
    activations = EndActivations(model, not_empty, n_prompts, n_answers)
    hooks = [(name, activations.hook(name)) for name in not_empty]
    with model.hooks(fwd_hooks=hooks):
        yield activations
