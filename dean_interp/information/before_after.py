"""An estimand before and under an ablation: the edit's estimates, and its change beside that under every control."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.information.activations import Activations
from dean_interp.information.estimands import Estimand, InformationArm, MutualInformationConfig
from dean_interp.information.estimate import PER_DIMENSION
from dean_interp.information.nulls import half_samples, largest_fall, within_group_permutations
from dean_interp.information.projections import READ_NOISE, Place
from dean_interp.information.shifts import Level, MutualInformation, Shift
from dean_interp.information.sides import Sides, label_sides, neuron_sides, probe_sides, residual_sides
from dean_interp.models.sites import MATRICES
from dean_interp.selection.selection import Selection
from dean_interp.statistics import rank_p_value

Samples = Sequence[tuple[Int[Tensor, " _"], float]]


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
        refuse_few(self.config, len(before.groups))
        self.before, self.edit, self.behaviours, self.calibration = before, edit, tuple(behaviours), calibration
        self.places = _places(self.config.estimand, before, edit)
        # made when they are first asked for: arms that leave out the same neurons of a place share its sides
        self._sides: dict[tuple, list[Sides]] = {}
        self._befores: dict[int, tuple[Tensor, Tensor, float]] = {}
        self._shuffles: dict[tuple[tuple[str, ...], int], Int[Tensor, "shuffle row"]] = {}

    def changes(self, arm: InformationArm, after: Activations) -> dict[str, float]:
        """The change of the excess at every place, by `variant|place`; the same procedure for the edit and controls."""
        after = arm.compared(after)
        changes = {}
        for place, sides in self._sides_of(arm):
            _, _, before = self._before(sides)
            x, y = sides.matrices(after)
            value, null = self._value_and_null(sides, x, y, self.config.n_null or 0)
            changes[_key(place, sides)] = value - _mean(null) - before
        return changes

    def information(
        self, after: Activations, controls: Sequence[Mapping[str, float]], *, arm: InformationArm | None = None
    ) -> MutualInformation:
        """The edit's estimates from its activations, beside the controls' `changes`; or those of another ablation."""
        edit = arm or self.edit
        after = edit.compared(after)
        shifts = []
        for place, sides in self._sides_of(edit):
            control_changes = [changes[_key(place, sides)] for changes in controls]
            shift = self._shift(place, sides, after, control_changes)
            if not _reaches(self.config.estimand, edit, place, self.before):
                shift = replace(shift, flags=(*shift.flags, "nothing that is changed lies upstream"))
            shifts.append(shift)
        layers, p_values = {}, {}
        for variant in dict.fromkeys(shift.variant for shift in shifts):
            single = [shift for shift in shifts if shift.variant == variant and not shift.is_joint]
            layers[variant], p_values[variant] = _largest_fall(single)
        return MutualInformation(
            config=self.config,
            units="index" if self.config.estimator in ("rbf_cka", "nhsic") else "nats",
            n_prompts=len(self.before.groups),
            read_noise=READ_NOISE,
            shifts=tuple(shifts),
            largest_fall_layer=layers,
            largest_fall_p=p_values,
        )

    def _sides_of(self, arm: InformationArm) -> list[tuple[Place, Sides]]:
        """Every place with each of its sides, of the neurons that the arm compares."""
        neurons = arm.neurons(self.config.estimand)
        each = []
        for place in self.places:
            units = []
            for selection in neurons:
                sites = place.sites_among(selection.units)
                units += [selection.units[site].numpy().tobytes() for site in sites]
            key = (place, *units)
            if key not in self._sides:
                self._sides[key] = self._made(place, neurons)
            each += [(place, sides) for sides in self._sides[key]]
        return each

    def _made(self, place: Place, neurons: tuple[Selection, Selection]) -> list[Sides]:
        config, before, behaviours = self.config, self.before, self.behaviours
        k, seed, estimator = config.k or 1, config.seed, config.estimator or ""
        match config.estimand:
            case "downstream_mi" | "subset_mi":
                return neuron_sides(before, place, neurons, estimator=estimator, k=k, seed=seed)
            case "awareness_mi":
                return probe_sides(
                    before, place, neurons, self.calibration, behaviours=behaviours, estimator=estimator, seed=seed
                )
            case "label_information":
                return label_sides(before, place, neurons, behaviours=behaviours, k=k, seed=seed)
            case "paper_nhsic":
                return residual_sides(before, place, behaviours=behaviours, seed=seed)

    def _before(self, sides: Sides) -> tuple[Tensor, Tensor, float]:
        """Both matrices before the ablation, and their excess over the null; made once."""
        if id(sides) not in self._befores:
            x, y = sides.matrices(self.before)
            value, null = self._value_and_null(sides, x, y, self.config.n_null or 0)
            self._befores[id(sides)] = x, y, value - _mean(null)
        return self._befores[id(sides)]

    def _value_and_null(self, sides: Sides, x: Tensor, y: Tensor, n_shuffles: int) -> tuple[float, list[float]]:
        # a side without neurons or variance informs of nothing
        if sides.flags:
            return 0.0, [0.0] * n_shuffles
        rows = torch.arange(len(x))
        pairings = torch.cat([rows[None], self._shuffles_of(sides)[:n_shuffles]])
        value, *null = sides.core(x, y, pairings, rows).tolist()
        return value, null

    def _shuffles_of(self, sides: Sides) -> Int[Tensor, "shuffle row"]:
        """The estimand's shuffles, drawn once: every place, state and control takes the first of the same."""
        key = (sides.groups, sides.block)
        if key not in self._shuffles:
            n_shuffles, seed = self.config.n_shuffles or 1, self.config.seed
            self._shuffles[key] = within_group_permutations(sides.groups, n_shuffles, seed=seed, block=sides.block)
        return self._shuffles[key]

    def _shift(self, place: Place, sides: Sides, after: Activations, control_changes: Sequence[float]) -> Shift:
        x, y, _ = self._before(sides)
        x_after, y_after = sides.matrices(after)
        # both states are estimated on the same halves of the topics: the change is paired
        samples = half_samples(sides.clusters, sides.groups, self.config.n_subsamples or 2, seed=self.config.seed)
        values = _on_samples(sides, x, y, samples)
        values_after = _on_samples(sides, x_after, y_after, samples)
        level = self._level(sides, x, y, _half_width(values, samples))
        level = replace(level, beside=dict(sides.beside(x, y)))
        level_after = self._level(sides, x_after, y_after, _half_width(values_after, samples))
        change = level_after.excess - level.excess
        half_width = _half_width(values_after - values, samples)
        p = None
        if control_changes:
            p = rank_p_value(-change, [-control for control in control_changes])
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
            p=p,
            flags=self._flags(sides, level, n=len(x), n_dims=x.shape[1] + y.shape[1]),
        )

    def _flags(self, sides: Sides, level: Level, *, n: int, n_dims: int) -> tuple[str, ...]:
        """What is doubtful about the value before the ablation, or about its change."""
        flags = list(sides.flags)
        estimator = self.config.estimator
        wanted = PER_DIMENSION * n_dims
        if estimator in ("gaussian_mi", "copula_mi") and n // sides.block < wanted:
            flags.append(f"fewer than {wanted} prompts for {n_dims} dimensions")
        if estimator not in ("nhsic", "rbf_cka") and level.value > np.log(n):
            flags.append("above ln n")
        return tuple(flags)

    def _level(self, sides: Sides, x: Tensor, y: Tensor, half_width: float) -> Level:
        value, null = self._value_and_null(sides, x, y, self.config.n_shuffles or 1)
        return Level(
            value=value,
            low=value - half_width,
            high=value + half_width,
            null_mean=_mean(null[: self.config.n_null]),
            null_sd=float(np.std(null)),
            p=rank_p_value(value, null),
        )


def refuse_few(config: MutualInformationConfig, n_prompts: int) -> None:
    """Raise `InputError` where there are too few prompts for the estimand's components."""
    k = config.settled(n_prompts).k or 1
    least, what = 8, config.estimand
    if config.estimand in ("downstream_mi", "subset_mi"):
        # half of the prompts must still be more than the dimensions
        least, what = 4 * k + 4, f"k={k} components a side"
    if n_prompts < least:
        raise InputError(f"{n_prompts} distinct prompts are too few for {what}: at least {least}")


def _key(place: Place, sides: Sides) -> str:
    return f"{sides.variant}|{place.name}"


def _places(estimand: Estimand, before: Activations, edit: InformationArm) -> list[Place]:
    """Every layer by itself, and those that the ablation can reach as one."""
    if estimand == "paper_nhsic":
        return [Place(f"layer {layer}", (layer,)) for layer in sorted(before.residual)]
    # Where no layer has a neuron to compare, every layer says so.
    layers = sorted({site.layer for site in before.values or before.units.units})
    places = [Place(f"layer {layer}", (layer,)) for layer in layers]
    reached = [place.layers[0] for place in places if _reaches(estimand, edit, place, before)] or layers
    if len(reached) > 1:
        places.append(Place(f"layers {reached[0]} to {reached[-1]} as one", tuple(reached)))
    return places


def _reaches(estimand: Estimand, edit: InformationArm, place: Place, before: Activations) -> bool:
    """Whether something that is changed can change the activations of the last layer of the place."""
    last = place.layers[-1]
    compared = place.sites_among(before.units.units)
    for site, units in edit.changed.units.items():
        if not len(units):
            continue
        # a layer's own neurons stand after its attention, gate and in, and before its out
        is_before = site.unit == "weight" and site != site.neurons.out
        feeds = is_before and (site.part in MATRICES["attention"] or site.neurons in compared)
        within = estimand in ("subset_mi", "paper_nhsic") or feeds
        if site.layer < last or (site.layer == last and within):
            return True
    return False


def _largest_fall(shifts: Sequence[Shift]) -> tuple[int, float | None]:
    """The layer of the largest fall among single layers, and its p among the controls (None without controls).

    With controls the fall is standardised; without, it is the largest as it stands.
    """
    # A layer without an estimate cannot have fallen; where no layer has one, the record says so (`not_estimated`).
    shifts = [shift for shift in shifts if shift.is_estimated] or shifts
    changes = [shift.change for shift in shifts]
    control_changes = list(zip(*(shift.control_changes for shift in shifts), strict=True))
    if not control_changes:
        return shifts[int(np.argmin(changes))].layers[0], None
    number, p = largest_fall(changes, control_changes)
    return shifts[number].layers[0], p


def _on_samples(sides: Sides, x: Tensor, y: Tensor, samples: Samples) -> Float[np.ndarray, " sample"]:
    """The value on each of some samples of the rows."""
    if sides.flags:
        return np.zeros(len(samples))
    values = []
    for rows, _ in samples:
        pairing = torch.arange(len(rows))[None]
        values.append(float(sides.core(x[rows], y[rows], pairing, rows)))
    return np.array(values)


def _half_width(values: Float[np.ndarray, " sample"], samples: Samples) -> float:
    """Half the width of a 95 % interval, from the values on half samples."""
    factors = np.array([factor for _, factor in samples])
    return 1.96 * float(np.sqrt(np.mean(np.square(factors * (values - values.mean())))))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
