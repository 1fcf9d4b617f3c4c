"""Names on the Hugging Face hub, told from paths."""

import os
import re
from pathlib import Path

_OWNER_AND_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_on_hub(name: str) -> bool:
    """Whether the name of a model or data set is one of the hub, and not a path."""
    suffix = Path(name).suffix.lower()
    if suffix in (".csv", ".jsonl", ".gguf") or os.path.exists(name):
        return False
    return _OWNER_AND_NAME.fullmatch(name) is not None


def shared_name(name: str) -> str:
    """What a model is called where others read it: of a path its last part."""
    return name if is_on_hub(name) else Path(name).name
