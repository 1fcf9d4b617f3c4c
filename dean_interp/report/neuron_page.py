"""The page of one neuron, for a notebook cell or a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dean_interp.circuits.neuron import TextActivations
from dean_interp.circuits.neuron_view import NeuronView, view_neuron
from dean_interp.data.examples import Behaviour
from dean_interp.evaluation.lines import Line
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Template
from dean_interp.report.circuit_figures import activations_by_behaviour
from dean_interp.report.page import Page, rendered
from dean_interp.report.pictures import figure_element
from dean_interp.scoring.scores import Scores
from dean_interp.selection.selection import Selection


@dataclass(frozen=True)
class NeuronPage(Page):
    """A neuron's record and its page; in a notebook it shows itself."""

    view: NeuronView
    command: str = ""
    """The command that makes the page again, where a command made it."""

    def __repr__(self) -> str:
        return f"NeuronPage({self.view.name})"

    @property
    def headline(self) -> str:
        """The neuron in one sentence."""
        view = self.view
        most = max(view.firing, key=lambda name: view.firing[name])
        parts = [f"{view.name} fires most on {most} (mean size {view.firing[most]:.2g} over {_tokens_of(view, most)})"]
        if view.routed and not any(view.routed.values()):
            parts = [f"no token of the texts is sent to the expert of {view.name}"]
        elif view.routed:
            shares = ", ".join(f"{share:.1%} on {name}" for name, share in view.routed.items())
            parts.append(f"of all tokens its expert gets {shares}")
        if view.scores:
            ranks = ", ".join(f"{rank} for {name}" for name, rank in view.scores.rank.items())
            parts.append(f"ranks in its layer (of {view.n_neurons}): {ranks}")
        if view.effect:
            parts.append(_effect_on_margins(view.effect))
        return "; ".join(parts) + "."

    def html(self) -> str:
        """The page: nothing in it is loaded from a network."""
        return rendered("neuron.html.j2", **self.values)

    @property
    def values(self) -> dict[str, object]:
        """What the template of the page shows."""
        view = self.view
        peak = _peak(view.texts)
        return {
            "view": view,
            "headline": self.headline,
            "written": list(zip(view.written.promoted, view.written.suppressed, strict=True)),
            "figure": figure_element(activations_by_behaviour(view), f"Activations of {view.name} by behaviour"),
            "texts": [(text.behaviour, _shaded(text, peak)) for text in view.texts],
            "peak": peak,
            "command": self.command,
        }


def neuron_page(
    model: HookedModel,
    site: Site,
    index: int,
    examples: Sequence[Behaviour],
    *,
    scores: Sequence[Scores] = (),
    selections: Mapping[str, Selection] | None = None,
    n_texts: int = 8,
    template: Template = "chat",
    answer_tokens: int | None = None,
) -> NeuronPage:
    """One neuron from all sides, as a page.

    `neuron_page(model, Site(17, "neurons"), 1042, [load_behaviour("privacy", split="test")])` as the last line of a
    notebook cell shows it; `.save("L17.1042.html")` keeps it, `.view` is the record. The neurons of routed experts are
    counted expert by expert: `parse_neuron("L17.E5.42", model)` gives site and index. Arguments and errors are those of
    `circuits.neuron_view.view_neuron`.
    """
    view = view_neuron(
        model,
        (site, index),
        examples,
        scores=scores,
        selections=selections,
        n_texts=n_texts,
        template=template,
        answer_tokens=answer_tokens,
    )
    return NeuronPage(view)


def _tokens_of(view: NeuronView, behaviour: str) -> str:
    """Over how much of a behaviour's text a mean is."""
    n_prompts = view.n_prompts.get(behaviour)
    return f"all tokens of its {n_prompts} texts" if n_prompts else "all its tokens"


def _effect_on_margins(effect: Sequence[Line]) -> str:
    moved = []
    for line in effect:
        is_within = line.change.low <= 0 <= line.change.high
        if line.metric.startswith("margin") and not is_within:
            moved.append(f"{line.on} by {line.change}")
    if not moved:
        return "silenced alone it moves no margin clearly: each interval holds 0"
    return f"silenced alone it moves the margin on {' and '.join(moved)} nats per token"


def _peak(texts: Sequence[TextActivations]) -> float:
    """The largest size of an activation in all texts; 1 where there is none."""
    sizes = [abs(activation) for text in texts for (activation,) in text.activations]
    return max(sizes, default=0.0) or 1.0


def _shaded(text: TextActivations, peak: float) -> list[tuple[str, float, float | None]]:
    """Each token with its activation as a share of the peak, and as it is; None where it is not sent to the expert."""
    shaded = []
    for place, (token, (activation,)) in enumerate(zip(text.tokens, text.activations, strict=True)):
        is_seen = not text.routed or text.routed[place][0]
        share = round(abs(activation) / peak, 3)
        shaded.append((token, share, activation if is_seen else None))
    return shaded
