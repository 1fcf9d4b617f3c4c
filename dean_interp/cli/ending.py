"""How `dean-interp` and `analyses/` end: with an exit code and, where something was wrong, one line."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dean_interp.cli.terminal import fit_for_reader
from dean_interp.distributed import joined, n_processes, rank
from dean_interp.errors import InputError

EXIT_CODES = """exit codes:
  0    done
  1    what was verified does not hold
  2    wrong input, with what was given and what is allowed
  70   an internal error, which is a fault of this program
  130  interrupted by Ctrl-C; the same command goes on from what was written
  141  whoever read the output closed it, as `head` does"""


def ended(work: Callable[[], object], *, name: str, debug: bool) -> int:
    """Do the work; one of `EXIT_CODES`, after one line on standard error where something was wrong.

    With `debug` the trace comes before that line.
    """
    try:
        with joined():
            name += f" (process {rank()})" if n_processes() > 1 else ""
            with fit_for_reader():
                try:
                    work()
                finally:
                    sys.stdout.flush()  # a closed pipe shows here, not after the last line of Python
        return 0
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # what is left in them is written once more when Python exits
            os.dup2(nowhere, stream.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exception(error)
        code, line = _said(error)
        line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
        sys.stderr.write(f"{name}: {line}\n")
        return code


def _said(error: BaseException) -> tuple[int, str]:
    match error:
        case InputError():
            return 2, str(error)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EROFS | errno.EFBIG):
            return 2, f"cannot write {error.filename or 'a file'}: {error.strerror}; what was finished is kept"
        case KeyboardInterrupt():
            return 130, "interrupted; what was written is kept, and the same command goes on from there"
        case _:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            return 70, f"internal error: {what}; run again with --debug for the trace"


def script(work: Callable[[], object]) -> NoReturn:
    """Run a file of `analyses/` as a command, and exit as `dean-interp` does.

    Its `--debug` is taken out of the arguments here: no parser of a script needs to know it.
    """
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    sys.exit(ended(work, name=Path(sys.argv[0]).name, debug=debug))


def command() -> str:
    """The command that is running, as a study states it."""
    return " ".join([f"python analyses/{Path(sys.argv[0]).name}", *sys.argv[1:]])
