"""Records of any type, filled with numbers that are all different: for tests that look at what is made of them."""

import dataclasses
import itertools
import typing
from collections.abc import Mapping
from types import NoneType

_NUMBERS = itertools.count(1)


def sample(kind, /, **given):
    """A value of a type. Fields of a record that are not given, and have no default, are sampled, too."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            is_optional = {field.default, field.default_factory} != {dataclasses.MISSING}
            if field.name not in given and not is_optional:
                given[field.name] = sample(hints[field.name])
        return kind(**given)
    number = next(_NUMBERS)
    plain = {int: number, float: 0.1379 * number, str: f"text {number}", bool: True, NoneType: None}
    return plain[kind] if kind in plain else _generic(kind)


def _generic(kind):
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return parts[0]
    if origin in (dict, Mapping):
        keys = ("fairness", "privacy") if parts[0] is str else (sample(parts[0]),)
        return {key: sample(parts[1]) for key in keys}
    if origin is tuple:
        kinds = (parts[0], parts[0]) if parts[-1] is Ellipsis else parts
        return tuple(map(sample, kinds))
    # A union: its first part.
    assert parts, f"no sample of {kind}"
    return sample(parts[0])
