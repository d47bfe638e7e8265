"""What the README says of the code is what the code says."""

import json
import re
from pathlib import Path

import pytest

from minibnf.config import READS
from minibnf.verdicts import table, verdict_table
from tests.loss_table import table as loss_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_losses_is_the_one_that_make_losses_prints():
    assert loss_table() in README


def test_the_table_of_families_has_every_model_type():
    """Its figures are held to what is measured by `make parity` (tests/parity/conftest.py)."""
    assert set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", README, re.M)) - {"model_type"} == set(READS)


def test_every_file_of_the_package_is_named_and_every_link_leads_somewhere():
    for file in (ROOT / "minibnf").glob("[a-z]*.py"):
        assert f"(minibnf/{file.name})" in README, file.name
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        assert (ROOT / link).exists(), link


def test_every_make_target_that_the_readme_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.M)) <= targets


def test_the_examples_in_python_run(capsys):
    """The blocks under 'In your own training loop' and 'Talk with it, sample from it', as they stand."""
    loss, sampling = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(loss, names)
    assert names["logps"].grad[0, 0] < 0 < names["logps"].grad[1, 0]  # the chosen one goes up, the rejected one down
    exec(sampling, names)
    assert "7" in capsys.readouterr().out


def test_no_file_of_the_package_is_too_long_to_read():
    for file in (ROOT / "minibnf").glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 450, file.name


RESULTS = ROOT / "evidence" / "small-results.json"


@pytest.mark.skipif(not RESULTS.is_file(), reason="evidence/small-results.json is not there: make compare-full makes it")
def test_the_verdicts_are_drawn_from_the_committed_results():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert results["spec"] == json.loads((ROOT / "evidence" / "small.json").read_text(encoding="utf-8"))
    assert all(len(revision) == 40 for revision in results["facts"]["revision"])  # of committed code alone
    assert verdict_table(results) in README
    assert table(results, "qa") in README
