"""What a model object was scored on, so that nothing scored is ever measured."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel

_SCORED = "_dean_interp_scored_prompts"


def scored_prompts(model: HookedModel) -> set[str]:
    """Hashes of the prompts that this model was scored on, or is now edited by. Callers add to the set itself."""
    return model.__dict__.setdefault(_SCORED, set())


def refuse_scored(model: HookedModel, behaviours: Sequence[Behaviour], *, also: frozenset[str] = frozenset()) -> None:
    """Raise `InputError` where a behaviour is a calibration split, or shares a prompt with what was scored.

    Units are chosen to suit the examples that were scored; a measurement on those says nothing about others. `also` are
    hashes of further scored prompts.
    """
    for behaviour in behaviours:
        if behaviour.split == "calibration":
            raise InputError(
                f"'{behaviour.name}' is a calibration split, which is for scoring: load it with split='test' (or "
                "split=None for a file that is all test) to measure"
            )
        shared = behaviour.prompt_hashes & (scored_prompts(model) | also)
        if shared:
            raise InputError(
                f"{len(shared)} of the {len(behaviour.prompt_hashes)} prompts of '{behaviour.name}' were scored: "
                "measure on prompts that were not (split='test')"
            )


@contextmanager
def measuring_scored_prompts(model: HookedModel) -> Iterator[None]:
    """While open, the model counts as one that was scored on nothing: for measuring scored prompts on purpose."""
    scored = set(scored_prompts(model))
    scored_prompts(model).clear()
    try:
        yield
    finally:
        scored_prompts(model).update(scored)
