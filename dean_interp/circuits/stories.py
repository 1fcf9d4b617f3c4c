"""What can be counted of a neuron without reading it: whether the texts on which it fires have something in common.

Nothing here is a judgement: of the prompts on which a neuron is furthest from 0 it is counted how many are of one
behaviour and of one topic, beside as many random prompts; of its activations, whether they are larger on safe answers
than on unsafe ones to the same prompts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dean_interp.circuits.neuron import TextActivations
from dean_interp.errors import InputError
from dean_interp.statistics import rank_p_value


@dataclass(frozen=True)
class MostOfOne:
    """How many of the top prompts have the label (a behaviour, a topic) that most of them have."""

    label: str
    n: int
    p: float
    """One-sided: how often as many of as many random prompts have one label in common."""


class LabelCounts:
    """Labels of prompts, with what random prompts have in common."""

    def __init__(self, labels: Sequence[str], n_top: int, *, n_draws: int = 9999, seed: int = 0) -> None:
        """Draw random prompts and count what they have in common.

        Args:
            labels: one a prompt.
            n_top: number of prompts that are looked at.
            n_draws: number of random draws of as many prompts.
            seed: Seed for the draws.
        """
        n_prompts = len(labels)
        if not 1 <= n_top <= n_prompts:
            raise InputError(f"n_top must be from 1 to {n_prompts} prompts, got {n_top}")
        self.labels = labels
        self.n_top = n_top
        generator = np.random.default_rng(seed)
        _, codes = np.unique(labels, return_inverse=True)
        self.by_chance = []
        for _ in range(n_draws):
            drawn = generator.permutation(len(codes))[:n_top]
            self.by_chance.append(_most(codes[drawn]))

    def of(self, peaks: Float[np.ndarray, " prompt"]) -> MostOfOne:
        """What the prompts with the highest peaks have in common."""
        top = np.argsort(-peaks, kind="stable")[: self.n_top]
        counts = Counter(str(self.labels[int(i)]) for i in top)
        label, n = counts.most_common(1)[0]
        p = rank_p_value(float(n), self.by_chance)
        return MostOfOne(label, n, p)


def _most(codes: Int[np.ndarray, " prompt"]) -> float:
    """How many prompts have the label that most of them have."""
    return float(np.bincount(codes).max())


def activation_differences(
    safe: Sequence[TextActivations],
    unsafe: Sequence[TextActivations],
    column: int,
) -> Float[np.ndarray, " example"]:
    """A neuron's mean activation over each safe answer less that over the unsafe one, from where the two differ.

    Args:
        safe: prompts with their safe answers.
        unsafe: the same prompts with their unsafe answers.
        column: the neuron's place in the activations.
    """
    differences = []
    for safe_text, unsafe_text in zip(safe, unsafe, strict=True):
        n_shared = 0
        for safe_token, unsafe_token in zip(safe_text.tokens, unsafe_text.tokens, strict=False):
            if safe_token != unsafe_token:
                break
            n_shared += 1
        mean_of_safe = _mean_from(safe_text, n_shared, column)
        mean_of_unsafe = _mean_from(unsafe_text, n_shared, column)
        differences.append(mean_of_safe - mean_of_unsafe)
    return np.array(differences)


def _mean_from(text: TextActivations, start: int, column: int) -> float:
    """The mean activation from a token on; of the last token where none is left."""
    last = len(text.activations) - 1
    rows = text.activations[min(start, last) :]
    total = sum(row[column] for row in rows)
    return total / len(rows)
