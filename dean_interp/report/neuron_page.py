"""The page of one neuron, for a notebook cell or a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dean_interp.circuits.neuron import TextActivations
from dean_interp.circuits.neuron_view import NeuronView, view_neuron
from dean_interp.data.examples import Behaviour
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Template
from dean_interp.report.figures import activations_by_behaviour, to_svg
from dean_interp.report.page import Page, rendered
from dean_interp.scoring.scores import Scores
from dean_interp.selection.selection import Selection


@dataclass(frozen=True)
class NeuronPage(Page):
    """A neuron's record and its page; in a notebook it shows itself."""

    view: NeuronView
    command: str = ""
    """What makes the page again, where a command made it."""

    def __repr__(self) -> str:
        return f"NeuronPage({self.view.name})"

    @property
    def headline(self) -> str:
        """The neuron in one sentence."""
        view = self.view
        most = max(view.firing, key=lambda name: view.firing[name])
        said = [f"{view.name} fires most on {most}"]
        if view.scores:
            ranks = ", ".join(f"{rank} for {name}" for name, rank in view.scores.rank.items())
            said.append(f"ranks in its layer (of {view.n_neurons}): {ranks}")
        moved = [
            f"{line.on} by {line.change}" for line in view.effect
            if line.metric.startswith("margin") and not line.change.low <= 0 <= line.change.high
        ]  # fmt: skip
        if view.effect:
            said.append(
                f"silenced alone it moves the margin on {' and '.join(moved)} nats per token" if moved else
                "silenced alone it moves no margin beyond its interval")  # fmt: skip
        return "; ".join(said) + "."

    def html(self) -> str:
        """The page: nothing in it is loaded from a network."""
        view = self.view
        peak = max((abs(row[0]) for text in view.texts for row in text.activations), default=0.0) or 1.0

        def shaded(text: TextActivations) -> list[tuple[str, float, float]]:
            return [
                (token, round(abs(row[0]) / peak, 3), row[0])
                for token, row in zip(text.tokens, text.activations, strict=True)
            ]

        return rendered(
            "neuron.html.j2",
            view=view,
            headline=self.headline,
            written=list(zip(view.written.promoted, view.written.suppressed, strict=True)),
            figure=to_svg(activations_by_behaviour(view), "Activations by behaviour"),
            shaded=shaded,
            peak=peak,
            command=self.command,
        )


def neuron_view(
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
    """One neuron from all sides, as a page. Arguments and errors are those of `circuits.view.view_neuron`.

    `neuron_view(model, Site(17, "neurons"), 1042, [load_behaviour("privacy", split="test")])` as the last line of a
    notebook cell shows it; `.save("L17.1042.html")` keeps it, `.view` is the record.
    """
    return NeuronPage(
        view_neuron(
            model, (site, index), examples, scores=scores, selections=selections, n_texts=n_texts, template=template,
            answer_tokens=answer_tokens,
        )
    )  # fmt: skip
