"""Files from anywhere: whatever they hold, they are read, or refused in our own words, and nothing else happens."""

import ast
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dean_interp import (
    Behaviour,
    Example,
    InputError,
    Selection,
    Site,
    apply_to_checkpoint,
    create_edit,
    importance,
    load_behaviour,
    load_edit,
    load_scores,
    load_selection,
)
from dean_interp.study.results import load_results
from dean_interp.study.states import stored_log_probs
from dean_interp.study.verify import _Begun
from dean_interp.tensorfile import read_json, write_tensors

N_INPUTS = int(os.environ.get("DEAN_INTERP_FUZZ", "120"))
"""Inputs of each kind; the long form is `DEAN_INTERP_FUZZ=10000 pytest tests/test_hostile.py`."""
FUZZ = settings(max_examples=N_INPUTS, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))  # fmt: skip
SOURCES = sorted(Path(__file__).parents[1].glob("dean_interp/**/*.py")) + sorted(
    Path(__file__).parents[1].glob("analyses/*.py")
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


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
    write_tensors(folder / "original.safetensors", "dean_interp.state.1", {"log_prob/a": torch.ones(2, 2)},
                  {"fingerprint": "x"})  # fmt: skip
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


READERS = {
    "scores": load_scores,
    "selection": load_selection,
    "edit": load_edit,
    "original.safetensors": lambda path: stored_log_probs(path.parent, "original", "a"),
    "rows.jsonl": load_behaviour,
    "rows.csv": load_behaviour,
    "config.json": lambda path: read_json(path, _Begun),
}


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


@pytest.mark.parametrize("kind", ["scores", "selection", "edit"])
def test_hostile_facts_in_a_whole_file_are_refused(kind, valid, tmp_path, untyped):
    form = {"scores": "dean_interp.scores.2", "selection": "dean_interp.selection.1", "edit": "dean_interp.edit.1"}[
        kind
    ]
    folder = tmp_path / "in"
    folder.mkdir()

    @FUZZ
    @given(st.dictionaries(st.sampled_from(["behaviour", "fingerprint", "prompt_hashes", "tops", "facts", "shapes",
                                            "changes", "digest"]), JSON), st.text(max_size=10))  # fmt: skip
    def check(facts, name):
        path = folder / kind
        try:
            write_tensors(path, form, {f"values/{name}": torch.ones(3)}, facts)
        except (InputError, ValueError):
            return
        refused_or_read(READERS[kind], path, path.read_bytes())

    check()


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
def test_an_index_that_leads_out_of_its_folder_is_refused(name, llama, checkpoints, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    edit = create_edit(llama, Selection({Site(1, "neurons"): torch.tensor([3])}, {Site(1, "neurons"): (40,)}))
    with pytest.raises(InputError):
        apply_to_checkpoint(edit, folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".", "..", "a\0b", "a\nb", "x" * 300])
def test_a_name_that_would_be_a_path_is_refused(name):
    with pytest.raises(InputError, match="a behaviour's name is in file names"):
        Behaviour(name, (Example("p", {"safe": "a"}),))


def test_no_source_runs_what_a_file_holds():
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
