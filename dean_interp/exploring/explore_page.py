"""The view as one HTML page that needs no kernel: everything is measured beforehand, at fixed doses."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from pydantic_core import to_json

from dean_interp.data.examples import Behaviour
from dean_interp.editing.edit_at_dose import AnyEdit, at_dose
from dean_interp.exploring.explorer import HIGHEST_DOSE, LOWEST_DOSE, Explorer, ViewFacts
from dean_interp.exploring.held_out import ExploreConfig, held_out
from dean_interp.exploring.notebook import first_prompts
from dean_interp.exploring.unit_table import unit_table
from dean_interp.exploring.view_state import ViewState, view_state
from dean_interp.models.generate import generate
from dean_interp.models.hooked_model import HookedModel
from dean_interp.progress import progress_bar
from dean_interp.report.page import Page, rendered_from
from dean_interp.scoring.scores import Scores

DOSES_PER_ONE = 4
"""Number of doses of a page from one whole dose to the next."""


@dataclass(frozen=True)
class RecordedDose:
    """What a page shows at one dose."""

    state: ViewState
    answers: tuple[str, ...]
    """The answer to each prompt."""


@dataclass(frozen=True)
class ExplorePage(Page):
    """A change at fixed doses; in a notebook the page shows itself."""

    facts: ViewFacts
    recorded: tuple[RecordedDose, ...]
    """By dose, from the lowest to the highest."""
    command: str = ""
    """The command that makes the page again, where a command made it."""

    def __repr__(self) -> str:
        return f"ExplorePage({self.facts.change}, {len(self.recorded)} doses)"

    @property
    def headline(self) -> str:
        """What the change does at dose 1, in one sentence."""
        (whole,) = (each.state for each in self.recorded if each.state.dose == 1)
        by_behaviour: dict[str, list[float]] = {}
        for margin in whole.margins:
            by_behaviour.setdefault(margin.behaviour, []).append(margin.edited - margin.original)
        parts = [f"by {sum(changes) / len(changes):+.3f} for {name}" for name, changes in by_behaviour.items()]
        return (
            f"At dose 1 the mean margin of held-out prompts changes {' and '.join(parts)}. The KL on general text is "
            f"{whole.kl:.4f}. Both are in nats per token."
        )

    def html(self) -> str:
        """The page: nothing in it is loaded from a network."""
        record = to_json({"facts": self.facts, "recorded": self.recorded}, inf_nan_mode="null").decode()
        values = {
            "facts": self.facts,
            "headline": self.headline,
            "command": self.command,
            # A "</script>" in a text would end the script.
            "record": record.replace("<", "\\u003c"),
            "own_style": _text("explore.css"),
            "script": _text("explore.js"),
        }
        return rendered_from("dean_interp.exploring", "explore.html.j2", values)


def explore_page(
    model: HookedModel,
    change: AnyEdit,
    *,
    behaviours: Sequence[Behaviour] | None = None,
    general: Behaviour | None = None,
    scores: Sequence[Scores] = (),
    prompts: Sequence[str] = (),
    config: ExploreConfig = ExploreConfig(),  # noqa: B008 - frozen
) -> ExplorePage:
    """Measure a change at fixed doses, from -1 over 0 to 2 in steps of a quarter, and show it as one page.

    `explore_page(model, load_gates("gates.safetensors")).save("page.html")` writes it. Units are listed; they are
    switched in `explore` alone. Other arguments are those of `explore`, and so are the errors, but no package of
    notebooks is needed.

    Args:
        prompts: are answered at every dose. None given: the first held-out prompt of each behaviour.
    """
    measured = held_out(model, change, behaviours, general, config=config)
    explorer = Explorer(model, change, measured, unit_table(model, change, scores))
    prompts = list(prompts) or first_prompts(measured)
    n_steps = round((HIGHEST_DOSE - LOWEST_DOSE) * DOSES_PER_ONE)
    doses = [LOWEST_DOSE + step / DOSES_PER_ONE for step in range(n_steps + 1)]
    recorded = []
    for dose in progress_bar(doses, desc="doses", unit="dose", leave=False):
        state = view_state(model, change, measured, prompts, dose=dose, units=explorer.table.selection)
        with at_dose(model, change, dose):
            answers = generate(
                model,
                prompts,
                max_new_tokens=config.answer_length,
                template=config.template,
                label=f"answering at dose {dose:g}",
            )
        recorded.append(RecordedDose(state, tuple(answers)))
    return ExplorePage(explorer.facts(prompts, doses=doses), tuple(recorded))


def _text(name: str) -> str:
    return (files("dean_interp.exploring") / name).read_text(encoding="utf-8")
