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
    """There."""
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
            *headline(self),
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


def headline(found: Composition) -> list[str]:
    """The answer in short: where, how stable, whether the coupled set does it, and whether a look tells a story."""
    rise = next(iter(found.spreads.values()))
    strongest = sum(looked.share_of_rise for looked in found.neurons)
    sentences = [
        f"Half of the rise that gates predict is held by {rise.neurons_for_half} of {found.n_neurons} neurons "
        f"({rise.neurons_for_half / found.n_neurons:.1%}) and by {rise.layers_for_half} of {found.n_layers} layers; "
        f"the {len(found.neurons)} strongest neurons hold {strongest:.1%}."
    ]
    for name, agreements in found.agreements.items():
        if name.startswith("gates") and "share none" in name:
            shared = [agreement.shared for agreement in agreements]
            sentences.append(
                f"Made from topics that share none, the strongest gates overlap by {_mean_jaccard(shared):.2f} "
                f"(Jaccard; by chance {np.mean([each.jaccard_by_chance for each in shared]):.3f})."
            )
    for name, effect in found.effects.items():
        if name.startswith("coupled") and effect.n:
            sentences.append(
                f"The paper's set ({name}, {effect.n} neurons, {effect.n / found.n_neurons:.2%} of all) holds "
                f"{effect.share_of_rise:.1%} of this rise. {helping(effect)}"
            )
    n_silent = len(found.neurons) - len(telling(found))
    sentences.append(
        f"{n_silent} of the {len(found.neurons)} strongest neurons show neither a behaviour, nor a topic, nor a "
        "difference between safe and unsafe answers that could be counted. Nothing was labelled by hand."
    )
    return sentences


def _mean_jaccard(shared: Sequence[SharedUnits]) -> float:
    return float(np.mean([each.jaccard for each in shared]))


def helping(effect: SetEffect) -> str:
    """Whether neurons of a set help or hurt both margins more often than random ones do."""
    both, neither = effect.when_silenced["both"], effect.when_silenced["neither"]
    if effect.p_both <= SIGNIFICANT:
        said = "They hurt both margins more often than random neurons do"
    elif effect.p_neither <= SIGNIFICANT:
        said = "They help both margins more often than random neurons do"
    else:
        said = "They neither hurt nor help both margins more often than random neurons do"
    return (
        f"{said}: silencing one raises both margins in {both:.0%} (by chance {effect.by_chance['both']:.0%}, "
        f"p {p_text(effect.p_both)}) and neither in {neither:.0%} (by chance {effect.by_chance['neither']:.0%}, "
        f"p {p_text(effect.p_neither)}), to first order."
    )


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


def stable(name: str, agreements: Sequence[Remade]) -> str:
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
    """Whether a set helps or hurts, and what silencing all of it would do."""
    moved = []
    for behaviour, change in effect.silencing_all.items():
        moved.append(f"{behaviour} by {change} (random neurons: {effect.silencing_chance[behaviour]:+.3f})")
    return (
        f"{name}, {effect.n} neurons: {helping(effect)} Silencing all of them would move, to first order, "
        f"{' and '.join(moved)} nats per token. Gates lower {effect.n_lowered} of them and raise "
        f"{effect.n - effect.n_lowered}."
    )


def stories(found: Composition) -> list[str]:
    """What can be counted of the strongest neurons."""
    neurons = found.neurons
    if not neurons:
        return []
    n_behaviour = len(_certain({looked.neuron.name: looked.of_behaviour.p for looked in neurons}))
    n_topic = len(_certain({looked.neuron.name: looked.of_topic.p for looked in neurons}))
    p_of_answers = _p_of_answers(neurons)
    ranks = [list(looked.rank_of_first_words.values()) for looked in neurons]
    n_either = sum(min(of_neuron) <= FIRST_WORDS for of_neuron in ranks)
    n_both = sum(max(of_neuron) <= FIRST_WORDS for of_neuron in ranks)
    safe, unsafe = (sum(looked.n_raised_first_words[i] for looked in neurons) for i in (0, 1))
    n_tokens = sum(len(looked.written.promoted) for looked in neurons)
    by_chance = len(neurons) * (1 - (1 - FIRST_WORDS) ** len(found.behaviours))
    prompts = ", ".join(f"{n} {name}" for name, n in found.n_prompts.items())
    return [
        f"What they read: the {found.n_top} prompts on which a neuron is furthest from 0 (of {prompts}) are of one "
        f"behaviour more often than {found.n_top} random prompts in {n_behaviour} of {len(neurons)} neurons, and of "
        f"one topic in {n_topic} (p at most {SIGNIFICANT}, Holm).",
        f"Mean activations over safe and over unsafe answers to the same prompts differ in "
        f"{len(_certain(p_of_answers))} of {len(p_of_answers)} cases (a neuron and a behaviour; Holm). The same pairs "
        "chose the neurons, so this count is too high rather than too low.",
        f"What they write, directly: a difference between the first words of safe and of unsafe answers that is among "
        f"the largest {FIRST_WORDS:.0%} of the layer, for one behaviour at least, in {n_either} of {len(neurons)} "
        f"({by_chance:.1f} by chance), for both in {n_both}. Of the {n_tokens} tokens that they raise most {safe} "
        f"begin a safe answer and {unsafe} an unsafe one.",
        "Nothing was labelled by hand: these are counts, and no judgement of what a neuron is about.",
    ]


def telling(found: Composition) -> set[str]:
    """The names of the neurons whose texts or activations show a behaviour, a topic, or safe against unsafe."""
    names = set(_certain({looked.neuron.name: looked.of_behaviour.p for looked in found.neurons}))
    names |= set(_certain({looked.neuron.name: looked.of_topic.p for looked in found.neurons}))
    return names | {name.split()[0] for name in _certain(_p_of_answers(found.neurons))}


def _p_of_answers(neurons: Sequence[LookedAt]) -> dict[str, float]:
    p_values = {}
    for looked in neurons:
        p_values |= {f"{looked.neuron.name} {name}": p for name, p in looked.p_safe_less_unsafe.items()}
    return p_values


def _certain(p_values: Mapping[str, float]) -> list[str]:
    return [name for name, p in holm(p_values).items() if p <= SIGNIFICANT]
