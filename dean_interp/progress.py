"""Progress bars: one function makes the bars of all our loops, one switch turns them off.

On a terminal and in a notebook a bar redraws itself. A log file would fill with copies of it, so there a loop writes
one line every 30 seconds, and a loop that ends sooner writes nothing. Of several processes only rank 0 shows progress.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm as plain_tqdm
from tqdm.auto import tqdm

from dean_interp.distributed import is_rank0

ProgressBar = plain_tqdm
LOG_SECONDS = 30.0
"""Seconds between two lines of one loop in a log file."""
_LOG_LINE = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
# what `show_progress` was told last; None: the environment decides
_shown: bool | None = None


class _LogLines(plain_tqdm):
    """A bar as whole lines of a log file: nothing is drawn again, cleared, or written twice."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:  # noqa: ANN401 - any stream
        def write_line(text: str) -> None:
            if text:
                file.write(f"{text}\n")
                file.flush()

        return write_line

    def moveto(self, n: int) -> None:
        """A log file has no line to go to."""

    def clear(self, nolock: bool = False) -> None:
        """What is written stays."""

    def close(self) -> None:
        """End with a line where the last one is not the end, and there was one."""
        if not self.disable:
            was_shown = self.last_print_t > self.start_t
            if was_shown and self.leave and self.n > self.last_print_n:
                self.refresh()
            # Without a printer `tqdm` writes nothing more.
            self.sp = None
        super().close()


def show_progress(shown: bool = True) -> None:
    """Switch progress bars on or off in this process.

    Until this is called, the environment variable `DEAN_INTERP_PROGRESS` decides: `0` switches them off.
    """
    global _shown
    _shown = shown


@contextmanager
def hidden_progress() -> Iterator[None]:
    """While open, no bars are shown: for work that ends in the blink of an eye, again and again."""
    global _shown
    before = _shown
    _shown = False
    try:
        yield
    finally:
        _shown = before


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    leave: bool = True,
) -> ProgressBar:
    """A `tqdm` bar that suits where it is shown: a terminal, a notebook or a log file.

    Args:
        iterable: what the loop goes over; None: the caller calls `update`.
        desc: what the loop does, in front of the bar.
        total: how many steps the loop has; None: the length of `iterable`.
        initial: how many steps an earlier run has done.
        unit: what one step is.
        leave: whether the bar stays after the loop has ended.
    """
    make = tqdm if redraws() else _LogLines
    return make(iterable, desc=desc, total=total, initial=initial, unit=unit, leave=leave, **_style())


def redraws() -> bool:
    """Whether bars are shown and redraw themselves: libraries that know no log file show theirs only then."""
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
    return _is_shown() and (in_notebook or sys.stderr.isatty())


@contextmanager
def style_of_transformers_bars(*, leave: bool = True) -> Iterator[None]:
    """Inside, the bars of `transformers` (loading weights) look like our own.

    Args:
        leave: whether a bar stays after its loop has ended.
    """
    # loaded here, since loading it takes seconds
    from transformers.utils.logging import set_tqdm_hook

    def styled(make: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any]) -> Any:  # noqa: ANN401
        fitting = make if redraws() else _LogLines
        return fitting(*args, **({"leave": leave} | settings | _style()))

    previous = set_tqdm_hook(styled)
    try:
        yield
    finally:
        set_tqdm_hook(previous)


def _is_shown() -> bool:
    wanted = os.environ.get("DEAN_INTERP_PROGRESS") != "0" if _shown is None else _shown
    return wanted and is_rank0()


def _style() -> dict[str, Any]:
    """What `tqdm` is told beside what the loop says of itself."""
    if not _is_shown():
        return {"disable": True}
    if redraws():
        return {}
    return {
        "mininterval": LOG_SECONDS,
        "maxinterval": LOG_SECONDS,
        "delay": LOG_SECONDS,
        "position": 0,
        "bar_format": _LOG_LINE,
    }
