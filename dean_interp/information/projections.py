"""From the activations of one place to a few coordinates, by rules of the unablated model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.information.activations import Activations
from dean_interp.information.gaussian import principal_components
from dean_interp.information.kernels import spread
from dean_interp.information.probes import probe_direction
from dean_interp.models.sites import Site
from dean_interp.selection.selection import Selection

READ_NOISE = 0.3
"""Standard deviation of the independent read noise, in units of each neuron's own before the ablation."""
Rows = Int[Tensor, " row"]


@dataclass(frozen=True)
class Place:
    """A layer, or several read as one."""

    name: str
    layers: tuple[int, ...]

    @property
    def sites(self) -> list[Site]:
        """The neurons of its layers."""
        return [Site(layer, "neurons") for layer in self.layers]


class Projection:
    """One side of a place: standardised, with read noise, in the basis and scale of before the ablation."""

    def __init__(
        self,
        before: Activations,
        place: Place,
        read: Selection,
        k: int,
        seed: tuple[int, int],
        at_answers: Rows | None = None,
    ) -> None:
        self.place, self.read, self.rows = place, read, at_answers
        values = self._columns(before)
        self.n_units = values.shape[1]
        self.mean = values.mean(0)
        sd = values.std(0) if self.n_units else self.mean
        self.is_dead = not bool((sd > 0).any())
        self.scale = torch.where(sd > 0, sd, torch.ones_like(sd))
        # drawn for every unit of a site that was read, whatever is ablated: an edit and its controls share it
        noise = [_noise(before, site, read, seed) for site in place.sites if site in before.values]
        self.noise = READ_NOISE * torch.cat(noise, 1) if at_answers is None and noise else torch.zeros_like(values)
        self.basis, self.kept = torch.zeros(self.n_units, 0, dtype=torch.float64), 0.0
        if self.n_units:
            self.basis, self.kept = principal_components(self._noisy(values), k)

    def __call__(self, state: Activations) -> Float[Tensor, "row dim"]:
        """The side in any state of the model, on at most `k` coordinates."""
        values = self._columns(state)
        if not self.n_units:
            return torch.zeros(len(values), 1, dtype=torch.float64)
        return self._noisy(values) @ self.basis

    def _noisy(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.scale + self.noise

    def _columns(self, state: Activations) -> Float[Tensor, "row unit"]:
        columns = _columns(state, self.place, self.read, answers=self.rows is not None)
        return columns if self.rows is None else columns[self.rows]


class Probe:
    """One side of a place on one number: how a probe for one behaviour's safe answers reads it."""

    def __init__(
        self,
        before: Activations,
        place: Place,
        read: Selection,
        calibration: Activations | None,
        behaviour: str,
        seed: int,
    ) -> None:
        self.place, self.read = place, read
        values = _columns(before, place, read, answers=True)
        self.n_units = values.shape[1]
        source = calibration if calibration is not None else before
        known = _columns(source, place, read, answers=True)
        own = torch.tensor([group == behaviour for group in twice(source.groups)])
        label = (torch.arange(len(own)) % 2 == 0).long()  # safe stands first
        everywhere = torch.ones(len(own), dtype=torch.bool)
        half = torch.from_numpy(_half_of(before, seed))
        parts = [(everywhere, torch.ones(len(values), dtype=torch.bool))] if calibration is not None else [
            (~half, half), (half, ~half)
        ]  # fmt: skip
        self.parts = []
        for train, rows in parts if self.n_units else []:
            direction = probe_direction(known[own & train].numpy(), label[own & train].numpy())
            self.parts.append((rows, self._scored(values[rows], torch.from_numpy(direction))))

    def __call__(self, state: Activations) -> Float[Tensor, "row one"]:
        """The score of every answer in any state of the model; 0 without neurons."""
        values = _columns(state, self.place, self.read, answers=True)
        scores = torch.zeros(len(values), 1, dtype=torch.float64)
        for rows, score in self.parts:
            scores[rows, 0] = score(values[rows])
        return scores

    def in_direction(self, state: Activations, direction: np.ndarray) -> Float[Tensor, "row one"]:
        """A score in another direction, in standardised units."""
        values = _columns(state, self.place, self.read, answers=True)
        return (values / spread(values)) @ torch.from_numpy(direction)[:, None]

    def _scored(self, values: Tensor, direction: Tensor) -> Callable[[Tensor], Tensor]:
        score = values @ direction
        mean, sd = score.mean(), score.std()
        return lambda values: (values @ direction - mean) / (sd if sd > 0 else 1.0)


def _half_of(reads: Activations, seed: int) -> np.ndarray:
    """Whether a row is in the first half: half of the topics of every behaviour, both answers together."""
    drawn = np.random.default_rng([seed, 3])
    chosen: set[str] = set()
    for group in dict.fromkeys(reads.groups):
        names = list(dict.fromkeys(c for c, g in zip(reads.clusters, reads.groups, strict=True) if g == group))
        chosen |= {names[i] for i in drawn.permutation(len(names))[: len(names) // 2]}
    return np.array([cluster in chosen for cluster in twice(reads.clusters)])


def _columns(state: Activations, place: Place, read: Selection, *, answers: bool) -> Float[Tensor, "row unit"]:
    known = state.answers if answers else state.values
    columns = [
        (state.answer_columns if answers else state.columns)(site, read) for site in place.sites if site in known
    ]
    n_rows = len(state.groups) * (2 if answers else 1)
    return torch.cat(columns, 1) if columns else torch.zeros(n_rows, 0, dtype=torch.float64)


def _noise(reads: Activations, site: Site, read: Selection, seed: tuple[int, int]) -> Float[Tensor, "prompt unit"]:
    drawn = np.random.default_rng([*seed, site.layer]).standard_normal(reads.values[site].shape)
    return torch.from_numpy(drawn)[:, torch.isin(reads.units.units[site], read.units[site])]


def twice(names: Sequence[str]) -> tuple[str, ...]:
    """One entry an answer, where there is one a prompt."""
    return tuple(name for name in names for _ in range(2))
