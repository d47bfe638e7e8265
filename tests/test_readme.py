"""What the README says of the code is what the code says."""

import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from minibnf.files.config import READS
from minibnf.lab.tables import concentration, figure, rivals, table
from minibnf.lab.verdicts import verdict_table
from minibnf.losses import bnf_loss
from tests.loss_table import table as loss_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ANY_LOGP = st.one_of(st.sampled_from([0.0, -0.0, -1e4]), st.floats(-1e4, 0.0, width=32))


def test_the_table_of_losses_is_the_one_that_make_losses_prints():
    assert loss_table() in README


def test_the_table_of_families_has_every_model_type():
    """Its figures are held to what is measured by `make parity` (tests/parity/conftest.py)."""
    assert set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", README, re.M)) - {"model_type"} == set(READS)


def test_every_file_of_the_package_is_named_and_every_link_leads_somewhere():
    for file in (ROOT / "minibnf").rglob("[a-z]*.py"):
        assert f"({file.relative_to(ROOT)})" in README, file.name
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(
        r'src="([^"]+)"', README
    ):
        assert (ROOT / link).exists(), link


def test_every_make_target_that_the_readme_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.M)) <= targets


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
    """The blocks under 'In your own training loop' and 'Talk with it, sample from it', as they
    stand."""
    _, loss, sampling = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(loss, names)
    assert (
        names["logps"].grad[0, 0] < 0 < names["logps"].grad[1, 0]
    )  # the chosen one goes up, the rejected one down
    exec(sampling, names)
    assert "7" in capsys.readouterr().out


RESULTS = ROOT / "tutorials" / "evidence" / "small-results.json"


@pytest.mark.skipif(
    not RESULTS.is_file(),
    reason="tutorials/evidence/small-results.json is not there: make compare-full makes it",
)
def test_the_verdicts_are_drawn_from_the_committed_results():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert results["spec"] == json.loads(
        (ROOT / "tutorials" / "evidence" / "small.json").read_text(encoding="utf-8")
    )
    assert all(
        len(revision) == 40 for revision in results["facts"]["revision"]
    )  # of committed code alone
    assert verdict_table(results) in README
    assert table(results, "qa") in README


REAL = ROOT / "tutorials" / "evidence" / "real-results.json"


@pytest.mark.skipif(
    not REAL.is_file(),
    reason="tutorials/evidence/real-results.json is not there: make compare-real makes it",
)
def test_the_real_models_tables_are_drawn_from_the_committed_results():
    results = json.loads(REAL.read_text(encoding="utf-8"))
    assert results["spec"] == json.loads(
        (ROOT / "tutorials" / "evidence" / "real.json").read_text(encoding="utf-8")
    )
    assert all(len(revision) == 40 for revision in results["facts"]["revision"])
    assert len({(r["set"], r["method"], str(r["setting"])) for r in results["runs"]}) == 24
    for name in results["spec"]["on"]:
        assert table(results, name) in README, table(results, name)


@pytest.mark.skipif(
    not RESULTS.is_file(),
    reason="tutorials/evidence/small-results.json is not there: make compare-full makes it",
)
def test_the_figures_quoted_under_read_honestly_are_the_files():
    """Every number in that list, recomputed and formatted as the prose has it."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    prose = " ".join(
        README[README.index("Read honestly:") : README.index("On QA pairs, test prompts")].split()
    )
    short = lambda x: f"{x:.2f}".lstrip("0")

    def measured(name, method, what="accuracy", **setting):
        (run,) = [
            r for r in results["runs"]
            if (r["set"], r["method"], r["split"], r["setting"]) == (name, method, "validation", setting)
        ]  # fmt: skip
        return short(run["result"][what][0])

    wins = [
        measured("qa", "bnf", "win_rate", lr=1e-4),
        measured("qa", "dpo", "win_rate", lr=1e-4, beta=0.1),
    ]
    wins.append(measured("qa", "kto", "win_rate", lr=1e-4, beta=0.1))
    assert set(wins) == {".59"}
    methods = [*rivals(results, "qa"), "bnf", "rbnf", "nll"]
    best = [
        [figure(results, "qa", m, "best", what)[0] for m in methods]
        for what in ("win_rate", "accuracy")
    ]
    ends = [short(end(values)) for values in best for end in (min, max)]
    kept = [
        measured("qa", "bnf", lr=1e-4),
        *(measured("qa", m, lr=1e-4, beta=0.1) for m in ("dpo", "kto")),
    ]
    two = [measured("qa", "dpo", what, lr=1e-4, beta=2) for what in ("accuracy", "win_rate")]
    pairs = [[measured(name, "dpo lr 1e-4", lr=1e-4, beta=b) for name, b in row] for row in (
        (("qa", 0.1), ("math", 0.03)), (("qa", 1), ("math", 0.3)), (("qa", 3), ("math", 1)))]  # fmt: skip
    batch = [measured("qa", "bnf batch", what, lr=1e-4) for what in ("win_rate", "accuracy")]
    rho = sorted(concentration(results, name)[0] for name in results["spec"]["on"])
    lost = [float(measured("math", "bnf", lr=lr)) for lr in (1.8e-4, 3e-4, 1e-3)]
    assert lost[0] > 0.9 and lost[1] < 0.975 / 2 and lost[2] < 0.02
    for rival in ("dpo", "kto"):
        slow = [float(measured("math", rival, lr=lr, beta=0.1)) for lr in (3e-4, 1e-3)]
        assert slow[0] > 0.975 / 2 > slow[1]
    at_most = lambda method, **hyper: measured("math", method, lr=1e-3, **hyper)
    stay = {"orpo": at_most("orpo", lam=0.1), "nll": at_most("nll"), "dpo+nll": at_most("dpo+nll", beta=0.1),
            "cpo": at_most("cpo", beta=0.1), "slic": at_most("slic", delta=1)}  # fmt: skip
    assert list(stay.values()) == sorted(stay.values(), reverse=True)
    worst = {
        length: float(measured("qa", f"bnf{length}", "win_rate", lr=3e-4))
        for length in ("", " own", " batch")
    }
    assert min(worst, key=worst.get) == " batch"
    for sentence in (
        "win rates of {} to {}, {} to {} of reasoning kept".format(*ends),
        f"BNF keeps {kept[0]} of the reasoning, DPO at its customary β = 0.1 {kept[1]}, KTO {kept[2]} (validation prompts); "
        f"at β = 2 DPO keeps {two[0]} and wins {two[1]}",
        f"{pairs[0][0]} and {pairs[0][1]} at β|y| = 0.9, {pairs[1][0]} and {pairs[1][1]} at 9, "
        f"{pairs[2][0]} and {pairs[2][1]} at 30",
        f"at 1e-4 and 1.8e-4 the batch's mean does best: {batch[0]} at {batch[1]}; at 3e-4 it does worst",
        f"where DPO is at {measured('math', 'dpo', lr=1.8e-4, beta=0.1)}",
        "({} and {} are left there, of BNF {})".format(
            at_most("dpo", beta=0.1), at_most("kto", beta=0.1), at_most("bnf")
        ),
        f"keep {stay['slic']} to {stay['orpo']} even at 1e-3 ({', '.join(f'{m} {x}' for m, x in stay.items())})",
        f"keeps pulling a lost preferred token back, {at_most('rbnf')}",
        f"rank correlation +{short(rho[0])} to +{short(rho[-1])} over all runs",
    ):
        assert sentence in prose, sentence


def test_the_table_of_speed_is_the_committed_benchmarks():
    """Medians of the rounds, and the ratio's median and range."""
    found = json.loads(
        (ROOT / "tutorials" / "evidence" / "bench-results.json").read_text(encoding="utf-8")
    )["training"]
    for data, dtype in sorted({(x["data"], x["dtype"]) for x in found}):
        rounds = {x["side"]: x["rounds"] for x in found if (x["data"], x["dtype"]) == (data, dtype)}
        (theirs,) = (side for side in rounds if side.startswith("TRL"))
        median = lambda side, key, rounds=rounds: statistics.median(r[key] for r in rounds[side])
        both = lambda side, median=median: (
            f"{median(side, 'pairs_per_s'):.2f}, {median(side, 'peak_gb'):.1f} GB"
        )
        bnf, small, dpo = (
            "minibnf bnf, 2048 tokens",
            "minibnf bnf, 768 tokens",
            "minibnf dpo, 2048 tokens",
        )
        ratios = sorted(
            a["pairs_per_s"] / b["pairs_per_s"]
            for a, b in zip(rounds[bnf], rounds[theirs], strict=True)
        )
        ratio = f"{ratios[1]:.1f} ({ratios[0]:.1f} to {ratios[2]:.1f})"
        share = f"{100 * median(bnf, 'share'):.0f} % of {median(bnf, 'machine') / 1e9:.0f} GFLOP/s"
        cells = [
            dtype,
            both(theirs),
            both(bnf),
            ratio,
            both(small),
            f"{median(dpo, 'pairs_per_s'):.2f}",
            share,
        ]
        assert "| " + " | ".join(cells) + " |" in README
