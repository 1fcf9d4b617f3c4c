"""Everything that a study depends on, in one record; it is written down before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dean_interp.data.examples import Behaviour, ResponseKind, draw, load_behaviour
from dean_interp.data.leakage import Leaked, all_without_leaks
from dean_interp.data.sources import behaviour_name
from dean_interp.errors import InputError
from dean_interp.models.demo import DEMO_MODEL
from dean_interp.models.sites import Unit
from dean_interp.models.tokens import Template
from dean_interp.scoring.scores import KEEP
from dean_interp.selection.coupling import Fraction, each_fraction

_LEAST = {"n_calibration": 1, "n_test": 12, "n_general_test": 1, "answer_tokens": 1, "n_random": 1, "n_equal_kl": 1,
          "n_answers": 0, "max_new_tokens": 1, "n_answer_controls": 0, "score_tokens": 1, "layers_per_pass": 1,
          "measure_tokens": 1, "answer_batch": 1}  # fmt: skip


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
    units: tuple[Unit, ...] = ("neuron", "weight")
    """What is scored and silenced: MLP neurons, single MLP weights (the paper's unit), or both, side by side."""
    neuron_fraction: Fraction = 0.01
    """Top fraction of each layer's neurons that counts as important; one, or one each for first, second, general."""
    weight_fraction: Fraction = 1e-4
    """The same for the weights of each MLP matrix."""
    information_fraction: float = 0.05
    """Top fraction from which the mutual information's reads are taken: neurons of one behaviour, not of the other."""
    n_calibration: int = 96
    """Examples of each behaviour that are scored."""
    n_test: int = 32
    """Test prompts of each of the two behaviours."""
    n_general_test: int = 24
    """General test examples, for perplexity and KL."""
    answer_tokens: int | None = 12
    """First tokens of each test answer that are measured (None: all). Most of a study's time goes here."""
    n_random: int = 12
    """Random ablations of the edit's size for each unit, matched as `strata` says."""
    n_equal_kl: int = 7
    """Random ablations grown until their KL to the original equals the edit's. With `n_random`, 19 or more, or p cannot
    reach 0.05."""
    report_leaked: bool = False
    """Test prompts that are in the calibration data, or nearly, are left out and counted. Measure the edits on
    test sets that hold them too, and report both numbers?"""
    over_refusal: tuple[str, ...] = ("over_refusal_fairness", "over_refusal_privacy")
    """Benign prompts that deserve a plain answer: built-in names or files. None: over-refusal is not measured."""
    n_answers: int = 12
    """Test prompts of each behaviour, and of each over-refusal set, that are answered and judged. 0: none."""
    max_new_tokens: int = 40
    """Length of those answers."""
    n_answer_controls: int = 2
    """Equal-KL controls of each unit that answer too."""
    score_tokens: int = 512
    """The batch plan: padded tokens a batch in scoring. Sums over other batches round differently, so it is frozen."""
    layers_per_pass: int | None = None
    """Layers whose sums are held at once in scoring; fewer take more passes, and give the same scores. None: all."""
    measure_tokens: int = 1024
    """Padded tokens a batch in measuring."""
    answer_batch: int = 32
    """Prompts a batch in answering."""
    seed: int = 0
    """Of the draws of examples, the controls, the read noise and the shuffles."""
    device: Literal["cpu", "cuda", "mps", "auto"] | None = None
    """Where to run; unset: CUDA where there is one, else the CPU."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the weights."""

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        if not self.units or len(set(self.units)) < len(self.units):
            raise InputError(f"units must be neuron, weight or both, got {self.units}")
        for name in ("neuron_fraction", "weight_fraction", "information_fraction"):
            given = getattr(self, name)
            if not all(0 < one <= 1 for one in (given if isinstance(given, tuple) else (given,))):
                raise InputError(f"{name} must be in (0, 1], got {given}")
        for name, least in _LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.n_answers and self.n_answer_controls > self.n_equal_kl:
            raise InputError(
                f"n_answer_controls must be at most n_equal_kl ({self.n_equal_kl}), got {self.n_answer_controls}"
            )
        if len({behaviour_name(source) for source in self.sources}) < 3:
            raise InputError(f"first, second and general must be three different behaviours, got {self.sources}")

    @property
    def sources(self) -> tuple[str, str, str]:
        """The three behaviours' sources, general last."""
        return self.first, self.second, self.general

    @property
    def scored(self) -> tuple[Unit, ...]:
        """What is scored: neurons always, since the mutual information is read from them."""
        return ("neuron", "weight") if "weight" in self.units else ("neuron",)

    def fraction(self, unit: Unit) -> Fraction:
        """The fraction for one kind of unit."""
        return self.neuron_fraction if unit == "neuron" else self.weight_fraction

    @property
    def keep(self) -> float:
        """The top fraction of each matrix's weights whose scores are kept."""
        return max(KEEP, *each_fraction(self.weight_fraction))

    def calibration(self) -> list[Behaviour]:
        """The examples to score: first, second, general."""
        return [
            load_behaviour(source, n_examples=self.n_calibration, seed=self.seed, response=self.response)
            for source in (self.first, self.second)
        ] + [load_behaviour(self.general, n_examples=self.n_calibration, seed=self.seed)]

    def tests(self, calibration: Sequence[Behaviour] = ()) -> tuple[list[Behaviour], list[Leaked]]:
        """The examples to measure: first, second, general; and what was left out of each set, in the same order.

        They are drawn from the prompts that are in no calibration set, and nearly in none. The two behaviours must have
        both answers.
        """
        tests, leaked = [], []
        sizes = (self.n_test, self.n_test, self.n_general_test)
        wholes = [load_behaviour(source, n_examples=None, split="test") for source in self.sources]
        for whole, n, (clean, left_out) in zip(wholes, sizes, all_without_leaks(wholes, calibration), strict=True):
            if len(clean) < n <= len(whole):
                raise InputError(
                    f"{n} test prompts of '{clean.name}' are asked for; it has {len(whole)}, of which "
                    f"{len(whole) - len(clean)} are in the calibration data or nearly (see: dean-interp data audit)"
                )
            tests.append(draw(clean, n, seed=self.seed))
            leaked.append(left_out)
        for test in tests[:2]:
            if not test.paired:
                raise InputError(
                    f"'{test.name}' has prompts without a safe and an unsafe answer: a study measures the margin "
                    "between the two, so it needs the columns prompt,safe,unsafe"
                )
        return tests, leaked

    def benign(self) -> list[Behaviour]:
        """The over-refusal prompts that are answered."""
        if not self.n_answers:
            return []
        return [load_behaviour(source, n_examples=self.n_answers, seed=self.seed, split="test")
                for source in self.over_refusal]  # fmt: skip
