"""The card of an edit, in the form that model hubs show: what it changes, on what it was chosen and confirmed, its
gains with intervals, its damage, its nulls, what holds and what does not, its limits, and how it is undone.

Its numbers are those of the run that measured the edit. Of an edit without a run it says that nothing was measured.
Nothing on it says where a file lies on the machine that wrote it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Literal

from huggingface_hub import ModelCard, ModelCardData

from dean_interp.data.hub_names import shared_name
from dean_interp.editing.card_file import DIGEST_KEY
from dean_interp.editing.edit import Edit
from dean_interp.evaluation.lines import Line
from dean_interp.models.load import versions
from dean_interp.models.sites import parse_site
from dean_interp.report.card_data import CardSet, hub_model, improvement_sets, shared_command, study_sets
from dean_interp.report.html import options_of
from dean_interp.report.improve_page import improvement_rows
from dean_interp.report.page import rendered_markdown
from dean_interp.report.tables import StateRow, unit_rows
from dean_interp.study.config import StudyConfig
from dean_interp.study.confirmation import Condition, kl_text
from dean_interp.study.improvement import ImproveConfig, Improvement
from dean_interp.study.results import Results, UnitResults

Library = Literal["dean_interp", "transformers"]
TAGS = ["dean_interp", "model-editing", "mechanistic-interpretability", "transformer-lens"]


@dataclass(frozen=True)
class MeasuredEffect:
    """What was measured of one edit."""

    title: str
    headline: str
    faults: tuple[str, ...]
    conditions: tuple[Condition, ...]
    """What was fixed beforehand. Empty: nothing was."""
    rows: tuple[StateRow, ...]
    """The edit beside its nulls."""
    damage: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class EditCard:
    """What the card of an edit says."""

    title: str
    model: str
    """The model that it changes: a name on the hub, or that of a file or folder."""
    changes: Mapping[str, str]
    """What it changes, in words."""
    sets: tuple[CardSet, ...]
    apart: str
    """How prompts that chose and prompts that confirm were kept apart."""
    effects: tuple[MeasuredEffect, ...]
    """Empty: nothing was measured."""
    command: str
    """The command that made the edit; empty where no run did."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """The versions that the edit file was made with; empty where there is none."""
    digest: str | None = None
    """The digest of the edit file, where there is one."""

    def markdown(self, *, licence: str | None, written: date, library: Library = "dean_interp") -> str:
        """The card as a README.md.

        Args:
            licence: that of the model, as hubs write it (`apache-2.0`); None: not known.
            written: the day that the card is written on.
            library: what opens the files beside the card: this package an edit, `transformers` an edited checkpoint.
        """
        facts = ModelCardData(
            base_model=hub_model(self.model),
            license=licence,
            library_name=library,
            tags=TAGS,
            datasets=[each.hub for each in self.sets if each.hub] or None,
        )
        if self.digest:
            facts[DIGEST_KEY] = self.digest
        body = rendered_markdown(
            "card.md.j2",
            card=self,
            licence=licence,
            written=written.isoformat(),
            version=versions()["dean_interp"],
            is_checkpoint=library == "transformers",
            headings=list(self.effects[0].rows[0].changes) if self.effects else [],
        )
        return str(ModelCard(f"---\n{facts.to_yaml()}\n---\n\n{body}\n"))


def card_of_edit(edit: Edit, run: Improvement | Results | None) -> EditCard:
    """The card of an edit.

    Args:
        run: what was measured of it (`study.measured_edit`); None: nothing.
    """
    if run is None:
        model = shared_name(edit.facts["model"])
        card = EditCard(title=f"An edit of {model}", model=model, changes={}, sets=(), apart="", effects=(), command="")
    else:
        card = card_of_run(run)
    changes = {**_changes_of_edit(edit), **card.changes}
    return replace(card, changes=changes, versions=edit.facts.get("versions", {}), digest=edit.digest)


def card_of_run(run: Improvement | Results) -> EditCard:
    """The card of what a run found, without an edit file."""
    return _of_improvement(run) if isinstance(run, Improvement) else _of_study(run)


def _of_improvement(improvement: Improvement) -> EditCard:
    config, (first, second) = improvement.config, improvement.behaviours
    n_neurons = improvement.n_neurons or improvement.n_layers * improvement.d_mlp
    effect = MeasuredEffect(
        title="What was measured",
        headline=improvement.headline,
        faults=improvement.faults,
        conditions=improvement.conditions,
        rows=tuple(improvement_rows(improvement)),
        damage=f"KL to the original on general text that confirms: {kl_text(improvement.kl)} nats per answer token; "
        f"budget {config.max_kl:g}",
        lines=improvement.edit.lines,
    )
    return EditCard(
        title=f"{config.model.title}, edited for {first} and {second}",
        model=config.model.title,
        changes={
            "neurons": f"{improvement.n_changed} of {n_neurons}",
            "largest change of a multiplier": f"{improvement.largest_change:.2f}",
        },
        sets=improvement_sets(improvement),
        apart=_apart(improvement),
        effects=(effect,),
        command=shared_command("improve", options_of(config, ImproveConfig())),
    )


def _apart(improvement: Improvement) -> str:
    sentence = "No prompt has two of these roles, and prompts that are nearly those of an earlier role are left out."
    n_shared = sum(earlier.n_shared for earlier in improvement.earlier)
    if n_shared:
        sentence += f" {n_shared} confirming prompts had been opened by earlier runs, which counts against the result."
    return sentence


def _of_study(results: Results) -> EditCard:
    first, second = results.behaviours
    config = results.config
    changes = {}
    for kind in results.units:
        layers = [layer for layer, n in enumerate(kind.coupled_per_layer) if n]
        changes[f"{kind.unit}s"] = f"{kind.edit.n_units}, silenced, in {layers_in_words(layers)}"
    return EditCard(
        title=f"{config.model.title}, without what {first} and {second} share",
        model=config.model.title,
        changes=changes,
        sets=study_sets(results),
        apart="Prompts that are calibration prompts, exactly or nearly, are left out of the test sets.",
        effects=tuple(map(_effect_of_units, results.units)),
        command=shared_command("run", options_of(config, StudyConfig())),
    )


def _effect_of_units(kind: UnitResults) -> MeasuredEffect:
    primary = kind.primary
    outcome = Condition(
        "the outcome that was fixed beforehand",
        primary.reached,
        f"both mean margins {'rise' if primary.both_rise else 'do not both rise'}; the larger rank among random "
        f"controls is p = {primary.p_larger:.3f}; KL {primary.kl:.4f} against at most {primary.kl_of_controls:.4f}",
    )
    return MeasuredEffect(
        title=f"What was measured of the {kind.unit}s",
        headline=kind.headline,
        faults=kind.faults,
        conditions=(outcome,),
        rows=tuple(unit_rows(kind)),
        damage=f"KL to the original on general text: {primary.kl:.4f} nats per answer token",
        lines=kind.edit.lines,
    )


def _changes_of_edit(edit: Edit) -> dict[str, str]:
    """What the file of an edit says that it changes."""
    counts: dict[str, int] = {}
    layers: set[int] = set()
    for name, n_units in edit.facts["units"].items():
        site = parse_site(name)
        kind = f"{site.unit}s"
        counts[kind] = counts.get(kind, 0) + n_units
        layers.add(site.layer)
    return {
        "architecture": edit.facts["architecture"],
        **{kind: str(n) for kind, n in counts.items()},
        "layers": layers_in_words(sorted(layers)),
        "numbers in the checkpoint": f"{len(edit)} in {len(edit.changes)} tensors",
        "how": _how(edit.facts["value"]),
        "prompts that selected it": str(len(edit.facts["prompt_hashes"])),
        "digest of the edit file": edit.digest,
    }


def _how(value: str) -> str:
    """What an edit does to its units, from what its file says (`editing.values.described`)."""
    if value.startswith("Multiply"):
        return "each neuron is multiplied by a number of its own"
    return {"Zero": "silenced", "Mean": "put at their means"}.get(value, value)


def layers_in_words(layers: list[int]) -> str:
    """Ascending layers as text: `30 layers (0 to 29)`, `2 layers (3, 7)`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = []
    for run in runs:
        first, last = run[0], run[-1]
        parts.append(str(first) if first == last else f"{first} to {last}")
    noun = "layers" if len(layers) > 1 else "layer"
    return f"{len(layers)} {noun} ({', '.join(parts)})"
