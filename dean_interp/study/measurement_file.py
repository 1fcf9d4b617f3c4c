"""The file of a measurement: log-probabilities, KL and activations as tensors, and what they are of."""

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
    tensors = {}
    if compared_on:
        tensors[f"final/{compared_on}"] = measurement[compared_on].final
    for name, behaviour in measurement.behaviours.items():
        for field in _FIELDS:
            tensors[f"{field}/{name}"] = getattr(behaviour, field)
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
    has_activations = any(name.startswith("reads/") for name in tensors)
    if neurons is None or (len(neurons) and not has_activations):
        return Measurement(behaviours)
    examples = []
    for test in tests:
        if test.paired:
            examples += [(test.name, example) for example in test.examples]
    return Measurement(behaviours, _activations_of(path, tensors, neurons, examples))


def _behaviour_of(path: Path, tensors: Mapping[str, Tensor], test: Behaviour) -> BehaviourMeasurement:
    """One behaviour of a file. Raises `InputError` where the file does not hold it whole."""
    fields = [tensors.get(f"{field}/{test.name}", torch.empty(0)) for field in _FIELDS]
    log_prob, kl, n_tokens, per_token = fields
    final = tensors.get(f"final/{test.name}", torch.zeros(0, 0))
    shape = (len(test), 2 if test.paired else 1)
    is_of_answers = log_prob.shape == kl.shape == n_tokens.shape == shape
    dtypes = {log_prob.dtype, kl.dtype, per_token.dtype}
    has_right_dtypes = dtypes <= {torch.float32, torch.float64} and not n_tokens.is_floating_point()
    is_whole = is_of_answers and has_right_dtypes and final.dim() == 2
    # Only counts of answers say how many tokens there must be.
    is_whole = is_whole and per_token.shape == (int(n_tokens.sum()),)
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
    tensors = _read(path, fingerprint)
    return _activations_of(path, tensors, neurons, distinct(behaviours))


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
    reads = {f"reads/{site}": values for site, values in activations.values.items()}
    answers = {f"answers/{site}": values for site, values in activations.answers.items()}
    return reads | answers


def _activations_of(
    path: Path, tensors: Mapping[str, Tensor], neurons: Selection, examples: Sequence[tuple[str, Example]]
) -> Activations:
    """The activations that a file holds. Raises `InputError` where they are not those of the neurons."""
    values: dict[str, dict[Site, Tensor]] = {"reads": {}, "answers": {}}
    rows_of_kind = {"reads": (len(examples),), "answers": (len(examples), 2)}
    for kind, rows in rows_of_kind.items():
        for site, units in neurons.units.items():
            stored = tensors.get(f"{kind}/{site}")
            if stored is None:
                continue
            is_whole = stored.shape == (*rows, len(units)) and stored.is_floating_point()
            raise_if_damaged(path, not is_whole, f"the {kind} of {site} are not those of its units")
            values[kind][site] = stored
    groups, clusters = groups_and_clusters(examples)
    return Activations(values["reads"], neurons, groups=groups, clusters=clusters, answers=values["answers"])


@dataclass(frozen=True)
class _Facts:
    fingerprint: str


def _read(path: Path, fingerprint: str) -> dict[str, Tensor]:
    tensors, facts = read_tensors(path, _FORMAT, _Facts)
    if facts.fingerprint != fingerprint:
        raise InputError(f"{path} is of another model, other data or other units: choose another folder")
    return tensors
