"""Do first-order scores rank neurons by what silencing them really does?

    python analyses/scores_against_ablation.py --n-neurons 60 --n-examples 8

on the demo model (--model for another).

A sample of neurons, spread evenly over the ranks of the gradient score in every layer, is silenced one by one. The real
change of each example's loss, absolute and averaged, is compared with the score by Spearman's rank correlation; the
interval is a bootstrap over neurons. Magnitude and random scores are what a score has to beat. The ratio of the real
change to the score says where first order fails: it should be 1.
"""

import argparse

import numpy as np
import torch
from scipy.stats import bootstrap, spearmanr

from dean_interp import ScoringConfig, Selection, ablate, importance, load_behaviour, load_model
from dean_interp.cli.ending import script
from dean_interp.models.demo import DEMO_MODEL
from dean_interp.models.sites import neuron_sites
from dean_interp.models.tokens import collate
from dean_interp.progress import progress_bar
from dean_interp.scoring.capture import stream_activations
from dean_interp.scoring.methods import activation_contrast, magnitude, random
from dean_interp.scoring.preparation import prepare


def main() -> None:
    """Print one line a score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--behaviour", default="privacy")
    parser.add_argument("--n-examples", type=int, default=8)
    parser.add_argument("--n-neurons", type=int, default=60)
    given = parser.parse_args()
    model = load_model(given.model)
    behaviour = load_behaviour(given.behaviour, n_examples=given.n_examples)
    scores = {
        "gradient": importance(model, behaviour),
        "activation contrast": activation_contrast(model, behaviour),
        "magnitude": magnitude(model, behaviour),
        "random": random(model, behaviour),
    }
    sites, width = neuron_sites(model), model.cfg.d_mlp
    places = np.linspace(0, len(sites) * width - 1, given.n_neurons).astype(int)
    ranked = {site: scores["gradient"][site].argsort(descending=True) for site in sites}
    chosen = [(sites[i % len(sites)], int(ranked[sites[i % len(sites)]][i // len(sites)])) for i in places.tolist()]
    batch = collate(prepare(model, behaviour, ScoringConfig()).rows, device=model.cfg.device)

    def losses() -> torch.Tensor:
        return stream_activations(model, batch, [], lambda site, x: None).double().cpu()

    before, changes = losses(), []
    for site, index in progress_bar(chosen, desc="silencing one neuron at a time"):
        units = {one: torch.tensor([index] if one == site else [], dtype=torch.int64) for one in sites}
        with ablate(model, Selection(units, {one: (width,) for one in sites})):
            changes.append(float((losses() - before).abs().mean()))
    print(f"{len(chosen)} neurons, {len(behaviour)} examples of {behaviour.name}; changes {min(changes):.2g} to "
          f"{max(changes):.2g} nats")  # fmt: skip
    predicted = np.array([float(scores["gradient"][site][index]) for site, index in chosen])
    ratio, order = np.array(changes) / predicted, predicted.argsort()
    quarters = [f"{np.median(some):.2f}" for some in np.array_split(ratio[order], 4)]
    print(f"real change / first-order score, median by quarter of the score, lowest first: {', '.join(quarters)}")
    worst = order[-5:][::-1]
    print("the five highest scores: " + ", ".join(f"{chosen[i][0]}[{chosen[i][1]}] {ratio[i]:.2f}" for i in worst))
    for name, one in scores.items():
        values = [float(one[site][index]) for site, index in chosen]
        rho = spearmanr(values, changes).statistic
        drawn = bootstrap(
            (values, changes),
            lambda a, b: spearmanr(a, b).statistic,
            paired=True,
            vectorized=False,
            n_resamples=2000,
            method="percentile",
            rng=np.random.default_rng(0),
        )
        interval = drawn.confidence_interval
        print(f"{name:<20} Spearman {rho:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]")


if __name__ == "__main__":
    script(main)
