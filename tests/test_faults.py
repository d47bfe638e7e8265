"""A few trials of each campaign of tests/faults (make faults conducts them all)."""

import re
import subprocess
import sys
from pathlib import Path


def test_a_few_trials_of_each_campaign_hold():
    command = [sys.executable, "-m", "tests.faults", "--short", "--workers", "1"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    rows = re.findall(
        r"^\| (.+) \| ([\d,]+|skipped) \| ([\d,]+|no C compiler) \|", done.stdout, re.M
    )
    assert len(rows) == 17, done.stdout
