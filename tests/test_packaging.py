"""What is built and shipped: the package and nothing else, the same wheel from both sources, types for its users."""

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "dean_interp").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


def build(source, out, *targets):
    """Offline, by the build backend that is installed here."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *(f"-t{target}" for target in targets)]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist."""
    pytest.importorskip("hatchling", reason="the build backend is not installed (extra test)")
    sdist, wheel = sorted(build(ROOT, tmp_path_factory.mktemp("built")), key=lambda path: path.suffix)
    return wheel, sdist


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        return importlib.metadata.PathDistribution(zipfile.Path(wheel, f"{Path(name).parent}/")).metadata


def test_the_wheel_holds_the_package_its_licence_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {*wheel.namelist()}
    about = f"dean_interp-{PROJECT['version']}.dist-info"
    records = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert names == PACKAGE | records
    kinds = {Path(name).suffix for name in PACKAGE}
    assert {".py", ".j2", ".css", ".js", ".toml", ".jsonl"} <= kinds and "dean_interp/py.typed" in PACKAGE


def test_the_sdist_holds_the_same_and_builds_the_same_wheel(built, tmp_path):
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == PACKAGE | {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", ".gitignore"}
    (again,) = build(folder, tmp_path / "again", "wheel")
    assert again.read_bytes() == wheel.read_bytes()


def test_the_metadata_say_what_users_look_for(metadata):
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown" and "# dean_interp" in metadata.get_payload()
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert {*metadata.get_all("Provides-Extra")} == {*PROJECT["optional-dependencies"]} >= {
        "judges", "eval", "tuning", "quantisation", "docs", "vllm",
    }  # fmt: skip
    assert "vllm>=0.10; extra == 'vllm'" in metadata.get_all("Requires-Dist")


@pytest.mark.long
def test_users_of_the_installed_wheel_see_its_types(built, tmp_path):
    """In an environment that holds the wheel and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(built[0])], check=True)
    (tmp_path / "user.py").write_text(
        "from dean_interp import importance, load_behaviour, load_model\n"
        'scores = importance(load_model("m"), load_behaviour("fairness"))\n'
        "reveal_type(scores)\n"
        'wrong: int = load_behaviour("fairness")\n'
    )
    command = [sys.executable, "-m", "pyright", "--pythonpath", python, "user.py"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert 'Type of "scores" is "Scores"' in said and '"Behaviour" is not assignable to declared type "int"' in said


def test_the_lock_names_one_version_of_everything_that_is_required_and_no_place():
    """`make lock` writes it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name for name, _ in (re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines)}
    normal = {re.sub(r"[-_.]+", "-", name).lower() for name in pinned}
    assert len(normal) == len(lines)
    extras = PROJECT["optional-dependencies"]
    asked = [one for name in (*extras, "") if name != "vllm" for one in extras.get(name, PROJECT["dependencies"])]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", one)[0]).lower() for one in asked}
    assert names - normal == {"dean-interp"}
