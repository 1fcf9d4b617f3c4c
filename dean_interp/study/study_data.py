"""The examples of a study: what is scored, what is measured, what is answered, and what was left out of each set."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dean_interp.data.examples import Behaviour, draw, load_behaviour, prompt_hashes_of
from dean_interp.data.leakage import Leaked, all_without_leaks, without_leaks
from dean_interp.data.prompt_text import is_among
from dean_interp.data.readers import BUILTIN
from dean_interp.data.sources import names_fault
from dean_interp.data.text_files import decoded
from dean_interp.errors import InputError
from dean_interp.evaluation.outcomes import clusters_of
from dean_interp.study.config import StudyConfig
from dean_interp.study.settings import AnswerConfig, CalibrationConfig, DataConfig


@dataclass(frozen=True)
class PromptSets:
    """The prompts that are answered, by what a good answer is."""

    harmful: tuple[Behaviour, ...] = ()
    """A good answer does not comply."""
    over_refusal: tuple[Behaviour, ...] = ()
    """Harmless prompts that look harmful: a good answer is a plain one."""
    general: tuple[Behaviour, ...] = ()
    """Ordinary questions: a good answer is a plain one."""
    n_left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Number of prompts of each set that were scored, or nearly, and are left out."""

    @property
    def all(self) -> tuple[Behaviour, ...]:
        """Every set, in the order in which they are answered."""
        return self.harmful + self.over_refusal + self.general


@dataclass(frozen=True)
class StudyData:
    """The examples of a study. `calibration` and `tests` hold first, second and general."""

    calibration: Sequence[Behaviour]
    tests: Sequence[Behaviour]
    prompts: PromptSets
    leaked: Sequence[Leaked]
    """What was left out of each test set."""

    @property
    def all(self) -> list[Behaviour]:
        """Every set that the folder's `config.json` names."""
        return [*self.calibration, *self.tests, *self.prompts.all]


def study_data(config: StudyConfig) -> StudyData:
    """The examples that the settings name. Raises `InputError` as `test_sets` and `prompt_sets` do."""
    calibration = calibration_sets(config.data, config.calibration)
    tests, leaked = test_sets(config.data, calibration)
    scored = prompt_hashes_of(calibration)
    prompts = prompt_sets(config.data, config.answers, scored=scored, calibration=calibration)
    return StudyData(calibration=calibration, tests=tests, prompts=prompts, leaked=leaked)


def calibration_sets(data: DataConfig, calibration: CalibrationConfig) -> list[Behaviour]:
    """The examples to score: first, second, general."""
    n, seed = calibration.n_calibration, data.seed
    first = load_behaviour(data.first, n_examples=n, seed=seed, response=calibration.response)
    second = load_behaviour(data.second, n_examples=n, seed=seed, response=calibration.response)
    general = load_behaviour(data.general, n_examples=n, seed=seed)
    return [first, second, general]


def test_sets(data: DataConfig, calibration: Sequence[Behaviour] = ()) -> tuple[list[Behaviour], list[Leaked]]:
    """The examples to measure (first, second, general), and what was left out of each set.

    They are drawn from the prompts that are in no calibration set, and nearly in none.

    Raises:
        InputError: too few test prompts; a behaviour without both answers, or whose prompts are all of one topic.
    """
    wholes = [load_behaviour(source, n_examples=None, split="test") for source in data.sources]
    sizes = (data.n_test, data.n_test, data.n_general_test)
    checked = all_without_leaks(wholes, calibration)
    tests, leaks = [], []
    for whole, n, (clean, leaked) in zip(wholes, sizes, checked, strict=True):
        if len(clean) < n <= len(whole):
            n_leaked = len(whole) - len(clean)
            raise InputError(
                f"{n} test prompts of '{clean.name}' are asked for; it has {len(whole)}, of which "
                f"{n_leaked} are in the calibration data or nearly (see: dean-interp data audit)"
            )
        tests.append(draw(clean, n, seed=data.seed))
        leaks.append(leaked)
    first, second, _ = tests
    _refuse_without_margin(first)
    _refuse_without_margin(second)
    return tests, leaks


test_sets.__test__ = False  # pytest takes what begins with `test` for a test


def _refuse_without_margin(test: Behaviour) -> None:
    """Raise `InputError` where a behaviour has no margin, or no interval of it."""
    if not test.paired:
        raise InputError(
            f"'{test.name}' has prompts without a safe and an unsafe answer: a study measures the margin "
            "between the two, so it needs the columns prompt,safe,unsafe"
        )
    if len(set(clusters_of(test))) < 2:
        raise InputError(
            f"all {len(test)} test prompts of '{test.name}' are of the topic {test.examples[0].topic!r}. Intervals are "
            "clustered by topic, so they need at least two. Leave the column `topic` out, and each prompt "
            "counts as one"
        )


def prompt_sets(
    data: DataConfig, answers: AnswerConfig, *, scored: frozenset[str], calibration: Sequence[Behaviour] = ()
) -> PromptSets:
    """The prompts to answer, drawn from those that were not scored.

    Args:
        scored: hashes of scored prompts (`data.prompt_text.prompt_hash`).
        calibration: what was scored; near duplicates of it are left out, too.

    Raises:
        InputError: a set whose prompts were all scored; two sets of one name.
    """
    if not answers.n_answers:
        return PromptSets()
    harmful = answers.harmful or (data.first, data.second)
    # Answers are kept and shown by the names of their sets.
    named = dict.fromkeys((*data.sources, *harmful, *answers.over_refusal))
    if fault := names_fault(list(named)):
        raise InputError(f"each set of prompts needs a name of its own: {fault}")
    n_left_out: dict[str, int] = {}

    def drawn(source: str) -> Behaviour:
        has_test_split = source in BUILTIN or source in data.sources
        split = "test" if has_test_split else None
        whole = load_behaviour(source, n_examples=None, seed=data.seed, split=split)
        clean = without_scored(whole, scored)
        if calibration:
            clean, _ = without_leaks(clean, calibration)
        n_left_out[whole.name] = len(whole) - len(clean)
        n_drawn = min(answers.n_answers, len(clean))
        return draw(clean, n_drawn, seed=data.seed)

    return PromptSets(
        harmful=tuple(map(drawn, harmful)),
        over_refusal=tuple(map(drawn, answers.over_refusal)),
        general=(drawn(data.general),),
        n_left_out=n_left_out,
    )


def without_scored(behaviour: Behaviour, scored: frozenset[str]) -> Behaviour:
    """The behaviour without prompts that were scored. Raises `InputError` where none is left."""
    kept = tuple(example for example in behaviour.examples if not is_among(example.prompt, scored))
    if not kept:
        raise InputError(f"all {len(behaviour)} prompts of '{behaviour.name}' were scored: measure on others")
    return dataclasses.replace(behaviour, examples=kept)


def scored_part(source: str, scored: frozenset[str]) -> Behaviour:
    """The rows of a data set that were scored. Raises `InputError` where none was."""
    whole = load_behaviour(source, n_examples=None, split=None)
    kept = tuple(example for example in whole.examples if is_among(example.prompt, scored))
    if not kept:
        raise InputError(f"scored_data is data that units were scored on, and no prompt of '{whole.name}' was")
    return dataclasses.replace(whole, examples=kept)


def running_text(source: str) -> list[str]:
    """Text for windows: a .txt file, or a behaviour's prompts with their answers.

    Raises `InputError` where there is no such file or behaviour.
    """
    path = Path(source)
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise InputError(f"no file {path}")
        return [decoded(path)]
    split = "test" if source in BUILTIN else None
    whole = load_behaviour(source, n_examples=None, split=split)
    texts = []
    for example in whole.examples:
        answered = [f"{example.prompt}\n{answer}" for answer in example.answers.values()]
        # Rows of running text have no answer.
        texts += answered or [example.prompt]
    return texts
