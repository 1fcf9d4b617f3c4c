"""Seconds of the first load of a GGUF file, beside what plain `transformers` takes for the same folder.

    python benchmarks/gguf_conversion.py [FILE.gguf]      (the demo model's file, where none is named)

Both read the file, dequantise it to float32 and save weights and tokenizer, in turn, into fresh folders. The files
must be the same to the byte. Ours also waits until they are on the disk.
"""

import filecmp
import sys
import tempfile
import time
from pathlib import Path

import torch
from scoring import show  # beside this file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from dean_interp.models.demo import demo_model_file
from dean_interp.models.gguf_file import convert_gguf

REPEATS = 3


def plainly(file: Path, folder: Path) -> None:
    """As the documentation of transformers shows it."""
    options = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def main() -> None:
    """Two ways in turn, several times; ratios of neighbouring runs."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else demo_model_file()
    ratios = []
    for _ in range(REPEATS):
        seconds = {}
        with tempfile.TemporaryDirectory() as made:
            for name, convert in (("plain", plainly), ("ours", convert_gguf)):
                began = time.perf_counter()
                convert(file, Path(made) / name)
                seconds[name] = time.perf_counter() - began
            same, other, unread = filecmp.cmpfiles(
                Path(made) / "plain",
                Path(made) / "ours",
                [path.name for path in (Path(made) / "plain").iterdir()],
                False,
            )
            assert same and not (other or unread), (other, unread)
        print({name: round(taken, 1) for name, taken in seconds.items()}, f"{len(same)} files, the same bytes")
        ratios.append(seconds["plain"] / seconds["ours"])
    show(f"plain transformers / the conversion of {file.name}", ratios)


if __name__ == "__main__":
    main()
