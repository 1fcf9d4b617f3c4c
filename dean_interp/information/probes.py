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
Folds = Sequence[tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]]
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
    label = _numbered(labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels))
    matrix, column = as_matrices(x, label.astype(np.float64))
    flags = doubts(matrix, column)
    if CONSTANT in flags:
        return Estimate(0.0, "nats", tuple(flags))
    flags += few(len(matrix), matrix.shape[1])
    folds = folds_of(label, groups, n_folds=n_folds, seed=seed)
    return in_nats(usable_information(matrix.cpu().numpy(), label, folds), len(matrix), flags)


def _numbered(names: Sequence[Hashable]) -> Int[np.ndarray, " example"]:
    """Each name by its number, in the order of their first appearance."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.int64)


def folds_of(
    label: Int[np.ndarray, " example"], groups: Sequence[Hashable] | None, *, n_folds: int, seed: int
) -> Folds:
    """Which examples a probe is fitted on and which it is asked about, labels in equal shares."""
    names = list(range(len(label)) if groups is None else groups)
    if len(names) != len(label):
        raise InputError(f"groups must have one entry an example, got {len(names)} for {len(label)}")
    group = _numbered(names)
    fewest = min(len(np.unique(group[label == value])) for value in np.unique(label))
    if not 2 <= n_folds <= fewest:
        raise InputError(
            f"the rarest label has {fewest} examples or groups: n_folds must be from 2 to that, got {n_folds}"
        )
    if groups is None:
        splitter = StratifiedKFold(n_splits=n_folds, shuffle=True, random_state=seed)
        return list(splitter.split(group[:, None], label))
    splitter = StratifiedGroupKFold(n_splits=n_folds, shuffle=True, random_state=seed)
    folds = list(splitter.split(group[:, None], label, group))
    n_labels = len(np.unique(label))
    if any(len(np.unique(label[train])) < n_labels for train, _ in folds):
        raise InputError(
            f"one of {n_folds} folds would hold every example of a label: take fewer folds or smaller groups"
        )
    return folds


def usable_information(x: Float[np.ndarray, "example dim"], label: Int[np.ndarray, " example"], folds: Folds) -> float:
    """The value of `v_information` (nats); labels are 0, 1, ... and all occur."""
    loss = np.zeros(len(label))
    for train, test in folds:
        mean, spread = x[train].mean(0), x[train].std(0)
        scaled = (x - mean) / np.where(spread > 0, spread, 1.0)
        fitted = LogisticRegression(max_iter=1000).fit(scaled[train], label[train])
        column = np.searchsorted(fitted.classes_, label[test])
        probability = fitted.predict_proba(scaled[test])[np.arange(len(test)), column]
        loss[test] = -np.log(np.maximum(probability, 1e-12))
    share = np.bincount(label) / len(label)
    return float(-(share * np.log(share)).sum() - loss.mean())


def probe_direction(
    x: Float[np.ndarray, "example dim"], label: Int[np.ndarray, " example"]
) -> Float[np.ndarray, " dim"]:
    """The direction along which a probe's evidence for label 1 grows, in the units of `x`."""
    spread = x.std(0)
    scale = np.where(spread > 0, spread, 1.0)
    return LogisticRegression(max_iter=1000).fit((x - x.mean(0)) / scale, label).coef_[0] / scale
