"""One neuron, looked at from all sides: where it fires, how it scores, what it writes, what happens without it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dean_interp.circuits.lens import Written, written
from dean_interp.circuits.neuron import Neuron, NeuronScores, TextActivations, neuron_scores, top_texts
from dean_interp.data.examples import Behaviour
from dean_interp.editing.ablation import ablate
from dean_interp.errors import InputError
from dean_interp.evaluation.lines import Line, compare
from dean_interp.evaluation.measure import measure
from dean_interp.evaluation.outcomes import likelihoods
from dean_interp.models.load import HookedModel
from dean_interp.models.scored_prompts import scored_prompts
from dean_interp.models.sites import neuron_sites
from dean_interp.models.tokens import Template
from dean_interp.scoring.scores import Scores
from dean_interp.selection.selection import Selection

N_BINS = 40


@dataclass(frozen=True)
class NeuronView:
    """What there is to know of one neuron. Every number is in the record; a page shows it (`report.neuron`)."""

    name: str
    """`L17.1042`: layer 17, neuron 1042 of it."""
    scores: NeuronScores | None
    """Its score and its rank in its layer for each behaviour that was scored."""
    n_neurons: int
    """Neurons of a layer, what the ranks are out of."""
    held_by: Mapping[str, bool]
    """Of each selection that was given: is the neuron in it?"""
    written: Written
    bins: tuple[float, ...]
    """Edges of the bins of `activations`."""
    activations: Mapping[str, tuple[int, ...]]
    """Of each behaviour, tokens by activation."""
    firing: Mapping[str, float]
    """Of each behaviour, the mean size of the activation over tokens."""
    texts: tuple[TextActivations, ...]
    """Where it fires most: prompts with their scored answers, one column of activations."""
    effect: tuple[Line, ...]
    """Margins, losses and KL on the test examples with the neuron silenced alone, paired by prompt."""


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
    """Look at one neuron.

    Args:
        neuron: its site and index; `parse_neuron("L17.1042")` makes them from a name.
        examples: behaviours whose texts it is shown on. Those of the test split are also measured with the neuron
            silenced; calibration splits and scored prompts are only read.
        scores: of each behaviour, for its ranks.
        selections: by name; is the neuron in them?
        n_texts: how many texts to keep, those with the largest activations.
        answer_tokens: measure only that many first tokens of each answer.

    Raises:
        InputError: no examples, a site or index that the model does not have, scores without neurons.
    """
    site, index = neuron
    if site not in neuron_sites(model) or not 0 <= index < model.cfg.d_mlp:
        raise InputError(
            f"no neuron L{site.layer}.{index}: this model has layers 0 to {model.cfg.n_layers - 1} of "
            f"{model.cfg.d_mlp} neurons (0 to {model.cfg.d_mlp - 1})"
        )
    if not examples:
        raise InputError("a neuron is looked at on examples: give at least one behaviour")
    texts = top_texts(model, [neuron], examples, n_texts=sum(map(len, examples)), template=template)
    by_behaviour = {
        one.name: np.concatenate([[row[0] for row in text.activations] for text in texts if text.behaviour == one.name])
        for one in examples
    }
    edges = np.histogram_bin_edges(np.concatenate(list(by_behaviour.values())), N_BINS)
    return NeuronView(
        name=f"L{site.layer}.{index}",
        scores=neuron_scores(neuron, [one.of("neuron") for one in scores]) if scores else None,
        n_neurons=model.cfg.d_mlp,
        held_by={name: index in one.units.get(site, torch.tensor([])) for name, one in (selections or {}).items()},
        written=written(model, [neuron])[0],
        bins=tuple(edges.tolist()),
        activations={name: tuple(np.histogram(some, edges)[0].tolist()) for name, some in by_behaviour.items()},
        firing={name: float(np.abs(some).mean()) for name, some in by_behaviour.items()},
        texts=tuple(texts[:n_texts]),
        effect=tuple(_silenced(model, neuron, examples, template, answer_tokens)),
    )


def _silenced(
    model: HookedModel, neuron: Neuron, examples: Sequence[Behaviour], template: Template, answer_tokens: int | None
) -> list[Line]:
    seen = scored_prompts(model)
    tests = [one for one in examples if one.split != "calibration" and not one.prompt_hashes & seen]
    if not tests:
        return []
    site, index = neuron
    alone = Selection({site: torch.tensor([index])}, {site: (model.cfg.d_mlp,)})
    how = {"template": template, "answer_tokens": answer_tokens}
    before = measure(model, tests, **how)
    with ablate(model, alone):
        after = measure(model, tests, original=before, **how)
    return compare(likelihoods(before, tests), likelihoods(after, tests))
