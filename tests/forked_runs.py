"""Runs of `dean-interp` that are killed, or find no room: a process that has imported everything forks a child a run.

A kill then costs what the run had done, not ten seconds of imports. Libraries have started threads by then, and `fork`
does not copy them: a child waits for ever for a lock that such a thread held. A run that takes too long is therefore
aborted, with a stack that says where it stood, and done once more.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LONGEST = 180.0
"""Seconds that a run may take. On a busy machine it takes a tenth of them."""


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
        ended = self._ask(asked)
        if ended.code != -signal.SIGABRT:
            return ended
        print(f"{arguments} hung; once more\n{ended.error.partition('Extension modules')[0]}", file=sys.__stderr__)
        return self._ask(asked)

    def _ask(self, asked: dict[str, object]) -> Ended:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            return Ended(**json.loads(self.process.stdout.readline()))
        except BaseException:  # a test that was stopped: those after it are not to wait for the same run
            self.process.kill()
            raise


@contextlib.contextmanager
def runner(model: Path) -> Iterator[Runner]:
    """A process that has loaded `model` once, so that everything is imported."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
                   "PYTHONPATH": str(Path(__file__).parents[1])}  # fmt: skip
    command = [sys.executable, __file__, str(model)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            yield Runner(process)
        finally:
            process.kill()


def _serve(model: str) -> None:
    import torch
    from tqdm import tqdm

    from dean_interp import load_model
    from dean_interp.cli.main import main

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread that looks after bars
    load_model(model, device="cpu")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(main, **json.loads(line))) + "\n")
        sys.stdout.flush()


def _run(main, arguments: list[str], kill_after: float | None, largest_file: int | None) -> dict[str, object]:
    import faulthandler
    import re
    import resource
    import time

    # A pipe, since the limit holds for every file. It is emptied all the time, so that it is never full.
    reads, writes = os.pipe()
    os.set_blocking(reads, False)
    began, said = time.monotonic(), b""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(writes, 2)
        faulthandler.enable()
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        os._exit(main(arguments))
    os.close(writes)
    limit, sent = (LONGEST, signal.SIGABRT) if kill_after is None else (kill_after, signal.SIGKILL)
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        said += _ready(reads)
        if time.monotonic() - began > limit:
            os.kill(child, sent)
            done = os.waitpid(child, 0)
            break
        time.sleep(0.0005)
    seconds, code = time.monotonic() - began, os.waitstatus_to_exitcode(done[1])
    while more := _ready(reads):
        said += more
    os.close(reads)
    error = said.decode(errors="replace")
    if code != -signal.SIGABRT:
        error = (re.findall(r"^ *(dean-interp: .*)", error, re.MULTILINE) or [""])[-1]
    return {"code": code, "seconds": seconds, "error": error}


def _ready(pipe: int) -> bytes:
    """What can be read now; nothing at the end too."""
    try:
        return os.read(pipe, 2**16)
    except BlockingIOError:
        return b""


if __name__ == "__main__":
    _serve(sys.argv[1])
