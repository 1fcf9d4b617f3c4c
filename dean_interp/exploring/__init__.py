"""A change of a model, looked at while its dose and its units are switched."""
