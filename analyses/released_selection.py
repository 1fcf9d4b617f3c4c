"""The released code's selection beside the set intersection that the paper describes: sizes, overlap, effect.

    python analyses/released_selection.py --fraction 1e-4 --n-examples 32

on the demo model (--model for another). Both select weights from the same scores; the released procedure runs in
Hugging Face layout, since it depends on the order, and twice: with either behaviour first. Effects are changes of the
mean margins log p(safe) - log p(unsafe) on test prompts, nats per token, paired 95 %.
"""

import argparse
import warnings

from dean_interp import ablate, coupling, importance, load_behaviour, load_model, measure
from dean_interp.models.demo import DEMO_MODEL
from dean_interp.selection.released import released_coupling
from dean_interp.selection.stability import jaccard
from dean_interp.statistics import clustered_interval


def main() -> None:
    """Print the sizes, the overlaps and the effects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--fraction", type=float, default=1e-4)
    parser.add_argument("--n-examples", type=int, default=32)
    parser.add_argument("--n-test", type=int, default=32)
    given = parser.parse_args()
    model = load_model(given.model)
    calibration = [load_behaviour(name, n_examples=given.n_examples) for name in ("privacy", "fairness", "general")]
    privacy, fairness, general = (importance(model, behaviour, unit="weight") for behaviour in calibration)
    warnings.simplefilter("ignore", UserWarning)  # that this is not an intersection is what is shown here
    found = coupling(privacy, fairness, general, fraction=given.fraction)
    sets = {
        "set intersection": found.coupled,
        "released, privacy first": released_coupling(privacy, fairness, general, fraction=given.fraction),
        "released, fairness first": released_coupling(fairness, privacy, general, fraction=given.fraction),
    }
    print("sizes on the way to the intersection: " + ", ".join(f"{name} {n}" for name, n in found.sizes().items()))
    print(f"\n{'Jaccard overlap':<26}" + "".join(f"{name:>26}" for name in sets))
    for name, one in sets.items():
        print(f"{name:<26}" + "".join(f"{jaccard(one, other):>26.3f}" for other in sets.values()))
    print(f"\n{'set':<26}{'units':>7}{'important to both':>19}")
    for name, one in sets.items():
        print(f"{name:<26}{len(one):>7}{len(one & found.both):>19}")
    tests = [load_behaviour(name, n_examples=given.n_test, split="test") for name in ("privacy", "fairness", "general")]
    before = measure(model, tests, answer_tokens=12)
    print(f"\n{'change under ablation of':<26}{'privacy margin':>26}{'fairness margin':>26}{'perplexity':>12}")
    print(f"{'nothing':<26}{'':>52}{before['general'].perplexity:>12.1f}")
    for name, one in sets.items():
        with ablate(model, one):
            after = measure(model, tests, answer_tokens=12)
        cells = []
        for behaviour in ("privacy", "fairness"):
            change = (after[behaviour].margin - before[behaviour].margin).numpy()
            interval = clustered_interval(change, after[behaviour].prompts)
            cells.append(f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]")
        print(f"{name:<26}" + "".join(f"{cell:>26}" for cell in cells) + f"{after['general'].perplexity:>12.1f}")


if __name__ == "__main__":
    main()
