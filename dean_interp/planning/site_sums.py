"""What the running sums of a site take, and which sites' sums are as large as one another's."""

from collections.abc import Hashable, Sequence

import torch

from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.matrices import home, shape
from dean_interp.models.sites import Site

_BYTES_OF_FLOAT32 = 4


def site_bytes(model: HookedModel, site: Site, n_groups: int, *, n_further: int = 0) -> int:
    """Bytes of a site's running sums in float32 (`Sums`). Neurons have one effect for each group of examples.

    `n_further` is how many other folds of the effects are added up.
    """
    n_in, n_out = shape(model, site.matrix)
    n_slots = site.n_experts if site.is_of_experts else 0
    if site.unit == "weight":
        n_effects = n_in * n_out * (1 + n_further)
    else:
        n_effects = n_in * (1 + n_groups + n_further)
    n_activations = n_in
    return _BYTES_OF_FLOAT32 * (n_activations + n_effects + n_slots)


def pass_bytes(model: HookedModel, sites: Sequence[Site], n_groups: int, n_further: int) -> int:
    """Bytes of the sums of some sites on the device that computes. Those of offloaded weights lie in host memory."""
    device = torch.device(model.cfg.device)
    total = 0
    for site in sites:
        if home(model, site.matrix).type == device.type:
            total += site_bytes(model, site, n_groups, n_further=n_further)
    return total


def alike(model: HookedModel, sites: Sequence[Site]) -> dict[Site, Site]:
    """For each site one of the same part and shape, in the layer that is nearest to the middle."""
    middle = len(model.blocks) // 2
    from_the_middle = sorted(sites, key=lambda site: abs(site.layer - middle))
    kinds = {site: (site.part, shape(model, site.matrix)) for site in sites}
    # the first of its kind is the nearest
    nearest: dict[Hashable, Site] = {}
    for site in from_the_middle:
        nearest.setdefault(kinds[site], site)
    return {site: nearest[kind] for site, kind in kinds.items()}
