"""What a model object was scored on, so that nothing scored is ever measured."""

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.notes import notes


def scored_prompts(model: HookedModel) -> frozenset[str]:
    """Hashes of the prompts that this model was scored on, or is now edited by."""
    known = notes(model)
    return frozenset().union(known.scored_prompts, *known.edited_by)


def note_scored(model: HookedModel, prompt_hashes: Set[str]) -> None:
    """Remember that this model was scored on these prompts, however long what they made of it lasts."""
    notes(model).scored_prompts.update(prompt_hashes)


@contextmanager
def measuring_scored_prompts(model: HookedModel) -> Iterator[None]:
    """While open, prompts that were scored before may be measured; afterwards they are refused as before.

    For the few places where this is the question: how much does it flatter to measure what was scored?
    """
    known = notes(model)
    scored, edited_by = known.scored_prompts, known.edited_by
    known.scored_prompts, known.edited_by = set(), []
    try:
        yield
    finally:
        scored.update(known.scored_prompts)
        known.scored_prompts, known.edited_by = scored, edited_by


@contextmanager
def noting_scored_prompts(model: HookedModel, prompt_hashes: Set[str]) -> Iterator[None]:
    """While open, these prompts count as scored too, since what was made from them is applied to the model.

    What is scored in the meantime stays scored.
    """
    edited_by = notes(model).edited_by
    edited_by.append(prompt_hashes)
    try:
        yield
    finally:
        edited_by.remove(prompt_hashes)


def refuse_scored(model: HookedModel, behaviours: Sequence[Behaviour], *, also: frozenset[str] = frozenset()) -> None:
    """Raise `InputError` where a behaviour is a calibration split, or shares a prompt with what was scored.

    Units are chosen to suit the examples that were scored; a measurement on those says nothing about others.

    Args:
        model: what it was scored on is remembered on the object.
        behaviours: what is to be measured.
        also: hashes of further scored prompts.
    """
    scored = scored_prompts(model) | also
    for behaviour in behaviours:
        if behaviour.split == "calibration":
            raise InputError(
                f"'{behaviour.name}' is a calibration split, which is for scoring: load it with split='test' (or "
                "split=None for a file that is all test) to measure"
            )
        shared = behaviour.prompts_among(scored)
        if shared:
            raise InputError(
                f"{len(shared)} of the {len(set(behaviour.prompts))} prompts of '{behaviour.name}' were scored (by "
                "their letters and digits): measure on prompts that were not (split='test')"
            )
