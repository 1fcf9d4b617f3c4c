"""What a forward pass that measures costs: beside its own matrix products, and beside answers that share no prompt."""

import torch
from figures import Figure, interleaved
from passes import N_LAYERS, hooked, like_demo

from dean_interp import load_behaviour
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import answer_log_probs, batched
from dean_interp.models.tokens import Encoded, Row, encode, paths, row_length, trees

BATCH_TOKENS = 1024


def figures(n_layers: int = N_LAYERS) -> list[Figure]:
    """Margins on so many layers of the demo model's widths."""
    model = hooked(like_demo(n_layers))
    tests = load_behaviour("fairness", n_examples=10, split="test")
    pairs = [encode(model.tokenizer, e.prompt, list(e.answers.values()), answer_tokens=12) for e in tests.examples]
    shared, alone = trees(pairs), paths(pairs)
    return [
        Figure(
            name="measuring / its matrix products alone",
            limit=1.0,
            bound="the plain products",
            ratios=lambda: interleaved(lambda: margins(model, shared), lambda: products(model, shared, pairs)),
        ),
        Figure(
            name="measuring with shared prompts / every answer in a sequence of its own",
            limit=sum(map(row_length, shared)) / sum(map(row_length, alone)),
            bound="the share of tokens that is left",
            ratios=lambda: interleaved(lambda: margins(model, shared), lambda: margins(model, alone)),
        ),
    ]


def margins(model: HookedModel, rows: list[Row]) -> None:
    """Log-probabilities of every answer token."""
    with torch.inference_mode():
        for batch in batched(model, rows, batch_tokens=BATCH_TOKENS, label="margins"):
            answer_log_probs(model, batch)


def products(model: HookedModel, rows: list[Row], pairs: list[Encoded]) -> None:
    """A product with every matrix that a token passes through, and the unembedding's for answer tokens."""
    n_tokens, n_answer = sum(map(row_length, rows)), sum(len(answer) for pair in pairs for answer in pair.answers)
    unembedding = model.original_model.get_output_embeddings().weight
    with torch.inference_mode():
        for matrix in model.original_model.parameters():
            if matrix.dim() == 2 and matrix is not unembedding:
                torch.randn(n_tokens, matrix.shape[1]) @ matrix.T
        torch.randn(n_answer, unembedding.shape[1]) @ unembedding.T
