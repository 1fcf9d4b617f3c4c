"""The answer to an estimand: its estimates at every place, before and under the ablation, beside the controls."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from dean_interp.errors import InputError
from dean_interp.frames import Framed
from dean_interp.information.estimands import Estimand, MutualInformationConfig
from dean_interp.information.estimate import Units

NO_NEURONS = "a side without neurons"
DEAD = "a side without neurons or variance"
"""Flags of an estimate that is 0 because there was nothing to estimate."""


@dataclass(frozen=True)
class Level:
    """An estimate in one state, beside its null. The interval (95 %) is of the value, from halves of the topics."""

    value: float
    low: float
    high: float
    null_mean: float
    null_sd: float
    p: float
    """One-sided, against the shuffled pairings."""
    beside: Mapping[str, float] = field(default_factory=dict)

    @property
    def excess(self) -> float:
        """The value above the mean of its null."""
        return self.value - self.null_mean


@dataclass(frozen=True)
class Shift:
    """An estimate at one place, before and under the ablation, and its change beside the controls' changes."""

    place: str
    layers: tuple[int, ...]
    variant: str
    """Which of the estimand's numbers (`pooled`, `given topic`; whose neurons and label); empty where there is one."""
    n: int
    """Number of rows: prompts, or answers."""
    n_units: tuple[int, int]
    """Neurons a side (for `paper_nhsic`: residual coordinates)."""
    dims: tuple[int, int]
    """Coordinates a side after the projection."""
    variance_kept: float
    before: Level
    after: Level
    change: float
    """After minus before, each as its excess over its null; negative: the ablation lowered it."""
    low: float
    """Lower end of the 95 % interval of the change; the nulls are held fixed in it."""
    high: float
    """Upper end of it."""
    control_changes: tuple[float, ...]
    p: float | None
    """One-sided rank of the fall among the controls; None without controls."""
    flags: tuple[str, ...]

    @property
    def is_estimated(self) -> bool:
        """Whether both sides held something that could inform."""
        return not {NO_NEURONS, DEAD} & {*self.flags}

    @property
    def is_joint(self) -> bool:
        """Whether several layers are taken as one."""
        return len(self.layers) > 1


@dataclass(frozen=True)
class MutualInformation(Framed):
    """An estimand's estimates at every place, with all that they depend on. Values are in `units`."""

    config: MutualInformationConfig
    """What was asked for, with every default written out."""
    units: Units
    n_prompts: int
    read_noise: float
    """Standard deviation of the noise on each neuron, in units of its own before the ablation."""
    shifts: tuple[Shift, ...]
    largest_fall_layer: Mapping[str, int]
    """By variant: the layer of the largest standardised fall."""
    largest_fall_p: Mapping[str, float | None]
    """By variant: p of a fall that large in any layer, by its rank among the controls (max-statistic)."""

    def __repr__(self) -> str:
        return f"MutualInformation({self.name}, {len(self.shifts)} places, {self.n_prompts} prompts)"

    def to_pandas(self) -> pd.DataFrame:
        """One row a place of each variant: excess over the null before and after, its change, p among controls."""
        return pd.DataFrame([self._row(shift) for shift in self.shifts])

    def _row(self, shift: Shift) -> dict[str, object]:
        return {
            "estimand": self.name,
            "variant": shift.variant,
            "place": shift.place,
            "before": shift.before.excess,
            "after": shift.after.excess,
            "change": shift.change,
            "low": shift.low,
            "high": shift.high,
            "p": shift.p,
            "flags": "; ".join(shift.flags),
        }

    def __str__(self) -> str:
        """A table for people: the excess over the null before and after, its change, and p among the controls."""
        lines = []
        for variant in self.variants:
            if self.not_estimated(variant):
                lines.append(self._missing(variant))
                continue
            title = self._title(variant)
            lines.append(f"{title}: {self._level}, before -> after, change [95 %], p among controls")
            lines += [_line(shift) for shift in self.of(variant)]
            layer = self.largest_fall_layer[variant]
            p = self.largest_fall_p[variant]
            rank = "no controls" if p is None else f"p = {p:.2f} for {self.fall_like_it(variant)}"
            lines.append(f"{self.fall_name(variant)}: layer {layer}, {rank}")
        return "\n".join(lines)

    @property
    def _level(self) -> str:
        """What levels are given in."""
        return f"{self.units} above the null" if self.config.n_null else f"{self.units} (no null is subtracted)"

    def fall_name(self, variant: str) -> str:
        """What the change in `largest_fall_layer` is. The lowest beside the controls' may be no fall."""
        if self._falls(variant):
            return "the largest standardised fall"
        return "no fall; the change that is lowest beside the controls'"

    def fall_like_it(self, variant: str) -> str:
        """What p is the chance of, among the controls."""
        return f"a {'fall that large' if self._falls(variant) else 'change that low'} in any layer"

    def _falls(self, variant: str) -> bool:
        return self._largest_fall(variant).change < 0

    def _largest_fall(self, variant: str) -> Shift:
        """The estimate in `largest_fall_layer`."""
        layer = self.largest_fall_layer[variant]
        (shift,) = [shift for shift in self.of(variant) if shift.layers == (layer,)]
        return shift

    def _title(self, variant: str) -> str:
        """The estimand and which of its numbers this is."""
        if not variant:
            return self.estimand
        return f"{self.estimand}, {variant}"

    @property
    def name(self) -> str:
        """Estimand, estimator and components: what tells it from others of the same study."""
        name = f"{self.estimand}.{self.config.estimator}"
        if self.estimand in ("downstream_mi", "subset_mi", "label_information"):
            name += f".k{self.config.k}"
        return name

    @property
    def is_default(self) -> bool:
        """Whether the estimator and the components are those that are taken where none are asked for."""
        config = self.config
        default = MutualInformationConfig(self.estimand).settled(self.n_prompts)
        return config.estimator == default.estimator and config.k == default.k

    @property
    def headline(self) -> str:
        """One sentence a number: the largest fall in any layer, beside the controls."""
        sentences = []
        for variant in self.variants:
            if self.not_estimated(variant):
                sentences.append(self._missing(variant))
                continue
            sentences.append(self._sentence(variant))
        return " ".join(sentences)

    def _sentence(self, variant: str) -> str:
        layer = self.largest_fall_layer[variant]
        p = self.largest_fall_p[variant]
        shift = self._largest_fall(variant)
        rank = "there are no controls"
        if p is not None:
            n_controls = len(shift.control_changes)
            rank = f"p = {p:.2f} for {self.fall_like_it(variant)}, among {n_controls} random ablations"
        return (
            f"{self._title(variant)}: {self.fall_name(variant)}, in layer {layer}, is {shift.change:+.3f} "
            f"{self.units} (95 % {shift.low:+.3f} to {shift.high:+.3f}); {rank}."
        )

    @property
    def estimand(self) -> Estimand:
        """What is estimated."""
        return self.config.estimand

    @property
    def variants(self) -> list[str]:
        """The numbers of this estimand; the first is the main one."""
        names = [shift.variant for shift in self.shifts]
        return list(dict.fromkeys(names))

    def of(self, variant: str) -> list[Shift]:
        """One number, layer by layer, the joint place last."""
        if variant not in self.variants:
            raise InputError(f"{self.estimand} has the variants {self.variants}, got {variant!r}")
        return [shift for shift in self.shifts if shift.variant == variant]

    def not_estimated(self, variant: str) -> str:
        """Why this number could not be estimated in any layer; empty where it could in one."""
        shifts = self.of(variant)
        if any(shift.is_estimated for shift in shifts):
            return ""
        if not any(sum(shift.n_units) for shift in shifts):
            return "no neuron that is left is in the top of one behaviour alone (take another fraction of neurons)"
        return "every layer has a side without neurons, or whose neurons are the same on every prompt"

    @property
    def missing(self) -> list[str]:
        """One sentence for each number that could not be estimated in any layer."""
        return [self._missing(variant) for variant in self.variants if self.not_estimated(variant)]

    def _missing(self, variant: str) -> str:
        reason = self.not_estimated(variant)
        return f"{self._title(variant)}: not estimated, since {reason}."

    @property
    def _main(self) -> list[Shift]:
        return self.of(self.variants[0])

    @property
    def layers(self) -> list[Shift]:
        """The main number's single layers."""
        return [shift for shift in self._main if not shift.is_joint]

    @property
    def changes(self) -> tuple[float, ...]:
        """The main number's change of the excess, one a layer."""
        return tuple(shift.change for shift in self.layers)


def _line(shift: Shift) -> str:
    """One line of the table for people."""
    rank = "no controls" if shift.p is None else f"p = {shift.p:.2f}"
    line = (
        f"{shift.place:>22}  {shift.before.excess:+.3f} -> {shift.after.excess:+.3f}  {shift.change:+.3f} "
        f"[{shift.low:+.3f}, {shift.high:+.3f}]  {rank}"
    )
    if shift.flags:
        line += f"  ({'; '.join(shift.flags)})"
    return line
