"""Measurements on disk, so that a killed run goes on from the last state that it measured."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.evaluation.measure import BehaviourMeasurement, Measurement
from dean_interp.information.estimands import Reads
from dean_interp.models.sites import parse_site
from dean_interp.selection.selection import Selection
from dean_interp.tensorfile import read_tensors, write_tensors

_FORMAT = "dean_interp.state.1"
_FIELDS = ("log_prob", "kl", "n_tokens")


def save_measurement(measurement: Measurement, path: Path, *, fingerprint: str, compared_on: str | None = None) -> None:
    """Write a safetensors file; it appears whole or not at all.

    `fingerprint` says what was measured, and how: `load_measurement` refuses another.
    `compared_on` names the behaviour on which later measurements are compared with this one: only its `final` is kept.
    """
    tensors = {f"final/{compared_on}": measurement[compared_on].final} if compared_on else {}
    for name, behaviour in measurement.behaviours.items():
        tensors |= {f"{field}/{name}": getattr(behaviour, field) for field in _FIELDS}
    if measurement.reads is not None:
        tensors |= {f"reads/{site}": values for site, values in measurement.reads.values.items()}
    write_tensors(path, _FORMAT, tensors, {"fingerprint": fingerprint})


def load_measurement(
    path: Path, tests: Sequence[Behaviour], read: Selection | None, *, fingerprint: str
) -> Measurement:
    """The measurement of `tests` that `save_measurement` wrote. Raises `InputError` where it is of something else."""
    tensors, facts = read_tensors(path, _FORMAT)
    if facts.get("fingerprint") != fingerprint:
        raise InputError(f"{path} is of another model, other data or other units: choose another folder")
    known = [test for test in tests if f"log_prob/{test.name}" in tensors]
    behaviours = {
        test.name: BehaviourMeasurement(
            test.name,
            tuple(test.prompts),
            *(tensors[f"{field}/{test.name}"] for field in _FIELDS),
            final=tensors.get(f"final/{test.name}", torch.zeros(0, 0)),
        )
        for test in known
    }
    values = {parse_site(name[6:]): value for name, value in tensors.items() if name.startswith("reads/")}
    if read is None or not values:
        return Measurement(behaviours)
    groups = tuple(test.name for test in known if test.paired for _ in test.prompts)
    return Measurement(behaviours, Reads(dict(sorted(values.items())), read, groups))
