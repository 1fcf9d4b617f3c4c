"""The neurons with the largest part in an edit's predicted rise: what they do, when they fire, what they write.

The texts are the scored examples: both behaviours with their safe answers and with their unsafe ones, and general text.
All neurons are read in one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dean_interp.arms.arm import ArmExamples
from dean_interp.arms.composition import Edits
from dean_interp.arms.composition_results import LookedAt
from dean_interp.arms.coupled_arms import rule_scores
from dean_interp.arms.first_words import first_words, n_raised
from dean_interp.circuits.lens import written
from dean_interp.circuits.neuron import TextActivations, of_neuron, peak_of, read_texts
from dean_interp.circuits.neuron_view import NeuronView, view_from_texts
from dean_interp.circuits.stories import LabelCounts, activation_differences
from dean_interp.data.examples import Behaviour
from dean_interp.evaluation.outcomes import clusters_of
from dean_interp.models.load import model_fingerprint
from dean_interp.models.neuron_names import Neuron
from dean_interp.resume import Unfinished
from dean_interp.scoring.scores import Scores
from dean_interp.selection.gains import damage_of, gains_of
from dean_interp.selection.strata import Strata
from dean_interp.statistics import Interval, clustered_interval, sign_flip_p_value
from dean_interp.study.improvement import ChangedNeuron
from dean_interp.study.run_units import changed_neurons
from dean_interp.study.store import fingerprint_of

N_CONTEXT = 8
"""Tokens that are shown before the one on which a neuron is furthest from 0."""


def strongest_by_part(edits: Edits, n_neurons: int) -> list[Neuron]:
    """The neurons with the largest parts, the largest first."""
    strongest = edits.gates.strongest(n_neurons, by=edits.parts).selection
    parts: dict[Neuron, float] = {}
    for site, units in strongest.units.items():
        for index in units.tolist():
            parts[site, index] = float(edits.parts[site][index])
    return sorted(parts, key=lambda neuron: -parts[neuron])


def alike(
    neurons: Sequence[Neuron],
    matched: Strata,
    *,
    seed: int,
    taken: Sequence[Neuron],
) -> list[Neuron]:
    """For each neuron a random one of the same site and stratum that is not taken, none of them twice.

    Where a stratum has no other left, one of the site; where that has none, the neuron is left out.
    """
    generator = np.random.default_rng(seed)
    gone = set(taken)
    drawn = []
    for site, index in neurons:
        codes = matched[site]
        in_stratum = torch.nonzero(codes == codes[index])[:, 0].tolist()
        in_site = range(len(codes))
        for pool in (in_stratum, in_site):
            free = [(site, other) for other in pool if (site, other) not in gone]
            if free:
                number = int(generator.integers(len(free)))
                drawn.append(free[number])
                gone.add(free[number])
                break
    return drawn


def page_of(neuron: ChangedNeuron) -> str:
    """Where the page of a neuron lies, from the run folder on."""
    return f"neurons/{neuron.name}.html"


def look_at(
    examples: ArmExamples,
    neurons: Sequence[Neuron],
    edits: Edits,
    scores: Sequence[Scores],
    *,
    n_top: int,
) -> list[tuple[LookedAt, NeuronView]]:
    """What there is to count of the neurons, and the record that each one's page shows.

    Args:
        examples: what was scored.
        neurons: those that are looked at.
        edits: the gates that change them, and the sets that may hold them.
        scores: scores of both margins and of general text (`ArmExamples.margin_scores`).
        n_top: number of prompts of each neuron whose behaviours and topics are counted.
    """
    first, second, general = scores[:3]
    changed = changed_neurons(neurons, edits.gates, gains_of(first), gains_of(second), damage_of(general))
    pages = [page_of(neuron) for neuron in changed]
    texts = _read_once(examples, neurons, pages)
    counts = _prompt_counts(examples, n_top)
    words = [first_words(examples, behaviour) for behaviour in examples.scoring[:2]]
    looks = written(examples.model, neurons)
    rule = rule_scores(examples, "neuron")
    looked = []
    for column, neuron in enumerate(neurons):
        activations = of_neuron(texts.all, column)
        shown, activation = _furthest(activations[0])
        intervals, p_values = _answer_differences(texts, column)
        peaks = texts.peaks(column)
        record = LookedAt(
            neuron=changed[column],
            share_of_rise=_share_of_rise(neuron, edits),
            held_by=_sets_that_hold(neuron, edits),
            written=looks[column],
            fires_most=shown,
            activation=activation,
            of_behaviour=counts.behaviours.of(peaks),
            of_topic=counts.topics.of(peaks),
            safe_less_unsafe=intervals,
            p_safe_less_unsafe=p_values,
            first_words={words_of.behaviour: words_of.of(neuron) for words_of in words},
            rank_of_first_words={words_of.behaviour: words_of.rank(neuron) for words_of in words},
            n_raised_first_words=n_raised(looks[column], words),
            page=pages[column],
        )
        view = view_from_texts(examples.model, neuron, activations, scores=rule, selections=edits.sets)
        looked.append((record, view))
    return looked


def _share_of_rise(neuron: Neuron, edits: Edits) -> float:
    site, index = neuron
    total = sum(float(part.sum()) for part in edits.parts.values())
    return float(edits.parts[site][index]) / total


def _sets_that_hold(neuron: Neuron, edits: Edits) -> tuple[str, ...]:
    site, index = neuron
    names = []
    for name, selection in edits.sets.items():
        if index in selection.units[site]:
            names.append(name)
    return tuple(names)


@dataclass(frozen=True)
class _PromptCounts:
    """What counts behaviours and topics among the top prompts."""

    behaviours: LabelCounts
    topics: LabelCounts


def _prompt_counts(examples: ArmExamples, n_top: int) -> _PromptCounts:
    behaviours, topics = [], []
    for behaviour in examples.scoring[:3]:
        behaviours += [behaviour.name] * len(behaviour)
        topics += clusters_of(behaviour)
    n_top = min(n_top, len(topics))
    return _PromptCounts(LabelCounts(behaviours, n_top), LabelCounts(topics, n_top))


@dataclass(frozen=True)
class _Texts:
    """The texts of a look: a list for each set of answers, in the order of its examples."""

    behaviours: tuple[Behaviour, ...]
    """First, second and general."""
    safe: tuple[list[TextActivations], list[TextActivations]]
    unsafe: tuple[list[TextActivations], list[TextActivations]]
    general: list[TextActivations]

    @property
    def all(self) -> list[TextActivations]:
        return [*self.safe[0], *self.unsafe[0], *self.safe[1], *self.unsafe[1], *self.general]

    def peaks(self, column: int) -> np.ndarray:
        """The largest size of an activation on each prompt, with either answer."""
        peaks = []
        for safe, unsafe in zip(self.safe, self.unsafe, strict=True):
            for safe_text, unsafe_text in zip(safe, unsafe, strict=True):
                peak = max(peak_of(safe_text, column), peak_of(unsafe_text, column))
                peaks.append(peak)
        peaks += [peak_of(text, column) for text in self.general]
        return np.array(peaks)


def _answer_differences(
    texts: _Texts,
    column: int,
) -> tuple[dict[str, Interval], dict[str, float]]:
    """Activations over safe answers less those over unsafe ones, by behaviour: intervals and p-values over topics."""
    intervals, p_values = {}, {}
    first, second, _ = texts.behaviours
    for behaviour, safe, unsafe in zip((first, second), texts.safe, texts.unsafe, strict=True):
        differences = activation_differences(safe, unsafe, column)
        topics = clusters_of(behaviour)
        intervals[behaviour.name] = clustered_interval(differences, topics)
        p_values[behaviour.name] = sign_flip_p_value(differences, topics)
    return intervals, p_values


def _read_once(examples: ArmExamples, neurons: Sequence[Neuron], names: Sequence[str]) -> _Texts:
    """The activations on all texts; a reading that was stopped goes on. `names` tell the neurons from others."""
    first, second, general = examples.scoring[:3]
    parts = []
    for behaviour in (first, second):
        parts.append(replace(behaviour, name=f"{behaviour.name}, safe", response="safe"))
        parts.append(replace(behaviour, name=f"{behaviour.name}, unsafe", response="unsafe"))
    parts.append(general)
    template = examples.config.model.template
    data = [part.fingerprint for part in parts]
    fingerprint = fingerprint_of(model_fingerprint(examples.model), template, *names, *data)
    examples.own_folder.mkdir(parents=True, exist_ok=True)
    unfinished = Unfinished(examples.own_folder / "texts.unfinished", fingerprint)
    texts = read_texts(examples.model, neurons, parts, template=template, unfinished=unfinished)
    unfinished.discard()
    # The texts of the parts follow each other.
    texts_of_parts = []
    start = 0
    for part in parts:
        texts_of_parts.append(texts[start : start + len(part)])
        start += len(part)
    first_safe, first_unsafe, second_safe, second_unsafe, of_general = texts_of_parts
    return _Texts(
        behaviours=(first, second, general),
        safe=(first_safe, second_safe),
        unsafe=(first_unsafe, second_unsafe),
        general=of_general,
    )


def _furthest(text: TextActivations) -> tuple[str, float]:
    """The text up to the token on which the neuron is furthest from 0, and its activation there."""
    activations = [activation for activation, *_ in text.activations]
    position = max(range(len(text.tokens)), key=lambda place: abs(activations[place]))
    start = max(0, position - N_CONTEXT)
    context = "".join(text.tokens[start : position + 1])
    return context.replace("\n", " "), activations[position]
