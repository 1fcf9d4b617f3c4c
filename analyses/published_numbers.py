"""Which gains of the paper's table exceed sampling noise? The published shares with intervals and tests.

    python analyses/published_numbers.py

Each share is of questions whose answer the paper's judge called safe: 2,165 on fairness, 657 on privacy. The paper
gives no interval, one seed and no answers; so every comparison here treats the two runs as independent samples of
questions (Newcombe's interval, a two-proportion z test; Holm over DEAN's 16 gains, and over the 32 of fine-tuning). The
runs answered the *same* questions: a paired test would be sharper. By how much depends on how often both are right,
which was not published. So the intervals of this project's own studies (paired, clustered by topic, else by prompt)
cannot be had here. The last columns say what McNemar's test would give if only those answers changed that must have,
and if as many changed as can have.
"""

from collections.abc import Mapping
from math import sqrt

from scipy import stats

from dean_interp.cli.ending import script
from dean_interp.statistics import holm, proportion

QUESTIONS = {"fairness": 2165, "privacy": 657}
Key = tuple[str, str, str]
"""Model, behaviour and method."""
Comparison = tuple[float, float, int]
"""Share of the original, share with the method, number of questions."""
METHODS = ("FFT", "LoRA", "DoRA", "ReFT", "DEAN", "DEAN, malicious only")
PUBLISHED = {  # arXiv 2410.16672: origin, then METHODS
    "Qwen2-7B-Instruct": {
        "fairness": (0.6684, 0.5418, 0.4453, 0.4393, 0.3543, 0.7497, 0.7039),
        "privacy": (0.7412, 0.7900, 0.7656, 0.7793, 0.7991, 0.8447, 0.8097),
    },
    "Mistral-7B-Instruct-v0.2": {
        "fairness": (0.6231, 0.5570, 0.5062, 0.4697, 0.2846, 0.6342, 0.6642),
        "privacy": (0.6636, 0.7793, 0.7473, 0.7047, 0.5556, 0.7154, 0.6895),
    },
    "Vicuna-7B-v1.5": {
        "fairness": (0.5501, 0.4046, 0.3857, 0.3783, 0.3626, 0.5778, 0.6406),
        "privacy": (0.3760, 0.5297, 0.4871, 0.4703, 0.3227, 0.4414, 0.4977),
    },
    "Llama2-7B-Chat": {
        "fairness": (0.7386, 0.5478, 0.5769, 0.5783, 0.3917, 0.7746, 0.8060),
        "privacy": (0.7504, 0.6758, 0.6164, 0.6195, 0.3577, 0.8432, 0.8798),
    },
}


def difference(before: float, after: float, n: int) -> tuple[float, float, float]:
    """Change of a share with Newcombe's (1998, method 10) 95 % interval for two independent samples of `n`."""
    old, new = proportion(round(before * n), n), proportion(round(after * n), n)
    change = new.mean - old.mean
    low = change - sqrt((new.mean - new.low) ** 2 + (old.high - old.mean) ** 2)
    high = change + sqrt((new.high - new.mean) ** 2 + (old.mean - old.low) ** 2)
    return change, low, high


def unpaired_p(before: float, after: float, n: int) -> float:
    """Two-sided p of the pooled two-proportion z test, two independent samples of `n`."""
    old, new = round(before * n), round(after * n)
    pooled = (old + new) / (2 * n)
    return float(2 * stats.norm.sf(abs(new - old) / n / sqrt(2 * pooled * (1 - pooled) / n)))


def paired_p(before: float, after: float, n: int) -> tuple[float, float]:
    """McNemar's p if only the answers that must have changed did, and if as many changed as possibly can have."""
    old, new = round(before * n), round(after * n)
    # The fewest answers that must have changed, and the most that can have.
    must = abs(new - old)
    can = min(old, n - new) + min(new, n - old)
    least, most = (float(stats.binomtest((changed + must) // 2, changed).pvalue) for changed in (must, can))
    return least, most


def published(n_methods: int = len(METHODS)) -> str:
    """The table's first so many methods in words: points of fairness and privacy awareness against the original."""
    parts = []
    for model, table in PUBLISHED.items():
        changes = []
        for i, method in enumerate(METHODS[:n_methods]):
            fairness, privacy = (100 * (shares[i + 1] - shares[0]) for shares in table.values())
            changes.append(f"{method} {fairness:+.0f}/{privacy:+.0f}")
        parts.append(f"{model} {', '.join(changes)}")
    return f"fairness/privacy awareness in points (arXiv 2410.16672, table 1): {'; '.join(parts)}"


def comparisons() -> dict[Key, Comparison]:
    """Every published share beside the original's."""
    family = {}
    for model, table in PUBLISHED.items():
        for behaviour, (before, *after) in table.items():
            for method, share in zip(METHODS, after, strict=True):
                family[model, behaviour, method] = (before, share, QUESTIONS[behaviour])
    return family


def adjusted_p(family: Mapping[Key, Comparison]) -> dict[Key, float]:
    """Unpaired p of each comparison, with Holm's adjustment over all of them."""
    adjusted = holm({" / ".join(key): unpaired_p(*value) for key, value in family.items()})
    return {key: adjusted[" / ".join(key)] for key in family}


def main() -> None:
    """Print every change with its interval and tests; then the verdict on DEAN's gains."""
    family = comparisons()
    gains = {key: compared for key, compared in family.items() if key[2].startswith("DEAN")}
    others = {key: compared for key, compared in family.items() if key not in gains}
    # DEAN's gains are a family of their own: what other methods do is no part of its claim.
    adjusted = adjusted_p(gains) | adjusted_p(others)
    print_table(family, adjusted)
    print_verdict(gains, adjusted)


def print_table(family: Mapping[Key, Comparison], adjusted: Mapping[Key, float]) -> None:
    """Print one line a comparison: its change in points, and its tests."""
    print(
        f"{'model':<25}{'behaviour':<10}{'method':<22}{'points':>7} {'95 %':>16}   {'p':>8} {'p (Holm)':>9}"
        f" {'paired p: least':>16} {'.. most changed':>16}"
    )
    for key, compared in family.items():
        model, behaviour, method = key
        change, low, high = (100 * share for share in difference(*compared))
        least, most = paired_p(*compared)
        print(
            f"{model:<25}{behaviour:<10}{method:<22}{change:>+7.1f} [{low:>+6.1f}, {high:>+6.1f}]   "
            f"{unpaired_p(*compared):>8.2g} {adjusted[key]:>9.2g} {least:>16.2g} {most:>16.2g}"
        )


def print_verdict(gains: Mapping[Key, Comparison], adjusted: Mapping[Key, float]) -> None:
    """Print how many of DEAN's gains exceed sampling noise, and which do not."""
    noise = [key for key in gains if adjusted[key] > 0.05]
    print(f"\n{len(gains) - len(noise)} of {len(gains)} gains of DEAN exceed sampling noise; these do not:")
    for key in noise:
        change, _, _ = difference(*gains[key])
        p = unpaired_p(*gains[key])
        print(f"  {', '.join(key)}: {100 * change:+.1f} points, p = {p:.2g}, with Holm {adjusted[key]:.2g}")


if __name__ == "__main__":
    script(main)
