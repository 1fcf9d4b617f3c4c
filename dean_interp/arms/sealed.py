"""A seal on prompts: while it holds, no model of this process may read one of them.

Whoever chooses an edit promises not to look at confirming prompts. Here the promise is checked: every embedding of
every model in the process shows the tokens that it reads, and those of a sealed prompt are an error. It is the hash of
the prompt's tokens that is looked for, so templates, padding and batches do not hide it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dean_interp.data.examples import Behaviour

_FEWEST = 3


class SealBrokenError(RuntimeError):
    """A prompt was read that may not be read yet: a fault of an arm, which no other settings put right."""


@contextmanager
def sealed(tokenizer: PreTrainedTokenizerBase, behaviours: Sequence[Behaviour]) -> Iterator[None]:
    """While open, a model that reads a prompt of the behaviours raises `SealBrokenError`.

    Args:
        tokenizer: the one that the models' texts are encoded with.
        behaviours: their prompts. Those of fewer than 3 tokens cannot be told from other text, and are not sealed.
    """
    hashes = _hashes(tokenizer, behaviours)

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not isinstance(module, nn.Embedding) or not args:
            return
        tokens = args[0]
        if not isinstance(tokens, Tensor) or tokens.is_meta or tokens.is_floating_point():
            return
        for row in tokens.reshape(-1, tokens.shape[-1]).tolist():
            name = _sealed_in(row, hashes)
            if name is not None:
                raise SealBrokenError(f"a prompt of '{name}' was read while an edit was chosen: it is for confirming")

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _hashes(
    tokenizer: PreTrainedTokenizerBase,
    behaviours: Sequence[Behaviour],
) -> dict[int, dict[int, str]]:
    """By number of tokens: the hash of each prompt's tokens, and the behaviour that it is of."""
    hashes: dict[int, dict[int, str]] = {}
    for behaviour in behaviours:
        for prompt in behaviour.prompts:
            # A template may join the first and the last token with what stands beside them.
            tokens = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids[1:-1]
            if len(tokens) >= _FEWEST:
                of_this_length = hashes.setdefault(len(tokens), {})
                of_this_length[hash(tuple(tokens))] = behaviour.name
    return hashes


def _sealed_in(row: list[int], hashes: dict[int, dict[int, str]]) -> str | None:
    """The behaviour that a prompt in a row of tokens is of; None where no prompt is sealed."""
    for length, names in hashes.items():
        for start in range(len(row) - length + 1):
            tokens = tuple(row[start : start + length])
            name = names.get(hash(tokens))
            if name is not None:
                return name
    return None
