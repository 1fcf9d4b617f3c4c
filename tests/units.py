"""Random units of a model, and its logits on fixed tokens: what tests of ablations and edits act on."""

import torch
from transformers import AutoModelForCausalLM

from dean_interp import Selection
from dean_interp.models.matrices import neuron_sites, weight, weight_sites

IDS = torch.tensor([[2, 70, 80, 90, 100, 3, 60, 61, 62], [2, 9, 8, 7, 6, 5, 4, 3, 33]])


def some_neurons(model, n=6, seed=0):
    """`n` neurons of every layer."""
    sites = neuron_sites(model)
    return _drawn({site: (model.cfg.d_mlp,) for site in sites}, n, seed)


def some_weights(model, n=40, seed=0, modules="mlp"):
    """`n` weights of every matrix."""
    return _drawn({site: tuple(weight(model, site).shape) for site in weight_sites(model, modules)}, n, seed)


def logits_of(model, ids=IDS):
    with torch.inference_mode():
        return model(ids, return_type="logits")


def plain_logits(folder):
    """The logits of a folder's model in transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(IDS).logits


def _drawn(shapes, n, seed):
    generator = torch.Generator().manual_seed(seed)
    units = {site: torch.randperm(torch.Size(shape).numel(), generator=generator)[:n].sort().values
             for site, shape in shapes.items()}  # fmt: skip
    return Selection(units, shapes, frozenset({"a prompt"}))
