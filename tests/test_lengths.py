"""DPO's β against the length of answers: the table's numbers by hand, from the committed spec."""

import json
from pathlib import Path

import pytest

from minibnf.lab import lengths, plan
from minibnf.lab.compare import check
from minibnf.lab.plan import sweep
from minibnf.lab.verdicts import report
from tests.test_compare import BASE_EACH, run

# At .9 of reasoning and .5 of wins for the base: what each method wins, with 10 points lost.
WINS = {
    ("short", "bnf"): 0.66, ("long", "bnf"): 0.64,
    ("short", "dpo .1"): 0.56, ("long", "dpo .1"): 0.62,
    ("short", "dpo .3"): 0.60, ("long", "dpo .3"): 0.63,
    ("long", "dpo .05"): 0.60,
}  # fmt: skip


@pytest.fixture
def made():
    spec = json.loads(Path("tutorials/evidence/long.json").read_text())
    check(spec)
    runs = []
    for job in sweep(spec):
        name, method = job["set"], job["method"]
        one = run(name, method, job["setting"], win=WINS[name, method], accuracy=0.8)
        runs += [one, *(one | {"split": "test", "seed": seed} for seed in spec["seeds"])]
    facts = {"base": {name: {"test": BASE_EACH} for name in spec["on"]}}
    facts["response_tokens"] = {"long": 60.0, "short": 9.0}
    return {"spec": spec, "runs": runs, "facts": facts}


def test_what_bnf_gains_more_by_beta_times_length(made):
    """Straight from (0, 0) to 10 points lost: half of the gain at 5. Short answers at β = .1, whose
    β|y| is .9: bnf gains .16, dpo .06."""
    rows = [line.split(" | ") for line in lengths.table(made).splitlines()[2:]]
    assert [row[:2] for row in rows[:2]] == [
        ["| short, 9 tokens", "bnf"],
        ["| long, 60 tokens", "bnf"],
    ]
    assert [float(row[3]) for row in rows[2:]] == [0.9, 2.7, 3, 6, 18]
    assert rows[2][1:6] == ["dpo .1", "0.1", "0.9", "+0.030", "+0.060"]
    assert rows[2][6].startswith("**+0.050 (") and rows[2][7].startswith("**+0.100 (")


def test_how_much_larger_the_advantage_is_on_short_answers(made):
    """At β = .1 .10 on short and .02 on long answers, at .3 .06 and .01; at .05 nothing short."""
    assert lengths.change(made).splitlines()[2:] == [
        "| 0.1 | **+0.040 (+0.040 to +0.040)** | **+0.080 (+0.080 to +0.080)** |",
        "| 0.3 | **+0.025 (+0.025 to +0.025)** | **+0.050 (+0.050 to +0.050)** |",
    ]
    assert "## Length" in report(made) and lengths.table(made) in report(made)


def test_without_two_lengths_there_is_nothing_to_say(made):
    del made["spec"]["on"]["short"]
    assert "## Length" not in report(made)


def test_long_answers_are_judged_by_frontiers(made):
    """The more cautious rate keeps more, the bolder one wins more; the others are worse."""
    tried = plan.select(made["runs"], set="long", method="bnf", split="validation")
    scores = [(0.55, 0.88), (0.6, 0.82), (0.5, 0.8), (0.5, 0.8)]
    for one, (win, kept) in zip(tried, scores, strict=True):
        one["result"] |= {"win_rate": [win, 0.01], "accuracy": [kept, 0.01]}
    settings = [one["setting"] for one in tried[:2]]
    assert plan.final_settings(made["spec"], tried, "long", "bnf") == settings
