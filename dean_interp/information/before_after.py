"""An estimand before and under an ablation: the edit's estimates, and its change beside that under every control."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.information.activations import Activations
from dean_interp.information.estimands import Arm, Estimand, Level, MutualInformation, MutualInformationConfig, Shift
from dean_interp.information.estimate import PER_DIMENSION
from dean_interp.information.nulls import half_samples, largest_fall, within_group_permutations
from dean_interp.information.projections import READ_NOISE, Place
from dean_interp.information.sides import View, awareness_views, label_views, paper_views, read_views
from dean_interp.selection.selection import Selection
from dean_interp.statistics import rank_p_value


class Frozen:
    """Everything about one question that is fixed before the ablation. Hand it the reads of one state after another."""

    def __init__(
        self,
        question: MutualInformationConfig,
        before: Activations,
        edit: Arm,
        behaviours: Sequence[str],
        calibration: Activations | None = None,
    ) -> None:
        """`behaviours` are the names of first and second; `calibration` are reads that probes are fitted on."""
        self.question = question.settled(len(before.groups))
        self.before, self.edit, self.behaviours, self.calibration = before, edit, tuple(behaviours), calibration
        self.places = _places(self.question.estimand, before, edit)
        self._views: dict[tuple, list[View]] = {}
        self._levels: dict[int, tuple[Tensor, Tensor, float]] = {}
        self._shuffles: dict[tuple[tuple[str, ...], int], Tensor] = {}
        refuse_few(self.question, len(before.groups))

    def changes(self, arm: Arm, after: Activations) -> dict[str, float]:
        """The change of the excess at every place, by `variant|place`; the same procedure for the edit and controls."""
        found = {}
        for place, view in self._each(arm):
            _, _, before = self._before(view)
            x, y = view.sides(after)
            value, null = self._value_and_null(view, x, y, self.question.n_null or 0)
            found[f"{view.variant}|{place.name}"] = value - _mean(null) - before
        return found

    def information(self, after: Activations, controls: Sequence[Mapping[str, float]]) -> MutualInformation:
        """The edit's estimates from its reads, beside the controls' `changes`."""
        question = self.question
        shifts = tuple(
            self._shift(place, view, after, [one[f"{view.variant}|{place.name}"] for one in controls])
            for place, view in self._each(self.edit)
        )
        layer, p = {}, {}
        for variant in dict.fromkeys(shift.variant for shift in shifts):
            single = [shift for shift in shifts if shift.variant == variant and len(shift.layers) == 1]
            of_controls = list(zip(*(shift.control_changes for shift in single), strict=True))
            place, rank = largest_fall([shift.change for shift in single], of_controls) if of_controls else (
                int(np.argmin([shift.change for shift in single])), None
            )  # fmt: skip
            layer[variant], p[variant] = single[place].layers[0], rank
        units = "index" if question.estimator in ("rbf_cka", "nhsic") else "nats"
        return MutualInformation(question, units, len(self.before.groups), READ_NOISE, shifts, layer, p)

    def _each(self, arm: Arm) -> list[tuple[Place, View]]:
        reads = arm.reads(self.question.estimand)
        return [(place, view) for place in self.places for view in self._views_at(place, reads)]

    def _views_at(self, place: Place, reads: tuple[Selection, Selection]) -> list[View]:
        key = (place, *(read.units[site].numpy().tobytes() for read in reads for site in place.sites))
        if key not in self._views:
            self._views[key] = self._made(place, reads)
        return self._views[key]

    def _made(self, place: Place, reads: tuple[Selection, Selection]) -> list[View]:
        question, before = self.question, self.before
        k, seed, estimator = question.k or 1, question.seed, question.estimator or ""
        match question.estimand:
            case "downstream_mi" | "subset_mi":
                return read_views(before, place, reads, estimator=estimator, k=k, seed=seed)
            case "awareness_mi":
                return awareness_views(before, place, reads, self.calibration, behaviours=self.behaviours,
                                       estimator=estimator, seed=seed)  # fmt: skip
            case "label_information":
                return label_views(before, place, reads, behaviours=self.behaviours, k=k, seed=seed)
            case "paper_nhsic":
                return paper_views(before, place, behaviours=self.behaviours, seed=seed)

    def _before(self, view: View) -> tuple[Tensor, Tensor, float]:
        """Both sides before the ablation, and their excess; made once a view."""
        if id(view) not in self._levels:
            x, y = view.sides(self.before)
            value, null = self._value_and_null(view, x, y, self.question.n_null or 0)
            self._levels[id(view)] = x, y, value - _mean(null)
        return self._levels[id(view)]

    def _value_and_null(self, view: View, x: Tensor, y: Tensor, n_shuffles: int) -> tuple[float, list[float]]:
        rows = torch.arange(len(x))
        if view.flags:  # a side without neurons or variance informs of nothing
            return 0.0, [0.0] * n_shuffles
        value, *null = view.core(x, y, torch.cat([rows[None], self._drawn(view)[:n_shuffles]]), rows).tolist()
        return value, null

    def _drawn(self, view: View) -> Tensor:
        """The question's shuffles, drawn once: every place, state and control takes the first of the same."""
        key = (view.groups, view.block)
        if key not in self._shuffles:
            n, seed = self.question.n_shuffles or 1, self.question.seed
            self._shuffles[key] = within_group_permutations(view.groups, n, seed=seed, block=view.block)
        return self._shuffles[key]

    def _shift(self, place: Place, view: View, after: Activations, controls: Sequence[float]) -> Shift:
        question = self.question
        x, y, _ = self._before(view)
        now = view.sides(after)
        samples = half_samples(view.clusters, view.groups, question.n_subsamples or 2, seed=question.seed)
        factors = np.array([factor for _, factor in samples])
        then_values, now_values = self._of_samples(view, x, y, samples), self._of_samples(view, *now, samples)
        before, level = (
            self._level(view, x, y, _half_width(then_values, factors)),
            self._level(view, *now, _half_width(now_values, factors)),
        )
        before = Level(**{**vars(before), "beside": dict(view.beside(x, y))})
        change = level.excess - before.excess
        error = _half_width(now_values - then_values, factors)
        dims = (x.shape[1], y.shape[1])
        n_prompts, n_dims = len(x) // view.block, sum(dims)
        flags = list(view.flags)
        if question.estimator in ("gaussian_mi", "copula_mi") and n_prompts < PER_DIMENSION * n_dims:
            flags.append(f"fewer than {PER_DIMENSION * n_dims} prompts for {n_dims} dimensions")
        flags += ["nothing that is silenced lies upstream"] * (not _reaches(question.estimand, self.edit, place))
        if question.estimator not in ("nhsic", "rbf_cka") and before.value > np.log(len(x)):
            flags.append("above ln n")
        return Shift(
            place.name, place.layers, view.variant, len(x), view.n_units, dims, view.variance_kept, before, level,
            change, change - error, change + error, tuple(controls),
            rank_p_value(-change, [-one for one in controls]) if controls else None, tuple(flags),
        )  # fmt: skip

    def _level(self, view: View, x: Tensor, y: Tensor, error: float) -> Level:
        value, null = self._value_and_null(view, x, y, self.question.n_shuffles or 1)
        subtracted = null[: self.question.n_null]
        return Level(value, value - error, value + error, _mean(subtracted), float(np.std(null)),
                     rank_p_value(value, null))  # fmt: skip

    def _of_samples(self, view: View, x: Tensor, y: Tensor, samples: Sequence[tuple[Tensor, float]]) -> np.ndarray:
        if view.flags:
            return np.zeros(len(samples))
        return np.array(
            [float(view.core(x[rows], y[rows], torch.arange(len(rows))[None], rows)) for rows, _ in samples]
        )


def refuse_few(question: MutualInformationConfig, n_prompts: int) -> None:
    """Raise `InputError` where there are too few prompts for the question's components."""
    k = question.settled(n_prompts).k or 1
    of_reads = question.estimand in ("downstream_mi", "subset_mi")
    least = 4 * k + 4 if of_reads else 8  # half of the prompts must still be more than the dimensions
    if n_prompts < least:
        what = f"k={k} components a side" if of_reads else question.estimand
        raise InputError(f"{n_prompts} distinct prompts are too few for {what}: at least {least}")


def _places(estimand: Estimand, before: Activations, edit: Arm) -> list[Place]:
    """Every layer that is read, and those that the ablation can reach as one."""
    layers = sorted(before.residual) if estimand == "paper_nhsic" else sorted(site.layer for site in before.values)
    places = [Place(f"layer {layer}", (layer,)) for layer in layers]
    if estimand == "paper_nhsic":
        return places
    reached = tuple(place.layers[0] for place in places if _reaches(estimand, edit, place)) or tuple(layers)
    joint = [Place(f"layers {reached[0]} to {reached[-1]} as one", reached)] if len(reached) > 1 else []
    return places + joint


def _reaches(estimand: Estimand, edit: Arm, place: Place) -> bool:
    """Whether something that is silenced can change what is read in the last layer of the place."""
    last = place.layers[-1]
    for site, chosen in edit.ablated.units.items():
        if not len(chosen):
            continue
        # a layer's own neurons stand after its attention, gate and in, and before its out
        within = estimand in ("subset_mi", "paper_nhsic") or site.part not in ("neurons", "out")
        if site.layer < last or (site.layer == last and within):
            return True
    return False


def _half_width(values: np.ndarray, factors: np.ndarray) -> float:
    """Of a 95 % interval, from the values on subsamples."""
    return 1.96 * float(np.sqrt(np.mean(np.square(factors * (values - values.mean())))))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
