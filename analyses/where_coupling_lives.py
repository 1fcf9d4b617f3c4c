"""Where do coupled units sit, what do they read and write, do both behaviours pull alike, and would new data find them?

    python analyses/where_coupling_lives.py --out runs/where

on the demo model (--model for another). Shares by layer and, for weights, by matrix; the strongest coupled neurons with
the text on which they fire most and the tokens that their output direction raises and lowers; signs of their effects;
overlap of selections from separate draws of the examples. Resumes; writes results.json, report.html and figures.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from math import prod
from pathlib import Path

import numpy as np
import tyro
from tyro.conf import OmitArgPrefixes

from dean_interp import Behaviour, InputError, Scores, Selection, load_behaviour
from dean_interp.circuits.lens import written
from dean_interp.circuits.neuron import TextActivations, strongest_neurons, top_texts
from dean_interp.cli.ending import command, script
from dean_interp.data.examples import draw
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Unit
from dean_interp.progress import progress_bar
from dean_interp.report.figures import shares_by_layer
from dean_interp.report.html import write_arms_report
from dean_interp.selection.coupling import Coupling, couple, opposite_sign
from dean_interp.selection.stability import chance_overlap, jaccard
from dean_interp.selection.strata import strata
from dean_interp.study import day
from dean_interp.study.arm_results import ArmResults
from dean_interp.study.config import StudyConfig
from dean_interp.study.method import score
from dean_interp.study.run_folder import owned
from dean_interp.study.settings import AnswerConfig, CalibrationConfig
from dean_interp.study.study_data import test_sets

N_CONTEXT = 8
"""Tokens that are shown before the one on which a neuron fires most."""


def _default_study() -> StudyConfig:
    return StudyConfig(calibration=CalibrationConfig(n_calibration=48), answers=AnswerConfig(n_answers=0))


@dataclass(frozen=True)
class Where:
    """Look at the coupled units of a model."""

    out: Path = Path("runs/where")
    """The run folder."""
    n_draws: int = 3
    """Number of separate draws of the examples, each scored by itself."""
    n_neurons: int = 8
    """Number of the strongest neurons that are shown with what they read and write."""
    quick: bool = False
    """Run two draws."""
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=_default_study)


def run(given: Where) -> ArmResults:
    """Score every draw, couple, look."""
    if given.quick:
        given = dataclasses.replace(given, n_draws=2)
    config = given.study
    config.check()
    # The draws of each behaviour; then the behaviours of each draw.
    by_behaviour = [separate_draws(source, config, given.n_draws) for source in config.data.sources]
    draws = list(zip(*by_behaviour, strict=True))
    tests, _ = test_sets(config.data, list(chain(*by_behaviour)))
    # Where a folder lies is no setting of what is in it.
    with owned(given.out, dataclasses.replace(given, out=Path()), [*chain(*by_behaviour), *tests]):
        model = day.of_evaluation(config.model, given.out, ()).load()
        scores = scores_of_draws(given, model, draws)
        conclusions, panels, counts = [], {}, []
        for unit in config.unit:
            couplings = [coupling_of(of_draw, config, unit) for of_draw in scores]
            of_unit = [behaviour.of(unit) for behaviour in scores[0]]
            coupling = couplings[0]
            conclusions += [where(unit, coupling, model, of_unit), stability(unit, couplings)]
            panels[unit] = {
                "in both tops": shares_of_layers(coupling.both),
                "coupled": shares_of_layers(coupling.coupled),
            }
            counts.append(f"{len(coupling.both):,} {unit}s in both tops, {len(coupling.coupled):,} coupled")
            if unit == "neuron":
                conclusions.append(signs(coupling.coupled, of_unit))
                conclusions += looked_at(
                    given=given, model=model, coupled=coupling.coupled, scores=of_unit, tests=tests
                )
        results = ArmResults(
            title=f"Where the coupling lives in {config.model.title}",
            model=config.model.title,
            facts=facts(given),
            conclusions=tuple(conclusions),
            arms={},
        )
        picture = shares_by_layer(panels, n="; ".join(counts))
        page = write_arms_report(results, given.out, {"Coupled units by layer": picture})
        print(results, f"page: {page.resolve()}", sep="\n\n")
        return results


def separate_draws(source: str, config: StudyConfig, n_draws: int) -> list[Behaviour]:
    """Draws of one behaviour that share no example. Raises `InputError` where it has too few."""
    n = config.calibration.n_calibration
    whole = load_behaviour(source, n_examples=None, response=config.calibration.response)
    if n_draws * n > len(whole):
        raise InputError(f"{n_draws} draws of {n} examples are {n_draws * n}; '{whole.name}' has {len(whole)}")
    drawn = draw(whole, n_draws * n, seed=config.data.seed)
    parts = [drawn.examples[start : start + n] for start in range(0, n_draws * n, n)]
    return [dataclasses.replace(drawn, examples=part) for part in parts]


def scores_of_draws(given: Where, model: HookedModel, draws: Sequence[Sequence[Behaviour]]) -> list[list[Scores]]:
    """The scores of every draw, from its folder or computed and kept there."""
    scores = []
    for number, behaviours in enumerate(progress_bar(draws, desc="draws", unit="draw")):
        folder = given.out / f"draw_{number + 1}"
        folder.mkdir(exist_ok=True)
        # One pass gives the scores and the signs of the same effects.
        scores.append([score(model, behaviour, given.study, folder, also=("signed",)) for behaviour in behaviours])
    return scores


def coupling_of(scores: Sequence[Scores], config: StudyConfig, unit: Unit) -> Coupling:
    """What one draw couples, of one kind of unit."""
    return couple(*(behaviour.of(unit) for behaviour in scores), fraction=config.fraction(unit))


def shares_of_layers(selection: Selection) -> list[float]:
    """The selected units of each layer, as shares of the layer's."""
    sizes: dict[int, int] = {}
    for site, shape in selection.shapes.items():
        sizes[site.layer] = sizes.get(site.layer, 0) + prod(shape)
    counts = selection.layer_counts()
    return [counts.get(layer, 0) / size for layer, size in sorted(sizes.items())]


def where(unit: Unit, coupling: Coupling, model: HookedModel, scores: Sequence[Scores]) -> str:
    """How many are coupled, beside chance; in which third of the layers; for weights in which matrix."""
    matched = strata(model, scores, general=scores[2])
    floor = chance_overlap(coupling.first, coupling.second, matched, excluded=coupling.general)
    n_layers, n_coupled = model.cfg.n_layers, len(coupling.coupled)
    thirds, parts = np.zeros(3), {}
    for site, n in coupling.coupled.counts().items():
        thirds[3 * site.layer // n_layers] += n
        parts[site.part] = parts.get(site.part, 0) + n
    by_third = ", ".join(f"{share:.0%}" for share in thirds / max(n_coupled, 1))
    by_matrix = ""
    if unit == "weight":
        by_matrix = "; by matrix " + ", ".join(f"{name} {n / n_coupled:.0%}" for name, n in parts.items())
    return (
        f"{n_coupled} {unit}s are coupled, where units alike in activation, size and general score would give "
        f"{floor.expected:.0f} [{floor.low:.0f}, {floor.high:.0f}] by chance. In the first, middle and last third of "
        f"the layers: {by_third}{by_matrix}."
    )


def stability(unit: Unit, couplings: Sequence[Coupling]) -> str:
    """Overlap between draws, of the coupled units and of one behaviour's top."""
    pairs = list(combinations(couplings, 2))
    overlaps = [jaccard(first.coupled, second.coupled) for first, second in pairs]
    of_tops = [jaccard(first.first, second.first) for first, second in pairs]
    in_all = couplings[0].coupled
    for coupling in couplings[1:]:
        in_all = in_all & coupling.coupled
    return (
        f"Between separate draws of the examples coupled {unit}s overlap by {np.mean(overlaps):.2f} (Jaccard; "
        f"{len(pairs)} pairs, {min(overlaps):.2f} to {max(overlaps):.2f}; one behaviour's top: "
        f"{np.mean(of_tops):.2f}); {len(in_all)} are in every draw."
    )


def signs(coupled: Selection, scores: Sequence[Scores]) -> str:
    """Whether silencing a coupled neuron would move both behaviours' losses the same way."""
    n_opposite = len(opposite_sign(coupled, scores[0], scores[1]))
    return (
        f"Of the {len(coupled)} coupled neurons {len(coupled) - n_opposite} push both behaviours' losses the same way "
        f"and {n_opposite} in opposite ways: only these trade one behaviour for the other, to first order."
    )


def looked_at(
    given: Where, model: HookedModel, coupled: Selection, scores: Sequence[Scores], tests: Sequence[Behaviour]
) -> list[str]:
    """The strongest coupled neurons: what they fire on, and what they write."""
    neurons = strongest_neurons(coupled, scores[0], scores[1], n_neurons=given.n_neurons)
    texts = top_texts(model, neurons, tests, n_texts=sum(map(len, tests)), template=given.study.model.template)
    sentences = []
    for column, direction in enumerate(written(model, neurons)):
        text, position = strongest_position(texts, column)
        context = "".join(text.tokens[max(0, position - N_CONTEXT) : position + 1])
        activation = text.activations[position][column]
        sentences.append(f"{direction}. It fires most at the end of: …{context} (activation {activation:.1f}).")
    return sentences


def strongest_position(texts: Sequence[TextActivations], column: int) -> tuple[TextActivations, int]:
    """The text and the position at which the neuron of that column is furthest from 0; of equals the first."""
    places = [(text, position) for text in texts for position in range(len(text.activations))]
    return max(places, key=lambda place: abs(place[0].activations[place[1]][column]))


def facts(given: Where) -> dict[str, str]:
    """How it was done."""
    n = given.study.calibration.n_calibration
    return {
        "examples": f"{n} of each behaviour a draw, {given.n_draws} draws that share none",
        "command": command(),
    }


if __name__ == "__main__":
    script(lambda: run(tyro.cli(Where, description=__doc__)))
