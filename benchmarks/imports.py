"""Seconds that imports take, each in a fresh interpreter, in turn.

    make bench        (or: python benchmarks/imports.py)

`import dean_interp` loads names when they are first used, so the names that most work needs stand beside it.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from scoring import show  # beside this file

REPEATS = 5
PROGRAMS = {
    "import_transformer_lens": "import transformer_lens",
    "import_dean_interp": "import dean_interp",
    "import_names": "from dean_interp import ablate, couple, importance, load_behaviour, load_model, measure",
}
"""What is timed, by its name in the results file."""


def seconds(program: str) -> float:
    """Time of one Python process that runs a program."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Print every time, and add it to the results file."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    # The first round fills the caches of the file system.
    for repeat in range(REPEATS + 1):
        for name, program in PROGRAMS.items():
            taken = seconds(program)
            if repeat:
                times[name].append(taken)
    path = Path(__file__).with_name("latest.json")
    results = json.loads(path.read_text()) if path.is_file() else {}
    for name, program in PROGRAMS.items():
        least, median, most = show(f"seconds of `{program}`", times[name])
        results |= {f"{name}_seconds_min": least, f"{name}_seconds": median, f"{name}_seconds_max": most}
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
