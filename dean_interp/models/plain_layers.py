"""Which layers are what they seem: a matrix, its bias, and nothing beside it.

Packages put layers of their own in a model's (low-rank adapters, quantised or compiled ones, parametrisations), whose
`weight` is not all of the map that the layer computes. Only layers that are known to be plain are taken for plain ones.
"""

from collections.abc import Collection

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from dean_interp.errors import InputError
from dean_interp.models.hooked_model import HookedModel

_KNOWN = ("torch.nn.modules.", "transformers.", "transformers_modules.", "transformer_lens.")
_NOT_PLAIN = ("transformers.integrations.", "transformers.quantizers.")
_MATRICES = (nn.Linear, nn.Embedding, Conv1D)
_INSIDE = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}


def refused_wrapper(model: object) -> InputError:
    """The error for an object that is not a model of `transformers`, but may wrap one."""
    kind = type(model)
    if kind.__module__.startswith("peft."):
        return InputError(f"a {kind.__name__} keeps its adapter apart: give what its merge_and_unload() returns")
    if kind.__name__ in _INSIDE:
        attribute = _INSIDE[kind.__name__]
        return InputError(f"a {kind.__name__} wraps another model: give that one, its .{attribute}")
    return InputError(f"a model is a name, a folder, or a model in memory, got {kind.__name__}")


def refuse_adapters(model: nn.Module, name: str) -> None:
    """Raise `InputError` where adapters are attached to a model and not merged into its weights."""
    for path, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("peft."):
            raise InputError(
                f"'{name}' has an adapter that is not merged into its weights ({path}, a {kind.__name__} of peft): "
                "merge it (merge_and_unload() of peft), or load its base with adapter=... (--adapter), which does"
            )


def refuse_wrapped(model: HookedModel) -> None:
    """Raise `InputError` where any layer of a model is not plain, and so what is scored not what is computed."""
    inside = getattr(model, "original_model", model)
    own = {kind.__module__ for kind in type(inside).__mro__}
    for path, module in inside.named_modules():
        why = why_not_plain(module, own)
        if why:
            # As the checkpoint calls it, without the bridge's own steps.
            place = path.replace("_original_component", "").replace("..", ".").strip(".")
            raise InputError(
                f"{model.cfg.model_name} has layers whose weights are not all that they compute: {place} {why}. "
                "Merge, remove or dequantise them first"
            )


def why_not_plain(module: nn.Module, own: Collection[str] = ()) -> str:
    """What makes a layer another than it seems, as the end of a sentence; empty where it is plain.

    Args:
        module: the layer.
        own: Python modules whose classes are known as well: those that the model's class comes from.
    """
    kind = type(module)
    if is_parametrized(module):
        return "is parametrised"
    place = f"{kind.__module__}."
    is_known = place.startswith(_KNOWN) and not place.startswith(_NOT_PLAIN)
    if not is_known and kind.__module__ not in own:
        return f"is a {kind.__module__}.{kind.__name__}"
    if module._compiled_call_impl is not None:
        return "is compiled"
    if isinstance(module, _MATRICES):
        return _why_not_a_matrix(module)
    return ""


def _why_not_a_matrix(module: nn.Module) -> str:
    """The same for a layer that holds a matrix."""
    forward = module.__dict__.get("forward")
    # That of accelerate fetches weights, and that of TransformerLens computes the same product.
    is_of_lens = getattr(forward, "__module__", "").startswith("transformer_lens.")
    is_ours = hasattr(module, "_hf_hook") or is_of_lens
    if forward is not None and not is_ours:
        return "has a forward of its own"
    weight = module._parameters.get("weight")
    if weight is None or not module._parameters.keys() <= {"weight", "bias"}:
        return "computes its weight from other parameters"
    if type(weight) is not nn.Parameter:
        return f"holds a {type(weight).__name__}"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"holds {weight.dtype}"
    return ""
