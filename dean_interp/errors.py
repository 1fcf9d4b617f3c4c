"""The errors for what a caller can put right: bad names, bad files, bad fractions; data that leave nothing to do."""

from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import get_type_hints


class InputError(ValueError):
    """Something was asked for that cannot be done as given.

    The text is one line that says what was given and what is allowed. The command line prints it and exits with 2.
    """


class DamagedFileError(InputError):
    """A file cannot be what was written: it was cut off, changed, or is of another version."""


class NothingToChangeError(InputError):
    """The data leave nothing that would raise both behaviours: no neuron, no direction.

    Where labels are flipped that is an outcome like others: a null that changes nothing.
    """


def refuse_below(settings: object, least: Mapping[str, int | float]) -> None:
    """Raise `InputError` where one of these settings is below its least value, or no number; None is unset."""
    for name, smallest in least.items():
        value = getattr(settings, name)
        if value is None:
            continue
        if not value >= smallest:
            raise InputError(f"{name} must be at least {smallest}, got {value}")


def refuse_below_one(**counts: int | None) -> None:
    """Raise `InputError` where one of these numbers is below 1; None is unset."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"{name} must be at least 1, got {count}")


def refuse_other_type(what: str, given: object, kind: type, example: str) -> None:
    """Raise `InputError` where a value is not of the kind that is needed: `example` says what makes one."""
    if not isinstance(given, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise InputError(f"{what} must be {article} {kind.__name__}, such as {example}; got {given!r:.80}")


def refuse_other_groups(settings: object) -> None:
    """Raise `InputError` where a group of settings is something else, such as a name in place of a `ModelConfig`."""
    for name, kind in get_type_hints(type(settings)).items():
        if isinstance(kind, type) and is_dataclass(kind):
            refuse_other_type(name, getattr(settings, name), kind, f"{kind.__name__}()")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A question with the known name that is nearest to what was given: ` (did you mean 'fairness'?)`.

    It is empty where no name is near. It stands behind the name in an error, before the names that are allowed.
    """
    by_lower_case = {name.lower(): name for name in known}
    nearest = get_close_matches(given.lower(), by_lower_case, n=1, cutoff=0.7)
    return f" (did you mean {by_lower_case[nearest[0]]!r}?)" if nearest else ""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line: its first, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0]
