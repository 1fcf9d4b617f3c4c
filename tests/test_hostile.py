"""Files from anywhere: whatever they hold, they are read, or refused in our own words, and nothing else happens."""

import ast
import dataclasses
import json
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from dean_interp import (
    Behaviour,
    Example,
    InputError,
    Selection,
    Site,
    apply_edit_to_checkpoint,
    create_edit,
    importance,
    load_behaviour,
    load_edit,
    load_model,
    load_scores,
    load_selection,
    top_fraction,
)
from dean_interp.editing.apply import create_gates_edit
from dean_interp.editing.checkpoint import checkpoint_state
from dean_interp.editing.edit import compare, stack
from dean_interp.files import atomic_folder, read_json, write_json, write_tensors
from dean_interp.resume import RunSettings, Unfinished
from dean_interp.selection.gates import Gates, load_gates
from dean_interp.study.config import StudyConfig
from dean_interp.study.measurement_file import load_measurement
from dean_interp.study.results import load_results

N_INPUTS = int(os.environ.get("DEAN_INTERP_FUZZ", "200"))
"""Inputs of each kind; the long form is `DEAN_INTERP_FUZZ=10000 pytest tests/test_hostile.py`."""
FUZZ = settings(max_examples=N_INPUTS, suppress_health_check=list(HealthCheck))
SOURCES = sorted(Path(__file__).parents[1].glob("dean_interp/**/*.py")) + sorted(
    Path(__file__).parents[1].glob("analyses/*.py")
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


HOSTILE = st.one_of(
    st.sampled_from([None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, math.nan, math.inf, "", "..", "a\0b", "\ud800",
                     [], {}, [[]], "L0.neurons", "L\u00b2.in", "L99999999999.in", "x" * 5000]),
    JSON,
)  # fmt: skip


@st.composite
def altered(draw, record: object) -> object:
    """A record with something in it replaced, left out or put in."""
    if isinstance(record, dict) and record and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(record)))
        rest = {name: one for name, one in record.items() if name != key}
        match draw(st.integers(0, 5)):
            case 0:
                return rest
            case 1:
                return rest | {str(draw(HOSTILE)): record[key]}
            case _:
                return rest | {key: draw(altered(record[key]))}
    if isinstance(record, list) and record and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(record) - 1))
        return [*record[:at], *draw(st.sampled_from([[], [draw(altered(record[at]))], record[:2]])), *record[at + 1 :]]
    return draw(HOSTILE)


@st.composite
def altered_tensors(draw, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of which one has other numbers, another type or shape, or is not there."""
    name = draw(st.sampled_from(sorted(tensors)))
    old, found = tensors[name], dict(tensors)
    match draw(st.integers(0, 6)):
        case 0:
            del found[name]
        case 1:
            found[name] = old.to(draw(st.sampled_from([torch.float64, torch.int8, torch.bool, torch.bfloat16])))
        case 2:
            found[name] = old.flatten()[: draw(st.integers(0, 3))]
        case 3:
            found[name] = old[None] if draw(st.booleans()) else old.flatten()
        case 4:
            found[name] = old.flip(0)
        case _:
            number = draw(st.sampled_from([-1, 2**31 - 1, math.nan, math.inf, 0]))
            if old.dtype == torch.uint8:
                number = draw(st.sampled_from([0, 1, 255]))
            if math.isfinite(number) or old.is_floating_point():
                found[name] = torch.full_like(old, number)
    return found


@st.composite
def damaged(draw, valid: bytes) -> bytes:
    """A valid file with bytes flipped, cut off or put in; or bytes from nowhere."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=300))
    content = bytearray(valid)
    head = draw(st.booleans())  # half of the time near the beginning, where the structure is
    for _ in range(draw(st.integers(1, 4))):
        end = min(len(content), 400) if head else len(content)
        at = draw(st.integers(0, max(end - 1, 0)))
        match draw(st.integers(0, 3)):
            case 0 if content:
                content[at] = draw(st.integers(0, 255))
            case 1:
                del content[at:]
            case 2:
                content[at:at] = draw(st.binary(max_size=8))
            case _ if content:
                del content[at : at + draw(st.integers(1, 20))]
    return bytes(content)


@pytest.fixture(scope="module")
def valid(llama, tmp_path_factory):
    """One file of each kind as the package writes it."""
    folder = tmp_path_factory.mktemp("valid")
    scores = importance(llama, load_behaviour("privacy", n_examples=6), unit=("neuron", "weight"))
    scores.save(folder / "scores")
    chosen = Selection({Site(1, "neurons"): torch.tensor([3, 5])}, {Site(1, "neurons"): (40,)}, frozenset({"ab"}))
    chosen.save(folder / "selection")
    create_edit(llama, chosen).save(folder / "edit")
    gates = Gates({Site(1, "neurons"): torch.tensor([0.0] + 39 * [0.9])}, frozenset({"ab"}))
    create_gates_edit(llama, gates).save(folder / "gates edit")
    numbers = {f"{name}/a": torch.ones(3, 2) for name in ("log_prob", "kl")} | {"n_tokens/a": torch.ones(3, 2).long()}
    write_tensors(folder / "original.safetensors", "dean_interp.state.1", numbers, {"fingerprint": "x"})
    Unfinished(folder / "sums.unfinished", "x").keep({"sum": torch.ones(3)}, n_batches=2)
    published = {"prompt": "May I?", "response": "No.", "is_safe": True, "category": {"privacy_violation": True}}
    (folder / "published.jsonl").write_text(json.dumps(published) + "\n" + json.dumps(published | {"is_safe": False}))
    rows = [
        {"prompt": "May I?", "safe": "No.", "unsafe": "Yes.", "topic": "t"},
        {"prompt": "And now?", "response": "A"},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rows.csv").write_text('prompt,safe,unsafe\n"May I, now?",No.,"Yes\nthen."\nWhy?,B,C\n')
    (folder / "config.json").write_text(json.dumps({"study": {"n_test": 12, "model": "x"}, "data": {}}))
    return folder


def refused_or_read(read, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    before = set(path.parent.parent.rglob("*"))
    try:
        read(path)
    except InputError as error:
        assert len(str(error)) < 2000
    assert set(path.parent.parent.rglob("*")) == before


def used_scores(path: Path) -> None:
    scores = load_scores(path)
    assert repr(scores) and len(scores.to_pandas()) and scores.shapes
    for unit in scores.units:
        assert len(top_fraction(scores.of(unit), 0.02)) <= sum(value.numel() for value in scores.values.values())


def used_selection(path: Path) -> None:
    selection = load_selection(path)
    assert repr(selection) and len(selection.to_pandas()) == len(selection & selection) == len(selection)
    assert len(selection.fingerprint) == 16 and selection.layer_counts() is not None


def used_edit(path: Path) -> None:
    edit = load_edit(path)
    assert repr(edit) and len(stack(edit, edit)) == len(edit) and compare(edit, edit) is not None
    edit.hooked()


def used_gates_edit(path: Path) -> None:
    edit = load_edit(path)
    assert repr(edit) and len(edit.gates) <= len(edit) and compare(edit, edit) is not None
    with pytest.raises(InputError, match="cannot be stacked"):
        stack(edit, edit)
    edit.hooked()


def used_state(path: Path) -> None:
    load_measurement(path, [MEASURED], None, fingerprint="x").to_pandas()


MEASURED = Behaviour("a", tuple(Example(f"p {i}", {"safe": "a", "unsafe": "b"}) for i in range(3)), split="test")
READERS = {
    "scores": used_scores,
    "selection": used_selection,
    "edit": used_edit,
    "gates edit": used_gates_edit,
    "original.safetensors": used_state,
    "sums.unfinished": lambda path: Unfinished(path, "x").restore({"sum": torch.zeros(3)}),
    "rows.jsonl": load_behaviour,
    "rows.csv": load_behaviour,
    "published.jsonl": lambda path: load_behaviour(f"beavertails:privacy@{path}", n_examples=None),
    "config.json": lambda path: read_json(path, RunSettings[StudyConfig]),
}
TENSORS = ("scores", "selection", "edit", "gates edit", "original.safetensors", "sums.unfinished")


@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_read_or_refused(kind, valid, tmp_path, untyped):
    content = (valid / kind).read_bytes()
    folder = tmp_path / "in"
    folder.mkdir()

    @FUZZ
    @given(damaged(content))
    def check(given_bytes):
        refused_or_read(READERS[kind], folder / kind, given_bytes)

    check()


@pytest.mark.parametrize("kind", TENSORS)
def test_a_whole_file_that_holds_something_else_is_read_or_refused(kind, valid, tmp_path, untyped):
    with safe_open(valid / kind, framework="pt") as file:
        head = json.loads(file.metadata()["dean_interp"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    folder = tmp_path / "in"
    folder.mkdir()

    @FUZZ
    @given(st.data())
    def check(data):
        record, held = head, tensors
        if data.draw(st.booleans()):
            record = data.draw(altered(head))
        else:
            held = data.draw(altered_tensors(tensors))
        content = save({name: one.contiguous() for name, one in held.items()}, {"dean_interp": json.dumps(record)})
        refused_or_read(READERS[kind], folder / kind, content)

    check()


def test_an_edit_whose_digest_was_made_to_fit_is_refused_all_the_same(valid, tmp_path, untyped):
    """Whoever changes an edit can make its digest anew: what it does is checked as well."""
    edit = load_edit(valid / "edit")
    ((name, change),) = edit.changes.items()
    at = change.indices
    bad = {"indices": [at + 2**30, -at, at.flip(0), torch.zeros_like(at)],
           "old": [change.old * math.nan, change.old[1:]], "new": [change.new * math.inf, change.new[1:]],
           "shape": [(0, 24), (2**40, 2**40), (960,), (1, 2, 3)], "is_bias": [True]}  # fmt: skip
    for field, values in bad.items():
        for value in values:
            changed = dataclasses.replace(change, **{field: value})
            dataclasses.replace(edit, changes={name: changed}).save(tmp_path / "edit")
            with pytest.raises(InputError, match="is damaged"):
                load_edit(tmp_path / "edit")


@pytest.mark.parametrize("kind", ["model.safetensors", "model.safetensors.index.json"])
def test_a_damaged_checkpoint_is_edited_or_refused_and_nothing_is_left(kind, checkpoints, valid, tmp_path, untyped):
    folder, edit = tmp_path / "in", load_edit(valid / "edit")
    shutil.copytree(checkpoints["llama-gqa"], folder)
    names = safe_open(folder / "model.safetensors", framework="pt").keys()
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")})
    (folder / "model.safetensors.index.json").write_text(index)
    content = (folder / kind).read_bytes()

    @FUZZ
    @given(damaged(content) | altered(json.loads(index)).map(lambda one: json.dumps(one).encode()))
    def check(given_bytes):
        (folder / kind).write_bytes(given_bytes)
        with suppress(InputError):
            checkpoint_state(folder, edit)
            apply_edit_to_checkpoint(folder, edit, tmp_path / "out")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert [path.name for path in tmp_path.iterdir()] == ["in"]

    check()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"prompt":' * 100_000, '{"prompt": ' + "9" * 5000 + "}", "NaN"],
                         ids=["lists", "objects", "a long number", "NaN"])  # fmt: skip
def test_json_that_breaks_readers_is_a_bad_row_or_a_damaged_file(text, tmp_path):
    for name, read in {
        "a.jsonl": load_behaviour,
        "results.json": load_results,
        "c.json": READERS["config.json"],
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError):
            read(tmp_path / name)
    (tmp_path / "a.safetensors").write_bytes(save({"L0.neurons": torch.zeros(1)}, {"dean_interp": text}))
    for load in (load_scores, load_selection, load_edit):
        with pytest.raises(InputError):
            load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "name", ["x" * 5000, "x" * 300 + ".csv", "a\0b.jsonl", "a:b@" + "y" * 5000, "..", "", "/", "~"]
)
def test_a_name_that_no_file_can_have_is_refused(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError):
        load_behaviour(name)


def test_a_weight_file_that_would_run_code_runs_none(checkpoints, tmp_path):
    """Weights in `.bin` are read by `transformers` with the reader of torch that runs nothing."""

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "hit",)

    shutil.copytree(checkpoints["llama-gqa"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load the model"):
        load_model(tmp_path / "model", device="cpu")
    assert not (tmp_path / "hit").exists()


def test_modelling_code_that_comes_with_a_checkpoint_is_not_run(checkpoints, tmp_path):
    shutil.copytree(checkpoints["llama-gqa"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'hit')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(InputError, match="cannot load the model"):
        load_model(tmp_path / "model", device="cpu")
    assert not (tmp_path / "hit").exists()


def test_results_that_are_any_json_are_refused(tmp_path):
    path = tmp_path / "in" / "results.json"
    path.parent.mkdir()

    @FUZZ
    @given(JSON)
    def check(content):
        with pytest.raises(InputError):
            refused = json.dumps(content).encode()
            path.write_bytes(refused)
            load_results(path)

    check()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "a/../../x", "sub/model.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(name, llama, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    edit = create_edit(llama, Selection({Site(1, "neurons"): torch.tensor([3])}, {Site(1, "neurons"): (40,)}))
    with pytest.raises(InputError):
        apply_edit_to_checkpoint(folder, edit, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".", "..", "a\0b", "a\nb", "x" * 300, "\udcff"])
def test_a_name_that_would_be_a_path_is_refused(name):
    with pytest.raises(InputError, match="a behaviour's name is in file names"):
        Behaviour(name, (Example("p", {"safe": "a"}),))


def test_no_source_runs_what_a_file_holds():
    assert len(SOURCES) > 80, "the package and its analyses"
    banned = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {one.name.split(".")[0] for one in node.names} | {
                    (getattr(node, "module", "") or "").split(".")[0]
                }
                assert not names & banned, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "yaml.load", "os.system", "__import__"), path
                for one in node.keywords:
                    assert not (one.arg == "shell" and ast.unparse(one.value) == "True"), path
                    assert not (one.arg == "trust_remote_code" and ast.unparse(one.value) == "True"), path
            if isinstance(node, ast.FunctionDef):
                defaults = dict(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
                for argument, default in defaults.items():
                    if argument.arg == "trust_remote_code":
                        assert default is not None and ast.unparse(default) == "False", path


def test_a_file_beside_a_folder_of_its_name_is_written_while_the_folder_is_filled(tmp_path):
    """Both were made in `edit.part`: writing `edit.json` deleted what the folder held so far."""
    with atomic_folder(tmp_path / "edit") as filled:
        (filled / "weights").write_text("kept")
        write_json(tmp_path / "edit.json", {"a": 1})
    assert (tmp_path / "edit" / "weights").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edit", "edit.json"]


def test_numbers_that_are_not_finite_come_back_from_lists_and_mappings_too(tmp_path):
    """They became null there, and what had been written was called damaged."""
    path = tmp_path / "numbers.json"
    numbers = {"high": [math.inf], "low": [-math.inf, 0.5]}
    write_json(path, numbers)
    assert read_json(path, dict[str, list[float]]) == numbers
    write_json(path, [math.nan])
    assert math.isnan(read_json(path, list[float])[0])


def test_one_tensor_at_two_sites_is_written_for_both(tmp_path):
    sites = [Site(0, "neurons"), Site(1, "neurons")]
    every, gates = torch.arange(4), Gates(dict.fromkeys(sites, torch.ones(4)))
    selection = Selection(dict.fromkeys(sites, every), dict.fromkeys(sites, (4,)))
    selection.save(tmp_path / "selection.safetensors")
    gates.save(tmp_path / "gates.safetensors")
    assert load_selection(tmp_path / "selection.safetensors").fingerprint == selection.fingerprint
    assert load_gates(tmp_path / "gates.safetensors").fingerprint == gates.fingerprint
