"""Several processes that `torchrun` started share one run: each computes its shard of every loop, rank 0 writes.

All processes run the same program on the same data, so all reach the collectives below in the same order. Never call a
collective inside a sharded loop: a rank without batches would leave the others hanging. Outside of `process_group`
there is one process, and every function here does the trivial thing.
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

from dean_interp.errors import InputError, first_line

Item = TypeVar("Item")

# rank 0 may ask a judge for hours while the others wait; a lost process is noticed at once, whatever the timeout
_TIMEOUT = timedelta(days=7)
# until then the other ranks must see a file that rank 0 wrote
_SECONDS_UNTIL_SEEN = 60.0
_is_open = False


@contextmanager
def process_group() -> Iterator[None]:
    """Inside, loops are sharded over the processes that `torchrun` started; with one process nothing changes.

    The backend is gloo on CPUs and nccl on GPUs; each process takes the GPU of its local rank. A process group that the
    caller has initialised is used, and not destroyed.
    """
    global _is_open
    is_ours = not dist.is_initialized()
    if os.environ.get("WORLD_SIZE", "1") == "1" and is_ours:
        yield
        return
    if is_ours:
        try:
            _initialise()
        except (ValueError, RuntimeError) as error:
            reason = first_line(error)
            raise InputError(
                f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} asks for several processes, and they did not meet "
                f"({reason}): start them with torchrun, or unset it"
            ) from error
    was_open = _is_open
    _is_open = True
    try:
        yield
    finally:
        _is_open = was_open
        if is_ours:
            dist.destroy_process_group()


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _is_open else 1


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if _is_open else 0


def local_world_size() -> int:
    """The number of processes on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if _is_open else 1


def is_rank0() -> bool:
    """Whether this is rank 0, which writes files, prints and asks servers."""
    return rank() == 0


def shard(items: Sequence[Item]) -> Sequence[Item]:
    """Items of this rank: every `world_size`-th, from the number of the rank on. `gather` is the inverse."""
    return items[rank() :: world_size()]


def all_reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, in place, by its sum over the ranks."""
    _all_reduce(tensors, dist.ReduceOp.SUM)


def all_reduce_max(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, in place, by its elementwise maximum over the ranks."""
    _all_reduce(tensors, dist.ReduceOp.MAX)


def gather(items: Sequence[Item]) -> list[Item]:
    """The items of all ranks, on every rank, in the order from before `shard`. Items must be JSON values."""
    if world_size() == 1:
        return list(items)
    text = json.dumps(list(items))
    shards = [json.loads(_broadcast(sender, text)) for sender in range(world_size())]
    # the first item of every rank, then the second of every rank, and so on; rank 0 has the most items
    gathered = []
    for i in range(len(shards[0])):
        gathered += [items_of_rank[i] for items_of_rank in shards if i < len(items_of_rank)]
    return gathered


def on_rank0(work: Callable[[], Any]) -> Any:  # noqa: ANN401 - any JSON value
    """Call `work` on rank 0 alone and return its result, a JSON value, on every rank.

    An `InputError` of rank 0 is raised on every rank.
    """
    if world_size() == 1:
        return work()
    outcome: dict[str, Any] = {}
    if is_rank0():
        try:
            outcome = {"result": work()}
        except InputError as error:
            outcome = {"error": str(error)}
    outcome = json.loads(_broadcast(0, json.dumps(outcome)))
    if "error" in outcome:
        raise InputError(outcome["error"])
    return outcome["result"]


def write_on_rank0(path: Path, write: Callable[[], None]) -> None:
    """Call `write` on rank 0 alone; the other ranks go on once they see the file at `path`.

    Raises `InputError` where a rank does not see it: the folder is on no file system that all ranks share.
    """
    # a barrier: no rank may find the file before it was asked to write it, too
    all_reduce_sum([torch.zeros(1)])

    def write_and_stamp() -> list[int]:
        write()
        return _stamp(path)

    stamp = on_rank0(write_and_stamp)
    began = time.monotonic()
    while not is_rank0() and _stamp(path) != stamp:
        if time.monotonic() - began > _SECONDS_UNTIL_SEEN:
            raise InputError(
                f"process {rank()} does not see {path} as process 0 wrote it: the folder must lie on a file system "
                "that all processes share"
            )
        time.sleep(0.05)


def require_one_process(what: str) -> None:
    """Raise `InputError` where several processes would do what only one may do."""
    if world_size() > 1:
        raise InputError(f"{what} runs in one process, got {world_size()}: start it without torchrun")


def _initialise() -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=_TIMEOUT)


def _stamp(path: Path) -> list[int]:
    """Size and time of a file, by which ranks tell whether they see the same one."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _all_reduce(tensors: Iterable[Tensor], operation: Any) -> None:  # noqa: ANN401 - an enumeration of torch
    if world_size() > 1:
        with _lost_process_is_an_input_error():
            for tensor in tensors:
                dist.all_reduce(tensor, op=operation)


def _broadcast(sender: int, text: str) -> str:
    """The text of rank `sender`, on every rank."""
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    with _lost_process_is_an_input_error():
        # the receivers need the size to make room
        size = torch.tensor([len(content)])
        dist.broadcast(size, sender)
        if rank() != sender:
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, sender)
    return bytes(content.numpy()).decode()


@contextmanager
def _lost_process_is_an_input_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise InputError(
            f"process {rank()} of {world_size()} lost another one, whose own error says why "
            f"({first_line(error)[:120]}). What was finished is kept: start the same command again"
        ) from error
