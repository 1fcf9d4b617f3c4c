"""Measurements on disk, so that a killed run goes on from the last state that it measured."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dean_interp.data.examples import Behaviour
from dean_interp.evaluation.measure import BehaviourMeasurement, Measurement
from dean_interp.information.estimands import Reads
from dean_interp.models.sites import parse_site
from dean_interp.selection.selection import Selection

_FIELDS = ("log_prob", "kl", "n_tokens", "final")


def save_measurement(measurement: Measurement, path: Path) -> None:
    """Write a safetensors file; it appears whole or not at all."""
    tensors = {}
    for name, behaviour in measurement.behaviours.items():
        tensors |= {f"{field}/{name}": getattr(behaviour, field).contiguous() for field in _FIELDS}
    if measurement.reads is not None:
        tensors |= {f"reads/{site}": values.contiguous() for site, values in measurement.reads.values.items()}
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished)
    unfinished.replace(path)


def load_measurement(path: Path, tests: list[Behaviour], read: Selection | None) -> Measurement:
    """The measurement of `tests` that `save_measurement` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}
    known = [test for test in tests if f"log_prob/{test.name}" in tensors]
    behaviours = {
        test.name: BehaviourMeasurement(
            test.name, tuple(test.prompts), *(tensors[f"{field}/{test.name}"] for field in _FIELDS)
        )
        for test in known
    }
    values = {parse_site(name[6:]): value for name, value in tensors.items() if name.startswith("reads/")}
    if read is None or not values:
        return Measurement(behaviours)
    groups = tuple(test.name for test in known if test.paired for _ in test.prompts)
    return Measurement(behaviours, Reads(dict(sorted(values.items())), read, groups))
