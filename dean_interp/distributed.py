"""Several processes of one run, as `torchrun` starts them: each takes a share of every loop, the first one writes.

All run the same program on the same data, so all come to the functions below in the same order; within a shared loop,
of which one may have no part, none is called. Outside of `joined` there is one process, and nothing here does anything.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dean_interp.errors import InputError

Item = TypeVar("Item")

# the first process may ask a judge for hours while the others wait; a lost one is noticed
_PATIENCE = timedelta(days=7)
_SECONDS_SEEN = 60.0  # after which a file that the first process wrote must be there for the others
_joined = False


@contextmanager
def joined() -> Iterator[None]:
    """While open, this is one of the processes that `torchrun` started (or the only one), and loops are shared.

    With a GPU for each process, that of its number on its machine is the current one (gloo on CPUs, nccl on GPUs). A
    process group that the caller has begun is used, and left as it is.
    """
    global _joined
    own_group = not dist.is_initialized()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and own_group:
        yield
        return
    if own_group:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    _joined = True
    try:
        yield
    finally:
        _joined = False
        if own_group:
            dist.destroy_process_group()


def n_processes() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if _joined else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if _joined else 0


def n_here() -> int:
    """How many of them share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", n_processes())) if _joined else 1


def is_rank0() -> bool:
    """Whether this is the one that writes, prints and asks servers."""
    return rank() == 0


def shard(items: Sequence[Item]) -> Sequence[Item]:
    """Every n-th item, from this process's number on."""
    return items[rank() :: n_processes()]


def all_reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes, in place, its sum over the processes."""
    _reduce(tensors, dist.ReduceOp.SUM)


def all_reduce_max(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes, in place, the largest of every entry over the processes."""
    _reduce(tensors, dist.ReduceOp.MAX)


def gather(own: Sequence[Item]) -> list[Item]:
    """All items in their order, from what each process made of its `shard`. Items are what JSON can hold."""
    if n_processes() == 1:
        return list(own)
    shares = [json.loads(_from(sender, json.dumps(list(own)))) for sender in range(n_processes())]
    longest = len(shares[0])
    return [share[i] for i in range(longest) for share in shares if i < len(share)]


def on_rank0(work: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """What the first process finds; only it does the work. An `InputError` there is one in every process."""
    if n_processes() == 1:
        return work()
    said: dict[str, Any] = {}
    if is_rank0():
        try:
            said = {"found": work()}
        except InputError as error:
            said = {"error": str(error)}
    said = json.loads(_from(0, json.dumps(said)))
    if "error" in said:
        raise InputError(said["error"])
    return said["found"]


def written(path: Path, write: Callable[[], None]) -> None:
    """The first process writes once all are here, so that none finds the file before it is asked to write it, too; all
    go on once they see it. Raises `InputError` where one does not.
    """
    all_reduce_sum([torch.zeros(1)])  # a barrier

    def stamp() -> list[int]:
        write()
        return _stamp(path)

    wanted, began = on_rank0(stamp), time.monotonic()
    while not is_rank0() and _stamp(path) != wanted:
        if time.monotonic() - began > _SECONDS_SEEN:
            raise InputError(
                f"process {rank()} does not see {path} as process 0 wrote it: the folder must lie on a file system "
                "that all processes share"
            )
        time.sleep(0.05)


def refuse_several(what: str) -> None:
    """Raise `InputError` where several processes would do what one must."""
    if n_processes() > 1:
        raise InputError(f"{what} runs in one process, got {n_processes()}: start it without torchrun")


def _stamp(path: Path) -> list[int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return []
    return [found.st_size, found.st_mtime_ns]


def _reduce(tensors: Iterable[Tensor], how: Any) -> None:  # noqa: ANN401 - torch's own enumeration
    if n_processes() > 1:
        with _others():
            for tensor in tensors:
                dist.all_reduce(tensor, op=how)


def _from(sender: int, text: str) -> str:
    """The text that `sender` gives, in every process."""
    sent = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    with _others():
        size = torch.tensor([len(sent)])
        dist.broadcast(size, sender)
        if rank() != sender:
            sent = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(sent, sender)
    return bytes(sent.numpy()).decode()


@contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise InputError(
            f"process {rank()} of {n_processes()} lost another one, whose own error says why ({_first_line(error)}). "
            "What was finished is kept: start the same command again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
