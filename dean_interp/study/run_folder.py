"""The run folder: whose it is, what it was begun with, what its files held at the end, and how long each step took."""

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from dean_interp.data.examples import Behaviour, data_fingerprints
from dean_interp.distributed import is_rank0, on_rank0
from dean_interp.editing.checkpoint_files import all_files
from dean_interp.errors import InputError
from dean_interp.files import read_json, write_json
from dean_interp.resume import CONFIG_FILE, Config, RunSettings, refuse_other_settings
from dean_interp.study.results import load_record

CHECKSUMS = "checksums.json"
THREADS = "threads.json"
log = logging.getLogger(__name__)
_WAIT = 2.0
"""Seconds between two looks at a folder that another process writes to."""


def begun_with(folder: Path, kind: type[Config] | Any) -> RunSettings[Config]:  # noqa: ANN401 - a class, or a `dict`
    """What the run in a folder was begun with.

    Args:
        kind: the type of its settings.

    Raises:
        InputError: there is no run, or one of another kind.
    """
    return load_record(RunSettings[kind], folder / CONFIG_FILE, "run")


@contextmanager
def owned(
    folder: Path,
    config: Any,  # noqa: ANN401 - any settings record
    data: Sequence[Behaviour],
    *,
    begun: Sequence[str] = ("scores/*", "states/*"),
) -> Iterator[None]:
    """The folder, for these settings and this process alone. `config.json` says what it was begun with.

    Args:
        begun: patterns of files: once there is one, the settings are fixed.

    Raises `InputError` where the folder cannot be written, another process writes to it, or it holds a run with other
    settings or other data.
    """
    with locked(folder):
        settings = TypeAdapter(type(config)).dump_python(config, mode="json")
        wanted = RunSettings(config=settings, data=data_fingerprints(data))
        path = folder / CONFIG_FILE
        # Before anything is scored or measured there is nothing to lose.
        has_begun = any(any(folder.glob(pattern)) for pattern in begun)
        if path.is_file() and has_begun:
            refuse_other_settings(folder, begun_with(folder, dict[str, Any]), wanted)
        else:
            write_json(path, wanted)
        _say_what_is_there(folder)
        yield


def _say_what_is_there(folder: Path) -> None:
    if not is_rank0():
        return
    n_files = sum(1 for _ in folder.rglob("*.safetensors"))
    if (folder / CHECKSUMS).is_file():
        log.info("%s: is finished, and what it found is read", folder)
    elif n_files:
        log.info("%s: goes on; %d files of scores and measurements are there", folder, n_files)


class BusyError(InputError):
    """Another process writes to a folder."""


@contextmanager
def waited_for(folder: Path) -> Iterator[None]:
    """As `locked`; where another process writes to the folder, its end is waited for."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(folder))
                break
            except BusyError:
                time.sleep(_WAIT)
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, for this process and those that share its work alone.

    Raises `InputError` where it cannot be written, and `BusyError` where another process writes to it.
    """
    lock = FileLock(folder / ".lock")
    try:
        if folder.is_file():
            raise InputError(f"{folder} is a file, and a folder is wanted: give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        if is_rank0():
            lock.acquire(blocking=False)
    except Timeout as error:
        raise BusyError(f"another run is writing to {folder}") from error
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    # The system frees the lock of a process that was killed.
    try:
        yield
    finally:
        lock.release()


def note_checksums(folder: Path) -> None:
    """Write `checksums.json`: what the finished run's files hold. Once it is there, it stays."""
    path = folder / CHECKSUMS

    def missing() -> dict[str, str]:
        return {} if path.is_file() else checksums(folder, kept_files(folder))

    by_name = on_rank0(missing)
    if by_name:
        write_json(path, by_name)


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of files, by their names in the folder."""
    by_name = {}
    for name in names:
        with (folder / name).open("rb") as file:
            by_name[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return by_name


def kept_files(folder: Path) -> list[str]:
    """All records and tensors of a run but its times and its threads, and what tells of the others."""
    names = []
    for path in all_files(folder):
        is_record = path.suffix in (".json", ".safetensors")
        if is_record and path.name not in (CHECKSUMS, THREADS, "times.json"):
            names.append(path.as_posix())
    return sorted(names)


class Clock:
    """Seconds that each step took, in a file of their own; steps of an earlier process keep theirs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.monotonic()
        self.seconds: dict[str, float] = read_json(path, dict[str, float]) if path.is_file() else {}

    def lap(self, step: str) -> None:
        """The time since the last lap belongs to `step`."""
        now = time.monotonic()
        before = self.seconds.get(step, 0)
        self.seconds[step] = round(before + now - self.started, 1)
        self.started = now
        write_json(self.path, self.seconds)
