"""The units that a finished run stands on most: which they are, what the run does to them, on which text to look."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dean_interp.circuits.neuron import strongest_neurons
from dean_interp.circuits.neuron_scores import NeuronScores, neuron_scores
from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError, refuse_below_one
from dean_interp.models.neuron_names import Neuron, NeuronName, name_of
from dean_interp.scoring.scores import Scores, load_scores
from dean_interp.selection.gains import Damage, Gains, damage_of, gains_of
from dean_interp.selection.gates import Gates, load_gates
from dean_interp.selection.selection import load_selection
from dean_interp.study.improve_data import improve_data
from dean_interp.study.improvement import GATES_FILE, ChangedNeuron, Improvement
from dean_interp.study.measured_edit import load_run
from dean_interp.study.results import Results
from dean_interp.study.settings import ModelConfig
from dean_interp.study.study_data import study_data


@dataclass(frozen=True)
class RunUnit:
    """One of the strongest units of a run."""

    name: str
    layer: int
    multiplier: float
    """What the run multiplies its activation by; 0 where it is silenced."""
    behaviour: str
    """The behaviour that it matters to more: by its part in the predicted rise, or by its rank in its layer."""
    size: Mapping[str, float]
    """Its gain (nats per token) or its score (nats) for each behaviour, as `RunUnits.measured_by` says."""
    error: Mapping[str, float]
    """The standard error of each gain; empty for scores."""
    damage: float | None
    """Fisher information of its gate on general text, nats per token: twice the KL that a change of 1 costs alone. None
    where the run does not know it."""
    stability: float | None
    """How often it is selected when the examples are drawn anew; None where the run does not know it."""


@dataclass(frozen=True)
class RunUnits:
    """The strongest units of a run, the strongest first, and what is needed to look at them."""

    headline: str
    model: ModelConfig
    model_fingerprint: str
    measured_by: Literal["gain", "score"]
    neurons: tuple[Neuron, ...]
    units: tuple[RunUnit, ...]
    """In the order of `neurons`."""
    tests: tuple[Behaviour, ...]
    """The prompts that the run measured its edit on: first, second and general."""
    scores: tuple[Scores, ...]
    """For ranks in layers: of first, second and general, and of the register where its gains are subtracted."""

    @property
    def behaviours(self) -> list[str]:
        """The names of first and second."""
        return [test.name for test in self.tests[:2]]


def units_of_run(folder: Path, *, n_units: int) -> RunUnits:
    """The strongest units of a finished run: coupled neurons of `run`, or gates of `improve` that raise margins most.

    Args:
        folder: the run folder.
        n_units: number of units; fewer where the run has fewer.

    Raises:
        InputError: a number below 1; no finished run there; a run that selected weights alone; data that is gone.
    """
    refuse_below_one(n_units=n_units)
    run = load_run(folder)
    if isinstance(run, Improvement):
        return _of_improvement(run, folder, n_units)
    return _of_study(run, folder, n_units)


def strongest_changes(
    gates: Gates, first: Gains, second: Gains, damage: Damage, *, n_neurons: int
) -> list[tuple[Neuron, ChangedNeuron]]:
    """The neurons with the largest part in the predicted rise of both margins, the largest first."""
    # Gains of two behaviours are added on the scale of all neurons' gains.
    parts = {}
    for site, change in gates.changes.items():
        gain = first.mean[site] / first.size + second.mean[site] / second.size
        parts[site] = change * gain
    strongest = gates.strongest(min(n_neurons, len(gates)), by=parts).selection
    part_of: dict[Neuron, float] = {}
    for site, units in strongest.units.items():
        for index in units.tolist():
            part_of[site, index] = float(parts[site][index])
    neurons = sorted(part_of, key=lambda neuron: part_of[neuron], reverse=True)
    changes = changed_neurons(neurons, gates, first, second, damage)
    return list(zip(neurons, changes, strict=True))


def changed_neurons(
    neurons: Sequence[Neuron], gates: Gates, first: Gains, second: Gains, damage: Damage
) -> list[ChangedNeuron]:
    """What gates do to neurons: the gain of each for both behaviours, and its damage, in the order of the neurons."""
    diagonal = damage.diagonal
    changes = []
    for site, index in neurons:
        name = name_of((site, index), len(gates.multipliers[site]))
        changed = ChangedNeuron(
            layer=name.layer,
            index=name.index,
            owner=name.owner,
            multiplier=float(gates.multipliers[site][index]),
            gain={gains.behaviour: float(gains.mean[site][index]) for gains in (first, second)},
            error={gains.behaviour: float(gains.error[site][index]) for gains in (first, second)},
            damage=float(diagonal[site][index]),
        )
        changes.append(changed)
    return changes


def _of_improvement(improvement: Improvement, folder: Path, n_units: int) -> RunUnits:
    data = improve_data(improvement.config)
    scores = scores_of(folder, data.scoring)
    first = gains_of(scores[0])
    second = gains_of(scores[1])
    gates = load_gates(folder / GATES_FILE)
    changes = strongest_changes(gates, first, second, damage_of(scores[2]), n_neurons=n_units)
    scale = {gains.behaviour: gains.size for gains in (first, second)}
    return RunUnits(
        headline=improvement.headline,
        model=improvement.config.model,
        model_fingerprint=improvement.model_fingerprint,
        measured_by="gain",
        neurons=tuple(neuron for neuron, _ in changes),
        units=tuple(_changed_unit(changed, scale) for _, changed in changes),
        tests=tuple(data.confirming),
        scores=tuple(scores),
    )


def _changed_unit(changed: ChangedNeuron, scale: Mapping[str, float]) -> RunUnit:
    """A gate's neuron. Gains of two behaviours are compared on the scale of all neurons' gains."""
    change = changed.multiplier - 1
    rise = {name: change * gain / scale[name] for name, gain in changed.gain.items()}
    return RunUnit(
        name=changed.name,
        layer=changed.layer,
        multiplier=changed.multiplier,
        behaviour=max(rise, key=lambda name: rise[name]),
        size=changed.gain,
        error=changed.error,
        damage=changed.damage,
        stability=None,
    )


def _of_study(results: Results, folder: Path, n_units: int) -> RunUnits:
    if "neuron" not in results.config.unit:
        raise InputError(f"{folder} selected weights alone, and pages show neurons: run with --unit neuron")
    data = study_data(results.config)
    scores = scores_of(folder, data.calibration)
    coupled = load_selection(folder / "selection.neuron.safetensors")
    neurons = strongest_neurons(coupled, scores[0], scores[1], n_neurons=n_units)
    return RunUnits(
        headline=results.of("neuron").headline,
        model=results.config.model,
        model_fingerprint=results.model_fingerprint,
        measured_by="score",
        neurons=tuple(neurons),
        units=tuple(_coupled_unit(neuron_scores(neuron, scores), results) for neuron in neurons),
        tests=tuple(data.tests),
        scores=tuple(scores),
    )


def _coupled_unit(scored: NeuronScores, results: Results) -> RunUnit:
    first, second = results.behaviours
    probability = results.of("neuron").chance.probability or {}
    name = str(NeuronName(scored.layer, scored.index, scored.owner))
    return RunUnit(
        name=name,
        layer=scored.layer,
        multiplier=0.0,
        behaviour=min((first, second), key=lambda behaviour: scored.rank[behaviour]),
        size={behaviour: scored.score[behaviour] for behaviour in (first, second)},
        error={},
        damage=None,
        stability=probability.get(name),
    )


def scores_of(folder: Path, behaviours: Sequence[Behaviour]) -> list[Scores]:
    """The neuron scores of the behaviours that a run scored."""
    files = [folder / "scores" / f"{behaviour.name}.safetensors" for behaviour in behaviours]
    return [load_scores(file).of("neuron") for file in files]
