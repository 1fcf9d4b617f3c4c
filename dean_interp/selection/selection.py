"""A selection is a set of units with set algebra. It remembers the prompts that its scores came from."""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.files import is_ascending, raise_if_damaged, read_tensors, write_tensors
from dean_interp.frames import Framed
from dean_interp.models.sites import Shape, Site, WrittenSite, coordinates
from dean_interp.scoring.scores import Scores
from dean_interp.scoring.top import highest, rounded_up

_FORMAT = "dean_interp.selection.1"
Indices = Int[Tensor, " _"]
"""Flat indices of units, ascending."""
Within = Literal["matrix", "layer", "model"]
"""Which units are ranked together: those of one matrix (or a layer's neurons), of one layer, of the whole model."""


@dataclass(frozen=True)
class Selection(Framed):
    """Units of a model: for each site the selected units' flat indices, ascending, and the site's shape.

    A site without a selected unit has an empty tensor, so `-` and `|` know the shape of every site.
    """

    units: Mapping[Site, Indices]
    shapes: Mapping[Site, tuple[int, ...]]
    prompt_hashes: frozenset[str] = field(default=frozenset(), repr=False)
    """The prompts behind the scores that the units were selected by: `measure` refuses them while these are ablated."""

    def __post_init__(self) -> None:
        if self.units.keys() != self.shapes.keys():
            raise InputError("a selection needs the shape of every site that it names, and no other")

    def __len__(self) -> int:
        return sum(map(len, self.units.values()))

    def __and__(self, other: "Selection") -> "Selection":
        return self._combine(other, _intersection)

    def __or__(self, other: "Selection") -> "Selection":
        return self._combine(other, _union)

    def __sub__(self, other: "Selection") -> "Selection":
        return self._combine(other, _difference)

    def __repr__(self) -> str:
        n_units = sum(map(_n_units, self.shapes.values()))
        n_sites = sum(n > 0 for n in self.counts().values())
        return f"Selection({len(self)} of {n_units} units at {n_sites} sites)"

    def to_pandas(self) -> pd.DataFrame:
        """One row a selected unit: layer, part, and its index (neurons) or row and column (weights)."""
        tables = []
        for site, indices in self.units.items():
            if len(indices):
                columns = coordinates(site, indices, self.shapes[site])
                tables.append(pd.DataFrame(columns))
        if not tables:
            return pd.DataFrame(columns=["layer", "part"])
        return pd.concat(tables, ignore_index=True)

    def mask(self, site: Site) -> Bool[Tensor, "..."]:
        """True where a unit of the site is selected; the site's own shape."""
        mask = torch.zeros(self.shapes[site], dtype=torch.bool)
        mask.view(-1)[self.units[site]] = True
        return mask

    def counts(self) -> dict[Site, int]:
        """How many units are selected at each site."""
        return {site: len(indices) for site, indices in self.units.items()}

    def layer_counts(self) -> dict[int, int]:
        """How many units are selected in each layer."""
        counts: dict[int, int] = {}
        for site in sorted(self.units):
            counts.setdefault(site.layer, 0)
            counts[site.layer] += len(self.units[site])
        return counts

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the sites and their units, its first 16 digits."""
        content = [(str(site), self.units[site].tolist()) for site in sorted(self.units)]
        return hashlib.sha256(str(content).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        tensors = {str(site): indices for site, indices in self.units.items()}
        facts = {
            "shapes": {str(site): shape for site, shape in self.shapes.items()},
            "prompt_hashes": sorted(self.prompt_hashes),
        }
        write_tensors(path, _FORMAT, tensors, facts)

    def _combine(
        self,
        other: "Selection",
        combine: Callable[[Indices, Indices], Indices],
    ) -> "Selection":
        if self.shapes != other.shapes:
            raise InputError("selections can be combined only when they are of one model and one kind of unit")
        units = {}
        for site, indices in self.units.items():
            units[site] = combine(indices, other.units[site])
        prompt_hashes = self.prompt_hashes | other.prompt_hashes
        return Selection(units, self.shapes, prompt_hashes)


def _intersection(first: Indices, second: Indices) -> Indices:
    is_shared = torch.isin(first, second)
    return first[is_shared]


def _union(first: Indices, second: Indices) -> Indices:
    return torch.cat([first, second]).unique()


def _difference(first: Indices, second: Indices) -> Indices:
    is_shared = torch.isin(first, second)
    return first[~is_shared]


@dataclass(frozen=True)
class _SelectionFile:
    shapes: dict[WrittenSite, Shape]
    prompt_hashes: frozenset[str]


def load_selection(path: str | Path) -> Selection:
    """A selection from its file. Raises `InputError` where it is missing, damaged, or something else."""
    tensors, facts = read_tensors(path, _FORMAT, _SelectionFile)
    for site, shape in facts.shapes.items():
        n_units = _n_units(shape)
        is_whole = str(site) in tensors and is_ascending(tensors[str(site)], n_units)
        raise_if_damaged(path, not is_whole, f"{site} must hold some of its {n_units} units in ascending order")
        n_axes = 1 if site.unit == "neuron" else 2
        raise_if_damaged(path, len(shape) != n_axes, f"{site} has the shape {shape}")
    units = {site: tensors[str(site)] for site in sorted(facts.shapes)}
    return Selection(units, facts.shapes, facts.prompt_hashes)


def top_fraction(
    scores: Scores,
    fraction: float,
    *,
    within: Within = "matrix",
) -> Selection:
    """The highest-scoring `fraction` of the units of every site, `int(fraction * n_units)` of them.

    Signed scores count by size. Ties go to the lower site and index. `within` ranks the units of each layer, or of the
    whole model, together instead. Raises `InputError` where the fraction is not in (0, 1], selects nothing anywhere, or
    more than the scores' file kept.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction must be in (0, 1], got {fraction}")
    pools = _pools(scores, within)
    sizes = [_n_scored(scores, sites) for sites in pools]
    counts = [int(fraction * size) for size in sizes]
    if not any(counts):
        largest = max(sizes)
        smallest = rounded_up(1 / largest)
        raise InputError(f"fraction {fraction} selects no unit; {smallest} selects one of {largest}")
    return _top(scores, pools, counts)


def top_count(
    scores: Scores,
    count: int,
    *,
    within: Within = "matrix",
) -> Selection:
    """The `count` highest-scoring units of every site, of every layer, or (a budget) of the whole model.

    Raises `InputError` where there are not so many, or the scores' file kept fewer.
    """
    pools = _pools(scores, within)
    smallest = min(_n_scored(scores, sites) for sites in pools)
    if not 1 <= count <= smallest:
        raise InputError(f"count must be from 1 to {smallest} a {within}, got {count}")
    return _top(scores, pools, [count] * len(pools))


def _pools(scores: Scores, within: Within) -> list[list[Site]]:
    """The sites whose units are ranked together: one site, those of one layer, or all."""
    if within not in get_args(Within):
        raise InputError(f"within must be one of {get_args(Within)}, got {within!r}")
    if len(scores.units) > 1:
        raise InputError("these scores hold neurons and weights: choose one with scores.of('neuron') or of('weight')")
    sites = sorted(scores.values)
    match within:
        case "matrix":
            return [[site] for site in sites]
        case "layer":
            groups = itertools.groupby(sites, attrgetter("layer"))
            return [list(sites_of_layer) for _, sites_of_layer in groups]
        case "model":
            return [sites]


def _n_scored(scores: Scores, sites: Sequence[Site]) -> int:
    return sum(scores.values[site].numel() for site in sites)


def _top(
    scores: Scores,
    pools: Sequence[Sequence[Site]],
    counts: Sequence[int],
) -> Selection:
    """The `count` highest of each pool of sites."""
    units = {}
    for sites, count in zip(pools, counts, strict=True):
        if len(sites) == 1:
            (site,) = sites
            units[site] = scores.top(site, count)
        else:
            units |= _top_of_pool(scores, sites, count)
    return Selection(units, scores.shapes, scores.prompt_hashes)


def _top_of_pool(scores: Scores, sites: Sequence[Site], count: int) -> dict[Site, Indices]:
    """The `count` highest scores of several sites together, as ascending indices of each site."""
    # No more than `count` units of a site can be in the pool's top, so each site's own top is enough.
    candidates, sizes = {}, []
    for site in sites:
        n_candidates = min(count, scores.n_kept(site))
        candidates[site] = scores.top(site, n_candidates)
        sizes.append(scores.at(site, candidates[site]).abs())
    values = torch.cat(sizes)
    if not _are_kept(scores, sites, values, count):
        raise InputError(
            f"the {count} highest of {len(sites)} sites are not all among the scores of {scores.behaviour} that "
            "were kept: score again and keep more (keep=...)"
        )
    is_chosen = torch.zeros(len(values), dtype=torch.bool)
    is_chosen[highest(values, count)] = True
    # The candidates of the sites lie one after the other.
    parts = is_chosen.split(list(map(len, candidates.values())))
    units = {}
    for (site, indices), is_chosen_here in zip(candidates.items(), parts, strict=True):
        units[site] = indices[is_chosen_here]
    return units


def _are_kept(
    scores: Scores,
    sites: Sequence[Site],
    values: Float[Tensor, " candidate"],
    count: int,
) -> bool:
    """Whether the `count` highest of `values` are the highest of the sites: no score that was not kept is larger."""
    if count == 0:
        return True
    if count > len(values):
        return False
    lowest = float(values.topk(count).values[-1])
    return all(lowest >= scores.threshold(site) for site in sites)


def strongest(
    scores: Scores,
    among: Selection,
    counts: Mapping[Site, int],
) -> Selection:
    """The `counts[site]` highest-scoring units of `among` at each site, or all of them where there are fewer."""
    units = {}
    for site, indices in among.units.items():
        values = scores.at(site, indices).abs()
        count = min(counts[site], len(indices))
        units[site] = indices[highest(values, count)]
    prompt_hashes = among.prompt_hashes | scores.prompt_hashes
    return Selection(units, among.shapes, prompt_hashes)


def _n_units(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
