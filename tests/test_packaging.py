"""What is installed: the wheel holds what the package reads, and nothing of this repository beside it."""

import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USER = """
from dean_interp import Selection, load_behaviour, load_model, importance, top_fraction

scores = importance(load_model("x"), load_behaviour("fairness"))
selection: Selection = top_fraction(scores, 0.01)
wrong: int = top_fraction(scores, 0.01)
"""


def built(source: Path, out: Path, kind: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (path,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


def test_the_wheel_holds_the_package_whole_and_alone(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    there = (path for path in (ROOT / "dean_interp").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert packed == {path.relative_to(ROOT).as_posix() for path in there}
    tracked = subprocess.run(["git", "ls-files", "dean_interp"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0 and tracked.stdout:
        assert packed == set(tracked.stdout.split())
    for read in ("py.typed", "report/style.css", "report/report.html.j2", "evaluation/judges/lexical_judge.toml"):
        assert f"dean_interp/{read}" in packed
    assert all(name.startswith("dean_interp/") for name in packed)


def test_metadata_names_extras_licence_and_command(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (one for one in file.namelist() if one.endswith("METADATA"))
        metadata = file.read(name).decode()
        assert any(one.endswith("licenses/LICENSE") for one in file.namelist())
        (entry,) = (one for one in file.namelist() if one.endswith("entry_points.txt"))
        assert "dean-interp = dean_interp.cli.entry:start" in file.read(entry).decode()
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.M))
    assert extras == {"judges", "eval", "tuning", "comparison", "quantisation", "vllm", "notebook", "docs", "test"}
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.11" in metadata


def test_the_source_distribution_builds_the_same_wheel(wheel, tmp_path):
    source = built(ROOT, tmp_path / "source", "sdist")
    with tarfile.open(source) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert {path.name for path in unpacked.iterdir()} == {
        "dean_interp", "CHANGELOG.md", "LICENSE", "README.md", "PKG-INFO", "pyproject.toml", ".gitignore",
    }  # fmt: skip
    again = built(unpacked, tmp_path / "again", "wheel")
    first, second = (zipfile.ZipFile(one) for one in (wheel, again))
    assert first.namelist() == second.namelist()
    assert all(first.read(name) == second.read(name) for name in first.namelist())


def test_the_installed_wheel_works_elsewhere_and_its_types_are_seen(wheel, tmp_path):
    """Installed alone into an environment that finds its dependencies in this one."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(here + "\n")
    python = tmp_path / "env" / "bin" / "python"
    script = "import dean_interp; print(dean_interp.__file__, len(dean_interp.load_behaviour('fairness')))"
    done = subprocess.run([python, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "pyright", "--pythonpath", str(python), "user.py"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert '"Selection" is not assignable to "int"' in said and said.count(" error: ") == 1, said


def test_the_lock_file_holds_every_dependency():
    locked = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in locked}
    wanted = [*PROJECT["dependencies"]]
    for extra, requirements in PROJECT["optional-dependencies"].items():
        # vLLM comes with a torch of its own, so it is in no environment with the others.
        wanted += requirements if extra != "vllm" else []
    for one in wanted:
        name = re.match(r"[A-Za-z0-9._-]+", one)[0]
        assert name == "dean_interp" or re.sub(r"[-_.]+", "-", name).lower() in names, one
