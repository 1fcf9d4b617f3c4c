"""How fast this machine is, from a calibration that is made once and remembered in the cache folder."""

import dataclasses
import hashlib
import json
import logging
import platform
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from dean_interp.errors import InputError
from dean_interp.files import read_json, write_json
from dean_interp.models.gguf_file import cache_folder
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.load import versions
from dean_interp.models.sizes import neuron_shapes, unembedding_shape
from dean_interp.planning.amounts import PassKind
from dean_interp.planning.calibration import Calibration, calibrated, load_of_machine
from dean_interp.planning.parameters import operations_per_token
from dean_interp.planning.rates import Pace, Rates

log = logging.getLogger(__name__)


def pace_here(shape: HookedModel, kinds: Sequence[PassKind], *, device: str) -> Pace:
    """How long each kind of pass takes on this machine: as remembered, else calibrated now.

    What was found while the machine was busy is found anew once it is idle.
    """
    calibrations: dict[PassKind, Calibration] = {}
    for kind in kinds:
        calibrations[kind] = _remembered_or_new(shape, kind, device)
    n_rounds = min(len(calibration.rounds) for calibration in calibrations.values())
    rounds: list[dict[PassKind, Rates]] = []
    for number in range(n_rounds):
        rounds.append({kind: calibration.rounds[number] for kind, calibration in calibrations.items()})
    busy = [calibration.busy for calibration in calibrations.values() if calibration.busy]
    day = min(calibration.made for calibration in calibrations.values())
    return Pace(
        rates={kind: calibration.rates for kind, calibration in calibrations.items()},
        rounds=tuple(rounds),
        said=f"calibrated on this machine, {_where(device)}, {day}",
        busy=busy[0] if busy else "",
    )


def _remembered_or_new(shape: HookedModel, kind: PassKind, device: str) -> Calibration:
    """The calibration of one kind of pass that the cache holds; where it holds none that will do, a new one."""
    facts = _facts(shape, kind, device)
    try:
        name = _sha256(facts)[:16]
        path = cache_folder() / "calibrations" / f"{name}.json"
        remembered = read_json(path, _Remembered).calibration if path.is_file() else None
    except InputError as error:
        # No cache, or a file that is damaged, is no reason not to plan.
        log.warning("calibrating anew: %s", error)
        path, remembered = None, None
    if remembered is not None:
        is_worth_another_try = remembered.busy and _is_idle()
        if not is_worth_another_try:
            return remembered
    log.info("calibrating: passes through shallow models of this shape (%s)", kind)
    calibration = calibrated(shape, kind, device=device)
    if path is not None:
        _remember(path, _Remembered(facts, calibration))
    return calibration


@dataclasses.dataclass(frozen=True)
class _Remembered:
    """What the file holds."""

    facts: dict[str, str]
    """What the calibration is of."""
    calibration: Calibration


def _sha256(facts: dict[str, str]) -> str:
    content = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _remember(path: Path, remembered: _Remembered) -> None:
    try:
        write_json(path, remembered)
    except InputError as error:
        log.warning("the calibration is not remembered: %s", error)


def _facts(shape: HookedModel, kind: PassKind, device: str) -> dict[str, str]:
    """What a calibration holds for: machine, threads, dtype, the model's shape, versions."""
    sizes = sorted((str(site), tuple(size)) for site, size in neuron_shapes(shape).items())
    cfg = shape.cfg
    heads = (cfg.n_heads, cfg.n_key_value_heads, cfg.d_head)
    layers = str((len(shape.blocks), sizes, heads))
    return {
        "kind": kind,
        "machine": f"{platform.node()} {platform.machine()}, {psutil.cpu_count()} cores",
        "device": _where(device),
        "dtype": str(next(shape.parameters()).dtype),
        "architecture": type(shape.original_model).__name__,
        "layers": hashlib.sha256(layers.encode()).hexdigest(),
        "unembedding": str(tuple(unembedding_shape(shape))),
        "operations of a token": str(operations_per_token(shape)),
        "versions": str(versions()),
    }


def _where(device: str) -> str:
    """The device, with the number of threads where it is the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    n_threads = torch.get_num_threads()
    return "1 thread" if n_threads == 1 else f"{n_threads} threads"


def _is_idle() -> bool:
    load, n_cores = load_of_machine()
    return load <= n_cores
