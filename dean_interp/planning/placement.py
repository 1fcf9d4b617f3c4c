"""Where a model's weights would lie on given devices, who would share the work, and what room is left for sums."""

from dataclasses import dataclass

import torch

from dean_interp.models.load import HookedModel
from dean_interp.planning.memory import GIB, SHARE_OF_MEMORY
from dean_interp.planning.scoring import halved
from dean_interp.planning.site_sums import site_bytes
from dean_interp.scoring.preparation import N_SPREAD_GROUPS, ScoringConfig, in_passes, scored_sites
from dean_interp.study.config import StudyConfig


@dataclass(frozen=True)
class Devices:
    """What a study would run on."""

    gpus: int = 0
    """Number of GPUs. 0: the CPU."""
    gpu_gib: float = 80.0
    """Memory of each GPU, in GiB."""
    host_gib: float | None = None
    """Memory of the machine, in GiB. Unset: that of this machine, or of the container."""
    tflops: float | None = None
    """Speed of one device in plain matrix products of the model's dtype, in 10^12 operations a second. The time is then
    that of the arithmetic, to a factor of three. Unset: passes through a few layers of the model's shape are timed, on
    the CPU or on a GPU of this machine; where there is none, 200 is taken for a GPU."""


def devices_here(device: str | None) -> Devices:
    """The devices of this machine that a model would be loaded on.

    Args:
        device: as the model's settings name it. None and `auto`: CUDA where there is one, else the CPU.
    """
    if device in ("cpu", "mps") or not torch.cuda.is_available():
        return Devices()
    n_gpus = torch.cuda.device_count() if device == "auto" else 1
    n_bytes = torch.cuda.get_device_properties(0).total_memory
    return Devices(gpus=n_gpus, gpu_gib=n_bytes / GIB)


@dataclass(frozen=True)
class Placement:
    """Where the weights lie, in GiB, and who works with them."""

    world_size: int
    """Number of processes that share the work."""
    n_devices: int
    """Number of devices that each process uses."""
    on_device: float
    """Weights on each device."""
    offloaded: float
    """Weights that are fetched for every batch."""
    on_disk: float
    """Those of them that lie on disk."""
    in_words: str
    command: str


@dataclass(frozen=True)
class ScoringPasses:
    """Scoring in as few passes as memory allows."""

    layers_per_pass: int
    n_passes: int
    sums: float
    """Running sums of one pass, GiB."""


def place_weights(weights: float, batch: float, devices: Devices, host: float) -> Placement:
    """Whole on each device where it fits, else over all of them, else with the rest in host memory and on disk."""
    n_gpus = devices.gpus
    n_devices = max(n_gpus, 1)
    usable = usable_memory(devices, host)
    if weights + batch <= usable:
        return _whole(weights, n_gpus)
    command = "dean-interp run --device auto"
    if n_gpus and weights + batch <= n_gpus * usable:
        return Placement(
            world_size=1,
            n_devices=n_gpus,
            on_device=weights / n_gpus,
            offloaded=0.0,
            on_disk=0.0,
            in_words=f"laid over {n_gpus} GPUs, one process",
            command=command,
        )
    on_devices = max(0.0, n_devices * usable - batch)
    offloaded = weights - on_devices
    # On a machine with GPUs half of host memory holds weights; the other half is for sums.
    in_host = host / 2 if n_gpus else 0.0
    on_disk = max(0.0, offloaded - in_host)
    where = "in memory"
    if n_gpus:
        where = "on the GPU" if n_gpus == 1 else f"on {n_gpus} GPUs"
    return Placement(
        world_size=1,
        n_devices=n_devices,
        on_device=on_devices / n_devices,
        offloaded=offloaded,
        on_disk=on_disk,
        in_words=f"{on_devices:.0f} GiB {where}, the rest fetched for every batch ({on_disk:.0f} GiB of it from disk), "
        "one process",
        command=command,
    )


def _whole(weights: float, n_gpus: int) -> Placement:
    """The whole model on each device, with a process for each."""
    in_words, launcher = "whole in memory", ""
    if n_gpus == 1:
        in_words = "whole on the GPU"
    elif n_gpus:
        in_words = f"whole on each of {n_gpus} GPUs, whose processes share the work"
        launcher = f"torchrun --nproc-per-node {n_gpus} --no-python "
    return Placement(
        world_size=max(n_gpus, 1),
        n_devices=1,
        on_device=weights,
        offloaded=0.0,
        on_disk=0.0,
        in_words=in_words,
        command=f"{launcher}dean-interp run",
    )


def room_for_sums(placement: Placement, batch: float, devices: Devices, host: float) -> float:
    """GiB that are left for the running sums, which lie beside the weights."""
    if placement.offloaded and devices.gpus:
        return host * SHARE_OF_MEMORY - weights_in_host(placement, devices)
    # Without a GPU the device is the machine, whose memory weights and a batch take already.
    on_each = usable_memory(devices, host) - placement.on_device
    return placement.n_devices * on_each - batch


def weights_in_host(placement: Placement, devices: Devices) -> float:
    """GiB of weights in host memory that are not on the device that computes."""
    return placement.offloaded - placement.on_disk if devices.gpus else 0.0


def usable_memory(devices: Devices, host: float) -> float:
    """GiB that may be used of each device that computes."""
    memory = devices.gpu_gib if devices.gpus else host
    return memory * SHARE_OF_MEMORY


def passes_that_fit(model: HookedModel, config: StudyConfig, room: float) -> ScoringPasses:
    """The most layers a pass whose sums fit into that room (GiB)."""
    sites = scored_sites(model, config.scored, ScoringConfig())
    n_groups = min(N_SPREAD_GROUPS, config.calibration.n_calibration)
    for layers in halved(len(model.blocks)):
        passes = in_passes(sites, layers)
        sizes = []
        for pass_sites in passes:
            sizes.append(sum(site_bytes(model, site, n_groups) for site in pass_sites))
        sums = max(sizes) / GIB
        if sums <= room or layers == 1:
            return ScoringPasses(layers_per_pass=layers, n_passes=len(passes), sums=sums)
    raise AssertionError("a model has a layer")
