"""The entry point of the command `dean-interp`."""

import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

import tyro
from pydantic_core import to_json

from dean_interp.cli.arguments import Command
from dean_interp.cli.ending import ended
from dean_interp.cli.help_examples import after_help
from dean_interp.cli.steps import do

_CONFIG = (tyro.conf.CascadeSubcommandArgs, tyro.conf.FlagCreatePairsOff)  # `--json` may stand after the step


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns one of `ending.EXIT_CODES`."""
    given = sys.argv[1:] if arguments is None else arguments
    return ended(lambda: _command(given), name="dean-interp", debug="--debug" in given)


def _command(arguments: Sequence[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("dean_interp").setLevel(logging.INFO)
    try:
        command = tyro.cli(Command, prog="dean-interp", args=arguments, config=_CONFIG)
    except SystemExit as leaving:
        if leaving.code == 0 and {"-h", "--help"} & {*arguments}:
            print(after_help(arguments))  # noqa: T201 - the command line's own voice
        raise
    with redirect_stdout(sys.stderr):  # libraries print too; standard output is for the result
        said = do(command.step)
    record = to_json(said.record, indent=1, inf_nan_mode="null").decode() if command.json else None
    print(record or said.text)  # noqa: T201
    if not said.holds:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
