"""The card that an edited checkpoint folder carries, so that nobody takes it for the model that it was made from.

A card is a file beside the weights. The README.md of the checkpoint describes the unedited model, and its licence asks
for it, so it stays as it is, byte for byte: the card then gets a name of its own. A card names the digest of its edit,
and taking the edit back takes this card away, whichever edits are left.
"""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from dean_interp.editing.edit import Edit

DIGEST_KEY = "edit_digest"
"""The field of a card's first lines that names its edit."""


def card_names() -> Iterator[str]:
    """The names of cards, in the order in which they are taken."""
    yield "README.md"
    yield "EDIT_CARD.md"
    for number in count(2):
        yield f"EDIT_CARD_{number}.md"


def write_card(folder: Path, text: str) -> Path:
    """Write a card into a folder under the first name that is free; return its path."""
    for name in card_names():
        path = folder / name
        if not path.exists():
            path.write_text(text, encoding="utf-8", newline="\n")
            return path
    raise AssertionError("names of cards have no end")


def is_card(path: Path, edit: Edit) -> bool:
    """Whether a file is the card of this edit."""
    if path.name != "README.md" and not path.match("EDIT_CARD*.md"):
        return False
    return f"{DIGEST_KEY}: {edit.digest}" in path.read_text(encoding="utf-8", errors="replace")
