"""The first words of safe and of unsafe answers, and which neurons write them directly."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dean_interp.arms.arm import ArmExamples
from dean_interp.circuits.lens import Written, logit_differences
from dean_interp.data.examples import Behaviour
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.neuron_names import Neuron
from dean_interp.models.tokens import encode
from dean_interp.selection.gating import PerNeuron


@dataclass(frozen=True)
class FirstWords:
    """The first tokens of a behaviour's answers, and how far each neuron writes the safe ones above the unsafe ones."""

    behaviour: str
    safe: frozenset[str]
    unsafe: frozenset[str]
    differences: PerNeuron
    """Logits that an activation of 1 gives the safe ones, less those of the unsafe ones."""

    def of(self, neuron: Neuron) -> float:
        """The difference of one neuron."""
        site, index = neuron
        return float(self.differences[site][index])

    def rank(self, neuron: Neuron) -> float:
        """Share of the layer's neurons with a difference at least as large."""
        site, index = neuron
        sizes = self.differences[site].abs()
        is_as_large = sizes >= sizes[index]
        return float(is_as_large.float().mean())


def first_words(examples: ArmExamples, behaviour: Behaviour) -> FirstWords:
    """The first tokens of all answers of a behaviour, and what every neuron writes to them."""
    tokenizer = native_tokenizer(examples.model)
    safe, unsafe = [], []
    for example in behaviour.examples:
        answers = [example.answers["safe"], example.answers["unsafe"]]
        encoded = encode(tokenizer, example.prompt, answers, template=examples.config.model.template)
        safe_tokens, unsafe_tokens = encoded.answers
        safe.append(safe_tokens[0])
        unsafe.append(unsafe_tokens[0])
    return FirstWords(
        behaviour=behaviour.name,
        safe=_words(tokenizer, safe),
        unsafe=_words(tokenizer, unsafe),
        differences=logit_differences(examples.model, safe, unsafe),
    )


def _words(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> frozenset[str]:
    return frozenset(_plain(str(tokenizer.decode([token]))) for token in tokens)


def _plain(token: str) -> str:
    return token.strip().lower()


def n_raised(look: Written, words: Sequence[FirstWords]) -> tuple[int, int]:
    """The number of raised tokens that begin a safe answer of either behaviour, and an unsafe one."""
    n_safe, n_unsafe = 0, 0
    for token, _ in look.promoted:
        raised = _plain(token)
        n_safe += any(raised in words_of.safe for words_of in words)
        n_unsafe += any(raised in words_of.unsafe for words_of in words)
    return n_safe, n_unsafe
