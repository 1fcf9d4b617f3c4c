"""`explore`: the live view of a change in a notebook."""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dean_interp.data.examples import Behaviour
from dean_interp.editing.edit_at_dose import AnyEdit, refuse_dose
from dean_interp.errors import InputError
from dean_interp.exploring.explorer import Explorer
from dean_interp.exploring.held_out import ExploreConfig, HeldOut, held_out
from dean_interp.exploring.unit_table import unit_table
from dean_interp.models.hooked_model import HookedModel
from dean_interp.scoring.scores import Scores

if TYPE_CHECKING:
    from dean_interp.exploring.widget import ExploreWidget


def explore(
    model: HookedModel,
    change: AnyEdit,
    *,
    behaviours: Sequence[Behaviour] | None = None,
    general: Behaviour | None = None,
    scores: Sequence[Scores] = (),
    dose: float = 1.0,
    config: ExploreConfig = ExploreConfig(),  # noqa: B008 - frozen
) -> "ExploreWidget":
    """Look at a change of a model in a notebook, while its dose and its units are switched.

    `explore(model, load_gates("gates.safetensors"))` as the last line of a cell shows both answers to a prompt, the
    next tokens, the margins of held-out prompts, and the KL on general text. It needs the extra `notebook`.

    Args:
        model: the base of the change; hooks change it for each request and are taken away again.
        change: gates, an edit, or a selection, which is silenced.
        behaviours: pairs of the test split. None: built-in prompts of `fairness` and `privacy` that were not scored.
        general: text with one answer a prompt. None: built-in text of `general` that was not scored.
        scores: of each behaviour, so that units can be switched by behaviour.
        dose: the first dose.
        config: how prompts are read, and how long answers may be.

    Raises:
        InputError: `anywidget` missing, a change of another model, prompts that were scored, scores of other sites.
    """
    if importlib.util.find_spec("anywidget") is None:
        raise InputError("the live view needs the package anywidget: pip install 'dean_interp[notebook]'")
    refuse_dose(dose)
    measured = held_out(model, change, behaviours, general, config=config)
    # It makes a class of a package that may be missing.
    from dean_interp.exploring.widget import ExploreWidget

    explorer = Explorer(model, change, measured, unit_table(model, change, scores))
    return ExploreWidget(explorer, first_prompts(measured), dose=dose)


def first_prompts(measured: HeldOut) -> list[str]:
    """The first held-out prompt of each behaviour."""
    return [behaviour.prompts[0] for behaviour in measured.behaviours]
