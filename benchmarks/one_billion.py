"""Scores neurons and weights of a random model of a billion parameters, within the memory that was predicted.

python benchmarks/one_billion.py          (about 13 GiB; two CPU cores: a few minutes)
"""

import torch
from passes import BOTH, hooked, random_llama  # beside this file
from scoring import peak_bytes

from dean_interp import ScoringConfig, importance, load_behaviour
from dean_interp.planning.scoring import plan
from dean_interp.planning.stopwatch import timed


def main() -> None:
    """Print the plan, then what was measured."""
    torch.set_num_threads(2)
    plain = random_llama(n_layers=16, width=2048, d_mlp=8192, heads=32, kv_heads=8)
    model = hooked(plain)
    behaviour = load_behaviour("fairness", n_examples=4)
    planned = plan(model, behaviour, unit=BOTH)
    n_parameters = sum(each.numel() for each in plain.parameters())
    print(f"{n_parameters / 1e9:.2f} billion parameters\nplan: {planned}", flush=True)
    peaks = []

    def score() -> None:
        config = planned.apply(ScoringConfig())
        peaks.append(peak_bytes(lambda: importance(model, behaviour, unit=BOTH, config=config)))

    took = timed(score)
    gib, of_plan = peaks[0] / 2**30, peaks[0] / planned.peak_bytes
    print(
        f"measured: peak {gib:.2f} GiB, {of_plan:.2f} of the prediction; {took.wall / planned.seconds:.2f} of the time"
    )


if __name__ == "__main__":
    main()
