"""The file of a measurement: log-probabilities, KL and activations as tensors, and what they are of."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.data.examples import Behaviour, Example
from dean_interp.errors import InputError
from dean_interp.evaluation.measurement import BehaviourMeasurement, Measurement
from dean_interp.files import raise_if_damaged, read_tensors, write_tensors
from dean_interp.information.activations import Activations, distinct, groups_and_clusters
from dean_interp.models.sites import Site
from dean_interp.selection.selection import Selection

_FORMAT = "dean_interp.state.2"
_FIELDS = ("log_prob", "kl", "n_tokens", "token_log_prob")


def save_measurement(measurement: Measurement, path: Path, *, fingerprint: str, compared_on: str | None = None) -> None:
    """Write a safetensors file. It appears whole or not at all.

    Args:
        fingerprint: what was measured, and how: `load_measurement` refuses another.
        compared_on: the behaviour on which later measurements are compared with this one: only its `final` is kept.
    """
    tensors = {f"final/{compared_on}": measurement[compared_on].final} if compared_on else {}
    for name, behaviour in measurement.behaviours.items():
        tensors |= {f"{field}/{name}": getattr(behaviour, field) for field in _FIELDS}
    if measurement.activations is not None:
        tensors |= _tensors_of(measurement.activations)
    write_tensors(path, _FORMAT, tensors, {"fingerprint": fingerprint})


def load_measurement(
    path: Path, tests: Sequence[Behaviour], neurons: Selection | None, *, fingerprint: str
) -> Measurement:
    """The measurement of `tests` that `save_measurement` wrote. Raises `InputError` where it is of something else."""
    tensors = _read(path, fingerprint)
    behaviours = {test.name: _behaviour_of(path, tensors, test) for test in tests}
    # Where no neuron is to be kept the file holds no tensor of one, and the activations are there: of none.
    if neurons is None or (len(neurons) and not any(name.startswith("reads/") for name in tensors)):
        return Measurement(behaviours)
    examples = [(test.name, example) for test in tests if test.paired for example in test.examples]
    return Measurement(behaviours, _activations_of(path, tensors, neurons, examples))


def _behaviour_of(path: Path, tensors: Mapping[str, Tensor], test: Behaviour) -> BehaviourMeasurement:
    """One behaviour of a file. Raises `InputError` where the file does not hold it whole."""
    log_prob, kl, n_tokens, per_token = (tensors.get(f"{field}/{test.name}", torch.empty(0)) for field in _FIELDS)
    final = tensors.get(f"final/{test.name}", torch.zeros(0, 0))
    shape = (len(test), 2 if test.paired else 1)
    is_whole = log_prob.shape == kl.shape == n_tokens.shape == shape and not n_tokens.is_floating_point()
    is_whole &= {log_prob.dtype, kl.dtype, per_token.dtype} <= {torch.float32, torch.float64}
    is_whole = is_whole and per_token.shape == (int(n_tokens.sum()),)
    is_whole &= final.dim() == 2
    raise_if_damaged(path, not is_whole, f"it does not hold two numbers and a count of every answer of {test.name}")
    return BehaviourMeasurement(
        name=test.name,
        prompts=tuple(test.prompts),
        log_prob=log_prob,
        kl=kl,
        n_tokens=n_tokens,
        token_log_prob=per_token,
        final=final,
    )


def save_activations(activations: Activations, path: Path, *, fingerprint: str) -> None:
    """Write the activations of a set of examples; as `save_measurement`."""
    write_tensors(path, _FORMAT, _tensors_of(activations), {"fingerprint": fingerprint})


def load_activations(
    path: Path, behaviours: Sequence[Behaviour], neurons: Selection, *, fingerprint: str
) -> Activations:
    """The activations that `save_activations` wrote. Raises `InputError` where they are of something else."""
    return _activations_of(path, _read(path, fingerprint), neurons, distinct(behaviours))


def stored_log_probs(folder: Path, name: str, behaviour: str) -> Float[Tensor, "prompt answer"]:
    """Log-probabilities (nats per token) of a behaviour's answers, from the file of that name.

    Raises `InputError` where there is none.
    """
    path = folder / f"{name}.safetensors"
    tensors, _ = read_tensors(path, _FORMAT, _Facts)
    if f"log_prob/{behaviour}" not in tensors:
        raise InputError(f"{path} holds no measurement of '{behaviour}'")
    return tensors[f"log_prob/{behaviour}"]


def _tensors_of(activations: Activations) -> dict[str, Tensor]:
    tensors = {f"reads/{site}": values for site, values in activations.values.items()}
    return tensors | {f"answers/{site}": values for site, values in activations.answers.items()}


def _activations_of(
    path: Path, tensors: Mapping[str, Tensor], neurons: Selection, examples: Sequence[tuple[str, Example]]
) -> Activations:
    """The activations that a file holds. Raises `InputError` where they are not those of the neurons."""
    values: dict[str, dict[Site, Tensor]] = {"reads": {}, "answers": {}}
    for kind, site in itertools.product(values, neurons.units):
        if f"{kind}/{site}" in tensors:
            stored = values[kind][site] = tensors[f"{kind}/{site}"]
            n_neurons = len(neurons.units[site])
            shape = (len(examples), 2, n_neurons) if kind == "answers" else (len(examples), n_neurons)
            is_whole = stored.shape == shape and stored.is_floating_point()
            raise_if_damaged(path, not is_whole, f"the {kind} of {site} are not those of its units")
    return Activations(values["reads"], neurons, *groups_and_clusters(examples), values["answers"])


@dataclass(frozen=True)
class _Facts:
    fingerprint: str


def _read(path: Path, fingerprint: str) -> dict[str, Tensor]:
    tensors, facts = read_tensors(path, _FORMAT, _Facts)
    if facts.fingerprint != fingerprint:
        raise InputError(f"{path} is of another model, other data or other units: choose another folder")
    return tensors
