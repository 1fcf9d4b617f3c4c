"""Memory of the device that computes: what is free, and what is in use; on the CPU within the containers' limits.

Linux holds a process to the limits of its control group and of all groups around it. Version 2 has one tree of groups,
version 1 one for memory alone. In a container the tree may begin at the container's own group.
"""

from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from dean_interp.distributed import local_world_size

_TREES = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


class _Names(NamedTuple):
    """What a version of control groups calls the files of a group, and a line of the last one."""

    limit: str
    used: str
    statistics: str
    inactive_file: str


_NAMES = {
    "": _Names("memory.max", "memory.current", "memory.stat", "inactive_file"),
    "memory": _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
}
"""By the tree's folder: version 2, and version 1."""


class _Group(NamedTuple):
    """A group that holds this process, in bytes."""

    limit: int
    free: int


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on the CPU the share of this process in machine and container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = min([psutil.virtual_memory().available, *(group.free for group in _groups())])
    # The processes of one machine share its memory.
    return free // local_world_size()


def host_memory() -> int:
    """Bytes that the machine has, or the container that this process is in."""
    return min([psutil.virtual_memory().total, *(group.limit for group in _groups())])


def held_memory(device: torch.device) -> int:
    """Bytes in use now: by torch on a GPU, by the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _groups() -> list[_Group]:
    """The groups with a limit that this process is in. Version 1 writes no limit as one of 2^63 bytes."""
    groups = []
    for folder, names in _folders():
        # Without a limit there are none of these files, or one that says "max".
        limit, used = _number_in(folder / names.limit), _number_in(folder / names.used)
        if limit is not None and used is not None:
            # What was read from files counts as used, and is given up when memory is wanted.
            free = limit - used + _inactive_file(folder / names.statistics, names.inactive_file)
            groups.append(_Group(limit, max(0, free)))
    return groups


def _folders() -> list[tuple[Path, _Names]]:
    """The folders of the process's own groups and of all groups around them, to the top of their trees."""
    if not _OWN_GROUPS.is_file():
        return []
    folders = []
    for line in _OWN_GROUPS.read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        tree = "memory" if "memory" in controllers.split(",") else controllers
        if tree in _NAMES:
            top = _TREES / tree
            own = top / group.lstrip("/")
            around = [folder for folder in own.parents if folder.is_relative_to(top)]
            folders += [(folder, _NAMES[tree]) for folder in (own, *around)]
    return folders


def _inactive_file(statistics: Path, name: str) -> int:
    """Bytes of files that a group keeps in memory and has not read again; 0 where nobody says."""
    if statistics.is_file():
        for line in statistics.read_text(encoding="utf-8").splitlines():
            key, _, number = line.partition(" ")
            if key == name:
                return int(number)
    return 0


def _number_in(path: Path) -> int | None:
    """The number that a file holds; None where there is no file, or no number in it."""
    if not path.is_file():
        return None
    content = path.read_text(encoding="utf-8").strip()
    return int(content) if content.isdigit() else None
