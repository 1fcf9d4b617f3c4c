"""Silencing a selection while a context is open, through hooks and nothing else.

A neuron that is silenced at `hook_post` writes nothing: the output equals that of a model whose rows of `W_out` are
zero. Weights are never touched, and the hooks go even when the body raises.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.memory import scored_prompts
from dean_interp.models.sites import Site, neuron_sites
from dean_interp.scoring.scores import Scores
from dean_interp.selection.selection import Selection


@contextmanager
def ablate(model: HookedModel, selection: Selection, *, means: Scores | None = None) -> Iterator[None]:
    """Silence the selected units in every forward pass and generation inside the `with` block.

    Args:
        selection: neurons of this model.
        means: put each neuron's mean activation over these scores' examples in its place (mean ablation) instead of
            zero. The values are fixed beforehand: they never depend on the batch at hand.

    Raises:
        InputError: an empty selection, or one of another model's shape.
    """
    if not len(selection):
        raise InputError("the selection is empty: there is nothing to ablate")
    shapes = {site: (model.cfg.d_mlp,) for site in neuron_sites(model)}
    if any(shapes.get(site) != shape for site, shape in selection.shapes.items()):
        raise InputError(
            f"the selection is not of this model: {model.cfg.model_name} has {model.cfg.n_layers} layers of "
            f"{model.cfg.d_mlp} neurons"
        )
    hooks = [(site.hook_name, _silencer(selection, site, means)) for site, n in selection.counts().items() if n]
    known = scored_prompts(model)
    remembered = set(known)
    known.update(selection.prompt_hashes)
    try:
        with model.hooks(fwd_hooks=hooks):
            yield
    finally:
        known.intersection_update(remembered)


def _silencer(selection: Selection, site: Site, means: Scores | None) -> Callable[..., Tensor]:
    mask = selection.mask(site)
    values = means.activation_mean[site] if means else torch.zeros(len(mask))

    def silence(activation: Tensor, hook: object) -> Tensor:
        return torch.where(mask.to(activation.device), values.to(activation), activation)

    return silence
