"""Gates: a multiplier for every neuron, which hooks or a checkpoint apply to what the neuron writes.

A gate of 1 leaves its neuron as it is, 0 silences it, 1.5 makes it write half as much again. A silenced selection is
the special case of gates that are 0 or 1. The change of a neuron is its multiplier minus 1.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.files import format_of, is_finite, raise_if_damaged, read_tensors, write_tensors
from dean_interp.frames import Framed
from dean_interp.models.sites import Site, WrittenSite
from dean_interp.scoring.top import highest
from dean_interp.selection.selection import Selection

LIMITS = (0.0, 2.0)
"""No gate at a dose goes below 0, where its neuron would write the opposite, or above 2."""
_FORMAT = "dean_interp.gates.1"


@dataclass(frozen=True)
class Gates(Framed):
    """A multiplier for every neuron of a model, with an algebra of their changes.

    `gates * 0.5` changes half as much, `-gates` changes as much in the other direction, `gates + other` adds two
    changes, `gates.strongest(n)` keeps the n largest.
    """

    multipliers: Mapping[Site, Float[Tensor, " d_mlp"]]
    """float32, one tensor for each site of neurons, on the CPU."""
    prompt_hashes: frozenset[str] = field(default=frozenset(), repr=False)
    """The prompts behind the gates: `measure` refuses them while the gates are applied."""

    def __post_init__(self) -> None:
        for site, multiplier in self.multipliers.items():
            is_of_neurons = site.unit == "neuron" and multiplier.dim() == 1
            if not is_of_neurons:
                raise InputError(f"gates are multipliers of neurons, one number each; got {site} {multiplier.shape}")
            if not bool(multiplier.isfinite().all()):
                raise InputError(f"the gates of {site} are not finite")

    def __len__(self) -> int:
        """Number of neurons that change."""
        n_changed = 0
        for multiplier in self.multipliers.values():
            n_changed += int((multiplier != 1).sum())
        return n_changed

    def __repr__(self) -> str:
        n_neurons = sum(map(len, self.multipliers.values()))
        return f"Gates({len(self)} of {n_neurons} neurons change, largest change {self.largest_change:.3g})"

    def __mul__(self, dose: float | int) -> "Gates":
        """`dose` times every change: 0 is no change, -1 the opposite change."""
        changes = {}
        for site, change in self.changes.items():
            changes[site] = dose * change
        return gates_from_changes(changes, self.prompt_hashes)

    __rmul__ = __mul__

    def __neg__(self) -> "Gates":
        return self * -1.0

    def __add__(self, other: "Gates") -> "Gates":
        """The sum of two changes of one model's neurons."""
        if self._shapes != other._shapes:
            raise InputError("gates can be added only when they are of one model")
        other_changes = other.changes
        changes = {}
        for site, change in self.changes.items():
            changes[site] = change + other_changes[site]
        prompt_hashes = self.prompt_hashes | other.prompt_hashes
        return gates_from_changes(changes, prompt_hashes)

    def __sub__(self, other: "Gates") -> "Gates":
        return self + -other

    @property
    def changes(self) -> dict[Site, Float[Tensor, " d_mlp"]]:
        """Multiplier minus 1 of every neuron."""
        return {site: multiplier - 1 for site, multiplier in self.multipliers.items()}

    @property
    def largest_change(self) -> float:
        """The largest size of a change; 0 where there is none."""
        sizes = [float(change.abs().max()) for change in self.changes.values()]
        return max(sizes, default=0.0)

    @property
    def selection(self) -> Selection:
        """The neurons that change."""
        units = {}
        for site, change in self.changes.items():
            units[site] = torch.nonzero(change)[:, 0]
        return Selection(units, self._shapes, self.prompt_hashes)

    @property
    def silenced(self) -> Selection:
        """The neurons whose gate is 0."""
        units = {}
        for site, multiplier in self.multipliers.items():
            units[site] = torch.nonzero(multiplier == 0)[:, 0]
        return Selection(units, self._shapes, self.prompt_hashes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the sites and their multipliers, its first 16 digits."""
        return tensors_fingerprint(self.multipliers)

    def clipped(self, low: float | int, high: float | int) -> "Gates":
        """Multipliers no lower than `low` and no higher than `high`."""
        multipliers = {}
        for site, multiplier in self.multipliers.items():
            multipliers[site] = multiplier.clamp(low, high)
        return replace(self, multipliers=multipliers)

    def strongest(
        self,
        count: int,
        *,
        by: Mapping[Site, Float[Tensor, " d_mlp"]] | None = None,
    ) -> "Gates":
        """The gates of the `count` neurons of the model that change most; the others become 1.

        Args:
            count: number of neurons; ties go to the lower layer and index.
            by: what is ranked in place of the size of the change, one number a neuron.
        """
        if by is None:
            by = {site: change.abs() for site, change in self.changes.items()}
        sites = sorted(self.multipliers)
        values = torch.cat([by[site] for site in sites])
        if not 1 <= count <= len(values):
            raise InputError(f"count must be from 1 to {len(values)} neurons, got {count}")
        is_kept = torch.zeros(len(values), dtype=torch.bool)
        is_kept[highest(values, count)] = True
        # The neurons of the sites lie one after the other.
        sizes = [len(self.multipliers[site]) for site in sites]
        multipliers = {}
        for site, is_kept_here in zip(sites, is_kept.split(sizes), strict=True):
            multiplier = self.multipliers[site]
            multipliers[site] = torch.where(is_kept_here, multiplier, torch.ones_like(multiplier))
        return replace(self, multipliers=multipliers)

    def to_pandas(self) -> pd.DataFrame:
        """One row a neuron that changes, the largest change first: layer, index, multiplier."""
        tables = []
        for site, units in self.selection.units.items():
            columns = {
                "layer": site.layer,
                "index": units.numpy(),
                "multiplier": self.multipliers[site][units].numpy(),
            }
            tables.append(pd.DataFrame(columns))
        table = pd.concat(tables, ignore_index=True)
        size = (table["multiplier"] - 1).abs()
        order = np.argsort(-size.to_numpy(), kind="stable")
        return table.iloc[order].reset_index(drop=True)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        tensors = {str(site): multiplier for site, multiplier in self.multipliers.items()}
        facts = {"sites": list(tensors), "prompt_hashes": sorted(self.prompt_hashes)}
        write_tensors(path, _FORMAT, tensors, facts)

    @property
    def _shapes(self) -> dict[Site, tuple[int]]:
        return {site: (len(multiplier),) for site, multiplier in self.multipliers.items()}


@dataclass(frozen=True)
class _GatesFile:
    sites: list[WrittenSite]
    prompt_hashes: frozenset[str]


def load_gates(path: str | Path) -> Gates:
    """Gates from their file. Raises `InputError` where it is missing, damaged, or something else."""
    tensors, facts = read_tensors(path, _FORMAT, _GatesFile)
    for site in facts.sites:
        tensor = tensors.get(str(site), torch.empty(0, 0))
        is_whole = site.unit == "neuron" and is_finite(tensor, 1)
        raise_if_damaged(path, not is_whole, f"the gates of {site} are not one finite number a neuron")
    multipliers = {site: tensors[str(site)] for site in sorted(facts.sites)}
    return Gates(multipliers, facts.prompt_hashes)


def is_gates_file(path: str | Path) -> bool:
    """Whether a file says that it holds gates, of any version."""
    return format_of(path).startswith("dean_interp.gates.")


def gates_of(selection: Selection, multiplier: float = 0.0) -> Gates:
    """The gates that multiply the selected neurons by one number and leave the others; 0 silences them.

    Raises `InputError` where the selection holds weights.
    """
    multipliers = {}
    for site, units in selection.units.items():
        gate = torch.ones(selection.shapes[site])
        gate[units] = multiplier
        multipliers[site] = gate
    return Gates(multipliers, selection.prompt_hashes)


def gates_from_changes(
    changes: Mapping[Site, Float[Tensor, " d_mlp"]],
    prompt_hashes: frozenset[str] = frozenset(),
) -> Gates:
    """The gates that change every neuron's multiplier from 1 by so much."""
    multipliers = {site: 1 + change for site, change in changes.items()}
    return Gates(multipliers, prompt_hashes)


def dosed(gates: Gates, dose: float) -> Gates:
    """The gates with `dose` times their changes, held to `LIMITS`."""
    return (gates * dose).clipped(*LIMITS)


def tensors_fingerprint(tensors: Mapping[Site, Tensor]) -> str:
    """SHA-256 of the sites and their numbers in float32, its first 16 digits."""
    digest = hashlib.sha256()
    for site in sorted(tensors):
        numbers = tensors[site].detach().float().cpu().contiguous()
        digest.update(str(site).encode())
        digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()[:16]
