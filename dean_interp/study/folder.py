"""The run folder: whose it is, what it was begun with, what its files held at the end, and how long each step took."""

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dean_interp.data.examples import Behaviour
from dean_interp.distributed import agreed, writes
from dean_interp.errors import InputError
from dean_interp.tensorfile import write_text

SUMS = "SHA256SUMS"


@contextmanager
def owned(folder: Path, settings: Mapping[str, Any], data: Sequence[Behaviour]) -> Iterator[None]:
    """The folder, for these settings and this process alone. `config.json` says what it was begun with.

    Raises `InputError` where the folder cannot be written, another process writes to it, or it holds a run with other
    settings or other data.
    """
    with locked(folder):
        wanted = {"study": settings, "data": fingerprints(data)}
        wanted = json.loads(json.dumps(wanted))  # as the file gives it back
        path = folder / "config.json"
        something = any(any((folder / name).glob("*")) for name in ("scores", "arms"))
        if path.is_file() and something:  # before anything is scored or measured there is nothing to lose
            _refuse_other(folder, json.loads(path.read_text()), wanted)
        else:
            write_text(path, json.dumps(wanted, indent=1) + "\n")
        yield


def fingerprints(data: Sequence[Behaviour]) -> dict[str, str]:
    """Of each set of examples, by its name and split."""
    return {f"{one.name} ({one.split})": one.fingerprint for one in data}


def write_sums(folder: Path) -> None:
    """`SHA256SUMS`, as `sha256sum --check` reads it: what the finished run's files held. Once written, it stays."""
    path = folder / SUMS

    def lines() -> list[str]:
        return [] if path.is_file() else [f"{file_sum(folder / name)}  {name}\n" for name in kept_files(folder)]

    if found := agreed(lines):
        write_text(path, "".join(found))


def kept_files(folder: Path) -> list[str]:
    """The files that a run is made of, by their names in the folder: all records and tensors but the times."""
    files = (one.relative_to(folder) for one in folder.rglob("*") if one.suffix in (".json", ".safetensors"))
    return sorted(one.as_posix() for one in files if one.name != "times.json")


def read_sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a finished run, by its name. Raises `InputError` where the run is not finished."""
    path = folder / SUMS
    if not path.is_file():
        raise InputError(f"{folder} holds no finished run: {SUMS} is missing (the same `dean-interp run` finishes it)")
    return {name: digest for digest, _, name in (line.partition("  ") for line in path.read_text().splitlines())}


def file_sum(path: Path) -> str:
    """The SHA-256 of a file's bytes; empty where there is no file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, for this process and those that share its work alone.

    Raises `InputError` where it cannot be written, or another process writes to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    with lock:
        try:
            if writes():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another run is writing to {folder}") from error
        yield


def _refuse_other(folder: Path, there: Mapping[str, dict], wanted: Mapping[str, dict]) -> None:
    begun = there.get("study", {})
    other = [name for name in wanted["study"] if begun.get(name) != wanted["study"][name]]
    if other:
        changes = ", ".join(f"{name} ({begun.get(name)} there, {wanted['study'][name]} now)" for name in other)
        raise InputError(f"{folder} holds a run with another {changes}: choose another folder")
    changed = [name for name in wanted["data"] if there.get("data", {}).get(name) != wanted["data"][name]]
    if changed:
        raise InputError(
            f"the data of {', '.join(changed)} changed since the run in {folder} began: put them back, or choose "
            "another folder"
        )


class Clock:
    """Seconds that each step took, in a file of their own; steps of an earlier process keep theirs."""

    def __init__(self, path: Path) -> None:
        self.path, self.started = path, time.monotonic()
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def lap(self, step: str) -> None:
        """The time since the last lap belongs to `step`."""
        now = time.monotonic()
        self.seconds[step] = round(self.seconds.get(step, 0) + now - self.started, 1)
        self.started = now
        write_text(self.path, json.dumps(self.seconds, indent=1) + "\n")
