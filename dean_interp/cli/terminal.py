"""What a command writes beside its result, fit for its reader: a terminal, or a log file."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partialmethod
from typing import Any

from tqdm.std import tqdm

from dean_interp.distributed import is_rank0

LOG_SECONDS = 30.0
_LOG_LINE = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"


@contextmanager
def fit_for_reader(*, seconds: float = LOG_SECONDS) -> Iterator[None]:
    """Where there is no terminal, progress as lines. Of several processes the first one speaks.

    A bar redraws itself ten times a second, which floods a log. There, each loop (a library's too) says how far it is
    and what time is left every `seconds`, and a loop that ends sooner says nothing.
    """
    bars: Any = tqdm
    draw = bars.__init__
    if not is_rank0():
        bars.__init__ = partialmethod(draw, disable=True)
    elif not sys.stderr.isatty():
        lines = {"mininterval": seconds, "maxinterval": seconds, "delay": seconds}
        bars.__init__ = partialmethod(draw, **lines, position=0, bar_format=_LOG_LINE)
    try:
        with nullcontext() if is_rank0() else redirect_stdout(io.StringIO()):
            yield
    finally:
        bars.__init__ = draw


@contextmanager
def colours_where_wanted() -> Iterator[None]:
    """Inside, tyro writes help and errors in colours on terminals only, and never under NO_COLOR.

    tyro knows no NO_COLOR, and looks at stdout alone when it writes to stderr. It uses no colours where stdout is not a
    terminal, so stdout is a buffer where colours are not wanted.
    """
    if sys.stdout.isatty() and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        yield
        return
    # tyro draws its boxes by stdout's encoding, which a plain `StringIO` does not have.
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding, write_through=True)
    try:
        with redirect_stdout(buffer):
            yield
    finally:
        buffer.seek(0)
        sys.stdout.write(buffer.read())
