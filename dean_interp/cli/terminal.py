"""What a command writes beside its result, fit for its reader: a terminal, or a log file."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout

import tyro

from dean_interp.distributed import is_rank0
from dean_interp.progress import style_of_transformers_bars


@contextmanager
def fit_for_reader() -> Iterator[None]:
    """Colours only on terminals, and not under NO_COLOR. Of several processes the first one speaks."""
    options = tyro._experimental_options  # tyro's own switch; it knows no NO_COLOR
    coloured = options["ansi_codes"]
    on_terminals = sys.stdout.isatty() and sys.stderr.isatty()
    options["ansi_codes"] = coloured and on_terminals and not os.environ.get("NO_COLOR")
    try:
        with style_of_transformers_bars(), nullcontext() if is_rank0() else redirect_stdout(io.StringIO()):
            yield
    finally:
        options["ansi_codes"] = coloured
