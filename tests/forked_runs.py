"""Runs of `dean-interp` that are killed, or find no room: a process that has imported everything forks a child a run.

A kill then costs what the run had done, not ten seconds of imports.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How one run ended: `code` is -9 where it was killed."""

    code: int
    seconds: float
    error: str


class Runner:
    """Asks the forking process for runs, one at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(
        self, arguments: Sequence[object], *, kill_after: float | None = None, largest_file: int | None = None
    ) -> Ended:
        """Run the command; SIGKILL it after some seconds; let no file grow beyond some bytes (EFBIG)."""
        asked = {"arguments": [*map(str, arguments)], "kill_after": kill_after, "largest_file": largest_file}
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))


@contextlib.contextmanager
def runner(model: Path) -> Iterator[Runner]:
    """A process that has loaded `model` once, so that everything is imported."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
                   "PYTHONPATH": str(Path(__file__).parents[1])}  # fmt: skip
    command = [sys.executable, __file__, str(model)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        yield Runner(process)
        process.kill()


def _serve(model: str) -> None:
    import torch

    from dean_interp import load_model
    from dean_interp.cli.main import main

    torch.set_num_threads(1)
    load_model(model, device="cpu")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(main, **json.loads(line))) + "\n")
        sys.stdout.flush()


def _run(main, arguments: list[str], kill_after: float | None, largest_file: int | None) -> dict[str, object]:
    import re
    import resource
    import signal
    import time

    reads, writes = os.pipe()  # what is said there is short
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(writes, 2)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        os._exit(main(arguments))
    os.close(writes)
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if kill_after is not None and time.monotonic() - began > kill_after:
            os.kill(child, signal.SIGKILL)
            done = os.waitpid(child, 0)
            break
        time.sleep(0.0005)
    seconds = time.monotonic() - began
    with os.fdopen(reads) as said:
        errors = re.findall(r"^ *(dean-interp: .*)", said.read(), re.MULTILINE)
    return {"code": os.waitstatus_to_exitcode(done[1]), "seconds": seconds, "error": errors[-1] if errors else ""}


if __name__ == "__main__":
    _serve(sys.argv[1])
