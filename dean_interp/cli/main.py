"""The entry point of the command `dean-interp`."""

import json
import logging
import sys

import tyro

from dean_interp.cli.arguments import Command
from dean_interp.cli.steps import do
from dean_interp.errors import InputError

_CONFIG = (tyro.conf.CascadeSubcommandArgs, tyro.conf.FlagCreatePairsOff)  # `--json` may stand after the step


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 after one line that says what was wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("dean_interp").setLevel(logging.INFO)
    try:
        command = tyro.cli(Command, prog="dean-interp", args=arguments, config=_CONFIG)
        said = do(command.step)
    except InputError as error:
        print(f"dean-interp: {error}", file=sys.stderr)  # noqa: T201 - the command line's own voice
        return 2
    print(json.dumps(said.record, indent=1, ensure_ascii=False) if command.json else said.text)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
