"""The widget: traits that the browser and Python share, and a copy of what they show for readers without a kernel.

The browser sets `request` and `wanted`, Python answers with `state` and `answers`. They are kept in a notebook that is
saved with its widgets. For one that is not, a copy in plain HTML stands below the widget. The script hides it where
the widget is drawn.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from IPython.display import display, update_display
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from dean_interp.errors import InputError, first_line
from dean_interp.exploring.explorer import Explorer, ViewRequest
from dean_interp.exploring.snapshot import snapshot


@dataclass(frozen=True)
class _Wanted:
    request: int
    step: int


class ExploreWidget(anywidget.AnyWidget):
    """The live view of a change; as the last line of a cell it shows itself."""

    _esm = Path(__file__).with_name("explore.js")
    _css = Path(__file__).with_name("explore.css")
    facts = traitlets.Dict().tag(sync=True)
    request = traitlets.Dict().tag(sync=True)
    """Set by the browser: a `ViewRequest`."""
    state = traitlets.Dict().tag(sync=True)
    """Set by Python: a `ViewState` with the number of its request, or why there is none."""
    wanted = traitlets.Dict().tag(sync=True)
    """Set by the browser: the request whose answers shall grow, and by how many tokens they have been asked to grow."""
    answers = traitlets.Dict().tag(sync=True)
    """Set by Python: `TwoAnswers` with the number of their request."""

    def __init__(self, explorer: Explorer, prompts: Sequence[str], *, dose: float) -> None:
        self._explorer = explorer
        self._shown_as = ""
        facts = explorer.facts(prompts, name=f"dean-explore-{uuid.uuid4().hex}")
        super().__init__(facts=_plain(facts))
        self.observe(self._answer, "request")
        self.observe(self._grow, "wanted")
        self.request = {"number": 1, "dose": dose, "prompt": prompts[0]}

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ANN401 - IPython's own
        """The widget, and the copy for a reader that draws no widgets."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if bundle else ({}, {})
        return {**data, "text/html": self.html()}, metadata

    def _ipython_display_(self) -> None:
        """Show the widget and, below it, the copy, which follows what the widget shows."""
        data, metadata = self._repr_mimebundle_()
        del data["text/html"]
        display(data, metadata=metadata, raw=True)
        self._shown_as = self.facts["name"]
        display({"text/html": self.html()}, raw=True, display_id=self._shown_as)

    def html(self) -> str:
        """What is shown now, without a script."""
        return snapshot(self.facts, self.state, self.answers)

    def _answer(self, change: dict[str, Any]) -> None:
        """Answer a request of the browser, unless a newer one has been answered."""
        try:
            request = TypeAdapter(ViewRequest).validate_python(change["new"])
            state = self._explorer.state(request)
        except (InputError, ValidationError) as error:
            self.state = {**self.state, "request": change["new"].get("number", 0), "error": first_line(error)}
            return
        if state is not None:
            self.answers = {}
            self.state = {"request": request.number, **_plain(state)}
            self._keep_copy()

    def _grow(self, change: dict[str, Any]) -> None:
        """Let both answers grow by a token."""
        try:
            wanted = TypeAdapter(_Wanted).validate_python(change["new"])
            answers = self._explorer.next_token(wanted.request)
        except (InputError, ValidationError) as error:
            self.state = {**self.state, "error": first_line(error)}
            return
        if answers is not None:
            self.answers = {"request": wanted.request, "step": wanted.step, **_plain(answers)}
            if answers.is_done:
                self._keep_copy()

    def _keep_copy(self) -> None:
        if self._shown_as:
            update_display({"text/html": self.html()}, raw=True, display_id=self._shown_as)


def _plain(record: object) -> dict[str, Any]:
    """A record as JSON has it; numbers that are not finite become None."""
    return from_json(to_json(record, inf_nan_mode="null"))
