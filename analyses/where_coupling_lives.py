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
from dean_interp.study.folder import owned
from tyro.conf import OmitArgPrefixes

from dean_interp import (
    Behaviour,
    InputError,
    ScoringConfig,
    Selection,
    couple,
    importance,
    load_behaviour,
    load_model,
)
from dean_interp.circuits.lens import written
from dean_interp.circuits.neuron import strongest_neurons, top_texts
from dean_interp.cli.ending import script
from dean_interp.data.examples import draw
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Unit
from dean_interp.progress import progress_bar
from dean_interp.report.figures import shares_by_layer
from dean_interp.report.html import write_arms_report
from dean_interp.scoring.scores import Scores
from dean_interp.selection.coupling import Coupling, opposite_sign
from dean_interp.selection.stability import chance_overlap, jaccard
from dean_interp.selection.strata import strata
from dean_interp.study.arms import ArmResults, command
from dean_interp.study.config import StudyConfig
from dean_interp.study.run import score_into


@dataclass(frozen=True)
class Where:
    """Look at the coupled units of a model."""

    out: Path = Path("runs/where")
    n_draws: int = 3
    """Separate draws of the examples, each scored by itself."""
    n_neurons: int = 8
    """Of the strongest, shown with what they read and write."""
    quick: bool = False
    """Two draws."""
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=lambda: StudyConfig(n_calibration=48, n_answers=0))


def run(given: Where) -> ArmResults:
    """Score every draw, couple, look."""
    config, n_draws = given.study, 2 if given.quick else given.n_draws
    config.check()
    drawn = [separate(source, config, n_draws) for source in config.sources]
    tests, _ = config.tests([one for some in drawn for one in some])
    with owned(given.out, {"study": dataclasses.asdict(config), "n_draws": n_draws}, [*chain(*drawn), *tests]):
        model = load_model(config.model, device=config.device, dtype=config.dtype)
        scores = []
        for i, behaviours in enumerate(
            progress_bar(zip(*drawn, strict=True), total=n_draws, desc="draws", unit="draw")
        ):
            folder = given.out / f"draw_{i + 1}"
            folder.mkdir(exist_ok=True)
            scores.append([score_into(folder, model, one, config) for one in behaviours])
        said, panels = [], {}
        for unit in config.units:
            found = [couple(*(one.of(unit) for one in some), fraction=config.fraction(unit)) for some in scores]
            own = [one.of(unit) for one in scores[0]]
            said += [where(unit, found[0], model, own), stability(unit, found)]
            panels[unit] = layers(found[0].coupled, found[0].both)
            if unit == "neuron":
                said += [signs(model, found[0].coupled, [some[0] for some in drawn[:2]], config)]
                said += looked_at(given, model, found[0].coupled, own, tests)
        facts = {"examples": f"{config.n_calibration} of each behaviour a draw, {n_draws} draws that share none",
                 "command": command()}  # fmt: skip
        title = f"Where the coupling lives in {config.model}"
        results = ArmResults(title, config.model, facts, tuple(said), {})
        figure = shares_by_layer(panels)
        page = write_arms_report(results, given.out, {"Coupled units by layer": figure})
        print(results, f"page: {page.resolve()}", sep="\n\n")
        return results


def separate(source: str, config: StudyConfig, n_draws: int) -> list[Behaviour]:
    """Draws of one behaviour that share no example."""
    whole = load_behaviour(source, n_examples=None, response=config.response)
    n = config.n_calibration
    if n_draws * n > len(whole):
        raise InputError(f"{n_draws} draws of {n} examples are {n_draws * n}; '{whole.name}' has {len(whole)}")
    drawn = draw(whole, n_draws * n, seed=config.seed)
    return [dataclasses.replace(drawn, examples=drawn.examples[i * n : (i + 1) * n]) for i in range(n_draws)]


def layers(chosen: Selection, both: Selection) -> dict[str, list[float]]:
    """By layer: units in both tops, and of these the coupled, as shares of the layer's."""
    sizes: dict[int, int] = {}
    for site, shape in chosen.shapes.items():
        sizes[site.layer] = sizes.get(site.layer, 0) + prod(shape)
    return {
        name: [one.layer_counts().get(layer, 0) / size for layer, size in sorted(sizes.items())]
        for name, one in (("in both tops", both), ("coupled", chosen))
    }


def where(unit: Unit, found: Coupling, model: HookedModel, scores: Sequence[Scores]) -> str:
    """How many, beside chance; in which third of the layers; for weights in which matrix."""
    floor = chance_overlap(found.first, found.second, strata(model, scores, general=scores[2]), excluded=found.general)
    n_layers, n = model.cfg.n_layers, len(found.coupled)
    thirds, parts = np.zeros(3), {}
    for site, units in found.coupled.units.items():
        thirds[3 * site.layer // n_layers] += len(units)
        parts[site.part] = parts.get(site.part, 0) + len(units)
    shares = ", ".join(f"{name} {count / n:.0%}" for name, count in parts.items())
    by_part = "" if unit == "neuron" else f"; by matrix {shares}"
    return (
        f"{n} {unit}s are coupled, where units alike in activation, size and general score would give "
        f"{floor.expected:.0f} [{floor.low:.0f}, {floor.high:.0f}] by chance. In the first, middle and last third of "
        f"the layers: {', '.join(f'{share:.0%}' for share in thirds / max(n, 1))}{by_part}."
    )


def stability(unit: Unit, found: Sequence[Coupling]) -> str:
    """Overlap between draws, of the coupled and of one behaviour's top."""
    pairs = list(combinations(found, 2))
    coupled = [jaccard(one.coupled, other.coupled) for one, other in pairs]
    tops = [jaccard(one.first, other.first) for one, other in pairs]
    always = found[0].coupled
    for one in found[1:]:
        always = always & one.coupled
    return (
        f"Between separate draws of the examples coupled {unit}s overlap by {np.mean(coupled):.2f} (Jaccard; "
        f"{len(pairs)} pairs, {min(coupled):.2f} to {max(coupled):.2f}; one behaviour's top: {np.mean(tops):.2f}); "
        f"{len(always)} are in every draw."
    )


def signs(model: HookedModel, coupled: Selection, behaviours: Sequence[Behaviour], config: StudyConfig) -> str:
    """Whether silencing a coupled neuron would move both behaviours' losses the same way."""
    how = ScoringConfig(signed=True, template=config.template, batch_tokens=config.score_tokens)
    first, second = (importance(model, one, unit="neuron", config=how) for one in behaviours)
    opposite = len(opposite_sign(coupled, first, second))
    return (
        f"Of the {len(coupled)} coupled neurons {len(coupled) - opposite} push both behaviours' losses the same way "
        f"and {opposite} in opposite ways: only these trade one behaviour for the other, to first order."
    )


def looked_at(
    given: Where, model: HookedModel, coupled: Selection, scores: Sequence[Scores], tests: Sequence[Behaviour]
) -> list[str]:
    """The strongest coupled neurons: what they fire on, and what they write."""
    neurons = strongest_neurons(coupled, scores[0], scores[1], n_neurons=given.n_neurons)
    found = []
    texts = top_texts(model, neurons, tests, n_texts=sum(map(len, tests)), template=given.study.template)
    for column, one in enumerate(written(model, neurons)):
        value, text, at = max(
            ((row[column], text, at) for text in texts for at, row in enumerate(text.activations)),
            key=lambda place: abs(place[0]),
        )
        context = "".join(text.tokens[max(0, at - 8) : at + 1])
        found.append(f"{one}. It fires most at the end of: …{context} (activation {value:.1f}).")
    return found


if __name__ == "__main__":
    script(lambda: run(tyro.cli(Where, description=__doc__)))
