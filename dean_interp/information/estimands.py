"""The mutual information between two behaviours, before and under an ablation, by name.

| estimand | what | falls by construction? |
|---|---|---|
| `downstream_mi` | between fairness neurons and privacy neurons at prompt ends, without the silenced ones | no |
| `awareness_mi` | between two probes of safe against unsafe answers, one a behaviour; pooled, given the topic | no |
| `label_information` | what neurons of either behaviour tell of either's label (V-information), crossed ones too | no |
| `subset_mi` | the paper's theory: as `downstream_mi`, with the silenced neurons on both sides | yes |
| `paper_nhsic` | the nHSIC of the paper's group (`TracingLLM`), on residual streams paired arbitrarily | it is 0 |

What counts is the excess over a null that shuffles the pairing within each behaviour's prompts, and its change beside
the same change under matched random ablations. Two behaviours' prompts pooled depend on each other through their topic
alone; a shuffle within topics keeps that part. The first two estimands answer "did the mutual information fall?".
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

from dean_interp.editing.ablation import ablate, gated
from dean_interp.errors import InputError, refuse_below
from dean_interp.information.activations import Activations
from dean_interp.models.hooked_model import HookedModel
from dean_interp.selection.gates import Gates
from dean_interp.selection.random_sets import random_like, split_like
from dean_interp.selection.selection import Selection
from dean_interp.selection.strata import Strata

Estimand = Literal["downstream_mi", "awareness_mi", "label_information", "subset_mi", "paper_nhsic"]
HEADLINES: tuple[Estimand, ...] = ("downstream_mi", "awareness_mi")
WITH_SILENCED: tuple[Estimand, ...] = ("subset_mi", "paper_nhsic")
"""Estimands that compare the silenced neurons too."""
INDICES = ("rbf_cka", "nhsic")
"""Estimators whose value is an index, no nats."""


@dataclass(frozen=True)
class _Default:
    estimators: tuple[str, ...]
    """Those that can be asked for; the first is the default."""
    n_shuffles: int
    n_null: int
    n_subsamples: int


_MANY_PROMPTS = 320
"""From so many prompts on, 10 components a side can be estimated."""
_OF_NEURONS = ("gaussian_mi", "copula_mi", "rbf_cka")
_DEFAULTS: dict[str, _Default] = {
    "downstream_mi": _Default(_OF_NEURONS, n_shuffles=999, n_null=199, n_subsamples=200),
    "awareness_mi": _Default(("ksg_mi", *_OF_NEURONS), n_shuffles=199, n_null=49, n_subsamples=200),
    "label_information": _Default(("v_information",), n_shuffles=19, n_null=0, n_subsamples=20),
    "subset_mi": _Default(_OF_NEURONS, n_shuffles=999, n_null=199, n_subsamples=200),
    "paper_nhsic": _Default(("nhsic",), n_shuffles=999, n_null=199, n_subsamples=100),
}


@dataclass(frozen=True)
class MutualInformationConfig:
    """What is estimated, and how. The default counts depend on what one estimate costs."""

    estimand: Estimand = "downstream_mi"
    estimator: str | None = None
    """The estimator's name. None takes `gaussian_mi` on principal components for neurons and `ksg_mi` on ranks for
    probes; both can be asked for with `copula_mi` and `rbf_cka`. The other two estimands have one estimator each."""
    k: int | None = None
    """Principal components a side; None takes 10 from 320 prompts on, else 5."""
    n_shuffles: int | None = None
    """Shuffles of the null that gives p before and after."""
    n_null: int | None = None
    """How many of the first shuffles give the mean null that is subtracted, for the edit and every control alike. 0
    subtracts nothing (the default of `label_information`, whose null costs as many probes)."""
    n_subsamples: int | None = None
    """Random halves of the topics that give the intervals."""
    seed: int = 0
    """Seed for noise, shuffles, subsamples and the pairing of `paper_nhsic`."""

    def __post_init__(self) -> None:
        if self.estimand not in get_args(Estimand):
            raise InputError(f"estimand must be one of {get_args(Estimand)}, got {self.estimand!r}")
        allowed = _DEFAULTS[self.estimand].estimators
        if self.estimator is not None and self.estimator not in allowed:
            raise InputError(f"{self.estimand} takes the estimators {allowed}, got {self.estimator!r}")
        refuse_below(self, {"k": 1, "n_shuffles": 1, "n_null": 0, "n_subsamples": 2})

    def settled(self, n_prompts: int) -> "MutualInformationConfig":
        """With every default written out."""
        default = _DEFAULTS[self.estimand]
        default_k = 10 if n_prompts >= _MANY_PROMPTS else 5
        n_shuffles = self.n_shuffles or default.n_shuffles
        n_null = default.n_null if self.n_null is None else self.n_null
        return MutualInformationConfig(
            estimand=self.estimand,
            estimator=self.estimator or default.estimators[0],
            k=self.k or default_k,
            n_shuffles=n_shuffles,
            n_null=min(n_shuffles, n_null),
            n_subsamples=self.n_subsamples or default.n_subsamples,
            seed=self.seed,
        )

    @property
    def at_answers(self) -> bool:
        """Whether the estimand takes activations where answers end."""
        return self.estimand in ("awareness_mi", "label_information")


def refuse_few(config: MutualInformationConfig, groups: Sequence[str], behaviours: Sequence[str]) -> None:
    """Raise `InputError` where there are too few prompts for the estimand's components, or too few of a behaviour.

    `groups` are the behaviour of each distinct prompt, `behaviours` the names of first and second.
    """
    n_prompts = len(groups)
    least = 8
    what = config.estimand
    if config.estimand in ("downstream_mi", "subset_mi"):
        # half of the prompts must still be more than the dimensions
        k = config.settled(n_prompts).k or 1
        least = 4 * k + 4
        what = f"k={k} components a side (a smaller k needs fewer)"
    if n_prompts < least:
        raise InputError(f"{n_prompts} distinct test prompts are too few for {what}: give at least {least}")
    # neurons are compared over all prompts; the other estimands look at behaviours one by one, this one at all
    least_each = {"awareness_mi": 8, "label_information": 4, "paper_nhsic": 4}.get(config.estimand, 0)
    others = groups if config.estimand == "awareness_mi" else ()
    for behaviour in dict.fromkeys((*behaviours, *others)):
        n = groups.count(behaviour)
        if n < least_each:
            raise InputError(
                f"{n} distinct test prompts of '{behaviour}' are too few for {config.estimand}: give at least "
                f"{least_each} (a prompt of two behaviours counts as the first one's)"
            )


@dataclass(frozen=True)
class InformationArm:
    """One ablation and the neurons whose activations are compared under it: the edit, or a control.

    Controls compare the edit's neurons, but for those of `subset_mi`, which have neurons of their own. What the
    ablation itself does to a neuron is not compared: a silenced neuron is left out, and the activation of a gated one
    is taken before its gate.
    """

    ablated: Selection | Gates
    """Units that are silenced, or gates."""
    first_neurons: Selection
    second_neurons: Selection

    @property
    def changed(self) -> Selection:
        """The units that the ablation changes."""
        if isinstance(self.ablated, Gates):
            return self.ablated.selection
        return self.ablated

    @property
    def silenced(self) -> Selection:
        """The units of which nothing is left."""
        if isinstance(self.ablated, Gates):
            return self.ablated.silenced
        return self.ablated

    def applied(self, model: HookedModel) -> AbstractContextManager[object]:
        """While open, the model is under the ablation."""
        if isinstance(self.ablated, Gates):
            return gated(model, self.ablated)
        return ablate(model, self.ablated)

    def compared(self, activations: Activations) -> Activations:
        """Activations under the ablation, each without what its own gate did to it."""
        if isinstance(self.ablated, Gates):
            return activations.before(self.ablated)
        return activations

    def neurons(self, estimand: Estimand) -> tuple[Selection, Selection]:
        """The neurons on each side: without those that are silenced, but for `subset_mi`, which is about them."""
        if estimand in WITH_SILENCED:
            return self.first_neurons, self.second_neurons
        first = self._without_silenced(self.first_neurons)
        second = self._without_silenced(self.second_neurons)
        return first, second

    def _without_silenced(self, neurons: Selection) -> Selection:
        silenced = self.silenced
        # silenced weights are no neurons: nothing is left out for them
        if neurons.shapes != silenced.shapes:
            return neurons
        return neurons - silenced


def random_arm_like(arm: InformationArm, strata: Strata, *, seed: int) -> InformationArm:
    """A control of `subset_mi`: two other sets of neurons of the same sizes and overlap, and their overlap silenced.

    It is matched on site and stratum, from neurons that neither set of the arm holds. Of the overlap as many neurons
    are silenced as the arm silences.
    """
    both = arm.first_neurons & arm.second_neurons
    either = arm.first_neurons | arm.second_neurons
    silenced = both & arm.silenced
    # four disjoint parts: silenced, in both but kept, of the first alone, of the second alone
    parts = [silenced, both - silenced, arm.first_neurons - both, arm.second_neurons - both]
    drawn = random_like(either, strata, seed=seed)
    ablated, kept, first, second = split_like(drawn, parts, strata, seed=seed)
    drawn_both = ablated | kept
    return InformationArm(
        ablated=ablated,
        first_neurons=drawn_both | first,
        second_neurons=drawn_both | second,
    )
