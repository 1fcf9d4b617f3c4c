"""What a command writes beside its result, fit for its reader: a terminal, or a log file."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partialmethod
from typing import Any

import tyro
from tqdm.std import tqdm

from dean_interp.distributed import is_rank0

LOG_SECONDS = 30.0
_LOG_LINE = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"


@contextmanager
def fit_for_reader(*, seconds: float = LOG_SECONDS) -> Iterator[None]:
    """Colours only on terminals, and not under NO_COLOR; where there is no terminal, progress as lines. Of several
    processes the first one speaks.

    A bar redraws itself ten times a second, which floods a log. There, each loop (a library's too) says how far it is
    and what time is left every `seconds`, and a loop that ends sooner says nothing.
    """
    options = tyro._experimental_options  # tyro's own switch; it knows no NO_COLOR
    bars: Any = tqdm
    coloured, draw = options["ansi_codes"], bars.__init__
    on_terminals = sys.stdout.isatty() and sys.stderr.isatty()
    options["ansi_codes"] = coloured and on_terminals and not os.environ.get("NO_COLOR")
    if not is_rank0():
        bars.__init__ = partialmethod(draw, disable=True)
    elif not sys.stderr.isatty():
        lines = {"mininterval": seconds, "maxinterval": seconds, "delay": seconds}
        bars.__init__ = partialmethod(draw, **lines, position=0, bar_format=_LOG_LINE)
    try:
        with nullcontext() if is_rank0() else redirect_stdout(io.StringIO()):
            yield
    finally:
        options["ansi_codes"], bars.__init__ = coloured, draw
