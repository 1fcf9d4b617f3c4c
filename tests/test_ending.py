"""How commands end, whatever happens: one exit code, at most one line, only the result on standard output."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dean_interp import progress, show_progress
from dean_interp.cli import data, main
from dean_interp.cli.arguments import parsed
from dean_interp.cli.help_examples import EXAMPLES
from dean_interp.cli.step_result import StepResult
from dean_interp.cli.terminal import fit_for_reader
from dean_interp.errors import InputError
from dean_interp.progress import progress_bar

ANALYSES = Path(__file__).parents[1] / "analyses"
COMMANDS = sorted(EXAMPLES)


@pytest.fixture
def step_that(monkeypatch):
    """Put something in the place of what a step does."""
    return lambda does: monkeypatch.setattr(main, "do", lambda step, talk: does())


def fails(error: BaseException):
    def does():
        raise error

    return does


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("fraction must be in (0, 1], got 0"), 2, "dean-interp: fraction must be in (0, 1], got 0"),
        (KeyboardInterrupt(), 130, "dean-interp: interrupted; what was written is kept, and the same command goes on"),
        (KeyError("gone"), 70, "dean-interp: internal error: KeyError: 'gone'; run again with --debug for the trace"),
    ],
)
def test_an_error_is_one_line_and_its_trace_is_there_on_request(step_that, capsys, error, code, line):
    step_that(fails(error))
    assert main.main(["data", "show", "privacy"]) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(line) and said.err.count("\n") == 1
    assert main.main(["data", "show", "privacy", "--debug"]) == code
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.splitlines()[-1].startswith(line)


def test_wrong_arguments_are_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["couple", "a", "b", "c"])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and "--out" in said.err


START = "import sys; from dean_interp.cli.entry import start; sys.exit(start())"
"""What the command `dean-interp` runs."""


@pytest.mark.parametrize("words", [[], ["data", "show", "privacy"]])
def test_output_that_is_closed_before_its_end_is_silent(words):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", START, *words]
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 141
    assert "dean-interp:" not in done.stderr and "BrokenPipe" not in done.stderr


def test_help_in_a_pipe_has_no_colours_and_says_nothing_else():
    command = [sys.executable, "-c", START, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "TERM": "xterm"})
    assert "\x1b" not in done.stdout and done.stdout.endswith("as `head` does\n")
    assert done.stderr == ""


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_help_on_a_terminal_has_colours_unless_no_color_is_set(monkeypatch, capsys, no_color, coloured):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    with pytest.raises(SystemExit):
        main.main(["--help"])
    assert ("\x1b[" in capsys.readouterr().out) is coloured


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_ends_with_examples_that_can_be_parsed(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main([*name.split(), "--help"])
    assert stop.value.code == 0
    examples = EXAMPLES[name]
    shown = "\n".join(["examples:", *(f"  {one}" for one in examples)])
    said = capsys.readouterr().out
    assert said.endswith(f"{shown}\n") if name else f"{shown}\n\nexit codes:\n" in said
    assert 1 <= len(examples) <= 3
    for example in examples:
        program, *words = shlex.split(example)
        assert program == "dean-interp" and words[: len(name.split())] == name.split()
        plain, machine = (parsed([*words, *more]) for more in ((), ("--json", "--debug")))
        assert machine.json and machine.debug and machine.step == plain.step


def printed(capsys, arguments):
    """What the parser prints for these arguments."""
    with pytest.raises(SystemExit):
        parsed(arguments)
    return capsys.readouterr().out


def test_a_shell_is_offered_options_and_commands_and_no_piece_of_a_help_text(capsys):
    script = printed(capsys, ["--tyro-print-completion", "bash"])
    program = script.partition("<< 'PYTHON_EOF'")[2].partition("\n")[2].partition("\nPYTHON_EOF\n")[0]
    found = {"__name__": "completion"}
    exec(program, found)
    for name in COMMANDS:
        offered = found["get_completions"](
            ["dean-interp", *name.split(), ""], 1 + len(name.split()), found["COMPLETION_SPEC"]
        )
        assert len(offered) >= 2
        for line in offered:
            word, tab, about = line.partition("\t")
            assert tab and (re.fullmatch("-h|--[a-z-]+", word) or f"{name} {word}".strip() in EXAMPLES), line
            assert "\n" not in about, line


def test_help_breaks_no_line_but_where_its_width_ends(capsys):
    shown = printed(capsys, ["improve", "--help"])
    said = " ".join(re.sub("[│╭╰─╮╯]", " ", shown).split())
    assert "they come in pairs. Below 20, p cannot reach 0.05. 0: none" in said
    assert not re.search(r"in pairs\. +│\n", shown) and "Below\n" not in shown
    assert "Unset: the test prompts of first and second. (default: none)" in said


def test_every_command_has_examples(capsys):
    for name in ("", "data", "edit"):
        with pytest.raises(SystemExit):
            main.main([*name.split(), "--help"])
        steps = re.search(r"\{([a-z,]+)\}", capsys.readouterr().out).group(1).split(",")
        assert {f"{name} {step}".strip() for step in steps} <= {*COMMANDS}


def test_json_is_all_there_is_on_standard_output(monkeypatch, capsys):
    load = data.load_behaviour

    def loud(*args, **options):
        sys.stdout.write("a library's greeting\n")
        return load(*args, **options)

    monkeypatch.setattr(data, "load_behaviour", loud)
    for command in (["data", "show", "privacy"], ["data", "audit", "over_refusal_privacy"]):
        assert main.main([*command, "--json"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out) and "a library's greeting" in said.err


def test_a_number_that_json_does_not_have_is_null(step_that, capsys):
    step_that(lambda: StepResult({"rank": float("nan"), "where": "café"}, ""))
    assert main.main(["report", "runs/study", "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"rank": None, "where": "café"}


def test_progress_in_a_log_is_whole_lines_of_which_none_is_written_twice(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    for _ in progress_bar(range(2), desc="outer"):
        with progress_bar(total=1, desc="inner", leave=False) as bar:
            bar.update()
    with fit_for_reader():
        from transformers.utils.logging import tqdm

        list(tqdm(range(1), desc="weights"))
    said = capsys.readouterr().err
    assert "\r" not in said and "\x1b" not in said and said.endswith("\n")
    lines = said.splitlines()
    assert len({*lines}) >= 7 and all(
        re.fullmatch(r"(outer|inner|weights): +\d+%\| \d/\d \[.*\]", line) for line in lines
    )
    assert sum(line.startswith("outer: 100%") for line in lines) == 1


@pytest.mark.timing
def test_progress_in_a_log_is_a_line_with_the_time_left_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.2)
    for _ in progress_bar(range(3), desc="slow", leave=False):
        for _ in progress_bar(range(100), desc="fast", leave=False):
            pass
        time.sleep(0.25)
    lines = [line.strip() for line in capsys.readouterr().err.split("\n")]
    assert re.fullmatch(r"slow:  33%\| 1/3 \[\d\d:\d\d<\d\d:\d\d, .*\]", lines[0]), lines
    assert "\x1b" not in "".join(lines) and "fast" not in "".join(lines) and len(lines) <= 4


def test_progress_on_a_terminal_is_a_bar_from_the_first_step(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(total=1, desc="bar", unit="row") as bar:
        bar.update()
    shown = capsys.readouterr().err
    assert "bar:   0%|" in shown and "bar: 100%|███" in shown and "row" in shown and shown.count("\r") >= 2


def test_bars_of_transformers_keep_to_the_log_within_a_command_only(capsys):
    from transformers.utils.logging import tqdm

    with fit_for_reader():
        list(tqdm(range(3), desc="loading"))
    assert capsys.readouterr().err == ""
    list(tqdm(range(3), desc="loading"))
    assert "loading: 100%" in capsys.readouterr().err


def test_progress_is_switched_off_by_the_environment_or_by_a_call_which_goes_first(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "_shown", None)
    monkeypatch.setenv("DEAN_INTERP_PROGRESS", "0")
    list(progress_bar(range(3), desc="silent"))
    show_progress(True)
    list(progress_bar(range(3), desc="asked for"))
    monkeypatch.setenv("DEAN_INTERP_PROGRESS", "1")
    show_progress(False)
    list(progress_bar(range(3), desc="silent"))
    shown = capsys.readouterr().err
    assert "asked for" in shown and "silent" not in shown


def test_only_rank_0_shows_progress(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "is_rank0", lambda: False)
    monkeypatch.setattr(progress, "_shown", True)
    list(progress_bar(range(3), desc="silent"))
    assert capsys.readouterr().err == ""


def test_an_analysis_ends_as_the_command_does(monkeypatch, capsys, tmp_path):
    script = str(ANALYSES / "coupling_by_fraction.py")
    for more, first in (([], "coupling_by_fraction.py: "), (["--debug"], "Traceback")):
        monkeypatch.setattr(sys, "argv", [script, str(tmp_path), "weight", *more])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(script, run_name="__main__")
        said = capsys.readouterr()
        assert stop.value.code == 2 and said.out == "" and said.err.startswith(first)
        assert "must hold the scores of two behaviours and of general, got []" in said.err.splitlines()[-1]


@pytest.mark.parametrize("path", sorted(ANALYSES.glob("*.py")), ids=lambda path: path.stem)
def test_every_analysis_ends_through_the_same_door(path):
    assert path.read_text().splitlines()[-2:][0] == 'if __name__ == "__main__":'
    assert path.read_text().splitlines()[-1].startswith("    script(")
