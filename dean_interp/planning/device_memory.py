"""Memory of the device that computes: what is free, and what is in use."""

from pathlib import Path

import psutil
import torch

from dean_interp.distributed import local_world_size

_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CONTAINER_USED = Path("/sys/fs/cgroup/memory.current")
_CONTAINER_STATISTICS = Path("/sys/fs/cgroup/memory.stat")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on the CPU the share of this process in machine and container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    # A container without a limit has none of these files, or one that says "max".
    limit, used = _number_in(_CONTAINER_LIMIT), _number_in(_CONTAINER_USED)
    if limit is not None and used is not None:
        # What was read from files counts as used, and is given up when memory is wanted.
        free = min(free, max(0, limit - used + _inactive_file()))
    # The processes of one machine share its memory.
    return free // local_world_size()


def held_memory(device: torch.device) -> int:
    """Bytes in use now: by torch on a GPU, by the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _inactive_file() -> int:
    """Bytes of files that the container keeps in memory and has not read again; 0 where nobody says."""
    if _CONTAINER_STATISTICS.is_file():
        for line in _CONTAINER_STATISTICS.read_text(encoding="utf-8").splitlines():
            name, _, number = line.partition(" ")
            if name == "inactive_file":
                return int(number)
    return 0


def _number_in(path: Path) -> int | None:
    """The number that a file holds; None where there is no file, or no number in it."""
    if not path.is_file():
        return None
    content = path.read_text(encoding="utf-8").strip()
    return int(content) if content.isdigit() else None
