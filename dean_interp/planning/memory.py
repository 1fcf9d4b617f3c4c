"""What scoring holds in memory: the running sums, and what autograd keeps of a batch; and what a machine has."""

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import home, shape
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Row, batches, row_length
from dean_interp.scoring.sums import N_EXAMPLE_GROUPS

GIB = 2**30
SHARE_OF_MEMORY = 0.8
"""Share of the memory that is free which a plan takes at most."""
KEPT = {"d_model": 2.5, "d_mlp": 3.7, "d_kv": 1.7, "attention": 1.13}
"""Numbers that autograd keeps for a token in a layer: multiples of each width, and of heads times the row's length. A
least-squares fit to seven small Llamas; `python benchmarks/curves.py` says how near it comes."""
_KEPT_BYTES = {"float32": 4.0, "float16": 3.0, "bfloat16": 3.0}
"""Bytes of each such number: in half precision a part is kept in float32."""
_LOGITS_BYTES = 12.0
"""Bytes for each logit of an answer token: it, its logarithm and its gradient, in float32."""


def halved(n_layers: int) -> list[int]:
    """Layers a pass that are tried, the most first: each time half, down to one."""
    return [n_layers >> k for k in range(n_layers.bit_length())]


def largest_sums(model: HookedModel, passes: Sequence[Sequence[Site]], n_examples: int, *, offloaded: bool) -> int:
    """Bytes of the running sums of the pass that has the most.

    Args:
        offloaded: also count sums that lie in host memory, beside weights that are offloaded.
    """
    sizes = []
    for sites in passes:
        counted = [site for site in sites if offloaded or _is_on_device(model, site)]
        sizes.append(sum(site_bytes(model, site, n_examples) for site in counted))
    return max(sizes)


def _is_on_device(model: HookedModel, site: Site) -> bool:
    """Whether a site's sums are on the device that computes: those of offloaded weights lie in host memory."""
    return home(model, _matrix(site)).type == torch.device(model.cfg.device).type


def site_bytes(model: HookedModel, site: Site, n_examples: int) -> int:
    """Bytes of a site's running sums, in float32."""
    n_in, n_out = shape(model, _matrix(site))
    if site.unit == "weight":
        # The effect of each weight, and the square of what the matrix reads.
        return 4 * (n_in * n_out + n_in)
    # For a neuron its activation, the square of it, and its effect in each group of examples.
    return 4 * n_in * (2 + min(N_EXAMPLE_GROUPS, n_examples))


def _matrix(site: Site) -> Site:
    """The matrix whose inputs a site's sums are of: a neuron is what `out` reads."""
    return site if site.unit == "weight" else Site(site.layer, "out")


def batch_bytes(model: HookedModel, rows: Sequence[Row], batch_tokens: int, dtype: str) -> float:
    """What autograd keeps of the largest batch: of every token in every layer, and the logits of answer tokens."""
    cfg = model.cfg
    d_kv = (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    width = KEPT["d_model"] * cfg.d_model + KEPT["d_mlp"] * cfg.d_mlp + KEPT["d_kv"] * d_kv

    def kept(batch: Sequence[Row]) -> float:
        length = max(map(row_length, batch))
        n_answer = sum(len(branch.tokens) for row in batch for branch in row if branch.answer >= 0)
        layers = cfg.n_layers * len(batch) * length * (width + KEPT["attention"] * cfg.n_heads * length)
        return _KEPT_BYTES[dtype] * layers + _LOGITS_BYTES * n_answer * cfg.d_vocab

    return max(map(kept, batches(rows, batch_tokens=batch_tokens)))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on the CPU, what the machine and its container leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def held_memory(device: torch.device) -> int:
    """Bytes in use now: by torch on a GPU, by the process on the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
