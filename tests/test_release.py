"""The checklist of a release (docs/releasing.md), item by item."""

import re
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from test_packaging import wheel  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
CHECKLIST = (ROOT / "docs" / "releasing.md").read_text(encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_every_test_here_is_an_item_of_the_checklist_and_every_item_with_a_test_has_one():
    mine = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
    mine.remove(test_every_test_here_is_an_item_of_the_checklist_and_every_item_with_a_test_has_one.__name__)
    assert mine == set(re.findall(r"^- \[ \] .*\(`(test_\w+)`\)\.$", CHECKLIST, re.MULTILINE))


def test_the_version_is_one_in_every_place():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first[1] == PROJECT["version"] == CITATION["version"]


def test_the_citation_is_valid_and_cites_the_paper():
    """Of the schema 1.2.0 what a change of this file could break: required fields, and types that YAML would guess."""
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()
    assert CITATION["cff-version"] == "1.2.0" and isinstance(CITATION["version"], str)
    assert CITATION["license"] == PROJECT["license"] and CITATION["title"] == PROJECT["name"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(CITATION.get("date-released", "2026-01-01")))
    for work in (CITATION, CITATION["preferred-citation"], *CITATION["references"]):
        assert {"type", "title", "authors"} <= work.keys()
        for author in work["authors"]:
            assert author.keys() in ({"name"}, {"given-names", "family-names"})
    paper = CITATION["preferred-citation"]
    assert paper["url"].endswith("2410.16672") and isinstance(paper["year"], int) and len(paper["authors"]) == 5


def test_the_wheel_holds_every_file_that_is_not_code(wheel):  # noqa: F811
    """By what the code reads: each kind of such a file is there, and each template that a page names."""
    packed = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "dean_interp"
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".so")]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= packed
    assert {".j2", ".css", ".js", ".jsonl", ".toml", ".typed"} <= {Path(name).suffix or ".typed" for name in packed}
    code = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    templates = set(re.findall(r'"(\w+\.\w+\.j2)"', code))
    assert len(templates) > 8
    assert templates <= {Path(name).name for name in packed}


def test_the_metadata_are_complete(wheel):  # noqa: F811
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith("METADATA"))
        metadata = message_from_string(file.read(name).decode())
    assert (metadata["Name"], metadata["Version"]) == (PROJECT["name"], PROJECT["version"])
    assert metadata["Summary"] == PROJECT["description"] and len(metadata["Summary"]) < 200
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    readme = metadata.get_payload()
    assert readme.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_every_extra_that_is_named_exists():
    named = {}
    for path in [*PAGES, *(ROOT / "dean_interp").rglob("*.py"), *(ROOT / "analyses").glob("*.py"), ROOT / "Makefile"]:
        for extras in re.findall(r"(?:dean_interp|\.)\[([a-z, ]+)\]", path.read_text(encoding="utf-8")):
            named |= dict.fromkeys(extras.replace(" ", "").split(","), path.name)
    assert {"tuning", "comparison", "test"} <= named.keys()
    assert {name: where for name, where in named.items() if name not in PROJECT["optional-dependencies"]} == {}


def test_every_link_to_a_file_leads_to_one():
    gone, n_links = [], 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                n_links += 1
                gone += [] if (page.parent / target).exists() else [f"{page.name}: {target}"]
    assert n_links > 100 and gone == []


@pytest.mark.parametrize("package", ["torch", "transformers", "transformer_lens"])
def test_the_supported_versions_are_one_in_every_place(package):
    (wanted,) = (one for one in PROJECT["dependencies"] if re.match(rf"{package}\W", one))
    least = re.search(r">=([\d.]+)", wanted)[1]
    label = {"transformer_lens": "TransformerLens"}.get(package, package)
    for page in ("README.md", "docs/versions.md"):
        row = re.search(rf"^\| {label} \| ([\d.]+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert row[1] == least, page
