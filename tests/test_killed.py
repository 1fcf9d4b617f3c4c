"""A study that is killed at any moment goes on, and ends in the bytes of one that was left alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_killed_at_fifty_random_moments_it_ends_in_the_same_bytes(checkpoints, tmp_path):
    kills = 50
    script = Path(__file__).with_name("killed_study.py")
    command = [sys.executable, str(script), str(kills), "0", str(checkpoints["llama-gqa"]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == kills and found["ended"] >= 1 and found["different"] == []
