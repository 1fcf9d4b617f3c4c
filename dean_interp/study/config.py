"""Everything that a study depends on, in one record; it is written down before anything runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dean_interp.data.examples import Behaviour, ResponseKind, load_behaviour
from dean_interp.errors import InputError
from dean_interp.models.demo import DEMO_MODEL
from dean_interp.models.tokens import Template


@dataclass(frozen=True)
class StudyConfig:
    """What to study. The defaults are the demo: built-in behaviours on a small chat model, sized for two CPU cores."""

    model: str = DEMO_MODEL
    """A name on the Hugging Face hub, a local folder, a .gguf file, or the demo model."""
    first: str = "fairness"
    """First behaviour: a built-in name, a CSV or JSONL file with safe and unsafe answers, or a hub data set."""
    second: str = "privacy"
    """Second behaviour."""
    general: str = "general"
    """General ability: what must not change."""
    response: ResponseKind = "safe"
    """Which answers of the two behaviours are scored (unsafe: the paper's malicious-data-only mode)."""
    template: Template = "chat"
    """How prompt and answer become tokens."""
    fraction: float = 0.01
    """Top fraction of each layer's neurons that counts as important to a behaviour."""
    read_fraction: float = 0.05
    """Top fraction from which the mutual information's reads are taken: neurons of one behaviour, not of the other."""
    n_calibration: int = 128
    """Examples of each behaviour that are scored."""
    n_test: int = 96
    """Test prompts of each of the two behaviours."""
    n_general_test: int = 48
    """General test examples, for perplexity and KL."""
    answer_tokens: int | None = 12
    """First tokens of each test answer that are measured (None: all). Most of a study's time goes here."""
    n_random: int = 19
    """Random ablations matched per layer on activation-norm decile. 19 or more, or p cannot reach 0.05."""
    n_equal_kl: int = 5
    """Random ablations grown until their KL to the original equals the edit's."""
    seed: int = 0
    """Of the draws of examples, the controls, the read noise and the shuffles."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Where to run; unset: CUDA where there is one, else the CPU."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the weights."""

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        for name in ("fraction", "read_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        for name, least in (("n_random", 1), ("n_equal_kl", 1), ("n_calibration", 1), ("n_test", 12)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if len({Path(source).stem for source in self.sources}) < 3:
            raise InputError(f"first, second and general must be three different behaviours, got {self.sources}")

    @property
    def sources(self) -> tuple[str, str, str]:
        """The three behaviours' sources, general last."""
        return self.first, self.second, self.general

    def calibration(self) -> list[Behaviour]:
        """The examples to score: first, second, general."""
        return [
            load_behaviour(source, n_examples=self.n_calibration, seed=self.seed, response=self.response)
            for source in (self.first, self.second)
        ] + [load_behaviour(self.general, n_examples=self.n_calibration, seed=self.seed)]

    def tests(self) -> list[Behaviour]:
        """The examples to measure: first, second, general. The two behaviours must have both answers."""
        sizes = (self.n_test, self.n_test, self.n_general_test)
        tests = [
            load_behaviour(source, n_examples=n, seed=self.seed, split="test")
            for source, n in zip(self.sources, sizes, strict=True)
        ]
        for test in tests[:2]:
            if not test.paired:
                raise InputError(
                    f"'{test.name}' has prompts without a safe and an unsafe answer: a study measures the margin "
                    "between the two, so it needs the columns prompt,safe,unsafe"
                )
        return tests
