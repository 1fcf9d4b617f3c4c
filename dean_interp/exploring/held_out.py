"""What the view measures at every dose: a few held-out prompts of each behaviour, and general text.

No prompt that was scored to make the change is among them: a rise on those says nothing about others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dean_interp.data.examples import Behaviour, draw, load_behaviour
from dean_interp.editing.edit_at_dose import AnyEdit, as_hooks, refuse_other_base
from dean_interp.errors import InputError, refuse_below
from dean_interp.evaluation.measure import measure
from dean_interp.evaluation.measurement import Measurement
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.scored_prompts import refuse_scored, scored_prompts
from dean_interp.models.tokens import Template
from dean_interp.progress import hidden_progress

N_PROMPTS, N_GENERAL = 3, 6
"""Number of held-out prompts of each behaviour, and of general texts, where none were given: every move of the slider
measures them."""


@dataclass(frozen=True)
class ExploreConfig:
    """How the view reads prompts and how much it asks for."""

    template: Template = "chat"
    """How prompt and answer become tokens."""
    answer_tokens: int | None = 12
    """Number of first tokens of each written answer that are measured (None: all)."""
    answer_length: int = 48
    """Number of new tokens of each answer of the model, at most."""

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        refuse_below(self, {"answer_tokens": 1, "answer_length": 1})


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples, and what the original model makes of them."""

    behaviours: tuple[Behaviour, ...]
    general: Behaviour
    original: Measurement = field(repr=False)
    scored: frozenset[str] = field(repr=False)
    """Hashes of the prompts that the change was made from, and of those that the model was scored on."""
    config: ExploreConfig

    @property
    def all(self) -> list[Behaviour]:
        """The behaviours, general text last."""
        return [*self.behaviours, self.general]


def held_out(
    model: HookedModel,
    change: AnyEdit,
    behaviours: Sequence[Behaviour] | None = None,
    general: Behaviour | None = None,
    *,
    config: ExploreConfig = ExploreConfig(),
) -> HeldOut:
    """Measure the original model on held-out examples.

    Args:
        model: the base of the change.
        change: gates, an edit, or a selection.
        behaviours: pairs of the test split. None: built-in prompts of `fairness` and `privacy` that were not scored.
        general: text with one answer a prompt. None: built-in text of `general` that was not scored.
        config: how prompts are read.

    Raises:
        InputError: a change of another model, a behaviour without pairs, a calibration split, prompts that were scored.
    """
    config.check()
    refuse_other_base(model, change)
    scored = frozenset(scored_prompts(model) | as_hooks(change)[0].prompt_hashes)
    if behaviours is None:
        behaviours = [unscored(name, N_PROMPTS, scored) for name in ("fairness", "privacy")]
    if general is None:
        general = unscored("general", N_GENERAL, scored)
    refuse_other_kinds(behaviours, general)
    refuse_scored(model, [*behaviours, general], also=scored)
    with hidden_progress():
        original = measure(model, [*behaviours, general], template=config.template, answer_tokens=config.answer_tokens)
    return HeldOut(tuple(behaviours), general, original, scored, config)


def unscored(source: str, n_examples: int, scored: frozenset[str], *, seed: int = 0) -> Behaviour:
    """Examples of the test split that were not scored, drawn as `load_behaviour` draws them.

    Raises `InputError` where there are fewer.
    """
    whole = load_behaviour(source, n_examples=None, split="test")
    seen = whole.prompts_among(scored)
    left = tuple(example for example in whole.examples if example.prompt not in seen)
    if not left:
        raise InputError(f"all {len(whole)} test prompts of '{whole.name}' were scored: give another set")
    return draw(replace(whole, examples=left), n_examples, seed=seed)


def refuse_other_kinds(behaviours: Sequence[Behaviour], general: Behaviour) -> None:
    """Raise `InputError` for no behaviours, one without pairs, and general text with pairs."""
    if not behaviours:
        raise InputError("give at least one behaviour with safe and unsafe answers, got none")
    for behaviour in behaviours:
        if not behaviour.paired:
            raise InputError(f"'{behaviour.name}' has prompts without a safe and an unsafe answer, so it has no margin")
    if general.paired:
        raise InputError(f"general text has one answer a prompt; '{general.name}' has a safe and an unsafe one")
