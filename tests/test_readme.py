"""What README and the reference pages say of the code is what the code says."""

import importlib
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from minibnf.arguments import parser
from minibnf.files.config import READS
from minibnf.lab import lengths
from minibnf.lab.frontiers import file_table, frontier_table, questions, weight_table
from minibnf.lab.tables import rate_table, table
from minibnf.lab.verdicts import verdict_table, verdicts
from minibnf.losses import bnf_loss
from tests.benchmarks.memory import table as memory_table
from tests.loss_table import table as loss_table

ROOT = Path(__file__).parent.parent
README, USING, SPEED, VERIFICATION, EVIDENCE, CONTRIBUTING = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "tutorials/reference/using.md",
        "tutorials/reference/speed.md",
        "tutorials/reference/verification.md",
        "tutorials/evidence/README.md",
        "CONTRIBUTING.md",
    )
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tutorials/evidence/README.md"]
PAGES += sorted((ROOT / "tutorials/reference").glob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
ANY_LOGP = st.one_of(st.sampled_from([0.0, -0.0, -1e4]), st.floats(-1e4, 0.0, width=32))


def test_the_table_of_losses_is_the_one_that_make_losses_prints():
    assert loss_table() in README


def test_the_table_of_families_has_every_model_type():
    """Its figures are held to what is measured by `make parity` (tests/parity/conftest.py)."""
    assert set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", VERIFICATION, re.M)) - {"model_type"} == set(
        READS
    )


def test_every_file_of_the_package_is_named():
    for file in (ROOT / "minibnf").rglob("[a-z]*.py"):
        assert f"({file.relative_to(ROOT)})" in CONTRIBUTING, file.name


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have in links, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@each_page
def test_every_link_leads_somewhere_and_every_make_target_exists(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"""(?:\]\(|src=")((?!http)[^)"]+)""", text):
        file, _, anchor = link.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M)) <= targets


@given(
    tokens=st.lists(st.tuples(ANY_LOGP, ANY_LOGP, st.booleans()), min_size=6, max_size=6),
    preferred=st.tuples(st.booleans(), st.booleans()),
)
@example(tokens=[(0.0, -0.0, True)] * 3 + [(-0.0, 0.0, True)] * 3, preferred=(True, False))
@example(
    tokens=[(-1e4, 0.0, True), (0.0, -1e4, False), (-3e-8, 0.0, True)] * 2, preferred=(False, True)
)
def test_the_few_lines_at_the_top_have_bnfs_gradient(tokens, preferred):
    """Two responses of three tokens in float32, some of them padding, from impossible to
    certain."""
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", README, re.S)[0], names)
    logps, ref_logps, mask = (
        torch.tensor(column).view(2, 3) for column in zip(*tokens, strict=True)
    )
    mask[:, 0] = True  # a response has a token
    logps.requires_grad_()
    found, expected = (
        torch.autograd.grad(loss(logps, ref_logps, mask, torch.tensor(preferred)), logps)[0]
        for loss in (names["bnf"], bnf_loss)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_the_examples_in_python_run(capsys):
    """The blocks under 'Use it' and, in using.md, 'Talk and sample', as they stand."""
    _, loss = re.findall(r"```python\n(.*?)```", README, re.S)
    (sampling,) = re.findall(r"```python\n(.*?)```", USING, re.S)
    names: dict = {}
    exec(loss, names)
    # the chosen one goes up, the rejected one down
    assert names["logps"].grad[0, 0] < 0 < names["logps"].grad[1, 0]
    exec(sampling, names)
    assert "Answer: 201" in capsys.readouterr().out


@each_page
def test_the_commands_have_flags_that_exist(page):
    """Each line of a block that calls minibnf: its parser takes the words, and reads no file."""
    for block in re.findall(r"^```\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        for line in re.findall(r"^\.venv/bin/minibnf (.*)", block, re.M):
            command, *words = shlex.split(line, comments=True)
            if command == "check":
                continue  # its one word is a folder
            module = importlib.import_module(f"minibnf.{command}")
            assert module.parse(words).model, line


def test_the_table_of_trains_options_has_every_option_and_its_default():
    """Where the parser knows none (None, a list) the page says in words what is taken."""
    rows = re.findall(r"^\| `(--[a-z-]+)[^|]*\| ([^|]+) \|", USING, re.M)
    options = {
        a.option_strings[0]: a.default for a in parser()._actions if "-h" not in a.option_strings
    }
    assert [name for name, _ in rows] == list(options)
    for name, shown in rows:
        default = options[name]
        if isinstance(default, bool):
            assert (shown, default) == ("off", False), name
        elif isinstance(default, str):
            assert shown == default, name
        elif isinstance(default, int | float):
            assert shown == f"{default:g}", name


def evidence(name: str) -> dict:
    return json.loads((ROOT / "tutorials/evidence" / name).read_text(encoding="utf-8"))


def results_of(name: str) -> dict:
    """A comparison's committed results: of the committed specification, made by committed code."""
    results = evidence(f"{name}-results.json")
    assert results["spec"] == evidence(f"{name}.json")
    assert all(len(revision) == 40 for revision in results["facts"]["revision"])
    return results


def test_the_verdicts_are_drawn_from_the_committed_results():
    results = results_of("frontiers")
    assert verdict_table(results) in EVIDENCE
    assert all(frontier_table(results, name) in EVIDENCE for name in ("qa", "unpaired"))
    assert rate_table(results, "math") in EVIDENCE
    assert table(results_of("small"), "qa") in EVIDENCE


def test_the_maps_tables_are_drawn_from_the_committed_results():
    results = results_of("map")
    assert weight_table(results) in EVIDENCE and questions(results) in EVIDENCE


def test_the_table_of_lengths_is_drawn_from_the_committed_results():
    results = results_of("long")
    assert lengths.table(results) in EVIDENCE and lengths.change(results) in EVIDENCE


def test_the_verdicts_in_short_are_those_of_the_committed_results():
    """Claims and verdicts to the letter; of the numbers a row picks some and adds none."""
    numbers_in = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?%?")
    (part,) = re.findall(r"^<!-- verdicts:.*?-->\n(.*?)^<!-- end", README, re.M | re.S)
    shown = [line.strip("| ").split(" | ") for line in part.splitlines()[2:]]
    found = verdicts(results_of("frontiers"))
    assert [cells[:2] for cells in shown] == [[claim, verdict] for claim, verdict, _ in found]
    for (*_, short), (*_, numbers) in zip(shown, found, strict=True):
        assert numbers_in.findall(short), "a row without a number"
        assert set(numbers_in.findall(short)) <= set(numbers_in.findall(numbers)), short


def test_what_fits_is_what_the_formula_says():
    assert memory_table() in SPEED


def cells_after(head: str) -> list[list[str]]:
    """The rows of the evidence page's table that begins with this line."""
    _, _, rest = EVIDENCE.partition(head + "\n")
    return [line.strip("| ").split(" | ") for line in rest.split("\n\n")[0].splitlines()[1:]]


def test_the_small_tables_are_the_committed_runs_rounded():
    runs = {
        (r["set"], r["method"], r["setting"]["lr"], r["setting"].get("beta", 0.1)): r["result"]
        for r in results_of("small")["runs"]
        if r["split"] == "validation"
    }

    def close(cell, *run, what="accuracy"):
        assert abs(float(cell) - runs[run][what][0]) <= 0.0051, (run, cell)

    methods = ["nll", "rbnf", "bnf", "dpo", "kto"]
    rates = cells_after(f"| learning rate | {' | '.join(methods)} |")
    assert len(rates) == 3
    for rate, *cells in rates:
        for method, cell in zip(methods, cells, strict=True):
            close(cell, "math", method, float(rate), 0.1)
    untuned = cells_after("| at 1e-4 | win rate | reasoning |")
    assert len(untuned) == 4
    for name, win, kept in untuned:
        beta = float(name.partition("= ")[2] or 0.1)
        close(win, "qa", name.split(",")[0], 1e-4, beta, what="win_rate")
        close(kept, "qa", name.split(",")[0], 1e-4, beta)
    lengths = {"qa": 9, "math": 31}
    for product, *cells in cells_after(
        "| β × tokens | reasoning, QA (9 tokens per response) | reasoning, math (31) |"
    ):
        for (name, tokens), cell in zip(lengths.items(), cells, strict=True):
            tried = [0.03, 0.1, 0.3, 1, 3, 10]
            beta = min(tried, key=lambda b: abs(b * tokens - float(product)))
            close(cell, name, "dpo lr 1e-4", 1e-4, beta)


def test_the_real_models_tables_are_drawn_from_the_committed_results():
    results = results_of("real")
    for name in results["spec"]["on"]:
        assert table(results, name) in EVIDENCE, table(results, name)
        assert file_table(results, name) in EVIDENCE, file_table(results, name)


def test_the_table_of_speed_is_the_committed_benchmarks():
    """Medians of the rounds, and the ratio's median and range."""
    found, medians = evidence("bench-results.json")["training"], []
    for data, dtype in sorted({(x["data"], x["dtype"]) for x in found}):
        rounds = {x["side"]: x["rounds"] for x in found if (x["data"], x["dtype"]) == (data, dtype)}
        (theirs,) = (side for side in rounds if side.startswith("TRL"))
        bnf, small, dpo = (
            f"minibnf {side} tokens" for side in ("bnf, 2048", "bnf, 768", "dpo, 2048")
        )

        def median(side, key, rounds=rounds):
            return statistics.median(r[key] for r in rounds[side])

        speed = {side: f"{median(side, 'pairs_per_s'):.2f}" for side in (theirs, bnf, small, dpo)}
        memory = {side: f"{median(side, 'peak_gb'):.1f} GB" for side in (theirs, bnf, small)}
        both = {side: f"{speed[side]}, {memory[side]}" for side in memory}
        ratios = sorted(
            a["pairs_per_s"] / b["pairs_per_s"]
            for a, b in zip(rounds[bnf], rounds[theirs], strict=True)
        )
        medians.append(ratios[1])
        ratio = f"{ratios[1]:.1f} ({ratios[0]:.1f} to {ratios[2]:.1f})"
        share = f"{100 * median(bnf, 'share'):.0f} % of {median(bnf, 'machine') / 1e9:.0f} GFLOP/s"
        cells = [dtype, both[theirs], both[bnf], ratio, both[small], speed[dpo], share]
        assert f"| {' | '.join(cells)} |" in SPEED
    assert f" {min(medians):.1f} to {max(medians):.1f} times as many pairs per second" in README
