"""The documentation: the tutorial does what it says, command lines parse, the site builds without a warning."""

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import dean_interp
from dean_interp.cli.arguments import parsed
from dean_interp.study.improve import run_improve

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[+−-]?\d+(?:\.\d+)?")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return FENCED.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `dean-interp` in a block of shell, a line each; comments and alternatives in braces go."""
    shell = "".join(text for language, text in blocks(page) if language in ("bash", "") and "dean-interp" in text)
    lines = [re.sub(r"\s#\s.*", "", line).strip() for line in shell.replace("\\\n", " ").splitlines()]
    calls = [part for line in lines for part in re.split(r"; (?:do )?|&& ", line) if "dean-interp " in part]
    return [shlex.split(call.partition("dean-interp ")[2].rstrip("&")) for call in calls]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_every_command_line_in_the_documentation_parses(page):
    for arguments in commands(page):
        parsed(arguments)


def python(page: Path) -> list[str]:
    """The text of every block of Python."""
    return [text for language, text in blocks(page) if language == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if python(page)], ids=lambda page: page.stem)
def test_every_python_block_compiles(page):
    for text in python(page):
        compile(text, str(page), "exec")


@pytest.mark.slow
def test_the_tutorial_runs_and_prints_what_it_says(demo_model, tmp_path, monkeypatch):
    """Blocks in order, in one namespace; the block of text after one is its output. Numbers are near, words equal."""
    monkeypatch.chdir(tmp_path)
    namespace, said = {}, None
    for language, text in blocks(ROOT / "docs" / "tutorial.md"):
        if language == "text":
            assert NUMBER.sub("#", said) == NUMBER.sub("#", text)
            given, expected = ([float(one.replace("−", "-")) for one in NUMBER.findall(some)] for some in (said, text))
            assert given == pytest.approx(expected, rel=0.02, abs=0.01)
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(text, "docs/tutorial.md", "exec"), namespace)  # our own page
            said = printed.getvalue()
    assert (tmp_path / "neuron.html").is_file() and (tmp_path / "edit.safetensors").is_file()


@pytest.mark.long
def test_the_blocks_of_the_readme_run_as_printed(demo_model, tmp_path, monkeypatch, capsys):
    """The blocks in order, in one namespace and an empty folder; only the improvement has fewer examples."""

    def smaller(config, folder):
        sizes = {"n_score": 8, "n_choose": 4, "n_confirm": 8, "n_flips": 2, "n_random": 1}
        answers = replace(config.answers, n_answers=2, over_refusal=())
        return run_improve(replace(config, **sizes, answers=answers), folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dean_interp, "run_improve", smaller)
    namespace = {}
    for text in python(ROOT / "README.md"):
        exec(compile(text, "README.md", "exec"), namespace)  # our own page
    improvement, information = namespace["improvement"], namespace["information"]
    said = capsys.readouterr().out
    assert improvement.headline in said and str(information) in said
    assert (tmp_path / "runs" / "mine" / "gates.safetensors").is_file()


@pytest.mark.slow
def test_the_site_builds_strictly_and_its_reference_is_the_docstrings(tmp_path):
    if importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "reference" / "scoring.html").read_text(encoding="utf-8")
    reference = "".join(one.read_text(encoding="utf-8") for one in (tmp_path / "reference").glob("*.html"))
    assert not [name for name in dean_interp.__all__ if f'id="dean_interp.{name}"' not in reference]
    assert "Score every unit of the model for one behaviour, by gradients at hook points." in page
    loaded = re.findall(r'<(?:link|script|img)[^>]*(?:href|src)="(https?://[^"]*)"', page)
    assert not loaded, "a page loads nothing from a network"
