"""What was found of the neurons that edits are made of, as frozen records."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from dean_interp.arms.composition import SetEffect, SharedUnits, Spread
from dean_interp.circuits.lens import Written
from dean_interp.circuits.stories import MostOfOne
from dean_interp.frames import Framed
from dean_interp.statistics import Interval
from dean_interp.study.improvement import ChangedNeuron

RISE, NULL = "gates, part in the rise", "gates of flipped labels, part in theirs"
"""The first two of `Composition.spreads`."""
APART, FLIPPED = "that share none", "labels of one exchanged"
"""In the names of `Composition.agreements`: from topics that share none, and the null beside it."""


@dataclass(frozen=True)
class Remade:
    """One edit from two lots of examples."""

    shared: SharedUnits
    correlation: float | None
    """Spearman's, of the changes of all neurons; None of sets."""


@dataclass(frozen=True)
class LookedAt:
    """One of the strongest neurons: what it does, reads and writes."""

    neuron: ChangedNeuron
    share_of_rise: float
    held_by: tuple[str, ...]
    """The sets that hold it, too."""
    written: Written
    fires_most: str
    """The end of the text up to the token on which it is furthest from 0."""
    activation: float
    """The activation on that token."""
    of_behaviour: MostOfOne
    """What the prompts on which it is furthest from 0 are of."""
    of_topic: MostOfOne
    safe_less_unsafe: Mapping[str, Interval]
    """Its mean activation over safe answers less that over unsafe ones to the same prompts, by behaviour."""
    p_safe_less_unsafe: Mapping[str, float]
    """Two-sided, by flipping the signs of topics; not adjusted."""
    first_words: Mapping[str, float]
    """Logits that an activation of 1 gives the first token of safe answers, less those of unsafe ones, directly."""
    rank_of_first_words: Mapping[str, float]
    """Share of its layer's neurons that write such a difference at least as large, of either sign."""
    n_raised_first_words: tuple[int, int]
    """Number of the tokens that it raises most that begin a safe answer, and an unsafe one."""
    page: str
    """Its own page, from the run folder on."""


@dataclass(frozen=True)
class Composition(Framed):
    """What edits of one model are made of."""

    model: str
    n_layers: int
    n_neurons: int
    behaviours: tuple[str, str]
    n_prompts: Mapping[str, int]
    """Number of prompts whose texts were read, by behaviour."""
    n_topics: Mapping[str, int]
    n_top: int
    """Number of prompts of each neuron that are looked at."""
    spreads: Mapping[str, Spread]
    """Where each edit or set is; the gates' parts in the predicted rise come first."""
    agreements: Mapping[str, tuple[Remade, ...]]
    """How alike each edit is when it is made from other lots of examples."""
    overlaps: Mapping[str, SharedUnits]
    """What pairs of sets share."""
    effects: Mapping[str, SetEffect]
    """What each set does, to first order."""
    neurons: tuple[LookedAt, ...]
    """The strongest, the largest part in the predicted rise first."""
    controls: tuple[tuple[LookedAt, ...], ...]
    """Lots of random neurons, one for each of the strongest, alike in layer and activation."""
    facts: Mapping[str, str]
    """How it was done. `command` makes it again."""

    def __repr__(self) -> str:
        return f"Composition({self.model!r}, {len(self.spreads)} sets, {len(self.neurons)} neurons looked at)"

    def to_pandas(self) -> pd.DataFrame:
        """One row a layer: the share of each edit or set."""
        shares = {name: spread.by_layer for name, spread in self.spreads.items()}
        return pd.DataFrame(shares).rename_axis("layer").reset_index()
