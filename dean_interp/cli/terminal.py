"""What a command writes beside its result, fit for its reader: a terminal, or a log file. And talk with its user."""

import codecs
import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

from dean_interp.distributed import is_rank0
from dean_interp.errors import InputError
from dean_interp.progress import style_of_transformers_bars


@contextmanager
def fit_for_reader() -> Iterator[None]:
    """Inside, standard output and error take every text, and libraries draw their bars as we draw ours (`progress`).

    Of several processes the first one speaks. A stream that was closed before the process began is none; a buffer that
    nobody reads takes its place.
    """
    with ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            stack.enter_context(_any_character(stream))
        if sys.stdout is None or not is_rank0():
            stack.enter_context(redirect_stdout(io.StringIO()))
        if sys.stderr is None:
            stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(style_of_transformers_bars())
        yield


@contextmanager
def _any_character(stream: object) -> Iterator[None]:
    """Inside, characters that the stream's encoding (Windows' cp1252, say) does not have are written by number."""
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    errors = stream.errors
    # A stream that was put on another file (a pipe, in place of a file) cannot be set anew, and is left as it is.
    with suppress(OSError):
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with suppress(OSError):
            stream.reconfigure(errors=errors)


def has_every_character(stream: object) -> bool:
    """Whether the stream's encoding has every character."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return codecs.lookup(encoding).name.startswith("utf")


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
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding, errors="backslashreplace", write_through=True)
    try:
        with redirect_stdout(buffer):
            yield
    finally:
        buffer.seek(0)
        sys.stdout.write(buffer.read())


@dataclass(frozen=True)
class Talk:
    """How a step talks with its user while it runs, and everything else that is printed goes to stderr."""

    reader: Any
    """Where the user's lines come from: stdin, or what stands in its place. None: the process has none."""
    stdout: Any
    """Where the command's result goes, and what is said: stdout, or what stands in its place."""
    json: bool = False
    """Whether one JSON object is all that may stand on `stdout`."""

    @property
    def has_person(self) -> bool:
        """Whether a person types the lines. Else they come from a file or a program."""
        return self.reader is not None and self.reader.isatty()

    @property
    def writer(self) -> Any:  # noqa: ANN401 - as `stdout`
        """Where what is said goes: stderr, or (no person is there) None, where `stdout` is for a JSON object alone."""
        if not self.json:
            return self.stdout
        return sys.stderr if self.has_person else None

    @property
    def width(self) -> int | None:
        """Columns of the terminal where what is said is read; None where it is no terminal."""
        if self.writer is None or not self.writer.isatty():
            return None
        return shutil.get_terminal_size().columns

    @property
    def shows_lines(self) -> bool:
        """Whether what a person types stands where answers are read, so that nobody needs to repeat it."""
        return self.has_person and self.width is not None

    def say(self, text: str) -> None:
        """Write a text and a line end, at once."""
        if self.writer is not None:
            self.writer.write(f"{text}\n")
            self.writer.flush()

    def lines(self) -> Iterator[str]:
        """The user's lines without their ends, up to the end of the file. A person is asked for each.

        Raises `InputError` where a line is not text.
        """
        while True:
            try:
                line = self._next_line()
            except UnicodeDecodeError as error:
                raise InputError(f"stdin must be text in {error.encoding}, got other bytes ({error.reason})") from error
            if line is None:
                return
            yield line

    def _next_line(self) -> str | None:
        if self.reader is None:
            return None
        if not self.has_person:
            line = self.reader.readline()
            return line.rstrip("\r\n") if line else None
        # Where it is there, arrow keys move in the line and bring earlier lines back.
        with suppress(ImportError):
            import readline  # noqa: F401
        # `input` asks on stdout, which is for the user only where that is a terminal.
        with redirect_stdout(self.stdout if self.stdout.isatty() else sys.stderr):
            try:
                return input("> ")
            except EOFError:
                # The shell's own prompt begins on the next line.
                self.say("")
                return None
