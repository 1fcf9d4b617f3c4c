"""What autograd keeps of a batch, from the model's sizes alone: no pass is run."""

from collections.abc import Sequence

from dean_interp.models.experts import routed_experts
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Site
from dean_interp.models.sizes import neuron_shapes, residual_width, site_shape, unembedding_shape
from dean_interp.models.tokens import Row, batches, row_length
from dean_interp.planning.amounts import amount_of_batch

GIB = 2**30
SHARE_OF_MEMORY = 0.8
"""Share of the memory that a forecast takes at most, as a plan of scoring."""
KEPT = {"d_model": 2.5, "d_mlp": 3.7, "d_kv": 1.7, "attention": 1.13}
"""Numbers that autograd keeps for a token in a layer: multiples of each width, and of heads times the row's length. A
least-squares fit to seven small Llamas; `python benchmarks/curves.py` says how near it comes."""
KEPT_OF_SLOT = {"d_model": 1.8, "d_expert": 3.7}
"""The same for each routed expert that a token is sent to: a fit to twelve small mixtures of four families, of which it
comes within a fifth (`tests/test_mixture_plans.py`)."""
_KEPT_BYTES = {"float32": 4.0, "float16": 3.0, "bfloat16": 3.0}
"""Bytes of each such number: in half precision a part is kept in float32."""
_LOGITS_BYTES = 12.0
"""Bytes for each logit of an answer token: it, its logarithm and its gradient, in float32."""


def batch_bytes(model: HookedModel, rows: Sequence[Row], batch_tokens: int, dtype: str) -> float:
    """What autograd keeps of the largest batch: of every token in every layer, and the logits of answer tokens."""
    cfg = model.cfg
    n_layers = len(model.blocks)
    _, n_logits = unembedding_shape(model)
    # Numbers of a token in a layer, without those of attention, which grow with the row.
    in_residual = KEPT["d_model"] * residual_width(model)
    in_mlps = sum(_kept_of_site(model, site) for site in neuron_shapes(model)) / n_layers
    d_kv = (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    in_keys_and_values = KEPT["d_kv"] * d_kv
    width = in_residual + in_mlps + in_keys_and_values

    def kept(batch: Sequence[Row]) -> float:
        length = max(map(row_length, batch))
        in_attention = KEPT["attention"] * cfg.n_heads * length
        n_tokens = n_layers * len(batch) * length
        in_layers = n_tokens * (width + in_attention)
        n_answer_tokens = amount_of_batch(batch).n_logits
        return _KEPT_BYTES[dtype] * in_layers + _LOGITS_BYTES * n_answer_tokens * n_logits

    return max(map(kept, batches(rows, batch_tokens=batch_tokens)))


def _kept_of_site(model: HookedModel, site: Site) -> float:
    """Numbers that are kept for a token at a site of neurons. Of routed experts a token has a few alone."""
    experts = routed_experts(model, site.layer) if site.is_of_experts else None
    if experts is None:
        (d_mlp,) = site_shape(model, site)
        return KEPT["d_mlp"] * d_mlp
    of_input = KEPT_OF_SLOT["d_model"] * residual_width(model)
    of_neurons = KEPT_OF_SLOT["d_expert"] * experts.d_expert
    return experts.n_per_token * (of_input + of_neurons)
