"""The mutual information between two behaviours, before and under an ablation, by name.

| estimand | what | falls by construction? |
|---|---|---|
| `downstream_mi` | between fairness neurons and privacy neurons at prompt ends, without the silenced ones | no |
| `awareness_mi` | between two probes of safe against unsafe answers, one a behaviour; pooled, given the topic | no |
| `label_information` | what neurons of either behaviour tell of either's label (V-information), crossed ones too | no |
| `subset_mi` | the paper's theory: as `downstream_mi`, with the silenced neurons in both reads | yes |
| `paper_nhsic` | the nHSIC of the paper's group (`TracingLLM`), on residual streams paired arbitrarily | it is 0 |

What counts is the excess over a null that shuffles the pairing within each behaviour's prompts, and its change beside
the same change under matched random ablations. Two behaviours' prompts pooled depend on each other through their topic
alone; a shuffle within topics keeps that part. The first two estimands answer "did the mutual information fall?".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import pandas as pd

from dean_interp.errors import InputError
from dean_interp.frames import Framed
from dean_interp.information.estimate import Units
from dean_interp.selection.random_sets import random_like, split_like
from dean_interp.selection.selection import Selection
from dean_interp.selection.strata import Strata

Estimand = Literal["downstream_mi", "awareness_mi", "label_information", "subset_mi", "paper_nhsic"]
HEADLINES: tuple[Estimand, ...] = ("downstream_mi", "awareness_mi")


@dataclass(frozen=True)
class _Default:
    estimators: tuple[str, ...]
    """Those that can be asked for; the first is the default."""
    n_shuffles: int
    n_null: int
    n_subsamples: int


_OF_READS = ("gaussian_mi", "copula_mi", "rbf_cka")
_DEFAULTS: dict[str, _Default] = {
    "downstream_mi": _Default(_OF_READS, 999, 199, 200),
    "awareness_mi": _Default(("ksg_mi", *_OF_READS), 199, 49, 200),
    "label_information": _Default(("v_information",), 19, 0, 20),
    "subset_mi": _Default(_OF_READS, 999, 199, 200),
    "paper_nhsic": _Default(("nhsic",), 999, 199, 100),
}


@dataclass(frozen=True)
class MutualInformationConfig:
    """What is estimated, and how. The defaults of the counts depend on what one estimate costs."""

    estimand: Estimand = "downstream_mi"
    estimator: str | None = None
    """None: `gaussian_mi` on principal components for reads, `ksg_mi` on ranks for probes. `copula_mi` and `rbf_cka`
    stand beside them. Label information and the paper's nHSIC have one estimator each."""
    k: int | None = None
    """Principal components a side; None takes 10 from 320 prompts on, else 5."""
    n_shuffles: int | None = None
    """Of the null that gives p before and after."""
    n_null: int | None = None
    """The first shuffles, whose mean is the null that is subtracted: the same for the edit and every control. 0 takes
    the null as 0 (label information: a null costs as many probes)."""
    n_subsamples: int | None = None
    """Random halves of the topics that give the intervals."""
    seed: int = 0
    """Of read noise, shuffles, subsamples, and the pairing of `paper_nhsic`."""

    def __post_init__(self) -> None:
        if self.estimand not in get_args(Estimand):
            raise InputError(f"estimand must be one of {get_args(Estimand)}, got {self.estimand!r}")
        allowed = _DEFAULTS[self.estimand].estimators
        if self.estimator is not None and self.estimator not in allowed:
            raise InputError(f"{self.estimand} takes the estimators {allowed}, got {self.estimator!r}")
        for name, least in (("k", 1), ("n_shuffles", 1), ("n_null", 0), ("n_subsamples", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")

    def settled(self, n_prompts: int) -> "MutualInformationConfig":
        """With every default written out."""
        default = _DEFAULTS[self.estimand]
        k = self.k or (10 if n_prompts >= 320 else 5)
        n_shuffles = self.n_shuffles or default.n_shuffles
        n_null = min(n_shuffles, default.n_null if self.n_null is None else self.n_null)
        n_subsamples = self.n_subsamples or default.n_subsamples
        estimator = self.estimator or default.estimators[0]
        return MutualInformationConfig(self.estimand, estimator, k, n_shuffles, n_null, n_subsamples, self.seed)

    @property
    def at_answers(self) -> bool:
        """Whether it reads where answers end."""
        return self.estimand in ("awareness_mi", "label_information")


@dataclass(frozen=True)
class Arm:
    """One ablation and what is read under it: the edit, or a control. Those of `subset_mi` have reads of their own."""

    ablated: Selection
    first_neurons: Selection
    second_neurons: Selection

    def reads(self, estimand: Estimand) -> tuple[Selection, Selection]:
        """What is read: silenced neurons are left out of both reads, but for `subset_mi`, which is about them."""
        both = (self.first_neurons, self.second_neurons)
        if estimand in ("subset_mi", "paper_nhsic"):
            return both
        first, second = (read - self.ablated if read.shapes == self.ablated.shapes else read for read in both)
        return first, second


def random_arm_like(arm: Arm, strata: Strata, *, seed: int) -> Arm:
    """A control of `subset_mi`: two other reads of the same sizes and overlap, and their overlap silenced.

    It is matched on site and stratum, from neurons that neither read holds. Of the overlap as many neurons are
    silenced as the arm silences.
    """
    both = arm.first_neurons & arm.second_neurons
    silenced = both & arm.ablated
    parts = [silenced, both - silenced, arm.first_neurons - both, arm.second_neurons - both]
    drawn = random_like(arm.first_neurons | arm.second_neurons, strata, seed=seed)
    mine, shared, first, second = split_like(drawn, parts, strata, seed=seed)
    return Arm(mine, mine | shared | first, mine | shared | second)


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
    """Rows: prompts, or answers."""
    n_units: tuple[int, int]
    """Neurons (for `paper_nhsic`: residual coordinates) a side."""
    dims: tuple[int, int]
    """Coordinates a side after the projection."""
    variance_kept: float
    before: Level
    after: Level
    change: float
    """After minus before, each as its excess over its null; negative: the ablation lowered it."""
    low: float
    """Of the 95 % interval of the change; the nulls are held fixed in it."""
    high: float
    control_changes: tuple[float, ...]
    p: float | None
    """One-sided rank of the fall among the controls; None without controls."""
    flags: tuple[str, ...]

    @property
    def is_joint(self) -> bool:
        """Whether several layers are read as one."""
        return len(self.layers) > 1


@dataclass(frozen=True)
class MutualInformation(Framed):
    """An estimand with all that it depends on. Values in `units`."""

    question: MutualInformationConfig
    """With every default written out."""
    units: Units
    n_prompts: int
    read_noise: float
    """Standard deviation of the noise of reads, in units of each neuron's own before the ablation."""
    shifts: tuple[Shift, ...]
    largest_fall_layer: Mapping[str, int]
    """By variant: the layer of the largest standardised fall."""
    largest_fall_p: Mapping[str, float | None]
    """By variant: p of a fall that large in any layer, by its rank among the controls (max-statistic)."""

    def __repr__(self) -> str:
        return f"MutualInformation({self.name}, {len(self.shifts)} places, {self.n_prompts} prompts)"

    def to_pandas(self) -> pd.DataFrame:
        """One row a place of each variant: excess over the null before and after, its change, p among controls."""
        return pd.DataFrame([
            {"estimand": self.name, "variant": one.variant, "place": one.place, "before": one.before.excess,
             "after": one.after.excess, "change": one.change, "low": one.low, "high": one.high, "p": one.p,
             "flags": "; ".join(one.flags)} for one in self.shifts
        ])  # fmt: skip

    def __str__(self) -> str:
        """A table for people: the excess over the null before and after, its change, and p among the controls."""
        lines = []
        for variant in self.variants:
            name = f"{self.estimand}, {variant}" if variant else self.estimand
            lines.append(f"{name}: {self.units} above the null, before -> after, change [95 %], p among controls")
            for one in self.of(variant):
                rank = f"p = {one.p:.2f}" if one.p is not None else "no controls"
                flags = f"  ({'; '.join(one.flags)})" if one.flags else ""
                lines.append(f"{one.place:>22}  {one.before.excess:+.3f} -> {one.after.excess:+.3f}  {one.change:+.3f} "
                             f"[{one.low:+.3f}, {one.high:+.3f}]  {rank}{flags}")  # fmt: skip
            layer, p = self.largest_fall_layer[variant], self.largest_fall_p[variant]
            rank = "no controls" if p is None else f"p = {p:.2f} for a fall that large in any layer"
            lines.append(f"largest standardised fall: layer {layer}, {rank}")
        return "\n".join(lines)

    @property
    def name(self) -> str:
        """Estimand, estimator and components: what tells it from others of the same study."""
        k = f".k{self.question.k}" if self.estimand in ("downstream_mi", "subset_mi", "label_information") else ""
        return f"{self.estimand}.{self.question.estimator}{k}"

    @property
    def is_default(self) -> bool:
        """Whether the estimator and the components are those that are taken where none are asked for."""
        default = MutualInformationConfig(self.estimand).settled(self.n_prompts)
        return (self.question.estimator, self.question.k) == (default.estimator, default.k)

    @property
    def headline(self) -> str:
        """One sentence a number: the largest fall in any layer, beside the controls."""
        said = []
        for variant in self.variants:
            layer, p = self.largest_fall_layer[variant], self.largest_fall_p[variant]
            shift = next(one for one in self.of(variant) if one.layers == (layer,))
            name = f"{self.estimand}, {variant}" if variant else self.estimand
            among = "there are no controls" if p is None else (
                f"p = {p:.2f} for a fall that large in any layer, among {len(shift.control_changes)} random ablations"
            )  # fmt: skip
            said.append(f"{name}: the largest standardised fall, in layer {layer}, is {shift.change:+.3f} {self.units} "
                        f"(95 % {shift.low:+.3f} to {shift.high:+.3f}); {among}.")  # fmt: skip
        return " ".join(said)

    @property
    def estimand(self) -> Estimand:
        """What is estimated."""
        return self.question.estimand

    @property
    def variants(self) -> list[str]:
        """The numbers of this estimand; the first is the main one."""
        return list(dict.fromkeys(shift.variant for shift in self.shifts))

    def of(self, variant: str) -> list[Shift]:
        """One number, layer by layer, the joint place last."""
        if variant not in self.variants:
            raise InputError(f"{self.estimand} has the variants {self.variants}, got {variant!r}")
        return [shift for shift in self.shifts if shift.variant == variant]

    @property
    def layers(self) -> list[Shift]:
        """The main number's single layers."""
        return [shift for shift in self.of(self.variants[0]) if not shift.is_joint]

    @property
    def joint(self) -> Shift | None:
        """The main number for all layers that the ablation can reach, read as one."""
        return next((shift for shift in self.of(self.variants[0]) if shift.is_joint), None)

    @property
    def changes(self) -> tuple[float, ...]:
        """The main number's change of the excess, one a layer."""
        return tuple(shift.change for shift in self.layers)
