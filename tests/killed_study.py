"""`python killed_study.py KILLS SEED CHECKPOINT FOLDER`: a study that is killed at random moments and always goes on.

A first run is left alone. Then processes are killed (SIGKILL) after a random part of its time and started again, until
there were that many kills; every study that ends in between is compared, byte by byte, with the first, and begun anew.
Prints as JSON how many kills there were, how many studies ended, and which files differed.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from several_processes import study


def started(checkpoint: str, folder: Path) -> int:
    child = os.fork()
    if child == 0:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        study(checkpoint, str(folder))
        os._exit(0)
    return child


def ended(child: int, seconds: float) -> bool:
    """Whether it ends by itself within that time; it is killed where it does not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            assert status == 0, "the study failed"
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("times.json", ".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


if __name__ == "__main__":
    torch.set_num_threads(1)
    kills, seed, checkpoint, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    draw, began = random.Random(seed), time.monotonic()
    assert ended(started(checkpoint, out / "whole"), 600)
    whole, seconds = content(out / "whole"), time.monotonic() - began
    found = {"kills": 0, "ended": 0, "different": []}
    folder = out / "killed"
    while found["kills"] < kills or folder.exists():
        left = draw.uniform(0, seconds) if found["kills"] < kills else 600.0
        if not ended(started(checkpoint, folder), left):
            found["kills"] += 1
            continue
        now = content(folder)
        found["different"] += sorted(name for name in whole.keys() | now.keys() if whole.get(name) != now.get(name))
        found["ended"] += 1
        shutil.rmtree(folder)
    sys.stdout.write(json.dumps(found) + "\n")
