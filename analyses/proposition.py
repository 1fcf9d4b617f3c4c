"""The paper's proposition, I[(X,Z);(Y,Z)] >= I[X;Y], on planted data of known values; and what it does not say.

    python analyses/proposition.py --out runs/proposition

X and Y share a weak cause; Z is read by both sides. True values are closed forms of the covariance, estimates are
`gaussian_mi` of a sample. Three things are shown:
1. the inequality holds, and without read noise the left side is infinite (Z informs of itself);
2. removing Z from both reads lowers the information, as the paper says of its coupled neurons; but so does removing
   anything that both reads hold, and removing random coordinates of one read lowers it too;
3. a Z that is read twice but couples nothing else lowers the left side all the same: what falls is Z's own presence,
   so a drop is evidence of decoupling only in reads that never held Z, beside random ablations.
Writes proposition.json, proposition.svg and a page.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dean_interp.cli.ending import script
from dean_interp.information import gaussian_mi
from dean_interp.report.figures import estimates_beside_truth
from dean_interp.report.html import write_figure_page
from dean_interp.study.results import save_record

DIM, NOISE = 4, 0.3  # coordinates of X, Y and Z each; read noise in standard deviations


@dataclass(frozen=True)
class Case:
    """One pair of reads: the information in truth and as estimated (nats)."""

    name: str
    true: float
    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Cases:
    """All of it, for the file."""

    n: int
    read_noise: float
    cases: tuple[Case, ...]


def covariance(coupling: float) -> Tensor:
    """Of (X, Y, Z), all of variance 1: Z lends `coupling` of its cause to X and Y, which also share a cause of 0.4."""
    mix = torch.zeros(3 * DIM, 5 * DIM, dtype=torch.float64)
    eye = torch.eye(DIM, dtype=torch.float64)
    own = (1 - 0.4 - coupling) ** 0.5
    for side in (0, 1):
        rows = slice(side * DIM, (side + 1) * DIM)
        mix[rows, :DIM] = 0.4**0.5 * eye
        mix[rows, DIM : 2 * DIM] = coupling**0.5 * eye
        mix[rows, (2 + side) * DIM : (3 + side) * DIM] = own * eye
    mix[2 * DIM :, DIM : 2 * DIM] = eye
    return mix @ mix.T


def case(name: str, whole: Tensor, first: list[int], second: list[int], n: int, n_draws: int) -> Case:
    """Truth and estimates of two noisy reads of coordinates of (X, Y, Z)."""
    reads = torch.zeros(len(first) + len(second), len(whole), dtype=torch.float64)
    for row, column in enumerate([*first, *second]):
        reads[row, column] = 1
    both = reads @ whole @ reads.T + NOISE**2 * torch.eye(len(reads), dtype=torch.float64)
    cut = len(first)
    parts = (both[:cut, :cut], both[cut:, cut:], both)
    one, two, joint = (float(torch.linalg.slogdet(part).logabsdet) for part in parts)
    drawn = torch.Generator().manual_seed(0)
    draws = torch.randn(n_draws, n, len(both), generator=drawn, dtype=torch.float64) @ torch.linalg.cholesky(both).T
    values = np.array([gaussian_mi(sample[:, :cut], sample[:, cut:]).value for sample in draws])
    return Case(name, 0.5 * (one + two - joint), float(values.mean()), *map(float, np.quantile(values, (0.025, 0.975))))


def main() -> None:
    """Compute, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=400, help="examples a draw")
    parser.add_argument("--n-draws", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/proposition"))
    given = parser.parse_args()
    x, y, z = (list(range(i * DIM, (i + 1) * DIM)) for i in range(3))
    cases = []
    for title, coupling in (("Z couples X and Y", 0.4), ("Z couples nothing", 0.0)):
        whole = covariance(coupling)
        for name, first, second in (
            ("I[(X,Z);(Y,Z)]", x + z, y + z),
            ("Z removed: I[X;Y]", x, y),
            ("half of X removed: I[(X',Z);(Y,Z)]", x[: DIM // 2] + z, y + z),
            ("half of X and Y removed", x[: DIM // 2] + z, y[: DIM // 2] + z),
        ):
            cases.append(case(f"{title}: {name}", whole, first, second, given.n, given.n_draws))
    given.out.mkdir(parents=True, exist_ok=True)
    save_record(Cases(given.n, NOISE, tuple(cases)), given.out / "proposition.json")
    for one in cases:
        print(
            f"{one.name:<56} true {one.true:6.3f}  estimated {one.estimate:6.3f} [{one.low:.3f}, {one.high:.3f}] nats"
        )
    rows = [(one.name, one.true, one.estimate, one.low, one.high) for one in cases]
    page = write_figure_page(
        given.out / "proposition.html",
        title="I[(X,Z);(Y,Z)] >= I[X;Y], and what that does not say",
        text=(__doc__ or "").split("\n\n", 2)[2],
        figure=estimates_beside_truth(rows, f"nats, {given.n} examples"),
    )
    print(f"page: {page.resolve()}")


if __name__ == "__main__":
    script(main)
