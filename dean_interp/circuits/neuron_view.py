"""The record of one neuron: where it fires, how it scores, what it writes, what happens without it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float

from dean_interp.circuits.lens import Written, written
from dean_interp.circuits.neuron import TextActivations, of_neuron, read_texts
from dean_interp.circuits.neuron_scores import NeuronScores, neuron_scores
from dean_interp.data.examples import Behaviour
from dean_interp.editing.ablation import ablate
from dean_interp.errors import refuse_below_one
from dean_interp.evaluation.lines import Line, compare
from dean_interp.evaluation.measure import measure
from dean_interp.evaluation.measurement import Measurement
from dean_interp.evaluation.outcomes import likelihoods
from dean_interp.models.load import HookedModel
from dean_interp.models.neuron_names import Neuron, name_of
from dean_interp.models.scored_prompts import scored_prompts
from dean_interp.models.sizes import site_shape
from dean_interp.models.tokens import Template
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.resume import Unfinished
from dean_interp.scoring.scores import Scores
from dean_interp.selection.selection import Selection

N_BINS = 40


@dataclass(frozen=True)
class NeuronView:
    """What there is to know of one neuron; `report.neuron_page` shows it."""

    name: str
    """`L17.1042`: layer 17, neuron 1042 of it. `L17.E5.42`: neuron 42 of its expert 5."""
    scores: NeuronScores | None
    """Its score and its rank in its layer, for each behaviour that was scored."""
    n_neurons: int
    """Neurons of a layer (of all its routed experts, or of its shared one): ranks go from 1 to this number."""
    held_by: Mapping[str, bool]
    """For each selection that was given, by name: whether it holds the neuron."""
    written: Written
    bins: tuple[float, ...]
    """Edges of the bins of `activations`."""
    activations: Mapping[str, tuple[int, ...]]
    """For each behaviour, how many tokens have an activation in each bin. Of a routed expert's neuron: those tokens
    that are sent to the expert."""
    firing: Mapping[str, float]
    """For each behaviour, the mean size of the activation over all tokens: 0 where the expert does not see one."""
    texts: tuple[TextActivations, ...]
    """The texts on which it fires most (prompts with their scored answers); one column of activations."""
    effect: tuple[Line, ...]
    """Margins, losses and KL on the test examples with this neuron alone silenced, paired by prompt. Intervals are
    clustered by topic, else by prompt."""
    routed: Mapping[str, float] = field(default_factory=dict)
    """For each behaviour, the share of the tokens that are sent to the neuron's expert; empty where all are."""
    n_prompts: Mapping[str, int] = field(default_factory=dict)
    """For each behaviour, the number of texts that were read."""


@own_torch_settings()
def view_neuron(
    model: HookedModel,
    neuron: Neuron,
    examples: Sequence[Behaviour],
    *,
    scores: Sequence[Scores] = (),
    selections: Mapping[str, Selection] | None = None,
    n_texts: int = 8,
    template: Template = "chat",
    answer_tokens: int | None = None,
) -> NeuronView:
    """Look at one neuron. `neuron_page` shows the same as a page.

    Args:
        neuron: its site and index; `parse_neuron("L17.1042", model)` makes them from a name.
        examples: behaviours whose texts it is shown on. Those of the test split are measured with the neuron silenced,
            too; calibration splits and scored prompts are not.
        scores: scores of each behaviour, for its ranks.
        selections: selections by name; the record says which hold the neuron.
        n_texts: how many texts are kept, those with the largest activations.
        answer_tokens: how many first tokens of each answer are measured; None takes all.

    Raises:
        InputError: no examples, a site or index that the model does not have, scores without neurons, a number of texts
            below 1.
    """
    refuse_below_one(n_texts=n_texts)
    readings = neuron_readings(model, [neuron], examples, template=template, answer_tokens=answer_tokens)
    return view_of_reading(model, readings, 0, scores=scores, selections=selections, n_texts=n_texts)


@dataclass(frozen=True)
class NeuronReadings:
    """What one pass over examples says of several neurons, and the measurement that their effects are compared with."""

    neurons: tuple[Neuron, ...]
    examples: tuple[Behaviour, ...]
    texts: tuple[TextActivations, ...]
    """Every text, with one column of activations a neuron."""
    tests: tuple[Behaviour, ...]
    """The examples that may be measured."""
    original: Measurement | None
    """The unchanged model on them; None where there are none."""
    template: Template
    answer_tokens: int | None


@own_torch_settings()
def neuron_readings(
    model: HookedModel,
    neurons: Sequence[Neuron],
    examples: Sequence[Behaviour],
    *,
    template: Template = "chat",
    answer_tokens: int | None = None,
    unfinished: Unfinished | None = None,
) -> NeuronReadings:
    """Read several neurons on examples, all in one pass, and measure the unchanged model once.

    Args:
        neurons, examples, template, answer_tokens: as of `view_neuron`.
        unfinished: keeps the activations of the finished batches; a killed call goes on from there.
    """
    texts = read_texts(model, neurons, examples, template=template, unfinished=unfinished)
    scored = scored_prompts(model)
    tests = []
    for behaviour in examples:
        is_for_scoring = behaviour.split == "calibration"
        if not is_for_scoring and not behaviour.prompts_among(scored):
            tests.append(behaviour)
    original = None
    if tests:
        original = measure(model, tests, template=template, answer_tokens=answer_tokens)
    return NeuronReadings(
        neurons=tuple(neurons),
        examples=tuple(examples),
        texts=tuple(texts),
        tests=tuple(tests),
        original=original,
        template=template,
        answer_tokens=answer_tokens,
    )


@own_torch_settings()
def view_of_reading(
    model: HookedModel,
    readings: NeuronReadings,
    column: int,
    *,
    scores: Sequence[Scores] = (),
    selections: Mapping[str, Selection] | None = None,
    n_texts: int = 8,
) -> NeuronView:
    """The record of one of the neurons that were read, with the effect of silencing it alone.

    Args:
        column: the neuron's place among those that were read.
        scores, selections, n_texts: as of `view_neuron`.
    """
    neuron = readings.neurons[column]
    texts = of_neuron(readings.texts, column)
    view = view_from_texts(model, neuron, texts, scores=scores, selections=selections, n_texts=n_texts)
    # In the order in which the examples were given.
    names = [behaviour.name for behaviour in readings.examples]
    return replace(
        view,
        activations={name: view.activations[name] for name in names},
        firing={name: view.firing[name] for name in names},
        routed={name: view.routed[name] for name in names if view.routed},
        n_prompts={name: view.n_prompts[name] for name in names},
        effect=tuple(_effect_alone(model, neuron, readings)),
    )


def view_from_texts(
    model: HookedModel,
    neuron: Neuron,
    texts: Sequence[TextActivations],
    *,
    scores: Sequence[Scores] = (),
    selections: Mapping[str, Selection] | None = None,
    n_texts: int = 8,
) -> NeuronView:
    """The record of a neuron on texts that were read before. What happens without it is not measured.

    Args:
        texts: all texts with this neuron's activations alone, those on which it fires most first
            (`circuits.neuron.of_neuron`).
        scores, selections, n_texts: as of `view_neuron`.
    """
    (n_neurons,) = site_shape(model, neuron[0])
    by_behaviour: dict[str, np.ndarray] = {}
    routed: dict[str, np.ndarray] = {}
    # The activations at the tokens that the neuron sees: of a routed expert's neuron those sent to its expert.
    seen: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(text.behaviour for text in texts):
        by_behaviour[name] = _token_activations(texts, name)
        seen[name] = by_behaviour[name]
        if texts[0].routed:
            routed[name] = _are_routed(texts, name)
            seen[name] = by_behaviour[name][routed[name]]
    held_by: dict[str, bool] = {}
    for name, selection in (selections or {}).items():
        held_by[name] = _holds(selection, neuron)
    all_seen = np.concatenate(list(seen.values()))
    bins = np.histogram_bin_edges(all_seen, N_BINS)
    counts: dict[str, tuple[int, ...]] = {}
    for name, values in seen.items():
        in_bins, _ = np.histogram(values, bins)
        counts[name] = tuple(in_bins.tolist())
    return NeuronView(
        name=str(name_of(neuron, n_neurons)),
        scores=_scores(neuron, scores),
        n_neurons=n_neurons,
        held_by=held_by,
        written=written(model, [neuron])[0],
        bins=tuple(bins.tolist()),
        activations=counts,
        firing={name: float(np.abs(values).mean()) for name, values in by_behaviour.items()},
        texts=tuple(texts[:n_texts]),
        effect=(),
        routed={name: float(values.mean()) for name, values in routed.items()},
        n_prompts=dict(Counter(text.behaviour for text in texts)),
    )


def _scores(neuron: Neuron, scores: Sequence[Scores]) -> NeuronScores | None:
    """The neuron's scores and ranks; None where no scores are given."""
    if not scores:
        return None
    return neuron_scores(neuron, [behaviour_scores.of("neuron") for behaviour_scores in scores])


def _holds(selection: Selection, neuron: Neuron) -> bool:
    """Whether a selection holds the neuron."""
    site, index = neuron
    indices = selection.units.get(site, torch.tensor([]))
    return index in indices


def _token_activations(texts: Sequence[TextActivations], behaviour: str) -> Float[np.ndarray, " token"]:
    """The one neuron's activations at all tokens of a behaviour's texts."""
    parts = []
    for text in texts:
        if text.behaviour == behaviour:
            parts.append([row[0] for row in text.activations])
    return np.concatenate(parts)


def _are_routed(texts: Sequence[TextActivations], behaviour: str) -> Bool[np.ndarray, " token"]:
    """Whether the tokens of a behaviour's texts were sent to the neuron's expert."""
    are_routed = []
    for text in texts:
        if text.behaviour == behaviour:
            are_routed += [row[0] for row in text.routed]
    return np.array(are_routed)


def _effect_alone(model: HookedModel, neuron: Neuron, readings: NeuronReadings) -> list[Line]:
    """What silencing the neuron alone changes on the examples that may be measured; nothing where there are none."""
    if readings.original is None:
        return []
    site, index = neuron
    units = {site: torch.tensor([index])}
    shapes = {site: site_shape(model, site)}
    alone = Selection(units, shapes)
    with ablate(model, alone):
        silenced = measure(
            model,
            readings.tests,
            original=readings.original,
            template=readings.template,
            answer_tokens=readings.answer_tokens,
        )
    before = likelihoods(readings.original, readings.tests)
    after = likelihoods(silenced, readings.tests)
    return compare(before, after)
