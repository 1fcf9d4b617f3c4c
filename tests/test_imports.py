"""The public face: names load when they are first used, and importing the package loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dean_interp

HEAVY = ("torch", "transformer_lens", "transformers.trainer", "matplotlib", "circuitsvis", "jinja2", "sklearn")


def test_importing_the_package_loads_nothing_that_draws_pages_or_trains():
    program = f"import sys, dean_interp; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_alone_loads_nothing_that_takes_seconds():
    program = "import sys; from dean_interp.cli.entry import start; start([])"
    program += f"; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_adapters_are_loaded_by_the_arms_that_train_them_alone():
    program = "import sys, dean_interp.arms.all_arms, dean_interp.cli.steps; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_module_is_imported_that_windows_does_not_have():
    for path in sorted(Path(dean_interp.__file__).parent.rglob("*.py")):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        assert not imported & {"fcntl", "grp", "pty", "pwd", "resource", "termios"}, path


def test_the_three_lists_of_public_names_are_one():
    tree = ast.parse(Path(dean_interp.__file__).read_text(encoding="utf-8"))
    (type_checking,) = (statement for statement in tree.body if isinstance(statement, ast.If))
    imported = {}
    for statement in type_checking.body:
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            imported[alias.name] = statement.module.removeprefix("dean_interp.")
    assert imported == dean_interp._MODULES
    assert sorted(dean_interp.__all__) == sorted(imported)


@pytest.mark.parametrize("name", dean_interp.__all__)
def test_every_public_name_is_there(name):
    assert getattr(dean_interp, name) is not None
    assert name in dir(dean_interp)


def test_a_name_that_does_not_exist_is_an_error():
    with pytest.raises(AttributeError, match="has no attribute 'cuople'"):
        dean_interp.cuople  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'cuople'"):
        from dean_interp import cuople  # noqa: F401
