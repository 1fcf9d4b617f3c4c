"""Mutual information between two behaviours: estimators, nulls, estimands by name."""
