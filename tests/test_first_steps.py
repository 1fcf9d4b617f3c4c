"""The first five minutes: what stands on the screen of somebody who mistypes, on any terminal and any code page."""

import ast
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from dean_interp import InputError, load_behaviour
from dean_interp.cli import main as entry
from dean_interp.cli.arguments import parsed
from dean_interp.cli.columns import fitted
from dean_interp.cli.entry import OVERVIEW, start
from dean_interp.cli.step_result import StepResult
from dean_interp.data.examples import load_behaviour as load
from dean_interp.errors import did_you_mean
from dean_interp.evaluation.judges.make import make_judge
from dean_interp.study.settings import ModelConfig

PACKAGE = Path(__file__).parents[1] / "dean_interp"
TABLE = """\
measured:

            original          edit        change      p
  fairness     -0.39         -0.27  +0.12 [0.07]   2e-4
  privacy       0.03          0.18  +0.14 [0.10]  0.001

A sentence that is wider than a narrow terminal stays in one piece, so that it can be copied."""


# What is printed without a command, and for a wrong one.


def test_the_command_alone_shows_three_commands_to_try(capsys):
    assert start([]) == 0
    assert capsys.readouterr().out == f"{OVERVIEW}\n"
    tried = re.findall(r"^  (dean-interp .*?)(?:  |$)", OVERVIEW, re.MULTILINE)
    steps = [line for line in tried if not re.search("--(help|version)", line)]
    assert len(steps) == 3 and len(tried) == 6
    for line in steps:
        assert parsed(shlex.split(line)[1:])
    assert max(map(len, OVERVIEW.splitlines())) <= 80


def test_the_version_is_said_without_a_step(capsys):
    assert start(["--version"]) == 0
    assert capsys.readouterr().out == f"dean-interp {version('dean_interp')}\n"


@pytest.mark.parametrize("command", [[], ["improve"], ["edit", "create"]])
def test_help_may_stand_before_a_command(command, capsys):
    shown = []
    for words in (["help", *command], [*command, "--help"]):
        with pytest.raises(SystemExit) as stop:
            start(words)
        assert stop.value.code == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and " ".join(["usage: dean-interp", *command]) in shown[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["improve", "--n-scor", "3"],
            "'improve' has no option --n-scor (did you mean '--n-score'?): see dean-interp improve",
        ),
        (["improve", "--n-scor=3"], "'improve' has no option --n-scor (did you mean '--n-score'?): see"),
        (["improve", "--frist", "privacy"], "'improve' has no option --frist (did you mean '--first'?): see"),
        (
            ["data", "show", "privacy", "--n-score", "3"],
            "'data show' has no option --n-score: see dean-interp data show",
        ),
        (["--jsn", "data", "show", "privacy"], "'data show' has no option --jsn (did you mean '--json'?)"),
        (
            ["improve", "runs/x"],
            "'improve' has no place for 'runs/x'; a value follows the name of its option, such as --out",
        ),
        (["verify", "runs/x", "y"], "'verify' has no place for 'y'; a value follows the name of its option: see"),
    ],
)
def test_a_word_that_has_no_place_is_told_the_options_of_its_own_command(given, said, capsys):
    assert entry.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dean-interp: {said}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["improv"], "no command 'improv' (did you mean 'improve'?)"),
        (["edit", "creat"], "no command 'edit creat' (did you mean 'create'?)"),
        (["data", "shw", "privacy"], "no command 'data shw' (did you mean 'show'?)"),
    ],
)
def test_a_mistyped_command_is_told_the_nearest(capsys, given, said):
    with pytest.raises(SystemExit) as stop:
        entry.main(given)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"dean-interp: {said}"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_of_a_shell_knows_every_command(capsys, shell):
    with pytest.raises(SystemExit):
        entry.main(["--tyro-print-completion", shell])
    script = capsys.readouterr().out
    assert "improve" in script and "information" in script and "max-kl" in script


# The nearest name.


def test_the_nearest_name_is_told_where_one_is_near():
    assert did_you_mean("fairnes", ["privacy", "fairness"]) == " (did you mean 'fairness'?)"
    assert did_you_mean("FAIRNESS", ["privacy", "fairness"]) == " (did you mean 'fairness'?)"
    assert did_you_mean("colour", ["privacy", "fairness"]) == ""


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("fairnes", "fairness"),
        ("beavertail:fairness", "beavertails"),
        ("beavertails:fairnes", "fairness"),
        ("paper:fairnes@folder", "fairness"),
    ],
)
def test_a_mistyped_behaviour_is_told_the_nearest(source, meant):
    with pytest.raises(InputError, match=re.escape(f"(did you mean '{meant}'?)")):
        load_behaviour(source)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("promt,safe,unsafe", "'promt' (did you mean 'prompt'?)"),
        ("prompt,saef,unsaef", "'saef' (did you mean 'safe'?), 'unsaef' (did you mean 'unsafe'?)"),
        ("prompt,safe,unsafe,topics", "the column 'topics' must be written 'topic'"),
        ("prompt,safe,unsafe,splits", "the column 'splits' must be written 'split'"),
    ],
)
def test_a_mistyped_column_is_told_the_nearest(tmp_path, columns, said):
    """A topic or a split under another name would be left out without a word, and intervals would be too narrow."""
    path = tmp_path / "mine.csv"
    path.write_text(f"{columns}\n" + ",".join("abcd"[: columns.count(",") + 1]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(said)):
        load(str(path))


def test_a_column_that_is_nearly_one_that_is_there_means_nothing(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("prompt,safe,unsafe,topic,topics\na,b,c,d,e\n", encoding="utf-8")
    (example,) = load(str(path), n_examples=None, split=None).examples
    assert example.topic == "d"


def test_a_mistyped_model_and_judge_are_told_the_nearest():
    with pytest.raises(InputError, match=re.escape("(did you mean 'smollm2-135m-instruct'?)")):
        ModelConfig("smolm2-135m-instruct").load()
    with pytest.raises(InputError, match=re.escape("(did you mean 'lexical'?)")):
        make_judge("lexcal")


def test_a_task_that_does_not_exist_is_told_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(ModelConfig, "load", lambda self: pytest.fail("a model was loaded first"))
    assert entry.main(["run", "--tasks", "arc_eazy", "--out", str(tmp_path / "run")]) == 2
    assert "no task 'arc_eazy'; near names: arc_easy" in capsys.readouterr().err


# Narrow terminals.


@pytest.mark.parametrize("width", [30, 40, 60])
def test_a_table_fits_into_a_narrow_terminal_with_every_number_beside_its_name(width):
    shown = fitted(TABLE, width).splitlines()
    sentence = TABLE.splitlines()[-1]
    assert sentence in shown and max(len(line) for line in shown if line != sentence) <= width
    for name, numbers in (("fairness", "-0.39 -0.27 +0.12 [0.07] 2e-4"), ("privacy", "0.03 0.18 +0.14 [0.10] 0.001")):
        rows = [line.split(name, 1)[1] for line in shown if name in line]
        assert " ".join(" ".join(rows).split()) == numbers


def test_columns_stand_below_a_name_that_leaves_no_room():
    table = "model.layers.0.mlp.down_proj.weight      12      34\nmodel.layers.1.mlp.down_proj.weight       5      67"
    shown = fitted(table, 36).splitlines()
    assert shown[0] == "model.layers.0.mlp.down_proj.weight" and shown[1].split() == ["12", "34"]
    assert max(map(len, shown)) <= 36 and len(shown) == 4


def test_what_fits_and_what_is_no_table_is_left_as_it_is():
    assert fitted(TABLE, 200) == TABLE
    assert fitted("a sentence and no table\n\nanother", 8) == "a sentence and no table\n\nanother"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_tables_are_folded_for_a_terminal_alone(monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(entry, "do", lambda step, talk: StepResult({}, TABLE))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("COLUMNS", "40")
    assert entry.main(["report", "runs/study"]) == 0
    assert capsys.readouterr().out == f"{fitted(TABLE, 40) if is_terminal else TABLE}\n"


@pytest.mark.parametrize("width", [40, 60])
def test_help_fits_into_a_narrow_terminal(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        entry.main(["edit", "card", "--help"])
    _, _, options = capsys.readouterr().out.partition("examples:")[0].partition("positional arguments")
    lines = options.splitlines()
    assert len(lines) > 10 and max(map(len, lines)) <= width


# Code pages and file systems.

PRINTED = """
import sys
from dean_interp.cli.entry import start
for arguments in ([], ["--help"], ["improve", "--help"], ["data", "show", "privacy"], ["improv"],
                  ["data", "show", "√.csv"], ["data", "show", "fairnes"], ["--tyro-print-completion", "bash"]):
    try:
        code = start(arguments)
    except SystemExit as stop:
        code = stop.code or 0
    print(f"code {code}")
"""


@pytest.mark.parametrize("encoding", ["cp1252", "cp437"])
def test_everything_is_printed_on_any_code_page(encoding, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PRINTED, encoding="utf-8")
    environment = {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(PACKAGE.parent), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, program], capture_output=True, env=environment, check=True, cwd=tmp_path)
    said = done.stdout.decode(encoding)
    assert re.findall(r"^code (\d+)", said, re.MULTILINE) == ["0", "0", "0", "0", "2", "2", "2", "0"]
    assert b"UnicodeEncodeError" not in done.stderr and "improve" in said


def calls_without_an_encoding(path: Path) -> list[str]:
    """Calls that read or write text in the code page of the machine."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        is_ours = isinstance(node.func, ast.Name) and name != "open"
        of_os = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "os"
        if name not in ("open", "read_text", "write_text") or is_ours or of_os:
            continue
        is_binary = any(isinstance(value, ast.Constant) and value.value in ("rb", "wb", "r+b") for value in node.args)
        if not is_binary and not any(keyword.arg == "encoding" for keyword in node.keywords):
            found.append(f"{path.name}, line {node.lineno}")
    return found


def test_every_text_file_is_read_and_written_as_utf_8(tmp_path):
    sources = [*PACKAGE.rglob("*.py")]
    for folder in ("analyses", "benchmarks"):
        sources += (PACKAGE.parent / folder).glob("*.py")
    assert len(sources) > 100
    assert [place for path in sources for place in calls_without_an_encoding(path)] == []
    wrong = tmp_path / "wrong.py"
    lines = ["path.read_text()", "open(path)", "open(path, 'rb')", "path.write_text('', encoding='utf-8')"]
    wrong.write_text("\n".join(lines), encoding="utf-8")
    assert calls_without_an_encoding(wrong) == ["wrong.py, line 1", "wrong.py, line 2"]


def test_no_file_of_a_study_has_a_name_that_windows_forbids(finished_study):
    folder, _ = finished_study
    names = [path.name for path in folder.rglob("*")]
    assert len(names) > 20
    assert [name for name in names if re.search(r'[<>:"\\|?*]|[ .]$', name)] == []
