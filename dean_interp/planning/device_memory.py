"""Memory of the device that computes: what is free, and what is in use."""

from pathlib import Path

import psutil
import torch

from dean_interp.distributed import local_world_size


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on the CPU the share of this process in machine and container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text(encoding="utf-8").strip().isdigit():
        free = min(free, int(limit.read_text(encoding="utf-8")) - int(used.read_text(encoding="utf-8")))
    # The processes of one machine share its memory.
    return free // local_world_size()


def held_memory(device: torch.device) -> int:
    """Bytes in use now: by torch on a GPU, by the process on the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
