"""Which topics make gates, and with which labels: flips, whose gates are the nulls, and draws of the topics anew."""

from collections.abc import Sequence

import numpy as np

from dean_interp.scoring.scores import Scores
from dean_interp.study.roles import SHARES

Flip = tuple[dict[str, int], dict[str, int]]
"""The sign of each topic of first and of second: -1 where safe and unsafe answers change roles."""


def random_flips(first: Sequence[str], second: Sequence[str], n_pairs: int, *, seed: int) -> list[Flip]:
    """`n_pairs` random flips, each before its complement, which flips the other topics.

    Half of the topics of each behaviour are flipped, and of an odd number one is left out, so that what all topics
    share cancels. A flip that kept some of it would have it brought back to full size by its dose.
    """
    generator = np.random.default_rng([seed, 22])
    flips: list[Flip] = []
    for _ in range(n_pairs):
        of_first = _half_flipped(first, generator)
        of_second = _half_flipped(second, generator)
        flips.append((of_first, of_second))
        flips.append((_complement(of_first), _complement(of_second)))
    return flips


def drawn_topics(scores: Sequence[Scores], *, seed: int) -> Flip:
    """The topics of both behaviours that make the gates of one draw, each with its labels as they are."""
    generator = np.random.default_rng([seed, 23])
    share = SHARES["score"] / (SHARES["score"] + SHARES["choose"])
    drawn = []
    for of_behaviour in scores[:2]:
        order = _shuffled(list(of_behaviour.clusters), generator)
        n_drawn = round(share * len(order))
        drawn.append(dict.fromkeys(order[:n_drawn], 1))
    first, second = drawn
    return first, second


def _half_flipped(topics: Sequence[str], generator: np.random.Generator) -> dict[str, int]:
    """A sign for each of an even number of topics, half of them -1."""
    order = _shuffled(topics, generator)
    half = len(order) // 2
    flipped = dict.fromkeys(order[:half], -1)
    others = dict.fromkeys(order[half : 2 * half], 1)
    return flipped | others


def _shuffled(topics: Sequence[str], generator: np.random.Generator) -> list[str]:
    order = generator.permutation(len(topics))
    return [topics[int(place)] for place in order]


def _complement(signs: dict[str, int]) -> dict[str, int]:
    """The flip of the other topics."""
    return {name: -sign for name, sign in signs.items()}
