"""What was found of the neurons that edits are made of, as frozen records, and in plain sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dean_interp.arms.composition import SetEffect, SharedUnits, Spread
from dean_interp.circuits.lens import Written
from dean_interp.circuits.stories import MostOfOne
from dean_interp.evaluation.lines import p_text
from dean_interp.frames import Framed
from dean_interp.statistics import Interval, holm
from dean_interp.study.improvement import ChangedNeuron

SIGNIFICANT = 0.05
FIRST_WORDS = 0.05
"""A neuron whose write to first words is among this share of its layer stands out."""


@dataclass(frozen=True)
class Agreement:
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
    """There."""
    of_behaviour: MostOfOne
    """Of the prompts on which it is furthest from 0."""
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
    """Of the tokens that it raises most, the number that begin a safe answer, and an unsafe one."""
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
    agreements: Mapping[str, tuple[Agreement, ...]]
    """Between lots of examples."""
    overlaps: Mapping[str, SharedUnits]
    """Between sets."""
    effects: Mapping[str, SetEffect]
    """What each set does, to first order."""
    neurons: tuple[LookedAt, ...]
    """The strongest, the largest part in the predicted rise first."""
    facts: Mapping[str, str]
    """How it was done. `command` makes it again."""

    def __repr__(self) -> str:
        return f"Composition({self.model!r}, {len(self.spreads)} sets, {len(self.neurons)} neurons looked at)"

    def __str__(self) -> str:
        return "\n\n".join(self.sentences)

    @property
    def sentences(self) -> list[str]:
        """What was found, in plain words."""
        return [
            *where(self),
            *(stable(name, found) for name, found in self.agreements.items()),
            *(beside(name, found) for name, found in self.overlaps.items()),
            *(helps(name, found) for name, found in self.effects.items() if found.n),
            *stories(self),
        ]

    def to_pandas(self) -> pd.DataFrame:
        """One row a layer: the share of each edit or set."""
        shares = {name: spread.by_layer for name, spread in self.spreads.items()}
        return pd.DataFrame(shares).rename_axis("layer").reset_index()


def where(found: Composition) -> list[str]:
    """One sentence an edit or set."""
    sentences = []
    for name, spread in found.spreads.items():
        if not spread.effective_neurons:
            sentences.append(f"{name}: no neuron.")
            continue
        sentences.append(
            f"{name}: {spread.layers_for_half} of {found.n_layers} layers hold half of it, {spread.layers_for_most} "
            f"nine tenths; {spread.neurons_for_half} of {found.n_neurons} neurons hold half, {spread.neurons_for_most} "
            f"nine tenths; it is as spread as {spread.effective_neurons:.0f} equal neurons. Its middle lies at "
            f"{spread.depth:.2f} of the depth (0.5: halfway)."
        )
    return sentences


def stable(name: str, agreements: Sequence[Agreement]) -> str:
    """How alike an edit is from lot to lot."""
    shared = [agreement.shared for agreement in agreements]
    overlaps = [each.jaccard for each in shared]
    by_chance = np.mean([each.jaccard_by_chance for each in shared])
    correlations = [each.correlation for each in agreements if each.correlation is not None]
    of_changes = ""
    if correlations:
        of_changes = (
            f"changes of all neurons correlate by {np.mean(correlations):.2f} (Spearman, {min(correlations):.2f} to "
            f"{max(correlations):.2f}); "
        )
    sizes = np.mean([(each.n_first + each.n_second) / 2 for each in shared])
    return (
        f"{name}: {of_changes}sets of {sizes:.0f} neurons overlap by {np.mean(overlaps):.2f} (Jaccard, "
        f"{min(overlaps):.2f} to {max(overlaps):.2f}), by {by_chance:.3f} by chance; {len(shared)} pairs."
    )


def beside(name: str, shared: SharedUnits) -> str:
    """What two sets share."""
    return (
        f"{name}: they share {shared.n_both} neurons (of {shared.n_first} and {shared.n_second}), by chance within "
        f"layers {shared.expected:.1f} (p = {p_text(shared.p)}); Jaccard {shared.jaccard:.3f}."
    )


def helps(name: str, effect: SetEffect) -> str:
    """Whether the neurons of a set help or hurt."""
    kinds = []
    for kind, share in effect.when_silenced.items():
        said = kind if kind in ("both", "neither") else f"{kind} alone"
        kinds.append(f"{said} {share:.0%} ({effect.by_chance[kind]:.0%})")
    moved = []
    for behaviour, change in effect.silencing_all.items():
        moved.append(f"{behaviour} by {change} (by chance {effect.silencing_chance[behaviour]:+.3f})")
    return (
        f"{name}: silencing one of its {effect.n} neurons raises, to first order (random neurons of the same layers in "
        f"brackets): {', '.join(kinds)}; p = {p_text(effect.p_both)} for both. Silencing all of them would move "
        f"{' and '.join(moved)} nats per token. Gates lower {effect.n_lowered} of them and raise "
        f"{effect.n - effect.n_lowered}; they hold {effect.share_of_rise:.1%} of the predicted rise."
    )


def stories(found: Composition) -> list[str]:
    """What can be counted of the strongest neurons."""
    neurons = found.neurons
    if not neurons:
        return []
    share = sum(looked.share_of_rise for looked in neurons)
    one_behaviour = _certain({looked.neuron.name: looked.of_behaviour.p for looked in neurons})
    one_topic = _certain({looked.neuron.name: looked.of_topic.p for looked in neurons})
    p_of_answers = {}
    for looked in neurons:
        p_of_answers |= {f"{looked.neuron.name} {name}": p for name, p in looked.p_safe_less_unsafe.items()}
    tells_answers = _certain(p_of_answers)
    ranks = [list(looked.rank_of_first_words.values()) for looked in neurons]
    n_either = sum(min(of_neuron) <= FIRST_WORDS for of_neuron in ranks)
    n_both = sum(max(of_neuron) <= FIRST_WORDS for of_neuron in ranks)
    safe, unsafe = (sum(looked.n_raised_first_words[i] for looked in neurons) for i in (0, 1))
    n_tokens = sum(len(looked.written.promoted) for looked in neurons)
    with_any = {name.split()[0] for name in (*one_behaviour, *one_topic, *tells_answers)}
    of_chance = 1 - (1 - FIRST_WORDS) ** len(found.behaviours)
    prompts = ", ".join(f"{n} {name}" for name, n in found.n_prompts.items())
    return [
        f"The {len(neurons)} strongest neurons hold {share:.1%} of the predicted rise.",
        f"The {found.n_top} prompts on which each is furthest from 0 (of {prompts}) are of one behaviour more than as "
        f"many random prompts in {len(one_behaviour)} of {len(neurons)}, and of one topic in {len(one_topic)} (p at "
        f"most {SIGNIFICANT}, Holm).",
        f"Its mean activation differs between safe and unsafe answers to the same prompts, for a behaviour, in "
        f"{len(tells_answers)} of {len(p_of_answers)} neurons and behaviours (Holm; the same pairs chose the neurons, "
        "which flatters).",
        f"Directly, {n_either} of {len(neurons)} write a difference between the first words of safe and unsafe answers "
        f"that is among the largest {FIRST_WORDS:.0%} of their layer for one behaviour at least "
        f"({of_chance * len(neurons):.1f} by chance), {n_both} for both. Of the {n_tokens} tokens that they raise most "
        f"{safe} begin a safe answer and {unsafe} an unsafe one.",
        f"{len(neurons) - len(with_any)} of {len(neurons)} show neither a behaviour, nor a topic, nor a difference "
        "between safe and unsafe answers. Nothing was labelled by hand: these are counts, and no judgement of what a "
        "neuron is about.",
    ]


def _certain(p_values: Mapping[str, float]) -> list[str]:
    return [name for name, p in holm(p_values).items() if p <= SIGNIFICANT]
