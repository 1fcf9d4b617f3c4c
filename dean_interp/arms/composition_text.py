"""What was found of the neurons that edits are made of, in plain sentences."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dean_interp.arms.composition import SetEffect, SharedUnits, Spread
from dean_interp.arms.composition_results import APART, FLIPPED, NULL, RISE, Composition, LookedAt, Remade
from dean_interp.evaluation.line_table import p_text
from dean_interp.statistics import holm
from dean_interp.study.conclusions import SIGNIFICANT

FIRST_WORDS = 0.05
"""A neuron whose write to first words is among this share of its layer stands out."""
Neurons = Sequence[LookedAt]


def sentences(composition: Composition) -> list[str]:
    """All sentences, in the order in which they are read."""
    sentences = [*headline(composition), *where(composition)]
    for name, agreements in composition.agreements.items():
        sentences.append(stable(name, agreements))
    for name, shared in composition.overlaps.items():
        sentences.append(beside(name, shared))
    for name, effect in composition.effects.items():
        if effect.n:
            sentences.append(helps(name, effect))
    return sentences + stories(composition)


def headline(composition: Composition) -> list[str]:
    """The answer in short: where, how stable, whether the coupled set does it, and whether a look tells a story."""
    sentences = [_rise_in_short(composition), _stability_in_short(composition)]
    n_neurons = composition.n_neurons
    for name, effect in composition.effects.items():
        if name.startswith("coupled") and effect.n:
            sentences.append(
                f"The paper's set ({name}, {effect.n} neurons, {effect.n / n_neurons:.2%} of all) holds "
                f"{effect.share_of_rise:.1%} of this rise. {helping(effect)}"
            )
    n_telling = len(telling(composition.neurons))
    by_chance = _by_chance(composition, telling)
    sentences.append(
        f"{n_telling} of the {len(composition.neurons)} strongest neurons show a behaviour, a topic, or a difference "
        f"between safe and unsafe answers; of as many random neurons alike in layer and activation {by_chance:.1f} do. "
        "Nothing was labelled by hand."
    )
    return sentences


def _rise_in_short(composition: Composition) -> str:
    rise = composition.spreads[RISE]
    null = composition.spreads[NULL]
    n_neurons = composition.n_neurons
    share_of_strongest = sum(looked.share_of_rise for looked in composition.neurons)
    return (
        f"Half of the rise that gates predict is held by {rise.neurons_for_half} of {n_neurons} neurons "
        f"({rise.neurons_for_half / n_neurons:.1%}) and by {rise.layers_for_half} of {composition.n_layers} layers; "
        f"the {len(composition.neurons)} strongest neurons hold {share_of_strongest:.1%}. For gates made after "
        f"safe and unsafe were exchanged in half of the topics, it is {null.neurons_for_half} neurons and "
        f"{null.layers_for_half} layers."
    )


def _stability_in_short(composition: Composition) -> str:
    overlaps = {}
    for name, agreements in composition.agreements.items():
        if name.startswith("gates"):
            overlaps[name] = np.mean([agreement.shared.jaccard for agreement in agreements])
    (apart,) = (overlap for name, overlap in overlaps.items() if APART in name)
    (flipped,) = (overlap for name, overlap in overlaps.items() if FLIPPED in name)
    return (
        f"Made from topics that share none, the strongest gates overlap by {apart:.2f} (Jaccard); by {flipped:.2f} "
        "where the labels of one side are exchanged in half of its topics."
    )


def helping(effect: SetEffect) -> str:
    """Whether neurons of a set help or hurt both margins more often than random ones do."""
    they_hurt = effect.p_both <= SIGNIFICANT
    they_help = effect.p_neither <= SIGNIFICANT
    if they_hurt and they_help:
        do_what = "move both margins the same way"
    elif they_hurt:
        do_what = "hurt both margins"
    elif they_help:
        do_what = "help both margins"
    else:
        do_what = "neither hurt nor help both margins"
    observed = effect.when_silenced
    by_chance = effect.by_chance
    return (
        f"They {do_what} more often than random neurons do: silencing one raises both margins in "
        f"{observed['both']:.0%} (by chance {by_chance['both']:.0%}, p {p_text(effect.p_both)}) and neither in "
        f"{observed['neither']:.0%} (by chance {by_chance['neither']:.0%}, p {p_text(effect.p_neither)}), to first "
        "order."
    )


def where(composition: Composition) -> list[str]:
    """Where each edit or set sits: one sentence each."""
    sentences = []
    for name, spread in composition.spreads.items():
        if not spread.effective_neurons:
            sentences.append(f"{name}: no neuron.")
            continue
        sentences.append(_spread_text(name, spread, composition))
    return sentences


def _spread_text(name: str, spread: Spread, composition: Composition) -> str:
    return (
        f"{name}: {spread.layers_for_half} of {composition.n_layers} layers hold half of it, {spread.layers_for_most} "
        f"nine tenths; {spread.neurons_for_half} of {composition.n_neurons} neurons hold half, "
        f"{spread.neurons_for_most} nine tenths; it is as spread as {spread.effective_neurons:.0f} equal neurons. Its "
        f"middle lies at {spread.depth:.2f} of the depth (0.5: halfway)."
    )


def stable(name: str, agreements: Sequence[Remade]) -> str:
    """How alike an edit is from lot to lot."""
    overlaps = [agreement.shared.jaccard for agreement in agreements]
    by_chance = np.mean([agreement.shared.jaccard_by_chance for agreement in agreements])
    sizes = [(agreement.shared.n_first + agreement.shared.n_second) / 2 for agreement in agreements]
    correlations = [agreement.correlation for agreement in agreements if agreement.correlation is not None]
    of_changes = ""
    if correlations:
        of_changes = (
            f"changes of all neurons correlate by {np.mean(correlations):.2f} (Spearman, {min(correlations):.2f} to "
            f"{max(correlations):.2f}); "
        )
    return (
        f"{name}: {of_changes}sets of {np.mean(sizes):.0f} neurons overlap by {np.mean(overlaps):.2f} (Jaccard, "
        f"{min(overlaps):.2f} to {max(overlaps):.2f}), by {by_chance:.3f} by chance; {len(agreements)} pairs."
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
        by_chance = effect.silencing_chance[behaviour]
        moved.append(f"{behaviour} by {change} (random neurons: {by_chance:+.3f})")
    n_raised = effect.n - effect.n_lowered
    return (
        f"{name}, {effect.n} neurons: {helping(effect)} Silencing all of them would move, to first order, "
        f"{' and '.join(moved)} nats per token. Gates lower {effect.n_lowered} of them and raise {n_raised}."
    )


def stories(composition: Composition) -> list[str]:
    """What can be counted of the strongest neurons, beside random ones that are alike in layer and activation."""
    if not composition.neurons:
        return []
    return [
        _read_text(composition),
        _answers_text(composition),
        _written_text(composition),
        "Nothing was labelled by hand: these are counts, and no judgement of what a neuron is about.",
    ]


def _read_text(composition: Composition) -> str:
    prompts = ", ".join(f"{n} {name}" for name, n in composition.n_prompts.items())
    by_behaviour = _beside_chance(composition, of_one_behaviour)
    by_topic = _beside_chance(composition, of_one_topic)
    return (
        f"What they read: the {composition.n_top} prompts on which a neuron is furthest from 0 (of {prompts}) are of "
        f"one behaviour more often than random prompts in {by_behaviour} of {len(composition.neurons)} neurons, and of "
        f"one topic in {by_topic} (p at most {SIGNIFICANT}, Holm). In brackets, here and below: the mean of "
        f"{len(composition.controls)} lots of as many random neurons, alike in layer and activation."
    )


def _answers_text(composition: Composition) -> str:
    n_cases = len(_p_of_answers(composition.neurons))
    return (
        "Mean activations over safe and over unsafe answers to the same prompts differ in "
        f"{_beside_chance(composition, of_answers)} of {n_cases} cases (a neuron and a behaviour; Holm). The same "
        "pairs chose the strongest neurons, so this count is too high rather than too low."
    )


def _written_text(composition: Composition) -> str:
    by_words = _beside_chance(composition, of_first_words)
    raising_safe = _beside_chance(composition, raised_safe)
    raising_unsafe = _beside_chance(composition, raised_unsafe)
    n_raised = sum(len(looked.written.promoted) for looked in composition.neurons)
    return (
        "What they write, directly: a difference between the first words of safe and of unsafe answers that is among "
        f"the largest {FIRST_WORDS:.0%} of the layer for one behaviour at least, in {by_words} of "
        f"{len(composition.neurons)}. Of the tokens that they raise most {raising_safe} begin a safe answer and "
        f"{raising_unsafe} an unsafe one, of {n_raised}."
    )


def of_one_behaviour(neurons: Neurons) -> set[str]:
    """The neurons whose top prompts are of one behaviour."""
    p_values = {looked.neuron.name: looked.of_behaviour.p for looked in neurons}
    return _certain(p_values)


def of_one_topic(neurons: Neurons) -> set[str]:
    """The neurons whose top prompts are of one topic."""
    p_values = {looked.neuron.name: looked.of_topic.p for looked in neurons}
    return _certain(p_values)


def of_answers(neurons: Neurons) -> set[str]:
    """Neurons with a behaviour, where activations over safe and unsafe answers differ."""
    return _certain(_p_of_answers(neurons))


def telling(neurons: Neurons) -> set[str]:
    """The neurons whose texts or activations show a behaviour, a topic, or safe against unsafe."""
    with_answers = {name.split()[0] for name in of_answers(neurons)}
    return of_one_behaviour(neurons) | of_one_topic(neurons) | with_answers


def of_first_words(neurons: Neurons) -> set[str]:
    """The neurons that write one of the layer's largest differences between first words."""
    names = set()
    for looked in neurons:
        if min(looked.rank_of_first_words.values()) <= FIRST_WORDS:
            names.add(looked.neuron.name)
    return names


def raised_safe(neurons: Neurons) -> set[str]:
    """Tokens that are raised most and begin a safe answer, each with its neuron."""
    return _numbered(neurons, 0)


def raised_unsafe(neurons: Neurons) -> set[str]:
    """Tokens that are raised most and begin an unsafe answer, each with its neuron."""
    return _numbered(neurons, 1)


def _numbered(neurons: Neurons, kind: int) -> set[str]:
    names = set()
    for looked in neurons:
        for number in range(looked.n_raised_first_words[kind]):
            names.add(f"{looked.neuron.name} {number}")
    return names


def _by_chance(composition: Composition, count: Callable[[Neurons], set[str]]) -> float:
    """The mean count of the lots of random neurons."""
    if not composition.controls:
        return 0.0
    counts = [len(count(lot)) for lot in composition.controls]
    return float(np.mean(counts))


def _beside_chance(composition: Composition, count: Callable[[Neurons], set[str]]) -> str:
    n_strongest = len(count(composition.neurons))
    return f"{n_strongest} ({_by_chance(composition, count):.1f})"


def _p_of_answers(neurons: Sequence[LookedAt]) -> dict[str, float]:
    p_values = {}
    for looked in neurons:
        for behaviour, p in looked.p_safe_less_unsafe.items():
            p_values[f"{looked.neuron.name} {behaviour}"] = p
    return p_values


def _certain(p_values: Mapping[str, float]) -> set[str]:
    return {name for name, p in holm(p_values).items() if p <= SIGNIFICANT}
