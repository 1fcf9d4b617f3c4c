"""The entry point of the command `dean-interp`. Alone it says at once what to try; what its steps need loads slowly."""

import logging
import sys
from collections.abc import Sequence

from dean_interp import __version__

OVERVIEW = """dean-interp finds an edit of a language model that raises two behaviours and
changes other text little, measures both, and writes it into checkpoints.

Try these three first. The model is a small one that needs no hub and no GPU:

  dean-interp data show privacy
      the examples of a behaviour, as your own file would have them; seconds
  dean-interp neuron L17.1042
      a page of one neuron: where it fires, what it writes; some minutes
  dean-interp improve --out runs/improve
      an edit and its proof; half an hour on two CPU cores
      (with --dry-run: how long it would take on this machine)

Ctrl-C keeps what was done, and the same command goes on from there.

  dean-interp --help           all commands
  dean-interp improve --help   all options of one, with examples
  dean-interp --version        which version this is"""
NOT_OURS = ("torchao", "torch.utils._pytree")
"""Loggers that warn of kernels for a GPU, and of changes for programmers, when an installed torchao is imported."""


def start(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: those of the process). Returns one of `ending.EXIT_CODES`."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given:
        return _said(OVERVIEW)
    if given[0] == "--version":
        return _said(f"dean-interp {__version__}")
    # `help improve` is what other commands call `improve --help`.
    if given[0] == "help":
        given = [*given[1:], "--help"]
    for name in NOT_OURS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Only here: it imports torch and every step.
    from dean_interp.cli.main import main

    return main(given)


def _said(text: str) -> int:
    """Print a text that is there without a step."""
    try:
        _say(text)
    except OSError:
        # The reader closed the pipe, or the disk is full: it ends as every command does.
        from dean_interp.cli.ending import exit_code_of

        return exit_code_of(lambda: _say(text), name="dean-interp", debug=False)
    return 0


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the result
