"""Set algebra as text: `"(fairness & privacy) - general - over_refusal"`.

The grammar is Python's, restricted to names, `&`, `|`, `-` and parentheses. As in Python `-` binds before `&`, and `&`
before `|`.
"""

import ast
from collections.abc import Mapping
from operator import and_, or_, sub

from dean_interp.errors import InputError, did_you_mean
from dean_interp.selection.selection import Selection

_OPERATIONS = {ast.BitAnd: and_, ast.BitOr: or_, ast.Sub: sub}
_ALLOWED = "names of behaviours, &, |, - and parentheses are allowed, as in '(fairness & privacy) - general'"


def select(expression: str, sets: Mapping[str, Selection]) -> Selection:
    """The value of an expression over named selections.

    Raises:
        InputError: something other than names, `&`, `|`, `-` and parentheses, or a name that `sets` lacks.
    """
    *_, whole = select_each(expression, sets).values()
    return whole


def select_each(expression: str, sets: Mapping[str, Selection]) -> dict[str, Selection]:
    """The value of every part of an expression, in the order in which they are needed; the whole comes last."""
    values: dict[str, Selection] = {}
    _evaluate(_parsed(expression), expression, sets, values)
    return values


def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        place = ""
        if isinstance(error, SyntaxError) and error.offset:
            place = f" (near character {error.offset})"
        raise InputError(f"cannot read the expression {expression!r}{place}: {_ALLOWED}") from error


def _evaluate(
    node: ast.expr,
    expression: str,
    sets: Mapping[str, Selection],
    values: dict[str, Selection],
) -> Selection:
    """The value of a node. It and the values of the node's parts are added to `values` under their text."""
    text = ast.unparse(node)
    match node:
        case ast.Name(id=name) if name in sets:
            value = sets[name]
        case ast.Name(id=name):
            hint, names = did_you_mean(name, sets), ", ".join(sets)
            raise InputError(f"no behaviour {name!r}{hint} in the expression {expression!r}: there are {names}")
        case ast.BinOp(left, operator, right) if type(operator) in _OPERATIONS:
            combine = _OPERATIONS[type(operator)]
            left_value = _evaluate(left, expression, sets, values)
            right_value = _evaluate(right, expression, sets, values)
            value = combine(left_value, right_value)
        case _:
            raise InputError(f"{text!r} in the expression {expression!r}: {_ALLOWED}")
    # A part that comes twice stands where it came last.
    values.pop(text, None)
    values[text] = value
    return value
