"""Mutual information between two behaviours: estimators, nulls, estimands by name."""

from dean_interp.information.estimate import Estimate
from dean_interp.information.gaussian import copula_mi, gaussian_mi
from dean_interp.information.kernels import cka, hsic, nhsic
from dean_interp.information.neighbours import ksg_mi
from dean_interp.information.nulls import ShuffleTest, shuffle_test
from dean_interp.information.probes import v_information

__all__ = [
    "Estimate",
    "ShuffleTest",
    "cka",
    "copula_mi",
    "gaussian_mi",
    "hsic",
    "ksg_mi",
    "nhsic",
    "shuffle_test",
    "v_information",
]
