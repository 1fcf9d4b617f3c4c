"""The page of what edits are made of: where, how stable, beside each other; the strongest neurons with their pages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dean_interp.arms.composition_results import Composition, LookedAt
from dean_interp.arms.composition_text import headline, stories
from dean_interp.evaluation.line_table import p_text
from dean_interp.files import write_json, write_text
from dean_interp.report.composition_figures import shares_by_depth
from dean_interp.report.page import rendered
from dean_interp.report.pictures import figure_element, write_picture
from dean_interp.study.results import RESULTS_FILE

FIGURE = "Where the edits are"


@dataclass(frozen=True)
class Table:
    """A table of text; the first cell of a row may be a link."""

    head: tuple[str, ...]
    rows: list[list[str]]
    note: str = ""
    links: tuple[str, ...] = ()
    is_text: bool = False
    """Whether cells hold text that runs on."""


def write_composition(found: Composition, folder: Path, others: Mapping[str, Composition]) -> Path:
    """Write `results.json`, `report.html` and the picture (SVG, CSV) into the folder; return the page's path.

    Args:
        others: what was found elsewhere, by the name of its folder, for the figure.
    """
    write_json(folder / RESULTS_FILE, found)
    compared = {found.model: found}
    for name, other in others.items():
        # A model may be looked at twice, on other data.
        label = other.model if other.model not in compared else f"{other.model}, {name}"
        compared[label] = other
    picture = shares_by_depth(compared)
    write_picture(picture, folder, "where", FIGURE)
    page = rendered(
        "composition.html.j2",
        found=found,
        figure=figure_element(picture, FIGURE),
        headline=headline(found),
        sections={
            "Where": ([], [_spreads(found)]),
            "How stable": ([], [_agreements(found)]),
            "Beside each other": ([], [_overlaps(found), _effects(found), _silenced(found)]),
            "What the strongest read and write": (
                stories(found),
                [_strongest(found), _written(found), _counted(found)],
            ),
        },
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _spreads(found: Composition) -> Table:
    rows = []
    for name, spread in found.spreads.items():
        rows.append(
            [
                name,
                str(spread.layers_for_half),
                str(spread.layers_for_most),
                str(spread.neurons_for_half),
                str(spread.neurons_for_most),
                f"{spread.effective_neurons:.0f}",
                f"{spread.depth:.2f}",
            ]
        )
    head = ("edit or set", "layers: half", "nine tenths", "neurons: half", "nine tenths", "equal neurons", "depth")
    return Table(head, rows, f"Of {found.n_layers} layers and {found.n_neurons} neurons.")


def _agreements(found: Composition) -> Table:
    rows = []
    for name, agreements in found.agreements.items():
        shared = [agreement.shared for agreement in agreements]
        overlaps = [each.jaccard for each in shared]
        correlations = [each.correlation for each in agreements if each.correlation is not None]
        sizes = [each.n_first for each in shared] + [each.n_second for each in shared]
        rows.append(
            [
                name,
                str(len(shared)),
                f"{np.mean(sizes):.0f}",
                f"{np.mean(overlaps):.2f} ({min(overlaps):.2f} to {max(overlaps):.2f})",
                f"{np.mean([each.jaccard_by_chance for each in shared]):.3f}",
                f"{np.mean(correlations):.2f}" if correlations else "",
            ]
        )
    head = ("made twice, from", "pairs", "neurons", "overlap (Jaccard)", "by chance", "correlation")
    note = (
        "By chance: random sets of the same sizes in the same layers. Correlation: Spearman's, of the changes of all "
        "neurons. Draws share topics, and so do halves of the examples: both overlap more than new topics would."
    )
    return Table(head, rows, note)


def _overlaps(found: Composition) -> Table:
    rows = []
    for name, shared in found.overlaps.items():
        rows.append(
            [
                name,
                f"{shared.n_first} and {shared.n_second}",
                str(shared.n_both),
                f"{shared.expected:.1f}",
                p_text(shared.p),
                f"{shared.jaccard:.3f}",
            ]
        )
    note = (
        "By chance: hypergeometric within layers. p: one-sided, of as many shared neurons, at least 0.001. "
        "Neurons that are much active are in many sets: that is in the overlap, too."
    )
    return Table(("sets", "neurons", "shared", "by chance", "p", "Jaccard"), rows, note)


def _effects(found: Composition) -> Table:
    rows = []
    for name, effect in found.effects.items():
        p_values = {"both": f", p {p_text(effect.p_both)}", "neither": f", p {p_text(effect.p_neither)}"}
        shares = []
        for kind, share in effect.when_silenced.items():
            shares.append(f"{share:.0%} ({effect.by_chance[kind]:.0%}{p_values.get(kind, '')})")
        rows.append([name, str(effect.n), f"{effect.share_of_rise:.1%}", str(effect.n_lowered), *shares])
    first, second = found.behaviours
    kinds = ("raises both", f"{first} alone", f"{second} alone", "neither")
    note = (
        "Share of the neurons whose silencing raises both margins, one, or neither, to first order; in brackets, "
        "random neurons of the same layers; p: one-sided, of as many such neurons. Silenced by sign are those that "
        "raise both, by definition. Lowered: by gates, which raise the others."
    )
    return Table(("set", "neurons", "of the rise", "lowered", *kinds), rows, note)


def _silenced(found: Composition) -> Table:
    rows = []
    for name, effect in found.effects.items():
        changes = []
        for behaviour, change in effect.silencing_all.items():
            changes.append(f"{change} ({effect.silencing_chance[behaviour]:+.3f})")
        rows.append([name, *changes])
    note = (
        "Change of each margin when all neurons of a set are silenced, to first order, nats per token, with its "
        "interval by topic; in brackets, random neurons of the same layers. On the scored examples, which chose the "
        "sets: of gates and of silencing by sign it is far too large. Nothing was measured."
    )
    return Table(("all silenced", *found.behaviours), rows, note)


def _strongest(found: Composition) -> Table:
    rows = []
    for looked in found.neurons:
        neuron = looked.neuron
        rows.append(
            [
                neuron.name,
                f"{looked.share_of_rise:.2%}",
                f"{neuron.multiplier:.2f}",
                *(f"{gain:+.4f} ± {neuron.error[name]:.4f}" for name, gain in neuron.gain.items()),
                f"{neuron.damage:.2g}",
                *(_first_words(looked, name) for name in found.behaviours),
            ]
        )
    gains = [f"gain, {name}" for name in found.behaviours]
    words = [f"first words, {name}" for name in found.behaviours]
    note = (
        "Gains: nats per token for a gate that grows by 1, with their standard errors by topic. Damage: F, twice the "
        f"KL that a change of 1 costs alone. Multiplier: {found.facts['multipliers']}. First words: "
        "logit of the first token of safe answers less that of unsafe ones, for an activation of 1, and the share of "
        "the layer's neurons that write as large a difference."
    )
    head = ("neuron", "of the rise", "multiplier", *gains, "damage", *words)
    return Table(head, rows, note, _links(found))


def _written(found: Composition) -> Table:
    rows = []
    for looked in found.neurons:
        furthest = f"…{looked.fires_most} ({looked.activation:+.1f})"
        written = looked.written
        rows.append([looked.neuron.name, _tokens(written.promoted), _tokens(written.suppressed), furthest])
    head = ("neuron", "raises", "lowers", "is furthest from 0 at the end of")
    return Table(head, rows, "Raised and lowered: logit lens, for an activation of 1.", _links(found), is_text=True)


def _links(found: Composition) -> tuple[str, ...]:
    return tuple(looked.page for looked in found.neurons)


def _tokens(tokens: Sequence[tuple[str, float]]) -> str:
    return " ".join(repr(token) for token, _ in tokens[:5])


def _counted(found: Composition) -> Table:
    rows = []
    for looked in found.neurons:
        rows.append(
            [
                looked.neuron.name,
                f"{looked.of_behaviour.n} {looked.of_behaviour.label} (p {p_text(looked.of_behaviour.p)})",
                f"{looked.of_topic.n} {looked.of_topic.label} (p {p_text(looked.of_topic.p)})",
                *(_difference(looked, name) for name in found.behaviours),
                ", ".join(looked.held_by) or "none",
            ]
        )
    head = ["neuron", f"of its {found.n_top} top prompts", "of one topic"]
    head += [*(f"safe less unsafe, {name}" for name in found.behaviours), "is also in"]
    note = (
        "Safe less unsafe: mean activation over answers to the same prompts, with its interval by topic. p: not "
        "adjusted."
    )
    return Table(tuple(head), rows, note, _links(found))


def _difference(looked: LookedAt, behaviour: str) -> str:
    return f"{looked.safe_less_unsafe[behaviour]} (p {p_text(looked.p_safe_less_unsafe[behaviour])})"


def _first_words(looked: LookedAt, behaviour: str) -> str:
    return f"{looked.first_words[behaviour]:+.3f} ({looked.rank_of_first_words[behaviour]:.0%})"
