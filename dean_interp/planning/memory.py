"""What autograd keeps of a batch, from the model's sizes alone: no pass is run."""

from collections.abc import Sequence

from dean_interp.models.load import HookedModel
from dean_interp.models.sizes import neuron_counts, residual_width, unembedding_shape
from dean_interp.models.tokens import Row, batches, row_length

GIB = 2**30
SHARE_OF_MEMORY = 0.8
"""Share of the memory that a forecast takes at most, as a plan of scoring."""
KEPT = {"d_model": 2.5, "d_mlp": 3.7, "d_kv": 1.7, "attention": 1.13}
"""Numbers that autograd keeps for a token in a layer: multiples of each width, and of heads times the row's length. A
least-squares fit to seven small Llamas; `python benchmarks/curves.py` says how near it comes."""
_KEPT_BYTES = {"float32": 4.0, "float16": 3.0, "bfloat16": 3.0}
"""Bytes of each such number: in half precision a part is kept in float32."""
_LOGITS_BYTES = 12.0
"""Bytes for each logit of an answer token: it, its logarithm and its gradient, in float32."""


def batch_bytes(model: HookedModel, rows: Sequence[Row], batch_tokens: int, dtype: str) -> float:
    """What autograd keeps of the largest batch: of every token in every layer, and the logits of answer tokens."""
    cfg, counts = model.cfg, neuron_counts(model)
    n_layers, (_, n_logits) = len(counts), unembedding_shape(model)
    d_kv = (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    width = KEPT["d_model"] * residual_width(model) + KEPT["d_mlp"] * sum(counts) / n_layers + KEPT["d_kv"] * d_kv

    def kept(batch: Sequence[Row]) -> float:
        length = max(map(row_length, batch))
        n_answer = sum(len(branch.tokens) for row in batch for branch in row if branch.answer >= 0)
        layers = n_layers * len(batch) * length * (width + KEPT["attention"] * cfg.n_heads * length)
        return _KEPT_BYTES[dtype] * layers + _LOGITS_BYTES * n_answer * n_logits

    return max(map(kept, batches(rows, batch_tokens=batch_tokens)))
