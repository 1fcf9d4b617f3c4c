"""A GGUF file becomes a float32 Hugging Face folder in the user's cache, once.

`transformers` parses such a file anew for the settings, for the weights and for the tokens, each time every token in
Python. Here all three get one reader, which parses faster. Of all processes one converts at a time, so an unfinished
folder that the next one finds has no owner any more, and is deleted.
"""

import functools
import hashlib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dean_interp.errors import InputError
from dean_interp.files import atomic_folder, refuse_unreadable
from dean_interp.models.on_disk import refuse_other_weights
from dean_interp.models.supported import unreadable_model
from dean_interp.progress import ProgressBar, progress_bar, style_of_transformers_bars

log = logging.getLogger(__name__)

_UNFINISHED = ".converting"
_LEGACY_READER = "transformers.modeling_gguf_pytorch_utils"


def cache_folder() -> Path:
    """Where converted models are kept: `$DEAN_INTERP_CACHE`, else `$XDG_CACHE_HOME` or `~/.cache`, `dean_interp`.

    Raises `InputError` where none of them is set and the user has no home folder.
    """
    try:
        if chosen := os.environ.get("DEAN_INTERP_CACHE"):
            return Path(chosen).expanduser()
        caches = os.environ.get("XDG_CACHE_HOME")
        return (Path(caches) if caches else Path.home() / ".cache") / "dean_interp"
    except RuntimeError as error:
        raise InputError(f"no cache folder ({error}): name one by DEAN_INTERP_CACHE") from error


def folder_of_gguf(file: Path) -> Path:
    """The folder that a GGUF file was converted to; converts it at the first call. Errors as `convert_gguf`."""
    if not os.path.isfile(file):
        raise InputError(f"no file {file}")
    refuse_unreadable(file)
    # Another file, or the file changed, makes another folder.
    facts = file.stat()
    identity = f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    stamp = hashlib.sha256(identity.encode()).hexdigest()
    folder = cache_folder() / f"{file.stem}-{stamp[:12]}"
    if not folder.is_dir():
        convert_gguf(file, folder)
    return folder


def convert_gguf(file: Path, folder: Path) -> None:
    """Save a GGUF file as a float32 Hugging Face folder; the folder appears whole or not at all.

    Where another process converts a file into the same cache, this one waits, and takes its folder if it is the same.

    Raises `InputError` where the file cannot be read or holds not all of its model, or the folder cannot be written.
    """
    cache = folder.parent
    with _alone_in(cache):
        if folder.is_dir():
            return
        with ExitStack() as stack:
            stack.enter_context(_ended_by_sigterm())
            # what a killed conversion left there, of this file or another, is deleted first
            unfinished = stack.enter_context(atomic_folder(folder, part=cache / _UNFINISHED))
            progress = stack.enter_context(progress_bar(total=3, desc=f"converting {file.name}", unit="step"))
            stack.enter_context(style_of_transformers_bars(leave=False))
            model, tokenizer = _read_gguf(file, progress)
            try:
                model.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
            except (OSError, SafetensorError) as error:
                raise _cannot_write(cache, error) from error
            progress.update()


@contextmanager
def _alone_in(cache: Path) -> Iterator[None]:
    """Inside, no other process converts a file into the same cache; waits until none does."""
    lock = FileLock(cache / f"{_UNFINISHED}.lock")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.info("another process is converting a GGUF file in %s: waiting until it has ended", cache)
            lock.acquire()
    except OSError as error:
        raise _cannot_write(cache, error) from error
    # The system frees the lock of a process that was killed.
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends this process by an exception, as Ctrl-C does, so that what is unfinished is deleted.

    A program that handles the signal itself keeps its way, and so does a thread, which may not change it.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _read_gguf(file: Path, progress: ProgressBar) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32}
    # a version that has no such settings dequantises always
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with _parsed_once():
            loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, output_loading_info=True, **options)
            progress.update()
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            progress.update()
    except Exception as error:  # each of the readers of weights and tokens has errors of its own
        raise unreadable_model(str(file), error) from error
    model, info = loaded
    refuse_other_weights(str(file), model, info)
    return model, tokenizer


class _QuickReader(gguf.GGUFReader):
    """The reader of `gguf` over a plain array. It takes several slices a token, and those of a `memmap` are slow."""

    @property
    def data(self) -> np.ndarray:
        return self._bytes

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._bytes = np.asarray(mapped)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside, `transformers` parses a GGUF file once, and draws the bar of its tensors as it draws its others."""
    with ExitStack() as stack:
        # it looks these two up in `gguf` each time that it reads a file
        stack.enter_context(_replaced(gguf, "GGUFReader", functools.cache(_QuickReader)))
        stack.enter_context(_replaced(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)))
        # this bar alone passes by the hook that gives the others our style
        with suppress(ImportError):
            legacy = importlib.import_module(_LEGACY_READER)
            stack.enter_context(_replaced(legacy, "tqdm", transformers_logging.tqdm))
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:  # noqa: ANN401 - of any library
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _cannot_write(folder: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"cannot write to the cache folder {folder} ({reason}): name another by DEAN_INTERP_CACHE")
