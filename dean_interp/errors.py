"""The one error for what a caller can put right: bad names, bad files, bad fractions."""

from collections.abc import Mapping


class InputError(ValueError):
    """Something was asked for that cannot be done as given.

    The text is one line that says what was given and what is allowed. The command line prints it and exits with 2.
    """


def refuse_below(settings: object, least: Mapping[str, int | float]) -> None:
    """Raise `InputError` where one of these settings is below its least value, or no number; None is unset."""
    for name, smallest in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= smallest:
            raise InputError(f"{name} must be at least {smallest}, got {value}")


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line: its first, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
