"""The tests of the exercises pass on the solutions (tests/exercises runs them) and fail on the
blanks."""

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


def asked_for(file: Path) -> dict[str, ast.FunctionDef]:
    functions = [
        n for n in ast.parse(file.read_text("utf-8")).body if isinstance(n, ast.FunctionDef)
    ]
    return {f.name: f for f in functions if not f.name.startswith("_")}


@pytest.mark.parametrize("name", NAMES)
def test_blank_and_solution_ask_for_the_same_and_the_blank_is_blank(name):
    """In a reader's clone an exercise may be solved; as committed none is."""
    blank, solution = asked_for(BLANKS / f"{name}.py"), asked_for(SOLUTIONS / f"{name}.py")
    assert blank and list(blank) == list(solution)
    for f, node in blank.items():
        assert ast.unparse(node.args) == ast.unparse(solution[f].args), f
        assert ast.get_docstring(node), f
        if name in UNSOLVED or os.environ.get("CI"):
            assert len(node.body) == 2 and ast.unparse(node.body[1]) == BLANK, f


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
