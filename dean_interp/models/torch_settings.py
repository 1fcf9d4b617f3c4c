"""What a caller's own settings of torch must not change: every public function that runs a model puts them aside.

A notebook may have switched gradients off for good (`torch.inference_mode`), chosen another default dtype or device,
or have autocast on. Inside a function of ours the numbers are those of a fresh process; afterwards all is as it was.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from dean_interp.errors import InputError


@contextmanager
def own_torch_settings() -> Iterator[None]:
    """Inside, torch is set as in a fresh process. `@own_torch_settings()` does so for each call of a function."""
    default_dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        # a mode costs time at every call of torch, so it is entered only where there is another device to put aside
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, default_dtype)
        yield


def refuse_without_gradients(model: nn.Module, name: str) -> None:
    """Raise `InputError` where the model's weights were made inside `torch.inference_mode`: they give no gradient."""
    # what is offloaded is on `meta` between passes, and fetched anew for each
    if any(parameter.is_inference() and not parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            f"{name} was made inside torch.inference_mode, so no gradient can pass through it: make it outside"
        )
