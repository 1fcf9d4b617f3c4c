"""Loss and KL at windows of running text in one state of the model, in a file."""

from dataclasses import dataclass

import torch

from dean_interp.errors import InputError
from dean_interp.evaluation.windows import WindowMeasurement, window_loss
from dean_interp.files import read_tensors, write_tensors
from dean_interp.models.load import HookedModel
from dean_interp.resume import Unfinished
from dean_interp.study.store import State, Store, file_name, fingerprint_of
from dean_interp.study.study_data import running_text

_FORMAT = "dean_interp.windows.1"


@dataclass(frozen=True)
class _Facts:
    fingerprint: str


def kept_windows(
    store: Store,
    model: HookedModel | None,
    state: State,
    *,
    source: str,
    window: int,
    reference: WindowMeasurement | None = None,
) -> WindowMeasurement:
    """Loss and KL at windows in one state: from its file, else measured and written there.

    Args:
        model: None where the state is known to be in the store.
        source: the running text (`running_text`).
        window: tokens of a window.
        reference: the original's measurement, to which KL is taken.

    Raises `InputError` where the file is of something else.
    """
    path = store.folder / "windows" / f"{file_name(state.title)}.safetensors"
    texts = running_text(source)
    key = fingerprint_of(store.fingerprint, state.fingerprint, str(window), *texts)
    unfinished = Unfinished(path.with_suffix(".unfinished"), key)
    if not path.is_file():
        assert model is not None, f"{state.title} was not measured"
        with state.applied(model):
            measured = window_loss(model, texts, window=window, original=reference, unfinished=unfinished)
        # Only the original is compared with later.
        final = torch.zeros(0, 0) if state.fingerprint else measured.final
        tensors = {"loss": measured.loss, "kl": measured.kl, "final": final}
        write_tensors(path, _FORMAT, tensors, {"fingerprint": key})
    unfinished.discard()
    tensors, facts = read_tensors(path, _FORMAT, _Facts)
    if facts.fingerprint != key:
        raise InputError(f"{path} is of another model, other text or other units: choose another folder")
    return WindowMeasurement(window=window, loss=tensors["loss"], kl=tensors["kl"], final=tensors["final"])
