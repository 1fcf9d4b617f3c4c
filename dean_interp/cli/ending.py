"""How `dean-interp` and `analyses/` end: with an exit code and, where something was wrong, one line on stderr."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TextIO

import torch

from dean_interp.cli.terminal import fit_for_reader
from dean_interp.distributed import process_group, rank, world_size
from dean_interp.errors import InputError

EXIT_CODES = """exit codes:
  0    done
  1    what was verified does not hold (`verify`, `edit verify`)
  2    wrong input, with what was given and what is allowed
  70   an internal error, which is a fault of this program
  130  interrupted by Ctrl-C; the same command goes on from what was written
  141  the reader of the output closed it, as `head` does"""


def exit_code_of(work: Callable[[], object], *, name: str, debug: bool) -> int:
    """Do the work and return one of `EXIT_CODES`.

    Errors print one line to stderr, which begins with `name`; `debug` adds the traceback.
    """
    try:
        with process_group():
            if world_size() > 1:
                name += f" (process {rank()})"
            with fit_for_reader():
                try:
                    work()
                finally:
                    # A closed pipe or a full disk shows here, and not after the last line of Python.
                    _flush_stdout()
        return 0
    except BrokenPipeError:
        _drop_output(sys.stdout, sys.stderr)
        return 141
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exception(error)
        code, message = _code_and_message(error)
        # Whoever closed stderr wants to read nothing; where its disk is full nothing can be said.
        with suppress(OSError, AttributeError):
            sys.stderr.write(f"{name}: {_one_line(message)}\n")
        return code


def _flush_stdout() -> None:
    # A process that was started without a standard output has None.
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output(sys.stdout)
        raise InputError(f"cannot write the result to standard output: {error.strerror}") from error


def _drop_output(*streams: TextIO | None) -> None:
    """What is left in the streams is written once more when Python exits, so it must go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        if stream is not None:
            os.dup2(nowhere, stream.fileno())


def _code_and_message(error: BaseException) -> tuple[int, str]:
    match error:
        case InputError():
            return 2, str(error)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EROFS | errno.EFBIG):
            return 2, f"cannot write {error.filename or 'a file'}: {error.strerror}; what was finished is kept"
        # A file or folder that the user's system does not give: its name and the system's reason say what to change.
        case OSError(filename=str() | bytes() | Path()) if error.strerror:
            return 2, f"cannot use {os.fsdecode(error.filename)}: {error.strerror}"
        case MemoryError() | torch.OutOfMemoryError():
            return 2, "out of memory: take smaller batches, another --device, or a smaller --dtype"
        case KeyboardInterrupt():
            return 130, "interrupted; what was written is kept, and the same command goes on from there"
        case _:
            first_line = f"{type(error).__name__}: {error}".splitlines()[0]
            return 70, f"internal error: {first_line}; run again with --debug for the traceback"


def _one_line(message: str) -> str:
    """The message with line ends and other control characters spelled out."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)


def script(work: Callable[[], object]) -> NoReturn:
    """Run a file of `analyses/` as a command, and exit as `dean-interp` does.

    `--debug` is taken out of the arguments here, so that no script's own parser needs to know it.
    """
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    sys.exit(exit_code_of(work, name=Path(sys.argv[0]).name, debug=debug))


def command() -> str:
    """The command that is running, as a study states it."""
    return " ".join([f"python analyses/{Path(sys.argv[0]).name}", *sys.argv[1:]])
