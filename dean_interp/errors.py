"""The one error for what a caller can put right: bad names, bad files, bad fractions."""


class InputError(ValueError):
    """Something was asked for that cannot be done as given.

    The text is one line that says what was given and what is allowed. The command line prints it and exits with 2.
    """
