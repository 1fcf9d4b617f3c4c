"""What the first load of a GGUF file takes, beside plain `transformers` for the same folder.

    python benchmarks/gguf_conversion.py [FILE.gguf]      (the demo model's file, where none is named)

Both read the file, dequantise it to float32 and save weights and tokenizer, in turn, into fresh folders. The files
must be the same to the byte. Ours also waits until they are on the disk.
"""

import filecmp
import sys
import tempfile
from pathlib import Path

import torch
from figures import Figure, measure_figures  # beside this file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from dean_interp.models.demo import demo_model_file
from dean_interp.models.gguf_file import convert_gguf
from dean_interp.planning.stopwatch import timed

REPEATS = 3


def plainly(file: Path, folder: Path) -> None:
    """As the documentation of transformers shows it."""
    options = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def ratios(file: Path) -> list[float]:
    """Ours over the plain way, in turn; the files that both make must be the same."""
    found = []
    for _ in range(REPEATS):
        seconds = {}
        with tempfile.TemporaryDirectory() as made:
            for name, convert in (("plain", plainly), ("ours", convert_gguf)):
                folder = Path(made) / name
                seconds[name] = timed(lambda convert=convert, folder=folder: convert(file, folder)).better
            names = [path.name for path in (Path(made) / "plain").iterdir()]
            _, other, unread = filecmp.cmpfiles(Path(made) / "plain", Path(made) / "ours", names, False)
            assert not (other or unread), (other, unread)
        found.append(seconds["ours"] / seconds["plain"])
    return found


def main() -> None:
    """The figure of one file."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else demo_model_file()
    name = f"the first load of {file.name} / plain transformers'"
    measure_figures([Figure(name, limit=0.0, bound="no bound is known", ratios=lambda: ratios(file))])


if __name__ == "__main__":
    main()
