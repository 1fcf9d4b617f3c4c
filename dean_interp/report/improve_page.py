"""The page of an improvement: did both margins rise, at what damage, beside which nulls; and what can be done next."""

import shlex
from pathlib import Path

from dean_interp.files import write_text
from dean_interp.report.html import ShownInformation, options_of, shown_information
from dean_interp.report.improve_figures import effect_against_nulls, margins_and_kl_by_dose
from dean_interp.report.page import decimals, rendered
from dean_interp.report.pictures import figure_element
from dean_interp.report.tables import StateRow, group_row, line_groups, single_row
from dean_interp.study.choosing import FLIP, RANDOM_GATES
from dean_interp.study.confirmation import kl_text
from dean_interp.study.improvement import EDIT_FILE, ChangedNeuron, ImproveConfig, Improvement
from dean_interp.study.paper_rule import PAPER

N_SHOWN = 6
"""Answers of each set that are seen without a click: the first ones."""
DIVIDED_BY = {
    "own split": "its own split: its test topics confirm, its calibration topics score and choose",
    "topic": "topic: its halves share topics, so all topics were divided anew",
    "prompt": "prompt: it has no topics, and near duplicates stay together",
}
"""What examples were divided by, in words (`study.roles.Roles.divided_by`)."""


def write_improve_report(improvement: Improvement, folder: Path) -> Path:
    """Write `report.html` into the run folder of an improvement and return its path."""
    edit = str(folder / EDIT_FILE)
    edited = str(folder / "edited")
    n_flips = len(improvement.of_kind(FLIP))
    n_random = len(improvement.of_kind(RANDOM_GATES))
    page = rendered(
        "improve.html.j2",
        improvement=improvement,
        config=improvement.config,
        behaviours=improvement.behaviours,
        rows=improvement_rows(improvement),
        n_flips=n_flips,
        subtracts_register=bool(improvement.config.register and improvement.config.gating.against_register),
        effect=figure_element(effect_against_nulls(improvement), "Change of both margins under the edit and its nulls"),
        doses=figure_element(margins_and_kl_by_dose(improvement), "Margins and KL by dose"),
        dose_kl=kl_text(improvement.dose.kl),
        neurons=_neurons(improvement, folder),
        gain_digits=decimals(gain for neuron in improvement.neurons for gain in neuron.gain.values()),
        n_shown=N_SHOWN,
        information=_information(improvement),
        n_nulls=n_flips + n_random,
        lines=line_groups(improvement.edit.lines),
        divided_by=DIVIDED_BY,
        next_commands=next_commands(improvement, folder),
        apply_command=shlex.join(["dean-interp", "edit", "apply", edit, "CHECKPOINT", "--out", edited]),
        command=run_command(improvement, folder),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def next_commands(improvement: Improvement, folder: Path) -> dict[str, str]:
    """What a person wants to do with the edit, and the command that does it."""
    edit, edited = str(folder / EDIT_FILE), str(folder / "edited")
    model = ["--model", improvement.config.model.name]
    if improvement.config.model.adapter:
        model += ["--adapter", improvement.config.model.adapter]
    commands = {
        "chat with it": ["chat", *model, "--edit", edit],
        "write it into a checkpoint": ["edit", "export", edit, *model, "--out", edited],
        "take it back": ["edit", "revert", edit, edited, "--out", str(folder / "reverted")],
        "write its card": ["edit", "card", str(folder), "--out", str(folder / "README.md")],
    }
    return {what: shlex.join(["dean-interp", *words]) for what, words in commands.items()}


def run_command(improvement: Improvement, folder: Path) -> str:
    """The command that makes this improvement."""
    options = options_of(improvement.config, ImproveConfig())
    return shlex.join(["dean-interp", "improve", *options, "--out", str(folder)])


def neuron_page_of(neuron: ChangedNeuron, folder: Path) -> Path:
    """Where the page of a neuron lies in the run folder of an improvement."""
    return folder / "neurons" / f"{neuron.name}.html"


def look_at(neuron: ChangedNeuron, folder: Path) -> str:
    """The command that shows one neuron with the model, the sets and the gains of this improvement."""
    words = ["dean-interp", "neuron", neuron.name, "--run", str(folder)]
    return shlex.join([*words, "--out", str(neuron_page_of(neuron, folder))])


def _neurons(improvement: Improvement, folder: Path) -> list[tuple[ChangedNeuron, str | None, str]]:
    """The strongest neurons, each with its page where that is written (from the run folder on), and its command."""
    rows = []
    for neuron in improvement.neurons:
        page = neuron_page_of(neuron, folder)
        link = page.relative_to(folder).as_posix() if page.is_file() else None
        command = look_at(neuron, folder)
        rows.append((neuron, link, command))
    return rows


def _information(improvement: Improvement) -> list[ShownInformation]:
    """Under the edit and under the paper's rule; empty where it was not estimated."""
    shown = []
    for name, informations in improvement.information.items():
        title = "the edit" if name == improvement.edit.name else name
        shown.append(shown_information(title, informations))
    return shown


def improvement_rows(improvement: Improvement) -> list[StateRow]:
    """The edit, its opposite, and each kind of null as a group."""
    rows = [single_row(improvement.edit, "the edit")]
    rows += [single_row(state, "its opposite") for state in improvement.of_kind("opposite")]
    for state in improvement.of_kind(PAPER):
        label = f"the paper's rule: {state.n_units} neurons silenced"
        rows.append(single_row(state, label))
    for kind, label in ((FLIP, "gates of flipped labels"), (RANDOM_GATES, "random gates")):
        group = improvement.of_kind(kind)
        if group:
            counted = f"{len(group)} {label}" if len(group) > 1 else f"one set of {label}"
            rows.append(group_row(group, counted))
    return rows
