"""Set algebra as text: `"(fairness & privacy) - general - over_refusal"`.

The grammar is Python's, of which names, `&`, `|`, `-` and parentheses are allowed, and binds as there: `-` before `&`
before `|`.
"""

import ast
from collections.abc import Mapping
from operator import and_, or_, sub

from dean_interp.errors import InputError
from dean_interp.selection.selection import Selection

_OPERATIONS = {ast.BitAnd: and_, ast.BitOr: or_, ast.Sub: sub}
_ALLOWED = "names of behaviours, &, |, - and parentheses are allowed, as in '(fairness & privacy) - general'"


def select(expression: str, sets: Mapping[str, Selection]) -> Selection:
    """The value of an expression over named selections.

    Raises:
        InputError: something other than names, `&`, `|`, `-` and parentheses, or a name that `sets` lacks.
    """
    return list(select_each(expression, sets).values())[-1]


def select_each(expression: str, sets: Mapping[str, Selection]) -> dict[str, Selection]:
    """The value of every part of an expression, in the order in which they are needed; the whole comes last."""
    values: dict[str, Selection] = {}
    _value(_parsed(expression), expression, sets, values)
    return values


def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        place = f" (near character {error.offset})" if isinstance(error, SyntaxError) and error.offset else ""
        raise InputError(f"cannot read the expression {expression!r}{place}: {_ALLOWED}") from error


def _value(node: ast.expr, expression: str, sets: Mapping[str, Selection], values: dict[str, Selection]) -> Selection:
    """The value of a node; it and those of its parts are noted in `values` under their text."""
    match node:
        case ast.Name(id=name) if name in sets:
            value = sets[name]
        case ast.Name(id=name):
            raise InputError(f"no behaviour {name!r} in the expression {expression!r}: there are {', '.join(sets)}")
        case ast.BinOp(left, operator, right) if type(operator) in _OPERATIONS:
            sides = [_value(side, expression, sets, values) for side in (left, right)]
            value = _OPERATIONS[type(operator)](*sides)
        case _:
            raise InputError(f"{ast.unparse(node)!r} in the expression {expression!r}: {_ALLOWED}")
    values.pop(ast.unparse(node), None)  # a part that comes twice stands where it came last
    values[ast.unparse(node)] = value
    return value
