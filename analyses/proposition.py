"""The paper's proposition, I[(X,Z);(Y,Z)] >= I[X;Y], on planted data of known values; and what it does not say.

    python analyses/proposition.py --out runs/proposition

X and Y share a weak cause; Z is in both sides. True values are closed forms of the covariance, estimates are
`gaussian_mi` of a sample, with the middle 95 % of draws (a range over draws, no interval over prompts). Three things
are shown:
1. the inequality holds, and without noise the left side is infinite (Z informs of itself);
2. removing Z from both sides lowers the information, as the paper says of its coupled neurons; but so does removing
   anything that both sides hold, and removing random coordinates of one side lowers it too;
3. a Z that is in both sides but couples nothing else lowers the left side all the same: what falls is Z's own presence,
   so a drop is evidence of decoupling only between sides that never held Z, beside random ablations.
Writes proposition.json, a page and its picture (proposition.svg, proposition.csv).
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dean_interp.cli.ending import script
from dean_interp.files import write_json
from dean_interp.information import gaussian_mi
from dean_interp.report.figures import estimates_beside_truth
from dean_interp.report.html import write_figure_page

DIM, NOISE = 4, 0.3
"""Coordinates of X, Y and Z each; noise of the sides, in standard deviations."""
SHARED = 0.4
"""Share of the variance of X and Y that comes from the cause that both have."""


@dataclass(frozen=True)
class Case:
    """One pair of sides: the information in truth and as estimated (nats)."""

    name: str
    true: float
    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Cases:
    """Every pair of sides, for the file."""

    n: int
    read_noise: float
    cases: tuple[Case, ...]


def covariance(coupling: float) -> Tensor:
    """Covariance of (X, Y, Z), all of variance 1. Z lends `coupling` of its cause to X and Y, which share another."""
    mix = torch.zeros(3 * DIM, 5 * DIM, dtype=torch.float64)
    eye = torch.eye(DIM, dtype=torch.float64)
    own = (1 - SHARED - coupling) ** 0.5
    for side in (0, 1):
        rows = slice(side * DIM, (side + 1) * DIM)
        mix[rows, :DIM] = SHARED**0.5 * eye
        mix[rows, DIM : 2 * DIM] = coupling**0.5 * eye
        mix[rows, (2 + side) * DIM : (3 + side) * DIM] = own * eye
    mix[2 * DIM :, DIM : 2 * DIM] = eye
    return mix @ mix.T


def case(name: str, whole: Tensor, first: list[int], second: list[int], n: int, n_draws: int) -> Case:
    """The information between two noisy sides, coordinates of (X, Y, Z): in truth and as estimated."""
    # The covariance of both sides together, with the noise of the reads.
    chosen = torch.tensor([*first, *second])
    both = whole[chosen][:, chosen] + NOISE**2 * torch.eye(len(chosen), dtype=torch.float64)
    # The closed form: half of the log-determinants of the sides less that of both.
    n_first = len(first)
    of_sides = _log_det(both[:n_first, :n_first]) + _log_det(both[n_first:, n_first:])
    true = 0.5 * (of_sides - _log_det(both))
    # The same from draws of these sides.
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(n_draws, n, len(both), generator=generator, dtype=torch.float64)
    draws = normal @ torch.linalg.cholesky(both).T
    values = np.array([gaussian_mi(draw[:, :n_first], draw[:, n_first:]).value for draw in draws])
    low, high = map(float, np.quantile(values, (0.025, 0.975)))
    return Case(name=name, true=true, estimate=float(values.mean()), low=low, high=high)


def _log_det(covariance: Tensor) -> float:
    return float(torch.linalg.slogdet(covariance).logabsdet)


def main() -> None:
    """Compute, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=400, help="examples a draw")
    parser.add_argument("--n-draws", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/proposition"))
    given = parser.parse_args()
    x, y, z = (list(range(i * DIM, (i + 1) * DIM)) for i in range(3))
    half_of_x, half_of_y = x[: DIM // 2], y[: DIM // 2]
    sides = {
        "I[(X,Z);(Y,Z)]": (x + z, y + z),
        "Z removed: I[X;Y]": (x, y),
        "half of X removed: I[(X',Z);(Y,Z)]": (half_of_x + z, y + z),
        "half of X and Y removed": (half_of_x + z, half_of_y + z),
    }
    cases = []
    for title, coupling in (("Z couples X and Y", 0.4), ("Z couples nothing", 0.0)):
        whole = covariance(coupling)
        for name, (first, second) in sides.items():
            cases.append(
                case(name=f"{title}: {name}", whole=whole, first=first, second=second, n=given.n, n_draws=given.n_draws)
            )
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "proposition.json", Cases(given.n, NOISE, tuple(cases)))
    estimates = {}
    for shown in cases:
        estimates[shown.name] = (shown.estimate, shown.low, shown.high)
        print(
            f"{shown.name:<56} true {shown.true:6.3f}  estimated {shown.estimate:6.3f} "
            f"[{shown.low:.3f}, {shown.high:.3f}] nats"
        )
    page = write_figure_page(
        given.out / "proposition.html",
        title="I[(X,Z);(Y,Z)] >= I[X;Y], and what that does not say",
        text=(__doc__ or "").split("\n\n", 2)[2],
        picture=estimates_beside_truth(
            estimates,
            truths={shown.name: shown.true for shown in cases},
            n=f"{given.n_draws} draws of {given.n} examples",
        ),
    )
    print(f"page: {page.resolve()}")


if __name__ == "__main__":
    script(main)
