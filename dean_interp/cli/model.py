"""Which model a command means: arguments that most of them share."""

from dataclasses import dataclass
from typing import Literal

from dean_interp.models.demo import DEMO_MODEL
from dean_interp.models.load import HookedModel, load_model, refuse_not_finite
from dean_interp.models.tokens import Template


@dataclass(frozen=True)
class Model:
    """Which model, and how text becomes its tokens."""

    model: str = DEMO_MODEL
    """A name on the Hugging Face hub, a local folder, a .gguf file, or the demo model."""
    template: Template = "chat"
    """How prompt and answer become tokens."""
    device: Literal["cpu", "cuda", "mps", "auto"] | None = None
    """Where to run; unset: CUDA where there is one, else the CPU."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the weights."""

    def loaded(self) -> HookedModel:
        """The model. Raises `InputError` as `load_model` does, and for weights that are not finite."""
        model = load_model(self.model, device=self.device, dtype=self.dtype)
        refuse_not_finite(model)
        return model
