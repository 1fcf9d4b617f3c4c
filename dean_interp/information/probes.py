"""What a linear probe can tell of a label: V-information (Xu et al. 2020), and a probe's direction."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.information.estimate import CONSTANT, Estimate, Side, as_matrices, doubts, few, in_nats

N_FOLDS = 5
_LEAST_PROBABILITY = 1e-12
"""Keeps the loss of a probe finite where it was sure and wrong."""
_Rows = Int[np.ndarray, " _"]
Folds = Sequence[tuple[_Rows, _Rows]]
"""For each fold, the examples that a probe is fitted on and those that it is asked about."""


def v_information(
    x: Side,
    labels: Sequence[Hashable] | Shaped[np.ndarray, " example"] | Shaped[Tensor, " example"],
    *,
    groups: Sequence[Hashable] | None = None,
    n_folds: int = N_FOLDS,
    seed: int = 0,
) -> Estimate:
    """What a logistic probe can use of `x` to tell the label (nats): `H(label)` minus its cross-validated log loss.

    Usable information under computational constraints (Xu et al. 2020): at most the mutual information, less where the
    label is not linear in `x`, and negative where the probe learnt noise. The probe is scikit-learn's logistic
    regression (ridge, C = 1) on standardised columns.

    Args:
        x: `(n, dim)`; a vector is one column.
        labels: the label of each example.
        groups: the group of each example. A group (the answers to one prompt) is never on both sides of a fold.
        n_folds: folds of the cross-validation.
        seed: seed for the folds.

    Raises:
        InputError: NaN or infinity, labels or groups of another length, a label with fewer examples (or groups) than
            folds.
    """
    names = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    label = _numbered(names)
    matrix, column = as_matrices(x, label.astype(np.float64))
    n_examples, n_dims = matrix.shape
    flags = doubts(matrix, column)
    if CONSTANT in flags:
        return Estimate(0.0, "nats", tuple(flags))
    flags += few(n_examples, n_dims)
    folds = folds_of(label, groups, n_folds=n_folds, seed=seed)
    value = usable_information(matrix.cpu().numpy(), label, folds)
    return in_nats(value, n_examples, flags)


def _numbered(names: Sequence[Hashable]) -> Int[np.ndarray, " example"]:
    """Each name by its number, in the order of their first appearance."""
    distinct = dict.fromkeys(names)
    number_of = {name: number for number, name in enumerate(distinct)}
    numbers = [number_of[name] for name in names]
    return np.array(numbers, dtype=np.int64)


def folds_of(
    label: Int[np.ndarray, " example"],
    groups: Sequence[Hashable] | None,
    *,
    n_folds: int,
    seed: int,
) -> Folds:
    """Which examples a probe is fitted on and which it is asked about, labels in equal shares."""
    n_examples = len(label)
    names = list(range(n_examples)) if groups is None else list(groups)
    if len(names) != n_examples:
        raise InputError(f"groups must have one entry an example, got {len(names)} for {n_examples}")
    group = _numbered(names)
    values = np.unique(label)
    # every fold must hold every label
    fewest = min(len(np.unique(group[label == value])) for value in values)
    if fewest < 2:
        raise InputError(f"every label needs at least 2 examples or groups, and the rarest has {fewest}")
    if not 2 <= n_folds <= fewest:
        raise InputError(
            f"the rarest label has {fewest} examples or groups: n_folds must be from 2 to that, got {n_folds}"
        )
    # a splitter looks at the number of rows alone, not at what they hold
    rows = group[:, None]
    if groups is None:
        splitter = StratifiedKFold(n_splits=n_folds, shuffle=True, random_state=seed)
        return list(splitter.split(rows, label))
    splitter = StratifiedGroupKFold(n_splits=n_folds, shuffle=True, random_state=seed)
    folds = list(splitter.split(rows, label, group))
    for train, _ in folds:
        if len(np.unique(label[train])) < len(values):
            raise InputError(
                f"one of {n_folds} folds would hold every example of a label: take fewer folds or smaller groups"
            )
    return folds


def usable_information(
    x: Float[np.ndarray, "example dim"],
    label: Int[np.ndarray, " example"],
    folds: Folds,
) -> float:
    """The value of `v_information` (nats); labels are 0, 1, ... and all occur."""
    loss = np.zeros(len(label))
    for train, test in folds:
        # on the scale of the training examples
        mean = x[train].mean(0)
        scale = _scale(x[train])
        scaled = (x - mean) / scale
        probe = LogisticRegression(max_iter=1000).fit(scaled[train], label[train])
        # the probability that the probe gives to the true label
        column = np.searchsorted(probe.classes_, label[test])
        probabilities = probe.predict_proba(scaled[test])
        probability = probabilities[np.arange(len(test)), column]
        probability = np.maximum(probability, _LEAST_PROBABILITY)
        loss[test] = -np.log(probability)
    share = np.bincount(label) / len(label)
    surprise = -np.log(share)
    entropy = (share * surprise).sum()
    return float(entropy - loss.mean())


def probe_direction(
    x: Float[np.ndarray, "example dim"],
    label: Int[np.ndarray, " example"],
) -> Float[np.ndarray, " dim"]:
    """The direction along which a probe's evidence for label 1 grows, in the units of `x`."""
    scale = _scale(x)
    scaled = (x - x.mean(0)) / scale
    probe = LogisticRegression(max_iter=1000).fit(scaled, label)
    return probe.coef_[0] / scale


def _scale(x: Float[np.ndarray, "example dim"]) -> Float[np.ndarray, " dim"]:
    """Standard deviation of every column; 1 for a column that does not vary, beyond rounding."""
    span = x.max(0) - x.min(0)
    # numpy's own of equal numbers may be a rounding error in place of 0
    varies = span > 1e-12 * np.abs(x).max(0)
    return np.where(varies, x.std(0), 1.0)
