"""The command `dean-interp` with its arguments: a step is run, and its result printed."""

import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from pydantic_core import to_json

from dean_interp.cli.arguments import as_typed, parsed
from dean_interp.cli.columns import fitted
from dean_interp.cli.ending import exit_code_of
from dean_interp.cli.steps import do
from dean_interp.cli.terminal import Talk, has_every_character
from dean_interp.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: those of the process). Returns one of `ending.EXIT_CODES`."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_code_of(lambda: _command(given), name="dean-interp", debug="--debug" in given)


def _command(arguments: Sequence[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("dean_interp").setLevel(logging.INFO)
    command = parsed(arguments)
    talk = Talk(sys.stdin, sys.stdout, json=command.json)
    # Libraries print, too: stdout is for the result alone, and for steps that talk with their user.
    try:
        with redirect_stdout(sys.stderr):
            result = do(command.step, talk)
    except InputError as error:
        raise InputError(as_typed(str(error), arguments)) from error
    if command.json:
        ascii_alone = not has_every_character(sys.stdout)
        text = to_json(result.record, indent=1, inf_nan_mode="null", ensure_ascii=ascii_alone).decode()
        print(text)  # noqa: T201 - the result
    elif result.text:
        width = talk.width
        print(result.text if width is None else fitted(result.text, width))  # noqa: T201 - the result
    if not result.holds:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
