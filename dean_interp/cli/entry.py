"""The entry point of the command `dean-interp`. Alone it says at once what to try; what its steps need loads slowly."""

import sys
from collections.abc import Sequence

OVERVIEW = """dean-interp finds a small edit of a language model that raises two behaviours,
measures what the edit costs, and writes it into checkpoints.

Try these three first. The model is a small one that needs no hub and no GPU:

  dean-interp data show privacy
      the examples of a behaviour, as your own file would have them; seconds
  dean-interp neuron L17.1042
      a page of one neuron: where it fires, what it writes; a minute or two
  dean-interp improve --out runs/improve
      an edit and its proof; half an hour on two CPU cores

Ctrl-C keeps what was done, and the same command goes on from there.

  dean-interp --help           all commands
  dean-interp improve --help   all options of one, with examples"""


def start(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: those of the process). Returns one of `ending.EXIT_CODES`."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given:
        print(OVERVIEW)  # noqa: T201 - the result
        return 0
    # Only here: it imports torch and every step.
    from dean_interp.cli.main import main

    return main(given)
