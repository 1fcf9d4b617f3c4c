"""From the activations of one place to a few coordinates, by rules of the unablated model."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.information.activations import Activations
from dean_interp.information.gaussian import principal_components
from dean_interp.information.kernels import spread
from dean_interp.information.nulls import parts_to_halve
from dean_interp.information.places import Place
from dean_interp.information.probes import probe_direction
from dean_interp.models.sites import NEURONS, Site
from dean_interp.selection.selection import Selection

READ_NOISE = 0.3
"""Standard deviation of the independent noise on each neuron, in units of its own before the ablation."""
Rows = Int[Tensor, " row"]
IsRow = Bool[Tensor, " row"]
Score = Callable[[Float[Tensor, "row unit"]], Float[Tensor, " row"]]


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
        self.place = place
        self.neurons = neurons
        self.rows = at_answers
        values = self._columns(before)
        self.n_units = values.shape[1]
        # standardise: a neuron that does not vary keeps its units
        self.mean = values.mean(0)
        # torch warns where it takes the spread of no columns
        sd = values.std(0) if self.n_units else self.mean
        varies = sd > 0
        self.is_dead = not bool(varies.any())
        self.scale = torch.where(varies, sd, torch.ones_like(sd))
        # add noise: without it, a set of neurons that is computed from the other would tell all of it
        self.noise = torch.zeros_like(values)
        if at_answers is None:
            self.noise = READ_NOISE * _noise(before, place, neurons, seed)
        # project
        self.basis = torch.zeros(self.n_units, 0, dtype=torch.float64)
        self.kept = 0.0
        if self.n_units:
            self.basis, self.kept = principal_components(self._noisy(values), k)

    def __call__(self, state: Activations) -> Float[Tensor, "row dim"]:
        """The side in any state of the model, on at most `k` coordinates."""
        values = self._columns(state)
        if not self.n_units:
            return torch.zeros(len(values), 1, dtype=torch.float64)
        return self._noisy(values) @ self.basis

    def _noisy(self, values: Tensor) -> Tensor:
        standardised = (values - self.mean) / self.scale
        return standardised + self.noise

    def _columns(self, state: Activations) -> Float[Tensor, "row unit"]:
        if self.rows is None:
            return prompt_columns(state, self.place, self.neurons)
        columns = answer_columns(state, self.place, self.neurons)
        return columns[self.rows]


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
        self.place = place
        self.neurons = neurons
        values = answer_columns(before, place, neurons)
        self.n_units = values.shape[1]
        self.parts: list[tuple[IsRow, Score]] = []
        """Rows, and what scores them."""
        if not self.n_units:
            return
        if calibration is not None:
            _refuse_missing(calibration.groups, behaviour)
            calibration_values = answer_columns(calibration, place, neurons)
            direction = _direction(calibration_values, calibration, behaviour)
            everywhere = torch.ones(len(values), dtype=torch.bool)
            self.parts.append((everywhere, _standardised_score(values, direction)))
            return
        # no probe scores what it was fitted on
        half = _is_in_first_half(before, seed)
        for fitted_on, scored in ((~half, half), (half, ~half)):
            direction = _direction(values, before, behaviour, fitted_on)
            score = _standardised_score(values[scored], direction)
            self.parts.append((scored, score))

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
        standardised = values / spread(values)
        return standardised @ torch.from_numpy(direction)[:, None]


def _direction(
    values: Float[Tensor, "row unit"],
    state: Activations,
    behaviour: str,
    among: IsRow | None = None,
) -> Float[Tensor, " unit"]:
    """The direction of a probe that is fitted on the behaviour's answers, those `among` some rows."""
    is_fitted_on = torch.tensor([group == behaviour for group in twice(state.groups)])
    is_safe = is_safe_row(torch.arange(len(is_fitted_on))).long()
    if among is not None:
        is_fitted_on = is_fitted_on & among
    label = is_safe[is_fitted_on].numpy()
    direction = probe_direction(values[is_fitted_on].numpy(), label)
    return torch.from_numpy(direction)


def _standardised_score(values: Float[Tensor, "row unit"], direction: Float[Tensor, " unit"]) -> Score:
    """The score along a direction, standardised as it is on these values."""
    before = values @ direction
    mean = before.mean()
    sd = before.std()
    scale = sd if sd > 0 else 1.0

    def score(values: Float[Tensor, "row unit"]) -> Float[Tensor, " row"]:
        return (values @ direction - mean) / scale

    return score


def _refuse_missing(groups: Sequence[str], behaviour: str) -> None:
    """Raise `InputError` where a behaviour has no calibration prompt that its probe could be fitted on."""
    if behaviour not in groups:
        raise InputError(
            f"no calibration prompt is of '{behaviour}' (a prompt of two behaviours counts as the first one's)"
        )


def _is_in_first_half(state: Activations, seed: int) -> IsRow:
    """Whether a row is in the first half: half of the topics of every behaviour, both answers together.

    Where a behaviour's prompts are of one topic, or most of them, half of its prompts.
    """
    generator = np.random.default_rng([seed, 3])
    is_chosen = torch.zeros(len(state.groups), dtype=torch.bool)
    for parts in parts_to_halve(state.clusters, state.groups):
        order = generator.permutation(len(parts))
        for i in order[: len(parts) // 2]:
            is_chosen[parts[i]] = True
    return is_chosen.repeat_interleave(2)


def prompt_columns(state: Activations, place: Place, neurons: Selection) -> Float[Tensor, "prompt unit"]:
    """The activations of some neurons of a place at prompt ends, layer by layer."""
    columns = [state.columns(site, neurons) for site in place.sites_among(state.values)]
    return _joined(columns, len(state.groups))


def answer_columns(state: Activations, place: Place, neurons: Selection) -> Float[Tensor, "row unit"]:
    """The activations of some neurons of a place at the ends of answers, layer by layer."""
    columns = [state.answer_columns(site, neurons) for site in place.sites_among(state.answers)]
    return _joined(columns, 2 * len(state.groups))


def _joined(columns: Sequence[Float[Tensor, "row _"]], n_rows: int) -> Float[Tensor, "row unit"]:
    if not columns:
        return torch.zeros(n_rows, 0, dtype=torch.float64)
    return torch.cat(list(columns), 1)


def _noise(
    state: Activations,
    place: Place,
    neurons: Selection,
    seed: tuple[int, int],
) -> Float[Tensor, "prompt unit"]:
    """Standard normal noise for some neurons of a place, layer by layer."""
    columns = [_noise_of_site(state, site, neurons, seed) for site in place.sites_among(state.values)]
    return _joined(columns, len(state.groups))


def _noise_of_site(
    state: Activations,
    site: Site,
    neurons: Selection,
    seed: tuple[int, int],
) -> Float[Tensor, "prompt unit"]:
    # each of a layer's several sites has noise of its own
    parts = [] if site.part == "neurons" else [NEURONS.index(site.part)]
    generator = np.random.default_rng([*seed, site.layer, *parts])
    # drawn for every recorded neuron of the site, whatever is ablated: an edit and its controls share the noise
    noise = generator.standard_normal(state.values[site].shape)
    is_asked_for = torch.isin(state.units.units[site], neurons.units[site])
    return torch.from_numpy(noise)[:, is_asked_for]


def is_safe_row(rows: Rows) -> Bool[Tensor, " row"]:
    """Whether rows of answers are safe ones: of each prompt's two, the safe answer stands first."""
    return rows % 2 == 0


def twice(names: Sequence[str]) -> tuple[str, ...]:
    """One entry an answer, where there is one a prompt."""
    doubled = []
    for name in names:
        doubled += [name, name]
    return tuple(doubled)
