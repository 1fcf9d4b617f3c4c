"""Which way of making gates raises both behaviours most for its damage? Cross-validation over calibration topics.

    python analyses/gate_defaults.py --out runs/gate_defaults

on the demo model (--model for another). The defaults of `dean-interp improve` come from here. No test topic is opened.
Gains and damage are scored once. Then 13 random topics of each set (5 of the register set's) make gates, and the other
topics say what these gates do: the change of both margins and of the register set to first order, and the KL to second
order. All are of prompts that the gates know nothing of. Changes are given for a KL of 0.05 nats per answer token.
Writes results.json and report.html.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from tyro.conf import OmitArgPrefixes

from dean_interp import Behaviour, load_behaviour
from dean_interp.cli.ending import command, script
from dean_interp.errors import InputError
from dean_interp.files import write_text
from dean_interp.progress import progress_bar
from dean_interp.report.figures import changes_by_arm
from dean_interp.report.html import write_figure_page
from dean_interp.scoring.scores import Scores
from dean_interp.selection.gains import Gains, damage_of, gains_of
from dean_interp.selection.gating import GatingConfig
from dean_interp.selection.iterated import gates_of_scores
from dean_interp.statistics import Interval
from dean_interp.study import day
from dean_interp.study.choosing import effects
from dean_interp.study.improvement import ImproveConfig
from dean_interp.study.roles import halves_of
from dean_interp.study.run_folder import owned

SETTINGS: dict[str, GatingConfig] = {
    "register left alone": GatingConfig(against_register=0.0),
    "against register 0.5": GatingConfig(against_register=0.5),
    "against register 1": GatingConfig(against_register=1.0),
    "against register 1.25": GatingConfig(against_register=1.25),
    "against register 1.5": GatingConfig(against_register=1.5),
    "each neuron's cost alone": GatingConfig(cost="alone"),
    "ridge 0.1": GatingConfig(ridge=0.1),
    "ridge 1": GatingConfig(ridge=1.0),
    "ridge 10": GatingConfig(ridge=10.0),
    "both gains agree": GatingConfig(agree=True),
    "half an error less": GatingConfig(certainty=0.5),
    "one error less": GatingConfig(certainty=1.0),
    "strongest 460": GatingConfig(count=460),
    "strongest 4608": GatingConfig(count=4608),
    "silencing only": GatingConfig(silence_only=True),
    "proximal steps, 4 folds": GatingConfig(folds=4),
    "proximal steps, 4 folds, sparsity 0.02": GatingConfig(folds=4, sparsity=0.02),
    "proximal steps, 4 folds, sparsity 0.1": GatingConfig(folds=4, sparsity=0.1),
}
N_CHOOSING = 13
"""Topics that make gates, as in `improve`, or two thirds where there are fewer; the others judge them."""
Changes = tuple[float, float, float]
"""Of both margins, and of the register set; nats per token."""


@dataclass(frozen=True)
class GateDefaults:
    """Several ways of making gates, each judged on topics that did not make them."""

    out: Path = Path("runs/gate_defaults")
    """The run folder."""
    n_splits: int = 20
    """Number of random splits of the topics."""
    quick: bool = False
    """Use three splits."""
    study: OmitArgPrefixes[ImproveConfig] = field(default_factory=ImproveConfig)


def run(given: GateDefaults) -> dict[str, dict[str, Interval]]:
    """The change of each margin under every setting, with the spread over splits."""
    config = given.study
    register = halves_of(config.register)[0] if config.register else None
    if register is None:
        raise InputError("a register set with calibration topics is needed: what every setting does to it is compared")
    sets = [load_behaviour(source, n_examples=None) for source in (config.first, config.second, config.general)]
    sets.append(register)
    with owned(given.out, dataclasses.replace(given, out=Path()), sets):
        model = day.of_evaluation(config.model, given.out, ()).load()
        scores = effects(model, sets, config, given.out)
        settings = {name: gating for name, gating in SETTINGS.items() if _is_possible(gating, scores)}
        n_splits = 3 if given.quick else given.n_splits
        changes: dict[str, list[Changes]] = {name: [] for name in settings}
        for split in progress_bar(range(n_splits), desc="splits", unit="split"):
            for name, change in on_split(settings, scores, sets, config.max_kl, seed=split).items():
                changes[name].append(change)
    names = [sets[i].name for i in (0, 1, 3)]
    spread = {f"{on} margin": {name: _spread(changes[name], i) for name in changes} for i, on in enumerate(names)}
    write_text(given.out / "results.json", json.dumps(changes, indent=1) + "\n")
    text = in_words(changes, names, n_splits=n_splits, max_kl=config.max_kl)
    page = write_figure_page(
        given.out / "report.html",
        title=f"Which gates raise both behaviours of {config.model.title}?",
        text=f"{text}\n\n{command()}",
        picture=changes_by_arm(
            spread, "held-out change (nats per token)", counted="splits", bars="lowest and highest of the splits"
        ),
    )
    print(text, f"page: {page.resolve()}", sep="\n\n")
    return spread


def _is_possible(gating: GatingConfig, scores: Sequence[Scores]) -> bool:
    """Whether the model has so many neurons, and the sets have topics enough for the folds."""
    n_neurons = sum(value.numel() for value in scores[0].values.values())
    n_topics = min(n_choosing(len(of_behaviour.clusters)) for of_behaviour in scores[:2])
    return (gating.count is None or gating.count <= n_neurons) and 2 * gating.folds <= n_topics


def n_choosing(n_topics: int) -> int:
    """Number of topics of a set that make gates."""
    return min(N_CHOOSING, n_topics * 2 // 3)


def on_split(
    settings: Mapping[str, GatingConfig], scores: Sequence[Scores], sets: Sequence[Behaviour], kl: float, *, seed: int
) -> dict[str, Changes]:
    """The change of every margin under every setting at one KL, on the topics that did not make the gates."""
    generator = np.random.default_rng([seed, 5])
    topics_of_first, topics_of_second, topics_of_general, topics_of_register = [
        _choosing_topics(behaviour, generator) for behaviour in sets
    ]
    first, second, general, register = scores
    # Gates are made of some topics' gains. What they are worth is read from the gains of the other topics.
    first_signs, held_out_first = _divided(first, topics_of_first)
    second_signs, held_out_second = _divided(second, topics_of_second)
    register_signs, held_out_register = _divided(register, topics_of_register)
    register_gains = gains_of(register, signs=register_signs)
    # General text is divided as well: one part says what gates cost, the other one sets their dose.
    is_choosing = torch.tensor([example.cluster in topics_of_general for example in sets[2].examples])
    whole = damage_of(general)
    damage = whole.of_answers(is_choosing)
    held_out_damage = whole.of_answers(~is_choosing)
    changes: dict[str, Changes] = {}
    for name, gating in settings.items():
        gates = gates_of_scores(
            first,
            second,
            damage,
            signs=(first_signs, second_signs),
            register=register_gains,
            config=gating,
        )
        # A change grows with the dose, KL with its square.
        dose = (kl / held_out_damage.kl(gates)) ** 0.5
        changes[name] = (
            dose * held_out_first.of(gates),
            dose * held_out_second.of(gates),
            dose * held_out_register.of(gates),
        )
    return changes


def _choosing_topics(behaviour: Behaviour, generator: np.random.Generator) -> set[str]:
    """Random topics of a set: those that make gates."""
    topics = list(dict.fromkeys(example.cluster for example in behaviour.examples))
    order = generator.permutation(len(topics))
    return {topics[int(number)] for number in order[: n_choosing(len(topics))]}


def _divided(scores: Scores, topics: set[str]) -> tuple[dict[str, int], Gains]:
    """The signs with which the gains of some topics are taken, and the gains of all other topics."""
    signs = {name: 1 for name in scores.clusters if name in topics}
    others = {name: 1 for name in scores.clusters if name not in topics}
    return signs, gains_of(scores, signs=others)


def _spread(changes: Sequence[Changes], which: int) -> Interval:
    """Mean, lowest and highest over splits."""
    values = [change[which] for change in changes]
    return Interval(float(np.mean(values)), min(values), max(values), len(values))


def in_words(changes: Mapping[str, Sequence[Changes]], names: Sequence[str], *, n_splits: int, max_kl: float) -> str:
    """The settings, the best first: by the smaller of the two mean rises."""
    means = {name: np.mean(change, axis=0) for name, change in changes.items()}
    first, second, register = names
    lines = [
        f"Mean change of {first}, {second} and {register} over {n_splits} splits at a KL of {max_kl} nats per token. "
        "The best stand first, by the smaller of the first two changes. Beside them: the share of splits in which "
        f"{first} and {second} both rise. The bars of the figure are the lowest and highest."
    ]
    for name in sorted(means, key=lambda name: -min(means[name][:2])):
        both = np.mean([min(change[:2]) > 0 for change in changes[name]])
        rises = " and ".join(f"{mean:+.3f}" for mean in means[name][:2])
        moved = means[name][2]
        share = f"{moved / min(means[name][:2]):.2f} of the smaller rise"
        lines.append(f"{name}: {rises}, both rise in {both:.0%}; {register} {moved:+.3f}, {share}")
    return "\n\n".join(lines)


if __name__ == "__main__":
    script(lambda: run(tyro.cli(GateDefaults, description=__doc__)))
