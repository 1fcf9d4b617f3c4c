"""Changes of activations by hooks, at every position: what states of steering, ablated directions and maps hold."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from dean_interp.models.load import HookedModel
from dean_interp.study.store import State

ActivationMap = Callable[[HookedModel, Tensor], Tensor]
"""Gives new activations of a hook point of a model from those that it holds, position by position."""


@dataclass(frozen=True)
class HookedChange:
    """A change of what hook points hold, in every pass and at every position.

    What becomes of a position depends on nothing beside it, so padding, trees of shared prompts and the KV cache make
    no difference.
    """

    maps: Mapping[str, ActivationMap] = field(compare=False, repr=False)
    """The map of each hook point, by the hook point's name."""
    fingerprint: str
    """Hash of the tensors behind the maps, and of the dose."""

    @contextmanager
    def applied(self, model: HookedModel) -> Iterator[None]:
        """While open, the hook points hold what the maps make."""
        hooks = [(name, _hook(model, change)) for name, change in self.maps.items()]
        with model.hooks(fwd_hooks=hooks):
            yield


def _hook(model: HookedModel, change: ActivationMap) -> Callable[..., Tensor]:
    return lambda activation, hook: change(model, activation)


def hooked_state(
    maps: Mapping[str, ActivationMap],
    tensors: Mapping[str, Tensor],
    dose: float,
) -> State:
    """The model with changed activations, without a name.

    Args:
        maps: the changes at this dose, by hook point.
        tensors: all that the maps are made of beside the dose, each by a name that says what it does: their hash tells
            the state from others.
        dose: 0 is the model as it is.
    """
    if dose == 0:
        return State("", "arm")
    description = " ".join([repr(float(dose)), *maps])
    digest = hashlib.sha256(description.encode())
    for name, tensor in tensors.items():
        numbers = tensor.detach().float().cpu().contiguous()
        digest.update(name.encode())
        digest.update(numbers.numpy().tobytes())
    fingerprint = digest.hexdigest()[:16]
    return State("", "arm", change=HookedChange(maps, fingerprint))
