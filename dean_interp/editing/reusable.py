"""A context that can be opened again, also inside itself: what `contextlib.contextmanager` makes opens once."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator
from types import TracebackType
from typing import ParamSpec

Parameters = ParamSpec("Parameters")


class Reusable(ContextDecorator):
    """Opens a fresh context each time it is entered, and closes the last one that is open."""

    def __init__(self, fresh: Callable[[], AbstractContextManager[None]]) -> None:
        self._fresh = fresh
        self._open: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = self._fresh()
        context.__enter__()
        self._open.append(context)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.pop().__exit__(kind, error, trace)


def reusable(
    make: Callable[Parameters, AbstractContextManager[None]],
) -> Callable[Parameters, Reusable]:
    """Make what a function returns a context that can be opened again."""

    @functools.wraps(make)
    def made(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Reusable:
        return Reusable(lambda: make(*args, **kwargs))

    return made
