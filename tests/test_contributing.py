"""CONTRIBUTING.md's loss, entered as the page says into a copy, passes the generic tests there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_a_loss_is_a_pair_of_functions_and_one_entry(tmp_path):
    for name in ("minibnf", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"```diff\n--- a/minibnf/losses.py\n(.*?)```", page, re.S)
    before = "".join(line[1:] for line in diff.splitlines(True) if line[0] != "+")
    after = "".join(line[1:] for line in diff.splitlines(True))
    file = tmp_path / "minibnf" / "losses.py"
    text = file.read_text(encoding="utf-8")
    if text.count(before) != 1:
        pytest.skip("losses.py has another loss at its head than CONTRIBUTING.md shows")
    file.write_text(text.replace(before, after), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HYPOTHESIS_PROFILE": "mutants"}
    tests = ["tests/test_losses.py", "tests/test_laws.py", "tests/test_train.py"]
    then_the_table = "import pytest; code = pytest.main(); import tests.loss_table as losses"
    then_the_table += "; print(losses.table()); raise SystemExit(code)"
    command = [sys.executable, "-c", then_the_table, "-p", "no:cacheprovider", *tests, "-k", "mass"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= 8, done.stdout
    assert "| mass |" in done.stdout
