"""Everything a user can get wrong is one line on standard error and exit code 2, before any long work."""

from pathlib import Path

import pytest

from dean_interp import InputError, load_behaviour
from dean_interp.cli.main import main
from dean_interp.data import readers
from dean_interp.study import settings


@pytest.fixture
def no_model_is_read(monkeypatch):
    """Bad data must be found before a model is loaded."""
    monkeypatch.setattr(settings, "load_model", lambda *args, **options: pytest.fail("a model was loaded first"))


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1, error
    return lines[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--first", "gone.csv"], "no file gone.csv"),
        (["--first", "fairnes"], "no behaviour 'fairnes'"),
        (["--neuron-fraction", "0"], "--neuron-fraction must be in (0, 1], got 0"),
        (["--neuron-fraction", "7"], "--neuron-fraction must be in (0, 1], got 7"),
        (["--n-calibration", "900"], "n_examples=900"),
        (["--model", "nobody/nothing"], "cannot load the model 'nobody/nothing'"),
        (["--model", "gone.gguf"], "no file gone.gguf"),
    ],
)
def test_each_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, options, said):
    assert main(["run", "--out", str(tmp_path / "run"), *options]) == 2
    line = one_line(capsys)
    assert line.startswith("dean-interp: ")
    assert said in line


def test_a_bad_row_is_named_by_file_and_line(tmp_path, capsys, no_model_is_read):
    path = tmp_path / "mine.csv"
    path.write_text("prompt,safe,unsafe\nfine?,yes,no\nblank?,,no\n")
    assert main(["run", "--out", str(tmp_path / "run"), "--first", str(path)]) == 2
    assert f"{path}: line 3: safe is blank" in one_line(capsys)


def test_an_empty_behaviour_and_one_without_pairs_are_named(tmp_path, capsys, no_model_is_read):
    empty, single = tmp_path / "empty.csv", tmp_path / "single.csv"
    empty.write_text("prompt,safe,unsafe\n")
    assert main(["run", "--out", str(tmp_path / "run"), "--first", str(empty)]) == 2
    assert "empty (calibration split) has no examples" in one_line(capsys)
    single.write_text("prompt,response\n" + "".join(f"question {i}?,answer\n" for i in range(400)))
    assert main(["run", "--out", str(tmp_path / "run"), "--first", str(single)]) == 2
    assert "needs the columns prompt,safe,unsafe" in one_line(capsys)


def test_a_fraction_that_selects_nothing_says_which_would(tmp_path, capsys, checkpoints):
    options = ["--model", str(checkpoints["llama"]), "--n-calibration", "2", "--device", "cpu"]
    assert main(["run", "--out", str(tmp_path / "a"), *options, "--neuron-fraction", "0.001"]) == 2
    assert "fraction 0.001 selects no unit; 0.025 selects one of 40" in capsys.readouterr().err.splitlines()[-1]


def test_a_selection_that_comes_out_empty_says_which_fraction_would_not(tmp_path, capsys, checkpoints):
    """A user's own behaviours, all three with the same examples: what matters to both matters to general too."""
    rows = "".join(f'{{"prompt": "question {i}?", "safe": "yes {i}", "unsafe": "no"}}\n' for i in range(60))
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.jsonl").write_text(rows)
    sources = [f"--{role}={tmp_path / name}.jsonl" for role, name in
               (("first", "one"), ("second", "two"), ("general", "three"))]  # fmt: skip
    sizes = ["--n-calibration", "12", "--n-test", "12", "--n-general-test", "12", "--device", "cpu"]
    model = ["--model", str(checkpoints["llama"])]
    assert main(["run", "--out", str(tmp_path / "run"), *model, *sources, *sizes, "--neuron-fraction", "0.1"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "no coupled unit at fraction 0.1" in last and "no fraction gives one" in last


def test_a_mistake_does_not_keep_the_folder_from_the_corrected_command(tmp_path, capsys, checkpoints):
    options = [
        "run",
        "--out",
        str(tmp_path / "run"),
        "--n-calibration",
        "2",
        "--device",
        "cpu",
        "--neuron-fraction",
        "0.001",
    ]
    assert main([*options, "--model", "nobody/nothing"]) == 2
    assert main([*options, "--model", str(checkpoints["llama"])]) == 2
    assert "fraction 0.001 selects no unit" in capsys.readouterr().err.splitlines()[-1]


def test_a_report_of_nothing_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "results.json is missing" in one_line(capsys)


def test_the_built_in_names_are_the_files_of_the_package_and_those_that_the_error_lists():
    files = sorted(path.stem for path in (Path(readers.__file__).parent / "builtin").glob("*.jsonl"))
    assert "fairness" in files and sorted(readers.BUILTIN) == files
    with pytest.raises(InputError, match="no behaviour 'fairnes'") as error:
        load_behaviour("fairnes")
    listed = str(error.value).partition(": give ")[2].partition(", a .csv")[0]
    assert sorted(listed.split(", ")) == files
    for name in files:
        assert len(load_behaviour(name, n_examples=4, split="test")) == 4
