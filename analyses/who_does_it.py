"""Which neurons make up an edit that raises both behaviours: where, how stable, and does a look at them tell a story?

    python analyses/who_does_it.py --out runs/who

on the demo model (--model for another). Gates in closed form, neurons silenced by sign, and the paper's coupled neurons
beside each other: their layers, their overlap, whether other topics give them again, whether coupled neurons help or
hurt, and the strongest neurons with a page each. Nothing is measured, and no confirming or choosing prompt is read:
everything comes from the examples that are scored. With --scores runs/frontier it takes the scores that a comparison
left there; with --beside runs/who_other other models stand in the same figure. Resumes; writes results.json,
report.html and figures.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import tyro
from tyro.conf import OmitArgPrefixes

from dean_interp import Behaviour, InputError, Scores, Selection, couple, load_scores
from dean_interp.arms.arm import ArmExamples
from dean_interp.arms.changes import AlongGates
from dean_interp.arms.composition import (
    Edits,
    mean_spread,
    parts_of_gates,
    parts_of_set,
    rank_correlation,
    set_effect,
    shared_units,
    spread_of,
)
from dean_interp.arms.composition_results import APART, FLIPPED, NULL, RISE, Composition, LookedAt, Remade
from dean_interp.arms.composition_text import sentences
from dean_interp.arms.coupled_arms import rule_scores
from dean_interp.arms.gate_arms import CLOSED_FORM
from dean_interp.arms.sealed import sealed
from dean_interp.arms.signed_arms import SignedSilencingArm
from dean_interp.arms.strongest_neurons import alike, look_at, strongest_by_part
from dean_interp.cli.ending import command, script
from dean_interp.errors import NothingToChangeError
from dean_interp.evaluation.outcomes import clusters_of
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.progress import progress_bar
from dean_interp.report.composition_page import write_composition
from dean_interp.report.neuron_page import NeuronPage
from dean_interp.report.page import percent_of
from dean_interp.selection.gains import gains_of
from dean_interp.selection.gates import Gates, dosed
from dean_interp.selection.gating import PerNeuron, benefit_of
from dean_interp.selection.stability import n_groups, on_groups
from dean_interp.selection.strata import strata
from dean_interp.study import day
from dean_interp.study.flips import Flip, drawn_topics, random_flips
from dean_interp.study.improve_data import improve_data
from dean_interp.study.improvement import ImproveConfig
from dean_interp.study.results import load_record
from dean_interp.study.run_folder import owned
from dean_interp.study.settings import AnswerConfig

SIGNED = SignedSilencingArm()
STRONGEST = 0.01
"""Share of the neurons that is compared between draws of topics."""
N_TOP = 10
"""Prompts of each neuron whose behaviours and topics are counted."""
N_LOTS = 3
"""Lots of random neurons beside the strongest."""
RESULTS = "results.json"


@dataclass(frozen=True)
class Who:
    """Look at the neurons that edits are made of."""

    out: Path = Path("runs/who")
    """The run folder."""
    scores: Path | None = None
    """Folder of a comparison of arms whose scores are taken; nothing is written into it. Unset: score here."""
    beside: tuple[Path, ...] = ()
    """Folders of other runs that are drawn in the same figure."""
    fractions: tuple[float, ...] = (0.01, 0.03)
    """Top fractions of the coupled sets; the first is the paper's."""
    n_draws: int = 5
    """Number of draws of topics, and of divisions in halves."""
    n_neurons: int = 10
    """Number of the strongest neurons that are looked at."""
    quick: bool = False
    """Make two draws, and look at two neurons."""
    study: OmitArgPrefixes[ImproveConfig] = field(default_factory=ImproveConfig)


def run(given: Who) -> Composition:
    """What is in the run folder, else look now; the page either way."""
    if given.quick:
        given = dataclasses.replace(given, n_draws=2, n_neurons=2)
    config = dataclasses.replace(given.study, answers=AnswerConfig(n_answers=0))
    config.check()
    data = improve_data(config)
    others = {path.name: load_record(Composition, path / RESULTS, "results") for path in given.beside}
    known = scores_there(given.scores, data.scoring) if given.scores else []
    # Where a folder lies, and what is drawn beside it, is no setting of what is in it.
    settings = dataclasses.replace(given, out=Path(), scores=None, beside=())
    with owned(given.out, settings, data.all, begun=("scores/*", RESULTS)):
        if (given.out / RESULTS).is_file():
            found = load_record(Composition, given.out / RESULTS, "results")
        else:
            dated = day.of_evaluation(config.model, given.out, known)
            model = dated.load()
            examples = ArmExamples(
                model=model,
                config=dataclasses.replace(config, model=dated),
                scoring=data.scoring,
                folder=given.scores or given.out,
                own_folder=given.out / "arms",
            )
            with sealed(native_tokenizer(model), [*data.choosing, *data.confirming, *data.others]):
                found = looked_into(given, examples)
        page = write_composition(found, given.out, others)
    print(*sentences(found), f"page: {page.resolve()}", sep="\n\n")
    return found


def scores_there(folder: Path, scoring: Sequence[Behaviour]) -> list[Scores]:
    """The scores of both margins in the folder of a comparison. Raises `InputError` where some are missing."""
    paths = [folder / "scores" / f"{behaviour.name}.safetensors" for behaviour in scoring]
    rule = [folder / "rule" / "scores" / f"{behaviour.name}.safetensors" for behaviour in scoring[:3]]
    missing = [str(path) for path in (*paths, *rule) if not path.is_file()]
    if missing:
        raise InputError(f"{folder} does not hold all scores yet: {missing[0]} is missing")
    return [load_scores(path) for path in paths[:2]]


def looked_into(given: Who, examples: ArmExamples) -> Composition:
    """Everything that is counted."""
    scores, rule = examples.margin_scores, rule_scores(examples, "neuron")
    edits = edits_of(given, examples, scores, rule)
    spreads = {
        RISE: spread_of(edits.parts),
        NULL: mean_spread([spread_of(parts) for parts in parts_of_flips(given, examples, scores)]),
        "gates, size of the change": spread_of({site: change.abs() for site, change in edits.gates.changes.items()}),
    }
    spreads |= {name: spread_of(parts_of_set(selection)) for name, selection in edits.sets.items()}
    coupled = edits.sets[coupled_name(given.fractions[0])]
    n_neurons = sum(len(parts) for parts in edits.parts.values())
    n_strongest = len(coupled) or n_of_all(edits.gates)
    strongest = {f"{n_strongest} strongest gates": edits.gates.strongest(n_strongest, by=edits.parts).selection}
    compared = {**strongest, **edits.sets}
    overlaps = {}
    for first, second in combinations(compared, 2):
        # The coupled sets hold each other.
        if not first.startswith("coupled"):
            overlaps[f"{first} and {second}"] = shared_units(compared[first], compared[second])
    first, second = (behaviour.name for behaviour in examples.scoring[:2])
    neurons, controls = looked_at(given, examples, edits, scores)
    return Composition(
        model=examples.config.model.title,
        n_layers=len(examples.model.blocks),
        n_neurons=n_neurons,
        behaviours=(first, second),
        n_prompts={behaviour.name: len(behaviour) for behaviour in examples.scoring[:3]},
        n_topics={behaviour.name: len(set(clusters_of(behaviour))) for behaviour in examples.scoring[:3]},
        n_top=N_TOP,
        spreads=spreads,
        agreements=agreements(given, examples, scores, rule),
        overlaps=overlaps,
        effects={name: set_effect(each, scores, edits.gates, edits.parts) for name, each in compared.items()},
        neurons=neurons,
        controls=controls,
        facts=facts(examples, edits.dose),
    )


def edits_of(given: Who, examples: ArmExamples, scores: Sequence[Scores], rule: Sequence[Scores]) -> Edits:
    """The gates, and the sets."""
    along = gates_of_arm(examples)
    first, second = (gains_of(each) for each in scores[:2])
    benefit = benefit_of(first, second, None, CLOSED_FORM.gating)
    gates = dosed(along.direction, along.first_dose)
    sets = {SIGNED.name: signed_set(examples)}
    for fraction in given.fractions:
        sets[coupled_name(fraction)] = couple(*rule[:3], fraction=fraction).coupled
    return Edits(gates, along.first_dose, parts_of_gates(gates, benefit), sets)


def parts_of_flips(given: Who, examples: ArmExamples, scores: Sequence[Scores]) -> list[PerNeuron]:
    """The parts of gates whose labels were exchanged in random topics, in the rise of these labels."""
    topics = [list(each.clusters) for each in scores[:2]]
    # The complement of a flip makes the opposite gates, whose parts are the same.
    flips = random_flips(topics[0], topics[1], given.n_draws, seed=examples.seed)[::2]
    return [
        gates_and_parts(examples, scores, flip)[1] for flip in progress_bar(flips, desc="flipped labels", unit="flip")
    ]


def gates_and_parts(examples: ArmExamples, scores: Sequence[Scores], flip: Flip) -> tuple[Gates, PerNeuron]:
    """The gates' direction with the labels and topics of a flip, and each neuron's part in the rise of these."""
    gates = gates_of_arm(dataclasses.replace(examples, flip=flip)).direction
    first, second = (gains_of(each, signs=signs) for each, signs in zip(scores[:2], flip, strict=True))
    return gates, parts_of_gates(gates, benefit_of(first, second, None, CLOSED_FORM.gating))


def coupled_name(fraction: float) -> str:
    """What a coupled set is called."""
    return f"coupled, top {percent_of(fraction)}"


def gates_of_arm(examples: ArmExamples) -> AlongGates:
    """The gates in closed form, with settings that are fixed."""
    return CLOSED_FORM.fit(examples, {"ridge": 0.1, "cost": "together"})


def signed_set(examples: ArmExamples) -> Selection:
    """The neurons whose gains for both margins lie one standard error below 0; empty where there is none."""
    with suppress(NothingToChangeError):
        return SIGNED.fit(examples, {"certainty": 1.0}).selection
    shapes = rule_scores(examples, "neuron")[0].shapes
    return Selection({site: torch.empty(0, dtype=torch.int64) for site in shapes}, shapes)


def n_of_all(gates: Gates) -> int:
    """The number of neurons that is compared between draws: one at least."""
    n_neurons = sum(len(multiplier) for multiplier in gates.multipliers.values())
    return max(1, round(STRONGEST * n_neurons))


def agreements(
    given: Who, examples: ArmExamples, scores: Sequence[Scores], rule: Sequence[Scores]
) -> dict[str, tuple[Remade, ...]]:
    """Each edit between draws of topics, between halves that share no topic, and coupled sets between halves."""
    draws = [drawn_topics(scores, seed=number) for number in range(given.n_draws)]
    halves = []
    for number in range(given.n_draws):
        halves += halves_of_topics(scores, seed=number)
    each_with_each = list(combinations(range(len(draws)), 2))
    half_with_other = [(number, number + 1) for number in range(0, len(halves), 2)]
    found: dict[str, tuple[Remade, ...]] = {}
    between_draws = f"draws of {len(draws[0][0])} of {len(scores[0].clusters)} topics"
    found |= of_lots(examples, scores, draws, each_with_each, between_draws)
    n_half = len(halves[0][0])
    found |= of_lots(examples, scores, halves, half_with_other, f"halves of {n_half} topics {APART}")
    nulls = [with_flips(half, seed=number) if number % 2 else half for number, half in enumerate(halves)]
    found |= of_lots(examples, scores, nulls, half_with_other, f"halves, {FLIPPED} (null)")
    for fraction in given.fractions:
        name = f"{coupled_name(fraction)}, halves of the examples (which share topics)"
        found[name] = coupled_halves(rule, fraction, given.n_draws)
    return found


def of_lots(
    examples: ArmExamples, scores: Sequence[Scores], lots: Sequence[Flip], pairs: Sequence[tuple[int, int]], kind: str
) -> dict[str, tuple[Remade, ...]]:
    """The strongest gates, and the neurons silenced by sign, made from one lot of topics and from another."""
    gates, strongest, signed = [], [], []
    for lot in progress_bar(lots, desc=kind, unit="lot"):
        of_lot, parts = gates_and_parts(examples, scores, lot)
        gates.append(of_lot)
        strongest.append(of_lot.strongest(n_of_all(of_lot), by=parts).selection)
        signed.append(signed_set(dataclasses.replace(examples, flip=lot)))
    of_gates, of_sign = [], []
    for i, j in pairs:
        of_gates.append(Remade(shared_units(strongest[i], strongest[j]), rank_correlation(gates[i], gates[j])))
        of_sign.append(Remade(shared_units(signed[i], signed[j]), None))
    top = f"gates, strongest {percent_of(STRONGEST)}"
    return {f"{top}, {kind}": tuple(of_gates), f"{SIGNED.name}, {kind}": tuple(of_sign)}


def halves_of_topics(scores: Sequence[Scores], *, seed: int) -> tuple[Flip, Flip]:
    """Two lots of topics of both behaviours that share none, with labels as they are; of an odd number one is left."""
    generator = np.random.default_rng([seed, 24])
    lots = []
    for of_behaviour in scores[:2]:
        topics = list(of_behaviour.clusters)
        order = [topics[int(i)] for i in generator.permutation(len(topics))]
        half = len(order) // 2
        lots.append((dict.fromkeys(order[:half], 1), dict.fromkeys(order[half : 2 * half], 1)))
    (mine, other), (second_mine, second_other) = lots
    return (mine, second_mine), (other, second_other)


def with_flips(lot: Flip, *, seed: int) -> Flip:
    """The lot with safe and unsafe exchanged in half of its topics; of an odd number one keeps its labels."""
    generator = np.random.default_rng([seed, 26])
    flipped = []
    for signs in lot:
        topics = list(signs)
        exchanged = {topics[int(i)] for i in generator.permutation(len(topics))[: len(topics) // 2]}
        flipped.append({topic: -1 if topic in exchanged else 1 for topic in topics})
    return flipped[0], flipped[1]


def coupled_halves(rule: Sequence[Scores], fraction: float, n_splits: int) -> tuple[Remade, ...]:
    """The coupled set on one half of the groups of examples, and on the other."""
    found = []
    for seed in range(n_splits):
        generator = np.random.default_rng([seed, 25])
        orders = [generator.permutation(n_groups(each)) for each in rule]
        sets = []
        for half in (0, 1):
            parts = []
            for each, order in zip(rule, orders, strict=True):
                parts.append(on_groups(each, np.array_split(order, 2)[half]))
            sets.append(couple(*parts, fraction=fraction).coupled)
        found.append(Remade(shared_units(*sets), None))
    return tuple(found)


def looked_at(
    given: Who, examples: ArmExamples, edits: Edits, scores: Sequence[Scores]
) -> tuple[tuple[LookedAt, ...], tuple[tuple[LookedAt, ...], ...]]:
    """The strongest neurons, each with its page in the run folder; and lots of random ones that are alike."""
    neurons = strongest_by_part(edits, given.n_neurons)
    matched = strata(examples.model, scores[:3])
    lots, taken = [], list(neurons)
    for number in range(N_LOTS):
        lots.append(alike(neurons, matched, seed=number, taken=taken))
        taken += lots[-1]
    # One pass over the texts reads all of them.
    looked = look_at(examples, taken, edits, scores, n_top=N_TOP)
    for record, view in looked[: len(neurons)]:
        NeuronPage(view).save(given.out / record.page)
    records = [record for record, _ in looked]
    strongest, rest = tuple(records[: len(neurons)]), records[len(neurons) :]
    controls = []
    for lot in lots:
        controls.append(tuple(rest[: len(lot)]))
        rest = rest[len(lot) :]
    return strongest, tuple(controls)


def facts(examples: ArmExamples, dose: float) -> dict[str, str]:
    """How it was done."""
    counted = []
    for behaviour in examples.scoring:
        counted.append(f"{len(behaviour)} of {behaviour.name} ({len(set(clusters_of(behaviour)))} topics)")
    return {
        "scored examples": ", ".join(counted),
        "gates": "closed form, ridge 0.1, cost together, register set not used",
        "multipliers": f"at the dose {dose:g}, where a search for a KL begins; no KL was measured",
        "silencing by sign": "gains for both margins at least 1 standard error below 0, without general's top 1 %",
        "coupled": "in the top fraction of both behaviours' safe answers and not of general text (the paper's rule)",
        "not read": "no confirming and no choosing prompt: both were sealed while this was made",
        "command": command(),
    }


if __name__ == "__main__":
    script(lambda: run(tyro.cli(Who, description=__doc__)))
