"""An estimand before and under an ablation: the edit's estimates, and its change beside that under every control."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.information.activations import Activations
from dean_interp.information.estimands import INDICES, InformationArm, MutualInformationConfig, refuse_few
from dean_interp.information.estimate import PER_DIMENSION
from dean_interp.information.nulls import half_samples, largest_fall, within_group_permutations
from dean_interp.information.places import Place, is_reached, places_of
from dean_interp.information.projections import READ_NOISE
from dean_interp.information.shifts import Level, MutualInformation, Shift
from dean_interp.information.sides import Matrices, Sides, label_sides, neuron_sides, probe_sides, residual_sides
from dean_interp.selection.selection import Selection
from dean_interp.statistics import rank_p_value

Samples = Sequence[tuple[Int[Tensor, " _"], float]]
"""Some of the rows, and what scales the deviation of an estimate on them to all rows (`nulls.half_samples`)."""


class BeforeAfter:
    """One estimand, with all that is fixed before the ablation. Hand it the activations of one state after another.

    The edit and every control take the same sides, shuffles and nulls, so that the edit can be ranked among them.
    """

    def __init__(
        self,
        config: MutualInformationConfig,
        before: Activations,
        edit: InformationArm,
        behaviours: Sequence[str],
        calibration: Activations | None = None,
    ) -> None:
        """`behaviours` are the names of first and second; `calibration` are activations that probes are fitted on."""
        self.config = config.settled(len(before.groups))
        refuse_few(self.config, before.groups, behaviours)
        self.before = before
        self.edit = edit
        self.behaviours = tuple(behaviours)
        self.calibration = calibration
        self.places = places_of(self.config.estimand, before, edit)
        # made when they are first asked for: arms that leave out the same neurons of a place share its sides
        self._sides: dict[tuple, list[Sides]] = {}
        self._befores: dict[int, tuple[Matrices, float]] = {}
        self._shuffles: dict[tuple[tuple[str, ...], int], Int[Tensor, "shuffle row"]] = {}

    def changes(self, arm: InformationArm, after: Activations) -> dict[str, float]:
        """The change of the excess at every place, by `variant|place`; the same procedure for the edit and controls."""
        after = arm.compared(after)
        changes = {}
        for place, sides in self._sides_of(arm):
            _, excess = self._before(sides)
            excess_after = self._excess(sides, sides.matrices(after))
            changes[_key(place, sides)] = excess_after - excess
        return changes

    def information(
        self, after: Activations, controls: Sequence[Mapping[str, float]], *, arm: InformationArm | None = None
    ) -> MutualInformation:
        """The edit's estimates from its activations, beside the controls' `changes`; or those of another ablation."""
        edit = arm or self.edit
        after = edit.compared(after)
        estimand = self.config.estimand
        shifts = []
        for place, sides in self._sides_of(edit):
            key = _key(place, sides)
            control_changes = [changes[key] for changes in controls]
            shift = self._shift(place, sides, after, control_changes)
            if not is_reached(place, estimand, self.before, edit):
                flags = (*shift.flags, "nothing that is changed lies upstream")
                shift = replace(shift, flags=flags)
            shifts.append(shift)
        # each of the estimand's numbers has a largest fall of its own
        largest_fall_layer = {}
        largest_fall_p = {}
        for variant in dict.fromkeys(shift.variant for shift in shifts):
            single = [shift for shift in shifts if shift.variant == variant and not shift.is_joint]
            largest_fall_layer[variant], largest_fall_p[variant] = _largest_fall(single)
        return MutualInformation(
            config=self.config,
            units="index" if self.config.estimator in INDICES else "nats",
            n_prompts=len(self.before.groups),
            read_noise=READ_NOISE,
            shifts=tuple(shifts),
            largest_fall_layer=largest_fall_layer,
            largest_fall_p=largest_fall_p,
        )

    def _sides_of(self, arm: InformationArm) -> list[tuple[Place, Sides]]:
        """Every place with each of its sides, of the neurons that the arm compares."""
        neurons = arm.neurons(self.config.estimand)
        sides_of_places = []
        for place in self.places:
            units = []
            for selection in neurons:
                for site in place.sites_among(selection.units):
                    units.append(selection.units[site].numpy().tobytes())
            key = (place, *units)
            if key not in self._sides:
                self._sides[key] = self._new_sides(place, neurons)
            for sides in self._sides[key]:
                sides_of_places.append((place, sides))
        return sides_of_places

    def _new_sides(self, place: Place, neurons: tuple[Selection, Selection]) -> list[Sides]:
        before = self.before
        behaviours = self.behaviours
        seed = self.config.seed
        k = self.config.k or 1
        estimator = self.config.estimator or ""
        match self.config.estimand:
            case "downstream_mi" | "subset_mi":
                return neuron_sides(before, place, neurons, estimator=estimator, k=k, seed=seed)
            case "awareness_mi":
                return probe_sides(
                    before,
                    place,
                    neurons,
                    calibration=self.calibration,
                    behaviours=behaviours,
                    estimator=estimator,
                    seed=seed,
                )
            case "label_information":
                return label_sides(before, place, neurons, behaviours=behaviours, k=k, seed=seed)
            case "paper_nhsic":
                return residual_sides(before, place, behaviours=behaviours, seed=seed)

    def _before(self, sides: Sides) -> tuple[Matrices, float]:
        """Both matrices before the ablation, and their excess over the null; made once."""
        key = id(sides)
        if key not in self._befores:
            matrices = sides.matrices(self.before)
            excess = self._excess(sides, matrices)
            self._befores[key] = matrices, excess
        return self._befores[key]

    def _excess(self, sides: Sides, matrices: Matrices) -> float:
        """The value above the mean of its null."""
        value, null = self._value_and_null(sides, matrices, self.config.n_null or 0)
        return value - _mean(null)

    def _value_and_null(self, sides: Sides, matrices: Matrices, n_shuffles: int) -> tuple[float, list[float]]:
        # a side without neurons or variance informs of nothing
        if sides.flags:
            return 0.0, [0.0] * n_shuffles
        x, y = matrices
        rows = torch.arange(len(x))
        # the pairing as it is stands first, its shuffles after it
        shuffles = self._shuffles_of(sides)[:n_shuffles]
        pairings = torch.cat([rows[None], shuffles])
        value, *null = sides.core(x, y, pairings, rows).tolist()
        return value, null

    def _shuffles_of(self, sides: Sides) -> Int[Tensor, "shuffle row"]:
        """The estimand's shuffles, drawn once: every place, state and control takes the first of the same."""
        key = (sides.groups, sides.block)
        if key not in self._shuffles:
            n_shuffles = self.config.n_shuffles or 1
            self._shuffles[key] = within_group_permutations(
                sides.groups, n_shuffles, seed=self.config.seed, block=sides.block
            )
        return self._shuffles[key]

    def _shift(self, place: Place, sides: Sides, after: Activations, control_changes: Sequence[float]) -> Shift:
        matrices, _ = self._before(sides)
        matrices_after = sides.matrices(after)
        x, y = matrices
        # both states are estimated on the same halves of the topics: the change is paired
        n_samples = self.config.n_subsamples or 2
        samples = half_samples(sides.clusters, sides.groups, n_samples, seed=self.config.seed, block=sides.block)
        values = _on_samples(sides, matrices, samples)
        values_after = _on_samples(sides, matrices_after, samples)
        level = self._level(sides, matrices, _half_width(values, samples))
        level = replace(level, beside=dict(sides.beside(x, y)))
        level_after = self._level(sides, matrices_after, _half_width(values_after, samples))
        change = level_after.excess - level.excess
        half_width = _half_width(values_after - values, samples)
        return Shift(
            place=place.name,
            layers=place.layers,
            variant=sides.variant,
            n=len(x),
            n_units=sides.n_units,
            dims=(x.shape[1], y.shape[1]),
            variance_kept=sides.variance_kept,
            before=level,
            after=level_after,
            change=change,
            low=change - half_width,
            high=change + half_width,
            control_changes=tuple(control_changes),
            p=_p_of_fall(change, control_changes),
            flags=self._flags(sides, level, matrices),
        )

    def _flags(self, sides: Sides, level: Level, matrices: Matrices) -> tuple[str, ...]:
        """What is doubtful about the value before the ablation, or about its change."""
        x, y = matrices
        n_rows = len(x)
        n_prompts = n_rows // sides.block
        n_dims = x.shape[1] + y.shape[1]
        wanted = PER_DIMENSION * n_dims
        estimator = self.config.estimator
        flags = list(sides.flags)
        if estimator in ("gaussian_mi", "copula_mi") and n_prompts < wanted:
            flags.append(f"fewer than {wanted} prompts for {n_dims} dimensions")
        if estimator not in INDICES and level.value > np.log(n_rows):
            flags.append("above ln n")
        return tuple(flags)

    def _level(self, sides: Sides, matrices: Matrices, half_width: float) -> Level:
        value, null = self._value_and_null(sides, matrices, self.config.n_shuffles or 1)
        return Level(
            value=value,
            low=value - half_width,
            high=value + half_width,
            null_mean=_mean(null[: self.config.n_null]),
            null_sd=float(np.std(null)),
            p=rank_p_value(value, null),
        )


def _key(place: Place, sides: Sides) -> str:
    return f"{sides.variant}|{place.name}"


def _largest_fall(shifts: Sequence[Shift]) -> tuple[int, float | None]:
    """The layer of the largest fall among single layers, and its p among the controls (None without controls).

    With controls the fall is standardised; without, it is the largest as it stands.
    """
    # a layer without an estimate cannot have fallen; where no layer has one, the record says so (`not_estimated`)
    shifts = [shift for shift in shifts if shift.is_estimated] or shifts
    changes = [shift.change for shift in shifts]
    # from the controls of each layer to the layers of each control
    changes_of_layers = [shift.control_changes for shift in shifts]
    control_changes = list(zip(*changes_of_layers, strict=True))
    p = None
    if control_changes:
        number, p = largest_fall(changes, control_changes)
    else:
        number = int(np.argmin(changes))
    return shifts[number].layers[0], p


def _p_of_fall(change: float, control_changes: Sequence[float]) -> float | None:
    """One-sided rank of a fall among the controls; None without controls."""
    if not control_changes:
        return None
    control_falls = [-control_change for control_change in control_changes]
    return rank_p_value(-change, control_falls)


def _on_samples(sides: Sides, matrices: Matrices, samples: Samples) -> Float[np.ndarray, " sample"]:
    """The value on each of some samples of the rows."""
    if sides.flags:
        return np.zeros(len(samples))
    x, y = matrices
    values = []
    for rows, _ in samples:
        as_it_is = torch.arange(len(rows))[None]
        value = sides.core(x[rows], y[rows], as_it_is, rows)
        values.append(float(value))
    return np.array(values)


def _half_width(values: Float[np.ndarray, " sample"], samples: Samples) -> float:
    """Half the width of a 95 % interval, from the values on half samples."""
    factors = np.array([factor for _, factor in samples])
    deviations = factors * (values - values.mean())
    standard_error = np.sqrt(np.mean(np.square(deviations)))
    return 1.96 * float(standard_error)


def _mean(values: Sequence[float]) -> float:
    if not len(values):
        return 0.0
    return float(np.mean(values))
