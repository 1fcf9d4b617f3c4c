"""What was found of the neurons that edits are made of, in plain sentences."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dean_interp.arms.composition import SetEffect, SharedUnits
from dean_interp.arms.composition_results import APART, FLIPPED, NULL, RISE, Composition, LookedAt, Remade
from dean_interp.evaluation.lines import p_text
from dean_interp.statistics import holm

SIGNIFICANT = 0.05
FIRST_WORDS = 0.05
"""A neuron whose write to first words is among this share of its layer stands out."""
Neurons = Sequence[LookedAt]


def sentences(found: Composition) -> list[str]:
    """All of it."""
    return [
        *headline(found),
        *where(found),
        *(stable(name, remade) for name, remade in found.agreements.items()),
        *(beside(name, shared) for name, shared in found.overlaps.items()),
        *(helps(name, effect) for name, effect in found.effects.items() if effect.n),
        *stories(found),
    ]


def headline(found: Composition) -> list[str]:
    """The answer in short: where, how stable, whether the coupled set does it, and whether a look tells a story."""
    rise, null = found.spreads[RISE], found.spreads[NULL]
    strongest = sum(looked.share_of_rise for looked in found.neurons)
    sentences = [
        f"Half of the rise that gates predict is held by {rise.neurons_for_half} of {found.n_neurons} neurons "
        f"({rise.neurons_for_half / found.n_neurons:.1%}) and by {rise.layers_for_half} of {found.n_layers} layers; "
        f"the {len(found.neurons)} strongest neurons hold {strongest:.1%}. For gates made after "
        f"safe and unsafe were exchanged in half of the topics, it is {null.neurons_for_half} neurons and "
        f"{null.layers_for_half} layers."
    ]
    overlaps = {}
    for name, agreements in found.agreements.items():
        if name.startswith("gates"):
            overlaps[name] = _mean_jaccard([remade.shared for remade in agreements])
    (apart,) = (overlap for name, overlap in overlaps.items() if APART in name)
    (flipped,) = (overlap for name, overlap in overlaps.items() if FLIPPED in name)
    sentences.append(
        f"Made from topics that share none, the strongest gates overlap by {apart:.2f} (Jaccard); by {flipped:.2f} "
        "where the labels of one side are exchanged in half of its topics."
    )
    for name, effect in found.effects.items():
        if name.startswith("coupled") and effect.n:
            sentences.append(
                f"The paper's set ({name}, {effect.n} neurons, {effect.n / found.n_neurons:.2%} of all) holds "
                f"{effect.share_of_rise:.1%} of this rise. {helping(effect)}"
            )
    n_telling = len(telling(found.neurons))
    sentences.append(
        f"{n_telling} of the {len(found.neurons)} strongest neurons show a behaviour, a topic, or a difference between "
        f"safe and unsafe answers; of as many random neurons alike in layer and activation "
        f"{_by_chance(found, telling):.1f} do. Nothing was labelled by hand."
    )
    return sentences


def _mean_jaccard(shared: Sequence[SharedUnits]) -> float:
    return float(np.mean([each.jaccard for each in shared]))


def helping(effect: SetEffect) -> str:
    """Whether neurons of a set help or hurt both margins more often than random ones do."""
    both, neither = effect.when_silenced["both"], effect.when_silenced["neither"]
    if max(effect.p_both, effect.p_neither) <= SIGNIFICANT:
        said = "They move both margins the same way more often than random neurons do"
    elif effect.p_both <= SIGNIFICANT:
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
    """What can be counted of the strongest neurons, beside random ones that are alike in layer and activation."""
    if not found.neurons:
        return []
    n, n_cases = len(found.neurons), len(_p_of_answers(found.neurons))
    prompts = ", ".join(f"{n} {name}" for name, n in found.n_prompts.items())
    return [
        f"What they read: the {found.n_top} prompts on which a neuron is furthest from 0 (of {prompts}) are of one "
        f"behaviour more often than random prompts in {_beside_chance(found, of_one_behaviour)} of {n} neurons, and of "
        f"one topic in {_beside_chance(found, of_one_topic)} (p at most {SIGNIFICANT}, Holm). In brackets, here and "
        f"below: the mean of {len(found.controls)} lots of as many random neurons, alike in layer and activation.",
        f"Mean activations over safe and over unsafe answers to the same prompts differ in "
        f"{_beside_chance(found, of_answers)} of {n_cases} cases (a neuron and a behaviour; Holm). The same pairs "
        "chose the strongest neurons, so this count is too high rather than too low.",
        f"What they write, directly: a difference between the first words of safe and of unsafe answers that is among "
        f"the largest {FIRST_WORDS:.0%} of the layer for one behaviour at least, in "
        f"{_beside_chance(found, of_first_words)} of {n}. Of the tokens that they raise most "
        f"{_beside_chance(found, raised_safe)} begin a safe answer and {_beside_chance(found, raised_unsafe)} an "
        f"unsafe one, of {sum(len(looked.written.promoted) for looked in found.neurons)}.",
        "Nothing was labelled by hand: these are counts, and no judgement of what a neuron is about.",
    ]


def of_one_behaviour(neurons: Neurons) -> set[str]:
    """The neurons whose top prompts are of one behaviour."""
    return _certain({looked.neuron.name: looked.of_behaviour.p for looked in neurons})


def of_one_topic(neurons: Neurons) -> set[str]:
    """The neurons whose top prompts are of one topic."""
    return _certain({looked.neuron.name: looked.of_topic.p for looked in neurons})


def of_answers(neurons: Neurons) -> set[str]:
    """Neurons with a behaviour, where activations over safe and unsafe answers differ."""
    return _certain(_p_of_answers(neurons))


def telling(neurons: Neurons) -> set[str]:
    """The neurons whose texts or activations show a behaviour, a topic, or safe against unsafe."""
    with_answers = {name.split()[0] for name in of_answers(neurons)}
    return of_one_behaviour(neurons) | of_one_topic(neurons) | with_answers


def of_first_words(neurons: Neurons) -> set[str]:
    """The neurons that write one of the layer's largest differences between first words."""
    return {looked.neuron.name for looked in neurons if min(looked.rank_of_first_words.values()) <= FIRST_WORDS}


def raised_safe(neurons: Neurons) -> set[str]:
    """Tokens that are raised most and begin a safe answer, each with its neuron."""
    return _numbered(neurons, 0)


def raised_unsafe(neurons: Neurons) -> set[str]:
    """Tokens that are raised most and begin an unsafe answer, each with its neuron."""
    return _numbered(neurons, 1)


def _numbered(neurons: Neurons, kind: int) -> set[str]:
    names = set()
    for looked in neurons:
        names |= {f"{looked.neuron.name} {number}" for number in range(looked.n_raised_first_words[kind])}
    return names


def _by_chance(found: Composition, count: Callable[[Neurons], set[str]]) -> float:
    return float(np.mean([len(count(lot)) for lot in found.controls])) if found.controls else 0.0


def _beside_chance(found: Composition, count: Callable[[Neurons], set[str]]) -> str:
    return f"{len(count(found.neurons))} ({_by_chance(found, count):.1f})"


def _p_of_answers(neurons: Sequence[LookedAt]) -> dict[str, float]:
    p_values = {}
    for looked in neurons:
        p_values |= {f"{looked.neuron.name} {name}": p for name, p in looked.p_safe_less_unsafe.items()}
    return p_values


def _certain(p_values: Mapping[str, float]) -> set[str]:
    return {name for name, p in holm(p_values).items() if p <= SIGNIFICANT}
