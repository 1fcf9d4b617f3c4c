"""From the activations of one place to a few coordinates, by rules of the unablated model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.information.activations import Activations
from dean_interp.information.gaussian import principal_components
from dean_interp.information.kernels import spread
from dean_interp.information.probes import probe_direction
from dean_interp.models.sites import NEURONS, Site
from dean_interp.selection.selection import Selection

READ_NOISE = 0.3
"""Standard deviation of the independent noise on each neuron, in units of its own before the ablation."""
Rows = Int[Tensor, " row"]


@dataclass(frozen=True)
class Place:
    """A layer, or several layers taken as one."""

    name: str
    layers: tuple[int, ...]

    def sites_among(self, sites: Iterable[Site]) -> list[Site]:
        """Those of some sites that lie in its layers, layer by layer: in a mixture a layer has several of neurons."""
        return sorted(site for site in sites if site.layer in self.layers)


class Projection:
    """One side of a place on principal components: neurons are standardised, get noise, and are projected.

    Mean, scale, noise and components are those of the unablated model.
    """

    def __init__(
        self,
        before: Activations,
        place: Place,
        neurons: Selection,
        *,
        k: int,
        seed: tuple[int, int],
        at_answers: Rows | None = None,
    ) -> None:
        """With `at_answers` the rows are these answers, without noise; without, they are the prompts."""
        self.place, self.neurons, self.rows = place, neurons, at_answers
        values = self._columns(before)
        self.n_units = values.shape[1]
        self.mean = values.mean(0)
        sd = values.std(0) if self.n_units else self.mean
        self.is_dead = not bool((sd > 0).any())
        self.scale = torch.where(sd > 0, sd, torch.ones_like(sd))
        self.noise = torch.zeros_like(values)
        sites = place.sites_among(before.values)
        if at_answers is None and sites:
            self.noise = READ_NOISE * torch.cat([_noise(before, site, neurons, seed) for site in sites], 1)
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
        if self.rows is None:
            return prompt_columns(state, self.place, self.neurons)
        return answer_columns(state, self.place, self.neurons)[self.rows]


class Probe:
    """One side of a place on one number: the score of a probe that tells a behaviour's safe from its unsafe answers.

    The probe is fitted on `calibration`. Where there is none, each half of the topics is scored by a probe that was
    fitted on the other half. Scores are standardised as they are before the ablation.
    """

    def __init__(
        self,
        before: Activations,
        place: Place,
        neurons: Selection,
        *,
        calibration: Activations | None,
        behaviour: str,
        seed: int,
    ) -> None:
        self.place, self.neurons = place, neurons
        values = answer_columns(before, place, neurons)
        self.n_units = values.shape[1]
        self.parts: list[tuple[Bool[Tensor, " row"], Callable[[Tensor], Tensor]]] = []
        """Rows, and what scores them."""
        if not self.n_units:
            return
        if calibration is not None:
            direction = _direction(answer_columns(calibration, place, neurons), calibration, behaviour)
            everywhere = torch.ones(len(values), dtype=torch.bool)
            self.parts.append((everywhere, _standardised_score(values, direction)))
            return
        half = torch.from_numpy(_first_half(before, seed))
        for fitted_on, scored in ((~half, half), (half, ~half)):
            direction = _direction(values, before, behaviour, fitted_on)
            self.parts.append((scored, _standardised_score(values[scored], direction)))

    def __call__(self, state: Activations) -> Float[Tensor, "row 1"]:
        """The score of every answer in any state of the model; 0 without neurons."""
        values = answer_columns(state, self.place, self.neurons)
        scores = torch.zeros(len(values), 1, dtype=torch.float64)
        for rows, score in self.parts:
            scores[rows, 0] = score(values[rows])
        return scores

    def in_direction(self, state: Activations, direction: Float[np.ndarray, " unit"]) -> Float[Tensor, "row 1"]:
        """A score in another direction, in standardised units."""
        values = answer_columns(state, self.place, self.neurons)
        return (values / spread(values)) @ torch.from_numpy(direction)[:, None]


def _direction(
    values: Float[Tensor, "row unit"],
    state: Activations,
    behaviour: str,
    among: Bool[Tensor, " row"] | None = None,
) -> Float[Tensor, " unit"]:
    """The direction of a probe that is fitted on the behaviour's answers, those `among` some rows."""
    rows = torch.tensor([group == behaviour for group in twice(state.groups)])
    is_safe = is_safe_row(torch.arange(len(rows))).long()
    if among is not None:
        rows = rows & among
    return torch.from_numpy(probe_direction(values[rows].numpy(), is_safe[rows].numpy()))


def _standardised_score(
    values: Float[Tensor, "row unit"], direction: Float[Tensor, " unit"]
) -> Callable[[Tensor], Tensor]:
    """The score along a direction, standardised as it is on these values."""
    score = values @ direction
    mean, sd = score.mean(), score.std()
    return lambda values: (values @ direction - mean) / (sd if sd > 0 else 1.0)


def _first_half(state: Activations, seed: int) -> Bool[np.ndarray, " row"]:
    """Whether a row is in the first half: half of the topics of every behaviour, both answers together."""
    generator = np.random.default_rng([seed, 3])
    topics_of: dict[str, list[str]] = {group: [] for group in state.groups}
    for topic, group in zip(state.clusters, state.groups, strict=True):
        if topic not in topics_of[group]:
            topics_of[group].append(topic)
    chosen: set[str] = set()
    for topics in topics_of.values():
        order = generator.permutation(len(topics))
        chosen.update(topics[i] for i in order[: len(topics) // 2])
    return np.array([topic in chosen for topic in twice(state.clusters)])


def prompt_columns(state: Activations, place: Place, neurons: Selection) -> Float[Tensor, "prompt unit"]:
    """The activations of some neurons of a place at prompt ends, layer by layer."""
    columns = [state.columns(site, neurons) for site in place.sites_among(state.values)]
    return _joined(columns, len(state.groups))


def answer_columns(state: Activations, place: Place, neurons: Selection) -> Float[Tensor, "row unit"]:
    """The activations of some neurons of a place at the ends of answers, layer by layer."""
    columns = [state.answer_columns(site, neurons) for site in place.sites_among(state.answers)]
    return _joined(columns, 2 * len(state.groups))


def _joined(columns: Sequence[Float[Tensor, "row _"]], n_rows: int) -> Float[Tensor, "row unit"]:
    return torch.cat(list(columns), 1) if columns else torch.zeros(n_rows, 0, dtype=torch.float64)


def _noise(state: Activations, site: Site, neurons: Selection, seed: tuple[int, int]) -> Float[Tensor, "prompt unit"]:
    # drawn for every recorded neuron of the site, whatever is ablated: an edit and its controls share the noise
    # of several sites of a layer each has its own
    parts = [] if site.part == "neurons" else [NEURONS.index(site.part)]
    noise = np.random.default_rng([*seed, site.layer, *parts]).standard_normal(state.values[site].shape)
    return torch.from_numpy(noise)[:, torch.isin(state.units.units[site], neurons.units[site])]


def is_safe_row(rows: Rows) -> Bool[Tensor, " row"]:
    """Whether rows of answers are safe ones: of each prompt's two, the safe answer stands first."""
    return rows % 2 == 0


def twice(names: Sequence[str]) -> tuple[str, ...]:
    """One entry an answer, where there is one a prompt."""
    return tuple(name for name in names for _ in range(2))
