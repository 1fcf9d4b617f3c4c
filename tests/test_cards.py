"""The card of an edit: its numbers are those of the record, and it goes with the checkpoint that holds the edit."""

import json
import re
import shlex
import shutil
from datetime import date
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from test_improve import config, finished, sets  # noqa: F401 - fixtures: a whole small run

from dean_interp import InputError, Selection, Site, create_edit, load_edit, load_model, load_selection
from dean_interp.cli.main import main
from dean_interp.data.hub_names import shared_name
from dean_interp.editing.apply import create_gates_edit
from dean_interp.editing.edit import Edit
from dean_interp.editing.values import Scale
from dean_interp.report.card_data import hub_model, licence_of_model
from dean_interp.report.edit_card import card_of_edit, card_of_run, layers_in_words
from dean_interp.report.improve_page import next_commands
from dean_interp.report.page import minus
from dean_interp.selection.gates import load_gates
from dean_interp.study.measured_edit import measured_in

NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e-?\d+)?")
TODAY = date(2026, 11, 29)


def tables(card: str) -> list[list[list[str]]]:
    """The cells of every table, heads first and the lines below them left out."""
    found = re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE)
    rows = [[cells(line) for line in table.splitlines()] for table in found]
    return [[row, *others] for row, _, *others in rows]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")[1:-1]]


def table_that_begins(card: str, head: str) -> list[list[str]]:
    (table,) = (rows for rows in tables(card) if rows[0][0] == head)
    return table[1:]


def numbers(cell: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(cell.replace("−", "-"))]


def written(path: Path, *arguments: object) -> str:
    """The text of the card that the command writes."""
    assert main(["edit", "card", *map(str, arguments), "--out", str(path)]) == 0
    return path.read_text(encoding="utf-8")


def check_lines(card: str, lines: list[dict]) -> None:
    """Every line of the record has its row, and the row its numbers, to the digits that it shows."""
    rows = table_that_begins(card, "measured")
    assert len(rows) == len(lines) > 10
    for row, line in zip(rows, lines, strict=True):
        assert row[:3] == [line["metric"], line["on"], str(line["n"])]
        scale = 100 if line["unit"].startswith("share") else 1
        change = [scale * line["change"][end] for end in ("mean", "low", "high")]
        rounding = 0.51 if scale == 100 else 0.00051
        assert numbers(row[3]) == pytest.approx([scale * line["before"]["mean"]], abs=rounding)
        assert numbers(row[4]) == pytest.approx([scale * line["after"]["mean"]], abs=rounding)
        assert numbers(row[5]) == pytest.approx(change, abs=rounding)
        assert numbers(row[6]) == pytest.approx([line["p"]], rel=0.5, abs=0.006)
        if line["rank"] is not None:
            rank = [line["rank"], len(line["control_changes"])]
            assert numbers(row[7]) == pytest.approx(rank, abs=0.006)


def test_the_numbers_on_the_card_of_an_improvement_are_those_of_its_record(finished, tmp_path):  # noqa: F811
    folder, _ = finished
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    card = written(tmp_path / "README.md", folder)
    check_lines(card, record["states"][0]["lines"])

    edit, *_ = table_that_begins(card, "edit or null")
    state = record["states"][0]
    margins = [line["change"] for line in state["lines"] if line["metric"] == "margin of safe over unsafe"]
    for cell, change in zip(edit[2:5], margins, strict=True):
        assert numbers(cell) == pytest.approx([change["mean"], change["low"], change["high"]], abs=0.00051)
    assert numbers(edit[5]) == pytest.approx([state["perplexity"]], abs=0.051)
    assert numbers(edit[6]) == pytest.approx([state["kl"]], abs=0.00051)

    sizes = {row[0]: row[3:] for row in table_that_begins(card, "set")}
    for role in record["roles"]:
        n_examples = [role["n_examples"][name] for name in ("score", "choose", "confirm")]
        assert [numbers(cell)[0] for cell in sizes[role["name"]]] == n_examples
    changed = dict(table_that_begins(card, ""))
    assert numbers(changed["neurons"]) == [record["n_changed"], record["n_neurons"]]
    assert changed["layers"] == "1 layer (0)"


def test_a_card_lists_the_conditions_that_hold_and_those_that_do_not(finished, tmp_path):  # noqa: F811
    folder, improvement = finished
    program, *arguments = shlex.split(next_commands(improvement, folder)["write its card"])
    arguments[-1] = str(tmp_path / "README.md")
    assert program == "dean-interp" and main(arguments) == 0
    card = Path(arguments[-1]).read_text(encoding="utf-8")
    listed = re.findall(r"^- \[(x| )\] \*\*(.+)\*\* (holds|does not hold): ", card, re.MULTILINE)
    assert len(listed) > 3
    for (box, name, said), condition in zip(listed, improvement.conditions, strict=True):
        assert name == condition.name
        assert (box, said) == (("x", "holds") if condition.holds else (" ", "does not hold"))
    assert minus(improvement.headline) in card


def test_the_card_of_a_study_has_each_kind_of_unit_with_its_numbers(finished_study, tmp_path):
    folder, results = finished_study
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    card = written(tmp_path / "README.md", folder)
    parts = card.split("## What was measured of the ")[1:]
    assert len(parts) == len(results.units) == 2
    for part, unit in zip(parts, record["units"], strict=True):
        assert part.startswith(f"{unit['unit']}s\n")
        check_lines(part, unit["states"][0]["lines"])
        assert f"[{'x' if unit['primary']['reached'] else ' '}] **the outcome that was fixed beforehand**" in part
    assert "edit_digest" not in card, "a study writes no edit file"


def test_the_first_lines_are_what_hubs_read(finished, tmp_path):  # noqa: F811
    folder, _ = finished
    written(tmp_path / "README.md", folder, "--licence", "apache-2.0")
    facts = ModelCard.load(tmp_path / "README.md").data
    assert (facts.license, facts.library_name) == ("apache-2.0", "dean_interp")
    assert "model-editing" in facts.tags and facts.base_model is None, "a folder on this machine is on no hub"
    assert facts.edit_digest == load_edit(folder / "edit.safetensors").digest


def test_a_card_names_hub_models_and_published_sets(finished):  # noqa: F811
    _, improvement = finished
    card = card_of_run(improvement)
    assert hub_model("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"
    assert hub_model("smollm2-135m-instruct-0.1.2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_model("smollm2-of-mine") is None and hub_model("folder/model.gguf") is None
    text = card.markdown(licence=None, written=TODAY)
    assert "look it up before you share" in text and " on 2026-11-29." in text
    assert ModelCard(text).data.license is None


def test_no_card_says_where_a_file_lies(finished, tmp_path):  # noqa: F811
    folder, improvement = finished
    card = written(tmp_path / "README.md", folder)
    for path in (improvement.config.model.name, improvement.config.first, str(folder)):
        assert str(Path(path).parent) not in card
    assert "dean-interp improve --model layer" in card and "--first one.csv" in card
    assert shared_name("/home/somebody/model") == "model"


def test_an_edit_that_no_run_measured_says_so_and_gives_no_number_of_its_effect(finished, tmp_path):  # noqa: F811
    folder, improvement = finished
    alone = tmp_path / "edit.safetensors"
    shutil.copyfile(folder / "edit.safetensors", alone)
    card = written(tmp_path / "README.md", alone)
    assert "**Nothing was measured of this edit.**" in card and "nats" not in card
    assert [rows[0] for rows in tables(card)] == [["", ""]], "no table but that of what it changes"
    assert dict(table_that_begins(card, ""))["neurons"] == str(improvement.n_changed)


def test_a_run_stands_on_the_card_of_its_own_edit_alone(finished, tmp_path):  # noqa: F811
    """By the folder that the edit lies in, or by name; an edit that only lies beside results is not theirs."""
    folder, improvement = finished
    model = load_model(improvement.config.model.name, device="cpu")
    gates = load_gates(folder / "gates.safetensors")
    same, other = create_gates_edit(model, gates), create_edit(model, gates.selection, value=Scale(0.5))
    assert measured_in(folder, same) == improvement
    with pytest.raises(
        InputError, match=r"measured another edit than this one, whose units of layer are scaled by 0.5"
    ):
        measured_in(folder, other)
    beside = tmp_path / "run"
    shutil.copytree(folder, beside)
    other.save(beside / "other.safetensors")
    assert "Nothing was measured" in written(tmp_path / "other.md", beside / "other.safetensors")
    assert minus(improvement.headline) in written(tmp_path / "own.md", beside / "edit.safetensors")


def test_gates_on_another_model_of_the_same_shape_are_another_edit(finished):  # noqa: F811
    folder, improvement = finished
    model = load_model(improvement.config.model.name, device="cpu")
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    edit = create_gates_edit(model, load_gates(folder / "gates.safetensors"))
    with pytest.raises(InputError, match="measured another edit"):
        measured_in(folder, edit)


def test_an_edit_of_a_study_has_the_card_of_its_kind_of_unit(finished_study, llama):
    folder, results = finished_study
    edit = create_edit(llama, load_selection(folder / "selection.weight.safetensors"))
    measured = measured_in(folder, edit)
    assert [kind.unit for kind in measured.units] == ["weight"]
    card = card_of_edit(edit, measured).markdown(licence=None, written=TODAY)
    assert minus(results.of("weight").headline) in card and minus(results.of("neuron").headline) not in card


@pytest.fixture
def edit_and_checkpoint(finished, tmp_path) -> tuple[Path, Path]:  # noqa: F811
    """The edit file in its run folder, and a checkpoint with a card of its own."""
    folder, improvement = finished
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(improvement.config.model.name, checkpoint)
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n# A model\n", encoding="utf-8")
    return folder / "edit.safetensors", checkpoint


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_edited_checkpoint_carries_the_card_beside_the_models_own(edit_and_checkpoint, tmp_path, capsys):
    edit, checkpoint = edit_and_checkpoint
    edited, back = tmp_path / "edited", tmp_path / "back"
    assert main(["edit", "apply", str(edit), str(checkpoint), "--out", str(edited)]) == 0
    assert "its card is EDIT_CARD.md; README.md is that of the model" in capsys.readouterr().out
    assert (edited / "README.md").read_bytes() == (checkpoint / "README.md").read_bytes()
    facts = ModelCard.load(edited / "EDIT_CARD.md")
    assert (facts.data.library_name, facts.data.license) == ("transformers", "mit")
    assert "## What was measured" in facts.text
    assert main(["edit", "revert", str(edit), str(edited), "--out", str(back)]) == 0
    assert files_of(back) == files_of(checkpoint)


def test_the_card_is_the_readme_of_a_checkpoint_that_has_none(edit_and_checkpoint, tmp_path):
    edit, checkpoint = edit_and_checkpoint
    (checkpoint / "README.md").unlink()
    edited, back = tmp_path / "edited", tmp_path / "back"
    assert main(["edit", "apply", str(edit), str(checkpoint), "--out", str(edited)]) == 0
    assert "## What was measured" in (edited / "README.md").read_text(encoding="utf-8")
    assert main(["edit", "revert", str(edit), str(edited), "--out", str(back)]) == 0
    assert files_of(back) == files_of(checkpoint)


def test_of_two_edits_each_takes_its_own_card_away(checkpoints, llama, tmp_path):
    """In another order than they came, too."""
    first, second = two_edits(llama, tmp_path)
    both, base = tmp_path / "both", checkpoints["llama-gqa"]
    assert main(["edit", "apply", str(first), str(base), "--out", str(tmp_path / "one")]) == 0
    assert main(["edit", "apply", str(second), str(tmp_path / "one"), "--out", str(both)]) == 0
    assert {"README.md", "EDIT_CARD.md"} < set(files_of(both))
    assert main(["edit", "revert", str(first), str(both), "--out", str(tmp_path / "half")]) == 0
    assert main(["edit", "revert", str(second), str(tmp_path / "half"), "--out", str(tmp_path / "none")]) == 0
    assert files_of(tmp_path / "none") == files_of(base)


def two_edits(model: object, folder: Path) -> tuple[Path, Path]:
    """Two edits of different layers."""
    paths = []
    for layer in (0, 2):
        site = Site(layer, "neurons")
        selection = Selection({site: torch.tensor([1, 5])}, {site: (40,)}, frozenset())
        edit: Edit = create_edit(model, selection)
        edit.save(folder / f"edit_{layer}.safetensors")
        paths.append(folder / f"edit_{layer}.safetensors")
    return paths[0], paths[1]


def test_an_exported_checkpoint_carries_the_card(finished, tmp_path):  # noqa: F811
    folder, improvement = finished
    out, edit = tmp_path / "out", folder / "edit.safetensors"
    model = ["--model", improvement.config.model.name, "--device", "cpu"]
    assert main(["edit", "export", str(edit), *model, "--out", str(out)]) == 0
    assert minus(improvement.headline) in (out / "README.md").read_text(encoding="utf-8")


def test_a_text_that_is_no_card_is_not_replaced(finished, tmp_path, capsys):  # noqa: F811
    folder, _ = finished
    path = tmp_path / "README.md"
    path.write_text("# My project\n", encoding="utf-8")
    assert main(["edit", "card", str(folder), "--out", str(path)]) == 2
    assert "README.md is there and is no card of an edit" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "# My project\n"
    path.unlink()
    assert written(path, folder) == written(path, folder), "a card is replaced"


@pytest.mark.parametrize("facts", ["license: [a", "- a", "license: 5", "language: en"])
def test_a_card_of_the_model_that_names_no_licence_gives_none(tmp_path, facts):
    (tmp_path / "README.md").write_text(f"---\n{facts}\n---\n", encoding="utf-8")
    assert licence_of_model(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert licence_of_model(str(tmp_path)) == "mit"


def test_layers_are_written_as_runs():
    assert layers_in_words([0, 1, 2, 5, 7, 8]) == "6 layers (0 to 2, 5, 7 to 8)"
    assert layers_in_words([3]) == "1 layer (3)"
