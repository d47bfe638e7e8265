"""The tests of the exercises pass on the solutions (tests/exercises runs them) and fail on the
blanks; both are small."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
BLANKS, SOLUTIONS = ROOT / "tutorials" / "exercises", ROOT / "tests" / "exercises"
NAMES = [file.stem for file in sorted(SOLUTIONS.glob("e[0-9][0-9].py"))]
BLANK = "raise NotImplementedError"
UNSOLVED = [name for name in NAMES if BLANK in (BLANKS / f"{name}.py").read_text(encoding="utf-8")]
each = pytest.mark.parametrize("name", NAMES)


def functions(file: Path) -> dict[str, ast.FunctionDef]:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def asked_for(file: Path) -> dict[str, ast.FunctionDef]:
    return {name: node for name, node in functions(file).items() if not name.startswith("_")}


def skip_if_solved(name: str):
    """In a reader's clone an exercise may be solved; as committed none is."""
    if name not in UNSOLVED and not os.environ.get("CI"):
        pytest.skip(f"tutorials/exercises/{name}.py is solved here")


@each
def test_blank_and_solution_ask_for_the_same(name):
    blank, solution = asked_for(BLANKS / f"{name}.py"), asked_for(SOLUTIONS / f"{name}.py")
    assert blank and list(blank) == list(solution)
    for f in blank:
        assert ast.unparse(blank[f].args) == ast.unparse(solution[f].args), f
        assert ast.get_docstring(blank[f]), f


@each
def test_a_blank_is_blank_and_all_of_it_is_small(name):
    skip_if_solved(name)
    for f, node in asked_for(BLANKS / f"{name}.py").items():
        assert len(node.body) == 2 and ast.unparse(node.body[1]) == BLANK, f
    for f, node in functions(SOLUTIONS / f"{name}.py").items():
        assert node.end_lineno - node.lineno <= 40, f


@pytest.mark.skipif(not UNSOLVED, reason="no exercise is unsolved")
def test_every_test_fails_on_its_blank(tmp_path):
    """One run of pytest over all the blanks: each test fails, and because the blank raises
    NotImplementedError."""
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", *(SOLUTIONS / f"test_{name}.py" for name in UNSOLVED)]
    blanks = os.environ | {"EXERCISES": str(BLANKS)}
    run = subprocess.run(command, cwd=ROOT, env=blanks, capture_output=True, text=True)
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert run.returncode == 1 and len(cases) >= len(UNSOLVED), run.stdout
    for case in cases:
        failure = case.find("failure")
        where = f"{case.get('classname')}.{case.get('name')}"
        assert failure is not None, f"{where} does not fail on the blank"
        why = failure.get("message")
        assert "NotImplementedError" in why, f"{where} fails for another reason: {why}"
