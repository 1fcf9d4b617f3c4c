"""One example as two sequences, its prompt with either answer: what a circuit is traced on."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.circuits.graph import Node
from dean_interp.data.examples import Example
from dean_interp.errors import refuse_below_one
from dean_interp.models.load import HookedModel
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.neuron_names import Neuron, name_of, neuron_among
from dean_interp.models.sites import Site
from dean_interp.models.sizes import neuron_shapes
from dean_interp.models.tokens import Batch, Encoded, Template, collate, encode, paths


@dataclass(frozen=True)
class AnswerPair:
    """A prompt with its safe and its unsafe answer.

    Columns are the tokens that both sequences have in common, once: those of the prompt, then those of the safe answer,
    then those of the unsafe one.
    """

    model: HookedModel
    encoded: Encoded

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.encoded.prompt)

    @property
    def n_safe(self) -> int:
        """Tokens of the safe answer."""
        return len(self.encoded.answers[0])

    @property
    def n_columns(self) -> int:
        """Tokens of the prompt and of both answers."""
        safe, unsafe = self.encoded.answers
        return self.n_prompt + len(safe) + len(unsafe)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The text of each column."""
        tokenizer = native_tokenizer(self.model)
        safe, unsafe = self.encoded.answers
        columns = (*self.encoded.prompt, *safe, *unsafe)
        return tuple(str(tokenizer.decode([token])) for token in columns)

    @property
    def n_heads(self) -> int:
        """Attention heads of a layer."""
        return int(self.model.cfg.n_heads)

    @cached_property
    def neuron_shapes(self) -> dict[Site, tuple[int, ...]]:
        """The sites of the neurons with their shapes, in order of layers: in a mixture those of all its experts."""
        return neuron_shapes(self.model)

    def node(self, neuron: Neuron, column: int) -> Node:
        """A neuron at a column."""
        site, _ = neuron
        (n_neurons,) = self.neuron_shapes[site]
        name = name_of(neuron, n_neurons)
        return Node(kind="neuron", layer=name.layer, index=name.index, position=column, owner=name.owner)

    def neuron(self, node: Node) -> Neuron:
        """Site and number of a node that is a neuron."""
        neuron = neuron_among(self.neuron_shapes, node.neuron_name)
        assert neuron is not None, "a node is one of this model"
        return neuron

    @property
    def head_hooks(self) -> dict[int, str]:
        """Hook points of the attention heads, by layer: none where a layer has no attention, or none that is shown."""
        names = {layer: f"blocks.{layer}.attn.hook_z" for layer in range(len(self.model.blocks))}
        return {layer: name for layer, name in names.items() if name in self.model.hook_dict}

    def batch(self, n_copies: int) -> Batch:
        """So many copies of the pair, each as two rows."""
        rows = paths([self.encoded] * n_copies)
        return collate(rows, device=self.model.cfg.device)

    def rows(self, column: int) -> tuple[tuple[int, ...], int]:
        """Which of the two sequences hold a column, and at which position."""
        if column < self.n_prompt:
            return (0, 1), column
        if column < self.n_prompt + self.n_safe:
            return (0,), column
        return (1,), column - self.n_safe

    def by_column(self, values: Float[Tensor, "row pos unit"]) -> Float[Tensor, "column unit"]:
        """Values of both sequences as one row a column; those of the prompt's two copies are added."""
        safe, unsafe = values
        prompt = (safe + unsafe)[: self.n_prompt]
        end_of_safe = self.n_prompt + self.n_safe
        end_of_unsafe = self.n_columns - self.n_safe
        safe_answer = safe[self.n_prompt : end_of_safe]
        unsafe_answer = unsafe[self.n_prompt : end_of_unsafe]
        return torch.cat([prompt, safe_answer, unsafe_answer])


def answer_pair(
    model: HookedModel,
    example: Example,
    template: Template,
    answer_tokens: int | None,
) -> AnswerPair:
    """The pair of an example that has both answers, of each its first `answer_tokens` tokens (None: all).

    Raises `InputError` for a number of tokens below 1, and as `encode` does.
    """
    refuse_below_one(answer_tokens=answer_tokens)
    answers = [example.answers["safe"], example.answers["unsafe"]]
    encoded = encode(
        native_tokenizer(model),
        example.prompt,
        answers,
        template=template,
        answer_tokens=answer_tokens,
        n_ctx=model.cfg.n_ctx,
    )
    return AnswerPair(model, encoded)


def margins(logits: Float[Tensor, "answer_token d_vocab"], batch: Batch) -> Float[Tensor, " pair"]:
    """The margin of every pair of a batch (nats per token); logits are those that predict the batch's answer tokens."""
    log_probs = logits.log_softmax(-1)
    of_target = log_probs.gather(-1, batch.target[:, None])[:, 0]
    # Each answer's mean over its tokens; the answers of a pair have numbers that follow each other.
    n_answers = int(batch.answer.max()) + 1
    zeros = torch.zeros(n_answers, device=of_target.device)
    total = zeros.index_add(0, batch.answer, of_target)
    n_tokens = torch.bincount(batch.answer, minlength=n_answers)
    mean = total / n_tokens
    safe = mean[0::2]
    unsafe = mean[1::2]
    return safe - unsafe
