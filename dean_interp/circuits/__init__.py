"""A look inside: what a unit does, on which text."""
