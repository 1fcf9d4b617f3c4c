"""What a command writes beside its result, fit for its reader: a terminal, or a log file."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout

from dean_interp.distributed import is_rank0
from dean_interp.progress import style_of_transformers_bars


@contextmanager
def fit_for_reader() -> Iterator[None]:
    """Libraries draw their bars as we draw ours (`progress`). Of several processes the first one speaks."""
    with style_of_transformers_bars(), nullcontext() if is_rank0() else redirect_stdout(io.StringIO()):
        yield


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
