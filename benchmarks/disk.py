"""What writing an edit into a checkpoint folder costs, beside a plain copy of the folder."""

import shutil
import tempfile
from pathlib import Path

from figures import Figure, interleaved
from passes import hooked, random_llama

from dean_interp import apply_edit_to_checkpoint, create_edit, load_behaviour, top_fraction
from dean_interp.models.load import load_model
from dean_interp.scoring.methods import random

FRACTION = 0.01


def figures() -> list[Figure]:
    """An edit of neurons in a checkpoint of four layers of the demo model's widths."""
    return [
        Figure(
            name="writing an edit into a checkpoint folder / a plain copy of the folder",
            limit=1.0,
            bound="the disk",
            ratios=edit_beside_copy,
        )
    ]


def edit_beside_copy() -> list[float]:
    """Both into new folders, in turn."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "base"
        plain = random_llama(n_layers=4, width=576, d_mlp=1536, heads=9, kv_heads=3)
        hooked(plain).tokenizer.save_pretrained(folder)
        plain.save_pretrained(folder)
        model = load_model(folder, device="cpu")
        behaviour = load_behaviour("fairness", n_examples=2)
        edit = create_edit(model, top_fraction(random(model, behaviour), FRACTION))

        def edited() -> None:
            apply_edit_to_checkpoint(folder, edit, Path(made) / "edited")
            shutil.rmtree(Path(made) / "edited")

        def copied() -> None:
            shutil.copytree(folder, Path(made) / "copy")
            shutil.rmtree(Path(made) / "copy")

        return interleaved(edited, copied)
