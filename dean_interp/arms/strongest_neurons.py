"""The neurons with the largest part in an edit's predicted rise: what they do, when they fire, what they write.

The texts are the scored examples: both behaviours with their safe answers and with their unsafe ones, and general text.
All neurons are read in one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dean_interp.arms.arm import ArmExamples
from dean_interp.arms.composition import Edits
from dean_interp.arms.composition_results import LookedAt
from dean_interp.arms.coupled_arms import rule_scores
from dean_interp.circuits.lens import Written, logit_differences, written
from dean_interp.circuits.neuron import TextActivations, of_neuron, peak_of, read_texts
from dean_interp.circuits.neuron_view import NeuronView, view_from_texts
from dean_interp.circuits.stories import LabelCounts, activation_differences
from dean_interp.data.examples import Behaviour
from dean_interp.evaluation.outcomes import clusters_of
from dean_interp.models.load import model_fingerprint
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.neuron_names import Neuron, name_of
from dean_interp.models.tokens import encode
from dean_interp.resume import Unfinished
from dean_interp.scoring.scores import Scores
from dean_interp.selection.gains import damage_of, gains_of
from dean_interp.selection.gates import Gates
from dean_interp.selection.gating import PerNeuron
from dean_interp.selection.strata import Strata
from dean_interp.statistics import clustered_interval, sign_flip_p_value
from dean_interp.study.improvement import ChangedNeuron
from dean_interp.study.store import fingerprint_of

N_CONTEXT = 8
"""Tokens that are shown before the one on which a neuron is furthest from 0."""


def strongest_by_part(edits: Edits, n_neurons: int) -> list[Neuron]:
    """The neurons with the largest parts, the largest first."""
    neurons = []
    for site, units in edits.gates.strongest(n_neurons, by=edits.parts).selection.units.items():
        for index in units.tolist():
            neurons.append((float(edits.parts[site][index]), site, index))
    return [(site, index) for _, site, index in sorted(neurons, key=lambda each: -each[0])]


def alike(neurons: Sequence[Neuron], matched: Strata, *, seed: int, taken: Sequence[Neuron]) -> list[Neuron]:
    """For each neuron a random one of the same site and stratum that is not taken, none of them twice.

    Where a stratum has no other left, one of the site; where that has none, the neuron is left out.
    """
    generator, gone, drawn = np.random.default_rng(seed), set(taken), []
    for site, index in neurons:
        stratum = matched[site]
        in_stratum = (stratum == stratum[index]).nonzero()[:, 0].tolist()
        for pool in (in_stratum, range(len(stratum))):
            free = [(site, other) for other in pool if (site, other) not in gone]
            if free:
                drawn.append(free[int(generator.integers(len(free)))])
                gone.add(drawn[-1])
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
        scores: of both margins and of general text (`ArmExamples.margin_scores`).
        n_top: number of prompts of each neuron whose behaviours and topics are counted.
    """
    changed = _changed(neurons, edits.gates, scores)
    texts = _read_once(examples, neurons, [page_of(neuron) for neuron in changed])
    rule = rule_scores(examples, "neuron")
    counts = _counts(examples, n_top)
    words = [_first_words(examples, behaviour) for behaviour in examples.scoring[:2]]
    looks = written(examples.model, neurons)
    total = sum(float(part.sum()) for part in edits.parts.values())
    looked = []
    for column, neuron in enumerate(neurons):
        site, index = neuron
        alone = of_neuron(texts.all, column)
        shown, activation = _furthest(alone[0])
        peaks, differences = texts.peaks(column), texts.differences(column)
        record = LookedAt(
            neuron=changed[column],
            share_of_rise=float(edits.parts[site][index]) / total,
            held_by=tuple(name for name, each in edits.sets.items() if bool(each.mask(site)[index])),
            written=looks[column],
            fires_most=shown,
            activation=activation,
            of_behaviour=counts[0].of(peaks),
            of_topic=counts[1].of(peaks),
            safe_less_unsafe={name: clustered_interval(*of_each) for name, of_each in differences.items()},
            p_safe_less_unsafe={name: sign_flip_p_value(*of_each) for name, of_each in differences.items()},
            first_words={each.behaviour: each.of(neuron) for each in words},
            rank_of_first_words={each.behaviour: each.rank(neuron) for each in words},
            n_raised_first_words=_n_raised(looks[column], words),
            page=page_of(changed[column]),
        )
        looked.append((record, view_from_texts(examples.model, neuron, alone, scores=rule, selections=edits.sets)))
    return looked


def _counts(examples: ArmExamples, n_top: int) -> tuple[LabelCounts, LabelCounts]:
    """What counts behaviours and topics among the top prompts."""
    behaviours, topics = [], []
    for behaviour in examples.scoring[:3]:
        behaviours += [behaviour.name] * len(behaviour)
        topics += list(clusters_of(behaviour))
    n_top = min(n_top, len(topics))
    return LabelCounts(behaviours, n_top), LabelCounts(topics, n_top)


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
            for mine, other in zip(safe, unsafe, strict=True):
                peaks.append(max(peak_of(mine, column), peak_of(other, column)))
        peaks += [peak_of(text, column) for text in self.general]
        return np.array(peaks)

    def differences(self, column: int) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
        """A number and a topic for each pair of each behaviour."""
        found = {}
        for behaviour, safe, unsafe in zip(self.behaviours, self.safe, self.unsafe, strict=False):
            found[behaviour.name] = (activation_differences(safe, unsafe, column), clusters_of(behaviour))
        return found


def _read_once(examples: ArmExamples, neurons: Sequence[Neuron], names: Sequence[str]) -> _Texts:
    """The activations on all texts; a reading that was stopped goes on. `names` tell the neurons from others."""
    first, second, general = examples.scoring[:3]
    parts = []
    for behaviour in (first, second):
        parts.append(replace(behaviour, name=f"{behaviour.name}, safe", response="safe"))
        parts.append(replace(behaviour, name=f"{behaviour.name}, unsafe", response="unsafe"))
    parts.append(general)
    template = examples.config.model.template
    fingerprint = fingerprint_of(
        model_fingerprint(examples.model), template, *names, *(part.fingerprint for part in parts)
    )
    examples.own_folder.mkdir(parents=True, exist_ok=True)
    unfinished = Unfinished(examples.own_folder / "texts.unfinished", fingerprint)
    texts = read_texts(examples.model, neurons, parts, template=template, unfinished=unfinished)
    unfinished.discard()
    ends = np.cumsum([len(part) for part in parts]).tolist()
    lists = [texts[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return _Texts((first, second, general), (lists[0], lists[2]), (lists[1], lists[3]), lists[4])


@dataclass(frozen=True)
class _FirstWords:
    """The first tokens of a behaviour's answers, and how far each neuron writes the safe ones above the unsafe ones."""

    behaviour: str
    safe: frozenset[str]
    unsafe: frozenset[str]
    differences: PerNeuron

    def of(self, neuron: Neuron) -> float:
        site, index = neuron
        return float(self.differences[site][index])

    def rank(self, neuron: Neuron) -> float:
        """Share of the layer's neurons with a difference at least as large."""
        sizes = self.differences[neuron[0]].abs()
        return float((sizes >= sizes[neuron[1]]).float().mean())


def _first_words(examples: ArmExamples, behaviour: Behaviour) -> _FirstWords:
    tokenizer = native_tokenizer(examples.model)
    safe, unsafe = [], []
    for example in behaviour.examples:
        answers = [example.answers["safe"], example.answers["unsafe"]]
        encoded = encode(tokenizer, example.prompt, answers, template=examples.config.model.template)
        safe.append(encoded.answers[0][0])
        unsafe.append(encoded.answers[1][0])
    differences = logit_differences(examples.model, safe, unsafe)
    words = [frozenset(_plain(str(tokenizer.decode([token]))) for token in tokens) for tokens in (safe, unsafe)]
    return _FirstWords(behaviour.name, words[0], words[1], differences)


def _plain(token: str) -> str:
    return token.strip().lower()


def _n_raised(look: Written, words: Sequence[_FirstWords]) -> tuple[int, int]:
    """The number of raised tokens that begin a safe answer of either behaviour, and an unsafe one."""
    raised = [_plain(token) for token, _ in look.promoted]
    safe = frozenset[str]().union(*(each.safe for each in words))
    unsafe = frozenset[str]().union(*(each.unsafe for each in words))
    return sum(token in safe for token in raised), sum(token in unsafe for token in raised)


def _furthest(text: TextActivations) -> tuple[str, float]:
    """The text up to the token on which the neuron is furthest from 0, and its activation there."""
    position = max(range(len(text.tokens)), key=lambda place: abs(text.activations[place][0]))
    context = "".join(text.tokens[max(0, position - N_CONTEXT) : position + 1])
    return context.replace("\n", " "), text.activations[position][0]


def _changed(neurons: Sequence[Neuron], gates: Gates, scores: Sequence[Scores]) -> list[ChangedNeuron]:
    both, damage = [gains_of(each) for each in scores[:2]], damage_of(scores[2]).diagonal
    changed = []
    for site, index in neurons:
        name = name_of((site, index), len(gates.multipliers[site]))
        neuron = ChangedNeuron(
            layer=name.layer,
            index=name.index,
            owner=name.owner,
            multiplier=float(gates.multipliers[site][index]),
            gain={gains.behaviour: float(gains.mean[site][index]) for gains in both},
            error={gains.behaviour: float(gains.error[site][index]) for gains in both},
            damage=float(damage[site][index]),
        )
        changed.append(neuron)
    return changed
