"""Groups of settings that a study, a sweep and the evaluation of one edit share.

The defaults are the demo's: built-in behaviours on a small chat model, sized for two CPU cores.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from dean_interp.data.examples import ResponseKind
from dean_interp.data.hub_names import shared_name
from dean_interp.data.sources import names_fault
from dean_interp.errors import InputError, refuse_below
from dean_interp.evaluation.judges.make import refuse_login
from dean_interp.models.chat_settings import ChatSettings, Thinking
from dean_interp.models.demo import DEMO_MODEL
from dean_interp.models.load import HookedModel, load_model
from dean_interp.models.sites import Unit
from dean_interp.models.supported import refuse_not_finite
from dean_interp.models.tokens import Template
from dean_interp.scoring.preparation import ScoringConfig

FRACTION = {"neuron": 0.01, "weight": 1e-4}
"""Default top fraction of each layer's neurons, and of each MLP matrix's weights."""
INFORMATION_FRACTION = 0.05
"""Default top fraction of the neurons of each behaviour that mutual information is estimated between."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how text becomes its tokens."""

    name: Annotated[str, arg(name="model")] = DEMO_MODEL
    """A name on the Hugging Face hub, a local folder, a .gguf file, or the demo model."""
    adapter: str | None = None
    """A folder with an adapter that `peft` saved, which is merged into the weights of the model."""
    template: Template = "chat"
    """How prompt and answer become tokens."""
    device: Literal["cpu", "cuda", "mps", "auto"] | None = None
    """Where the model runs. Unset: CUDA where there is one, else the CPU."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the weights."""
    date: str | None = None
    """Day that the chat template writes into prompts, where it writes one (2026-11-28). Unset: that of the folder that
    is gone on with, else of today."""
    thinking: Thinking | None = None
    """Whether a model that can think before it answers shall do so. Unset: as its chat template has it."""

    @property
    def title(self) -> str:
        """What pages call the model: of a path its last part."""
        return shared_name(self.name)

    def load(self) -> HookedModel:
        """Load the model. Raises `InputError` as `load_model` does, and for weights that are not finite."""
        model = self._loaded(self.device)
        refuse_not_finite(model)
        return model

    def shape(self) -> HookedModel:
        """The model without a weight, for planning. Raises `InputError` as `load_model` does."""
        return self._loaded("meta")

    def _loaded(self, device: str | None) -> HookedModel:
        if self.template != "chat" and (self.date or self.thinking):
            raise InputError(f"date and thinking are for the template 'chat', got the template {self.template!r}")
        chat = ChatSettings(self.date, self.thinking)
        return load_model(self.name, device=device, dtype=self.dtype, adapter=self.adapter, chat=chat)


@dataclass(frozen=True)
class DataConfig:
    """The behaviours, and the test prompts on which every state of the model is measured."""

    first: str = "fairness"
    """First behaviour: a built-in name, a CSV or JSONL file with safe and unsafe answers, or a hub data set."""
    second: str = "privacy"
    """Second behaviour."""
    general: str = "general"
    """General ability: what must not change."""
    n_test: int = 32
    """Number of test prompts of each of the two behaviours."""
    n_general_test: int = 24
    """Number of general test examples, for perplexity and KL."""
    answer_tokens: int | None = 12
    """Number of first tokens of each written test answer that are measured (None: all)."""
    measure_tokens: int = 1024
    """Number of padded tokens a batch in measuring."""
    seed: int = 0
    """Seed for sampling examples, controls, noise and permutations."""

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        refuse_below(self, {"n_test": 12, "n_general_test": 1, "answer_tokens": 1, "measure_tokens": 1, "seed": 0})
        if len(set(self.sources)) < 3:
            raise InputError(f"first, second and general must be three different behaviours, got {self.sources}")
        if fault := names_fault(self.sources):
            raise InputError(f"first, second and general must be three different behaviours: {fault}")

    @property
    def sources(self) -> tuple[str, str, str]:
        """The three behaviours' sources, general last."""
        return self.first, self.second, self.general


@dataclass(frozen=True)
class CalibrationConfig:
    """The examples that are scored, and in which batches."""

    n_calibration: int = 96
    """Number of examples of each behaviour that are scored."""
    response: ResponseKind = "safe"
    """Which answers of the two behaviours are scored (unsafe: the paper's malicious-data-only mode)."""
    score_tokens: int = 512
    """Number of padded tokens a batch in scoring. Sums over other batches round differently, so a run keeps it."""
    layers_per_pass: int | None = None
    """Number of layers whose sums are held at once in scoring. Fewer take more passes and give the same scores. Unset:
    all."""

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        refuse_below(self, {"n_calibration": 1, "score_tokens": 1, "layers_per_pass": 1})

    def scoring(self, template: Template) -> ScoringConfig:
        """How a study scores."""
        return ScoringConfig(template=template, batch_tokens=self.score_tokens, layers_per_pass=self.layers_per_pass)


@dataclass(frozen=True)
class ControlConfig:
    """How many random controls stand beside an edit. Below 19 in all, p cannot reach 0.05."""

    n_random: int = 12
    """Number of random controls of the edit's size, matched by site and stratum."""
    n_equal_kl: int = 7
    """Number of random controls that are grown until their KL to the original equals the edit's."""

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        refuse_below(self, {"n_random": 1, "n_equal_kl": 0})


@dataclass(frozen=True)
class AnswerConfig:
    """What the model is asked beyond the written answers: its own answers, running text, tasks."""

    harmful: tuple[str, ...] = ()
    """Sets of prompts that the model should not comply with. Unset: the test prompts of first and second."""
    over_refusal: tuple[str, ...] = ("over_refusal_fairness", "over_refusal_privacy")
    """Sets of harmless prompts that look harmful and deserve a plain answer. No set: over-refusal is not measured."""
    n_answers: int = 12
    """Number of prompts of each set that are answered and judged. 0: none."""
    answer_lengths: tuple[int, ...] = (64,)
    """Numbers of new tokens at which the answers are judged."""
    judges: tuple[str, ...] = ("lexical",)
    """Who judges whether answers to harmful prompts are safe (docs/judges.md). The rules always judge the rest."""
    n_answer_controls: int = 2
    """Number of random controls (in `improve`: of gates of flipped labels) that answer too."""
    answer_batch: int = 32
    """Number of prompts a batch in answering."""
    text: str = "general"
    """Running text for perplexity at windows: a behaviour, or a plain .txt file."""
    window: int | None = None
    """Number of tokens of a window of that text. Unset: windows are not measured."""
    tasks: tuple[str, ...] = ()
    """Tasks of EleutherAI's lm-eval harness, by name (needs the extra `eval`)."""
    task_folder: Path | None = None
    """A folder with task files of your own."""
    task_limit: int | None = 200
    """Number of items of each task (None: all)."""

    def check(self, controls: ControlConfig) -> None:
        """Raise `InputError` where a setting is out of its range, or more controls shall answer than there are."""
        refuse_below(self, {"n_answers": 0, "n_answer_controls": 0, "answer_batch": 1, "window": 2, "task_limit": 1})
        if self.n_answers and (not self.answer_lengths or min(self.answer_lengths) < 1):
            raise InputError(f"answer_lengths must be at least 1, got {self.answer_lengths}")
        for judge in self.judges:
            refuse_login(judge)
        n_controls = controls.n_random + controls.n_equal_kl
        if self.n_answers and self.n_answer_controls > n_controls:
            raise InputError(
                f"n_answer_controls must be at most n_random + n_equal_kl ({n_controls}), got {self.n_answer_controls}"
            )


def check_units(units: tuple[Unit, ...]) -> None:
    """Raise `InputError` where no unit is named, or one twice."""
    if not units or len(set(units)) < len(units):
        raise InputError(f"unit must be neuron, weight or both, got {units}")


def check_fractions(name: str, given: float | tuple[float, ...]) -> None:
    """Raise `InputError` where a fraction is not in (0, 1], and where none is given."""
    values = given if isinstance(given, tuple) else (given,)
    if not values or not all(0 < value <= 1 for value in values):
        raise InputError(f"{name} must be in (0, 1], got {given}")
