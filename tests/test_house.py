"""Rules of the house that a machine can check: names, lengths, and who may lay out lines by hand."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dean_interp"
MAP = PACKAGE.parent / "docs" / "architecture.md"
MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}

LONGEST_MODULE, LONGEST_FUNCTION = 300, 50
DATA_TABLES = {
    "data/sources.py: SOURCES",
    "data/sources.py: _BBQ",
    "evaluation/judges/forms.py: _MARKERS",
}
"""Constants that `# fmt: skip` may lay out, and nothing else."""


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def repeated(names: list[str]) -> set[str]:
    return {name for name, n_times in Counter(names).items() if n_times > 1}


def two_files_of_one_name() -> set[str]:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return repeated([path.name for path in files if path.name != "__init__.py"])


def type_name(statement: ast.stmt) -> str | None:
    """The class or the type alias that a statement of a module defines. Aliases are told by their capitals."""
    if isinstance(statement, ast.ClassDef):
        return statement.name
    if isinstance(statement, ast.Assign):
        target = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign):
        target = statement.target
    else:
        return None
    if isinstance(target, ast.Name) and re.fullmatch(r"[A-Z]+[a-z]\w*", target.id):
        return target.id
    return None


def two_public_types_of_one_name() -> set[str]:
    names = [type_name(statement) for tree in TREES.values() for statement in tree.body]
    return repeated([name for name in names if name and not name.startswith("_")])


def long_modules() -> set[str]:
    n_lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    return {place(path) for path, n in n_lines.items() if n > LONGEST_MODULE}


def long_functions() -> set[str]:
    offenders = set()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION:
                    offenders.add(f"{place(path)}: {node.name}")
    return offenders


def laid_out_by_hand(path: Path) -> set[str]:
    """The constants of a module that end in `# fmt: skip`, by name, and the module itself for any other such line."""
    tables = {}
    for statement in TREES[path].body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            tables[statement.end_lineno] = f"{place(path)}: {ast.unparse(target)}"
    lines = path.read_text(encoding="utf-8").splitlines()
    by_hand = [n for n, line in enumerate(lines, 1) if re.search(r"#\s*fmt:\s*(skip|off)", line)]
    return {tables.get(n, place(path)) for n in by_hand}


def lines_laid_out_by_hand_outside_of_data_tables() -> set[str]:
    return set().union(*map(laid_out_by_hand, MODULES)) - DATA_TABLES


def docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Name and text of the public docstrings in a module, those below the fields of classes and below constants too."""
    body = getattr(node, "body", [])
    for i, statement in enumerate(body):
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            text = statement.value.value
            if isinstance(text, str):
                yield f"{name}, line {statement.lineno}" if i else name, text
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not statement.name.startswith("_"):
                yield from docstrings(statement, f"{name}: {statement.name}")


def docstrings_that_begin_with_of() -> set[str]:
    offenders = set()
    for path, tree in TREES.items():
        for name, text in docstrings(tree, place(path)):
            if text.lstrip().startswith("Of "):
                offenders.add(name.split(", line")[0])
    return offenders


def files_that_the_map_of_rooms_names_wrongly_or_not_at_all() -> set[str]:
    """Of each room that has a row in `docs/architecture.md`: modules that the row leaves out, or that are gone."""
    offenders = set()
    rows = re.findall(r"^\| `(\w+)/` \|(.*)$", MAP.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) > 5
    for room, row in rows:
        named = set(re.findall(r"\w+\.py", row))
        there = {path.name for path in (PACKAGE / room).glob("*.py")} - {"__init__.py"}
        offenders |= {f"{room}/{name}" for name in named ^ there}
    return offenders


RULES = (
    two_files_of_one_name,
    two_public_types_of_one_name,
    long_modules,
    long_functions,
    lines_laid_out_by_hand_outside_of_data_tables,
    docstrings_that_begin_with_of,
    files_that_the_map_of_rooms_names_wrongly_or_not_at_all,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_nothing_breaks_a_rule_of_the_house(rule):
    assert not rule(), "these break the rule"


def test_the_rules_see_the_whole_package():
    """A rule that looks at nothing would pass."""
    assert len(MODULES) > 50 and PACKAGE / "study" / "run.py" in TREES
    assert set().union(*map(laid_out_by_hand, MODULES)) >= DATA_TABLES, (
        "a table that is gone, or formatted, stays listed"
    )
    n_types = sum(type_name(statement) is not None for tree in TREES.values() for statement in tree.body)
    n_docstrings = sum(1 for path, tree in TREES.items() for _ in docstrings(tree, place(path)))
    assert n_types > 100 and n_docstrings > 500
