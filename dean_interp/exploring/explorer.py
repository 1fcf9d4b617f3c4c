"""The model's side of the view: it answers requests, the newest alone, and lets both answers grow token by token."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from dean_interp.data.hub_names import shared_name
from dean_interp.editing.edit import Edit
from dean_interp.editing.edit_at_dose import AnyEdit, at_dose
from dean_interp.exploring.held_out import HeldOut
from dean_interp.exploring.unit_table import ListedUnit, Switches, UnitTable
from dean_interp.exploring.view_state import ViewState, view_state
from dean_interp.models.generate import answer_stream
from dean_interp.models.hooked_model import HookedModel
from dean_interp.selection.gates import Gates
from dean_interp.selection.selection import Selection

LOWEST_DOSE, HIGHEST_DOSE = -1.0, 2.0
"""The ends of the slider."""
_KINDS: Mapping[type, str] = {Gates: "Gates", Selection: "Silenced units", Edit: "An edit"}


@dataclass(frozen=True)
class ViewFacts:
    """What stays as it is while the view is used."""

    model: str
    kind: str
    """What kind of change it is, in words."""
    change: str
    n_units: int
    n_by_layer: dict[int, int]
    n_by_behaviour: dict[str, int]
    listed: tuple[ListedUnit, ...]
    prompts: tuple[str, ...]
    """Prompts to begin with."""
    general: str
    """Name of the general text."""
    n_general: int
    answer_length: int
    lowest: float = LOWEST_DOSE
    highest: float = HIGHEST_DOSE
    doses: tuple[float, ...] = ()
    """The doses that were measured beforehand; empty where any dose can be asked for."""
    name: str = ""
    """What ties a live view to its copy without a kernel."""


@dataclass(frozen=True)
class ViewRequest:
    """What the reader of the view asks for."""

    number: int
    """A later request has a higher number."""
    dose: float
    prompt: str
    layers_off: frozenset[int] = frozenset()
    behaviours_off: frozenset[str] = frozenset()
    units_off: frozenset[str] = frozenset()

    @property
    def switches(self) -> Switches:
        """What is switched off."""
        return Switches(self.layers_off, self.behaviours_off, self.units_off)


@dataclass(frozen=True)
class TwoAnswers:
    """Both answers to a prompt, as far as they have come."""

    original: str
    edited: str
    is_done: bool


class Explorer:
    """A model and a change that requests are answered about."""

    def __init__(self, model: HookedModel, change: AnyEdit, held_out: HeldOut, table: UnitTable) -> None:
        self.model, self.change, self.held_out, self.table = model, change, held_out, table
        self.newest = 0
        """The number of the newest request."""
        # Margins and KL do not depend on the prompt.
        self._states: dict[tuple[float, Switches], ViewState] = {}
        self._prompt = ""
        self._original = self._edited = _GrowingAnswer(iter(()))

    def facts(self, prompts: Sequence[str], *, doses: Sequence[float] = (), name: str = "") -> ViewFacts:
        """What stays as it is."""
        general = self.held_out.general
        return ViewFacts(
            model=shared_name(str(self.model.cfg.model_name)),
            kind=_KINDS[type(self.change)],
            change=repr(self.change),
            n_units=len(self.table.selection),
            n_by_layer=dict(self.table.n_by_layer),
            n_by_behaviour=dict(self.table.n_by_behaviour),
            listed=self.table.listed,
            prompts=tuple(prompts),
            general=general.name,
            n_general=len(general),
            answer_length=self.held_out.config.answer_length,
            doses=tuple(doses),
            name=name,
        )

    def state(self, request: ViewRequest) -> ViewState | None:
        """What the view shows for a request; None for one that is older than another.

        Raises `InputError` as `view_state` does, and for a switch of something that the change does not hold.
        """
        if request.number <= self.newest:
            return None
        self.newest = request.number
        units = self.table.on(request.switches)
        place = (request.dose, request.switches)
        state = view_state(
            self.model,
            self.change,
            self.held_out,
            [request.prompt],
            dose=request.dose,
            units=units,
            known=self._states.get(place),
        )
        self._states[place] = state
        self._begin_answers(request, units)
        return state

    def next_token(self, number: int) -> TwoAnswers | None:
        """Both answers with one more token each; None where the request is not the newest."""
        if number != self.newest:
            return None
        self._original.grow()
        self._edited.grow()
        is_done = self._original.is_done and self._edited.is_done
        return TwoAnswers(self._original.text, self._edited.text, is_done)

    def _begin_answers(self, request: ViewRequest, units: Selection) -> None:
        """Begin the edited answer anew, and the original one where the prompt is another."""
        config = self.held_out.config
        if request.prompt != self._prompt:
            self._original = _GrowingAnswer(
                answer_stream(
                    self.model,
                    request.prompt,
                    under=nullcontext(),
                    max_new_tokens=config.answer_length,
                    template=config.template,
                )
            )
        self._prompt = request.prompt
        self._edited = _GrowingAnswer(
            answer_stream(
                self.model,
                request.prompt,
                under=at_dose(self.model, self.change, request.dose, units=units),
                max_new_tokens=config.answer_length,
                template=config.template,
            )
        )


class _GrowingAnswer:
    """An answer, and what makes it longer."""

    def __init__(self, texts: Iterator[str]) -> None:
        self.texts, self.text, self.is_done = texts, "", False

    def grow(self) -> None:
        """Add a token, if there is another."""
        longer = next(self.texts, None)
        self.is_done = longer is None
        self.text = self.text if longer is None else longer
