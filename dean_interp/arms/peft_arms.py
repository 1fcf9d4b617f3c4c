"""Arms of fine-tuning: LoRA and IA3, on the pairs by cross-entropy and by preferences, stopped at the KL.

The dose is the number of training steps, so equal damage stops each training where its KL is the wanted one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dean_interp.arms.adapter_change import AdapterKind, AdapterPath
from dean_interp.arms.arm import ArmExamples, Kind, Setting, Settings
from dean_interp.arms.pair_trainer import AdapterLoss, AdapterTraining
from dean_interp.arms.peft_training import trained_path
from dean_interp.errors import InputError

LEARNING_RATES: dict[AdapterKind, tuple[float, ...]] = {
    "lora": (1e-3, 2e-3, 4e-3),
    "ia3": (1e-2, 2e-2, 4e-2),
}
"""On the demo model, 16 steps at the lowest of these, in the MLP alone, come to a KL on general text of 0.02 to 0.27
nats per token; attention and a higher rank bring them there in fewer steps."""
_NAMES: dict[AdapterKind, str] = {"lora": "LoRA", "ia3": "IA3"}
_SOURCES: dict[AdapterKind | AdapterLoss, str] = {
    "lora": "LoRA (arXiv 2106.09685, section 4.1)",
    "ia3": "IA3 (arXiv 2205.05638, section 3.3)",
    "cross-entropy": "cross-entropy of safe answers",
    "preference": "DPO (arXiv 2305.18290, equation 7)",
}


@dataclass(frozen=True)
class AdapterArm:
    """An adapter that is trained on the pairs (`arms.arm.Arm`)."""

    adapter: AdapterKind
    loss: AdapterLoss
    n_steps: int | None = None
    """Optimizer steps, the largest dose. None: one pass over the pairs, so that the arm sees what the others see."""
    batch_size: int = 8
    """Pairs of a step."""
    every: int = 2
    """Steps from one state of the adapter that is kept to the next."""
    kind: Kind = "fine-tuning"
    uses_labels: bool = True

    @property
    def name(self) -> str:
        """The name says which adapter it is, and by which loss it is trained."""
        return f"{_NAMES[self.adapter]}, {self.loss}"

    @property
    def source(self) -> str:
        """The papers of the adapter and of the loss."""
        return f"{_SOURCES[self.adapter]}, {_SOURCES[self.loss]}"

    @property
    def choices(self) -> Mapping[str, Sequence[Setting]]:
        """The learning rate, whether attention gets adapters too, LoRA's rank, the preference's beta."""
        choices: dict[str, Sequence[Setting]] = {
            "learning_rate": LEARNING_RATES[self.adapter],
            "where": ("mlp", "all"),
        }
        if self.adapter == "lora":
            choices["rank"] = (4, 16)
        if self.loss == "preference":
            choices["beta"] = (0.05, 0.2)
        return choices

    def fit(self, examples: ArmExamples, settings: Settings) -> AdapterPath:
        """Train the adapter, or read one that is trained.

        Raises `InputError` as `trained_path`, and for settings that are not those of `choices`.
        """
        if set(settings) != set(self.choices):
            raise InputError(f"{self.name} takes the settings {', '.join(self.choices)}, got {', '.join(settings)}")
        given: dict[str, Any] = dict(settings)
        n_pairs = sum(map(len, examples.pairs))
        training = AdapterTraining(
            kind=self.adapter,
            loss=self.loss,
            n_steps=self.n_steps or math.ceil(n_pairs / self.batch_size),
            batch_size=self.batch_size,
            every=self.every,
            seed=examples.seed,
            **given,
        )
        return trained_path(examples, training)


ADAPTER_ARMS = (
    AdapterArm("lora", "cross-entropy"),
    AdapterArm("lora", "preference"),
    AdapterArm("ia3", "cross-entropy"),
    AdapterArm("ia3", "preference"),
)
