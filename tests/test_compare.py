"""Comparisons: what is run, what is chosen, what collapses; the verdicts' rules; one real run."""

import copy
import itertools
import json
import math
import re
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minibnf.lab.compare import check, compare, main
from minibnf.lab.figures import _look, comparison
from minibnf.lab.language import QA, problems
from minibnf.lab import frontiers
from minibnf.lab.frontiers import (
    against,
    at_rates,
    interval,
    measures,
    points,
    questions,
)
from minibnf.lab.plan import (
    FAR,
    chosen_settings,
    collapsed,
    finals,
    frontier,
    objective,
    select,
    settings,
    sweep,
    final_settings,
)
from minibnf.lab.tables import concentration, figure, good_rates, ranks
from minibnf.lab.trials import arguments, rounded, slug
from minibnf.lab.verdicts import NOT, REPRODUCED, report, verdicts
from tests.faults.runs import drawn_at_once

SPEC = {
    "base": "weights/tiny", "seeds": [1, 2], "train": {"batch_size": 32, "device": "cpu"},
    "sets": {"qa": {"kind": "qa", "count": 64}},
    "methods": {
        "bnf": {"loss": "bnf", "grid": {"lr": [1e-4, 1e-3]}},
        "dpo": {"loss": "dpo", "grid": {"lr": [1e-4, 1e-3], "beta": [0.1, 2]},
                "customary": {"beta": 0.1}},
    },
    "on": {"qa": ["bnf", "dpo"]},
}  # fmt: skip
BASE = {
    "win_rate": [0.5, 0.01], "accuracy": [0.9, 0.01], "degenerate": [0.1, 0.01],
    "shift/chosen": [0, 0], "shift/rejected": [0, 0], "gini": [0, None],
}  # fmt: skip
BASE_EACH = {"win_rate": [0.5] * 8, "accuracy": [0.9] * 8}
DEFAULTS = {"win": 0.6, "accuracy": 0.9, "degenerate": 0.1, "shift": (0.1, -1.0), "gini": 0.4}


def run(name, method, setting, seed=0, error=0.01, **scores):
    """A run that scored DEFAULTS, but for what is given, on each of 8 prompts alike."""
    found = DEFAULTS | scores
    assert found.keys() == DEFAULTS.keys()
    result = {
        "win_rate": [found["win"], error], "accuracy": [found["accuracy"], error],
        "degenerate": [found["degenerate"], error], "shift/chosen": [found["shift"][0], error],
        "shift/rejected": [found["shift"][1], error], "gini": [found["gini"], None],
    }  # fmt: skip
    return {
        "set": name, "method": method, "setting": setting, "seed": seed,
        "split": "test" if seed else "validation", "kind": "math" if name == "math" else "qa",
        "result": result, "base": BASE,
        "each": {"win_rate": [found["win"]] * 8, "accuracy": [found["accuracy"]] * 8},
    }  # fmt: skip


# ---- What is run ----


def test_every_combination_is_tried_and_what_is_best_customary_or_on_a_frontier_is_repeated():
    assert settings(SPEC, "qa", "dpo") == [
        {"lr": lr, "beta": b} for lr in (1e-4, 1e-3) for b in (0.1, 2)
    ]
    jobs = sweep(SPEC)
    assert len(jobs) == 6 and {job["seed"] for job in jobs} == {0}
    assert len(set(map(slug, jobs))) == 6
    scores = {
        "bnf": [(0.6, 0.9), (0.7, 0.86)],
        "dpo": [(0.5, 0.9), (0.6, 0.9), (0.55, 0.9), (0.65, 0.7)],
    }
    runs = [
        run("qa", method, setting, win=win, accuracy=kept)
        for method, row in scores.items()
        for setting, (win, kept) in zip(settings(SPEC, "qa", method), row, strict=True)
    ]
    best = {"lr": 1e-3}
    assert chosen_settings(SPEC, runs, "qa", "bnf") == {"best": best, "customary": best}
    assert final_settings(SPEC, runs, "qa", "bnf") == [{"lr": 1e-4}, best]
    _, b, c, d = settings(SPEC, "qa", "dpo")
    assert chosen_settings(SPEC, runs, "qa", "dpo") == {"best": b, "customary": c}
    # d is where the frontier ends
    assert final_settings(SPEC, runs, "qa", "dpo") == [b, c, d]  # d is where it ends
    last = finals(SPEC, runs)
    assert len(last) == (2 + 3) * 2
    assert {job["split"] for job in last} == {"test"} and {job["seed"] for job in last} == {1, 2}


def test_a_set_may_name_its_rates_and_those_that_are_tested():
    spec = changed("sets", "qa", lr=[1e-3, 1e-2], test_lr=[1e-2])
    assert settings(spec, "qa", "dpo") == [{"lr": x, "beta": 0.1} for x in (1e-3, 1e-2)]
    assert len(sweep(spec)) == 4 and final_settings(spec, [], "qa", "bnf") == [{"lr": 1e-2}]
    spec = changed("sets", "qa", test_lr=[1e-2])  # nothing is chosen, so nothing is tried first
    assert not sweep(spec) and len(finals(spec, [])) == 4
    assert settings(changed("methods", "bnf", grid=[{"lr": 1e-5}]), "qa", "bnf") == [{"lr": 1e-5}]


def test_a_product_of_beta_and_length_is_divided_by_the_sets_length():
    spec = changed("sets", "qa", tokens=10)
    spec["methods"]["dpo"] |= {"grid": {"lr": [1e-4], "beta|y|": [3]}, "customary": {"beta|y|": 3}}
    check(spec)
    (job,) = [job for job in sweep(spec) if job["method"] == "dpo"]
    words = arguments(spec, job, "data", "out")
    assert "beta=0.3" in words and not any("|" in word for word in words)
    assert slug(job) == "qa-dpo-lr0.0001-betay3-validation-0"


POINTS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda x: (0.9 - x[0] / 100, x[1] / 100)),
    min_size=1, max_size=8,
)  # fmt: skip


@given(scores=POINTS)
def test_no_setting_of_a_frontier_is_beaten_and_one_is_kept_up_to_its_end(scores):
    runs = [run("qa", "bnf", {"lr": k}, win=w, accuracy=a) for k, (a, w) in enumerate(scores)]
    kept = [scores[setting["lr"]] for setting in frontier(runs)]
    beaten = [p for p in kept if any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in scores)]
    assert kept and not beaten and len(set(kept)) == len(kept)
    assert kept == sorted(kept, reverse=True)
    within = [p for p in kept if p[0] >= 0.9 - FAR - 1e-9]
    assert len(kept) - len(within) <= 1
    for p in scores:  # whatever keeps enough is kept, equalled or beaten by what is kept
        if p[0] >= 0.9 - FAR:
            assert any(q[0] >= p[0] and q[1] >= p[1] for q in kept)


def test_what_a_setting_is_chosen_by():
    assert objective(run("qa", "bnf", {}, win=0.6, accuracy=0.85)) == pytest.approx(0.6 - 0.05)
    # Reasoning gained is no win.
    assert objective(run("qa", "bnf", {}, win=0.6, accuracy=0.95)) == 0.6
    assert objective(run("math", "bnf", {}, accuracy=0.85)) == 0.85
    assert objective(run("qa", "bnf", {}) | {"result": {}}) < 0
    assert objective(run("qa", "bnf", {}) | {"result": {"preference": [0.7, 0.1]}}) == 0.7


@pytest.mark.parametrize(
    "change, is_so",
    [
        ({}, False),
        ({"accuracy": 0.451}, False),
        ({"accuracy": 0.449}, True),
        ({"degenerate": 0.34}, False),
        ({"degenerate": 0.36}, True),
    ],
)
def test_collapse_is_half_of_the_reasoning_or_a_quarter_more_degenerate_answers(change, is_so):
    found = run("qa", "bnf", {}, **change)
    assert collapsed(found) is is_so
    assert collapsed(found | {"result": {}})  # it broke off


def changed(*path, **fields):
    """SPEC, with these fields of the object at a path; None takes a field away."""
    spec = copy.deepcopy(SPEC)
    place = spec
    for name in path:
        place = place[name]
    place.update(fields)
    for name in [name for name, value in fields.items() if value is None]:
        del place[name]
    return spec


REFUSED = [
    (changed(seeds=None), "field 'seeds' is missing"),
    (changed(sedes=[1]), "field 'sedes' is unknown"),
    (changed("on", math=["bnf"]), "'on' names 'math'"),
    (changed("on", qa=["bnf", "ipo"]), "'on' names 'ipo'"),
    (changed("methods", "bnf", loss="bfn"), "the trainer refuses"),
    (changed("sets", "qa", count=None), "set of the small world 'qa': field 'count' is missing"),
    (changed("sets", "qa", rows="x"), "set of files 'qa': field 'held_out' is missing"),
    (changed("sets", "qa", kind="maths"), "set 'qa': its 'kind' must be one of qa, math"),
    (changed("methods", "dpo", customery={}), "method 'dpo': field 'customery' is unknown"),
    (changed("methods", "bnf", "grid", beta=[1]), "no hyper-parameter 'beta'"),
    (changed("methods", "bnf", "grid", lr=None), "its grid must hold an 'lr'"),
    (changed("sets", "qa", lr=[1e-4], test_lr=[1e-3]), "'test_lr' must be among its 'lr'"),
    (changed("methods", "dpo", grid=[{"lr": 1, "beta|y|": 3, "beta": 0.1}]), "needs its 'tokens'"),
    (changed("methods", "bnf", grid=None), "method 'bnf': field 'grid' is missing"),
    (changed("methods", "dpo", customary={"beta": 1}), "and the customary {'beta': 1}"),
]


@pytest.mark.parametrize("spec, message", REFUSED)
def test_a_spec_that_cannot_be_run_is_refused_before_anything_is(spec, message, tmp_path, capsys):
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert main([str(tmp_path / "spec.json"), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def written(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(file)


def says(role, text):
    return [{"role": role, "content": text}]


def pair(prompt, chosen, rejected):
    sides = {"chosen": says("assistant", chosen), "rejected": says("assistant", rejected)}
    return {"prompt": says("user", prompt), **sides}


class InThisProcess(Executor):
    """Stands in for a pool of processes, of which each would import torch anew."""

    def __init__(self, workers, context):
        pass

    def submit(self, function, *given):
        done = Future()
        done.set_result(function(*given))
        return done


def test_one_whole_comparison_interrupted_and_taken_up_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minibnf.lab.trials.ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr("minibnf.train.training_curves", drawn_at_once)
    spec = {
        "base": "weights/tiny", "seeds": [1],
        "train": {"batch_size": 8, "max_steps": 2, "device": "cpu"},
        "exam": {"samples": 1, "count": 2}, "sets": {"qa": {"kind": "qa", "count": 16}},
        "methods": {
            "bnf": {"loss": "bnf", "grid": {"lr": [1e-4]}},
            "dpo": {"loss": "dpo", "grid": {"lr": [1e-4]}},
        },
        "on": {"qa": ["bnf", "dpo"]},
    }  # fmt: skip
    (tmp_path / "out" / "data").mkdir(parents=True)
    for split in ("train", "validation", "test"):  # fewer rows than would be drawn
        asked = problems(QA, split, 16, seed=0)
        rows = [pair(p.prompt, p.answer, "I will not tell you.") for p in asked]
        written(tmp_path / "out" / "data" / f"qa-{split}.jsonl", rows)
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    command = [str(tmp_path / "spec.json"), "--out", str(tmp_path / "out"), "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("minibnf.train.main", lambda argv: 130)  # as after Ctrl-C
        assert main(command) == 130
    assert "interrupted: the same command goes on" in capsys.readouterr().err
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "| bnf | best, customary | lr=0.0001 |" in shown
    assert "aligns as well as the best method" in shown
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"win_rate", "accuracy"} == set(results["runs"][0]["each"])
    assert set(results["facts"]["base"]["qa"]) == {"test"}
    assert len(results["runs"]) == 4 and results["spec"] == spec and results["facts"]["revision"]
    assert {figure.suffix for figure in (tmp_path / "out" / "figures").iterdir()} == {".svg"}
    assert not list((tmp_path / "out" / "runs").iterdir())  # models are not kept

    lost = sorted((tmp_path / "out" / "results").iterdir())[0]
    lost.unlink()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "results").iterdir()}
    again = compare(spec, tmp_path / "out", 1)

    def untimed(runs):
        return [{k: v for k, v in r.items() if k != "train_seconds"} for r in runs]

    assert untimed(again["runs"]) == untimed(results["runs"]) and lost.exists()
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    with pytest.raises(ValueError, match="holds runs of another spec"):
        compare(spec | {"seeds": [2]}, tmp_path / "out", 1)
    # What is known is not run again.
    monkeypatch.setattr("minibnf.lab.trials.run_job", lambda *given: pytest.fail("it was run"))
    (tmp_path / "new").mkdir()
    (tmp_path / "out" / "data").rename(tmp_path / "new" / "data")
    assert compare(spec, tmp_path / "new", 1, known=results)["runs"] == results["runs"]


@pytest.mark.parametrize("name", ["frontiers", "map", "long", "small", "quick", "real"])
def test_every_method_of_a_comparison_has_its_own_colour(name):
    """The eye tells any two apart: of red, green and blue from 0 to 1, they differ by .1."""
    to_rgb = pytest.importorskip("matplotlib.colors").to_rgb
    spec = json.loads(Path(f"tutorials/evidence/{name}.json").read_text())
    colours = [to_rgb(_look(spec, method)["color"]) for method in spec["methods"]]
    assert all(math.dist(one, other) > 0.1 for one, other in itertools.combinations(colours, 2))


# ---- Frontiers ----

BOTH = [1e-4, 1e-3]  # the rates of every grid


def results(rates=None, **of):
    """Results in which each method scores as given, on "qa", "unpaired" and "math".

    results(dpo={"win": 0.7}) speaks of every setting and seed, results(dpo_2=...) of beta = 2.
    rates: which "math" is tested at, "test_lr".
    """
    spec = copy.deepcopy(SPEC)
    spec["methods"] |= {
        m: {"loss": m, "grid": {"lr": [1e-4, 1e-3]}} for m in ("kto", "nll", "rbnf", "bnf batch")
    }
    spec["sets"]["math"] = {"kind": "math", "count": 64} | ({"test_lr": rates} if rates else {})
    spec["sets"]["unpaired"] = {"kind": "qa", "count": 64, "unpaired": "both"}
    methods = ["bnf", "dpo", "kto", "nll", "rbnf", "bnf batch"]
    spec["on"] = {name: methods for name in ("qa", "math", "unpaired")}

    def scored(job):
        method, setting = job["method"], job["setting"]
        given = of.get(method, {}) | of.get(f"{method}_{setting.get('beta')}", {})
        return run(job["set"], method, setting, job["seed"], **given)

    runs = [scored(job) for job in sweep(spec)]
    facts = {"base": {name: {"test": BASE_EACH} for name in spec["on"]}}
    return {
        "spec": spec,
        "facts": facts,
        "runs": runs + [scored(job) for job in finals(spec, runs)],
    }


def test_the_numbers_of_a_frontier_by_hand():
    """From the base (0, 0) to 4 points lost, .08 gained, to 12 lost, .12 gained: at 10 lost .11,
    at 5 lost .085; the mean is (.04 x .04 + (.08 + .11)/2 x .06) / .1 = .073."""
    made = results()
    lower, higher = (
        {"accuracy": [0.86] * 8, "win_rate": [0.58] * 8},
        {"accuracy": [0.78] * 8, "win_rate": [0.62] * 8},
    )
    for r in select(made["runs"], set="qa", method="bnf"):
        r["each"] = lower if r["setting"]["lr"] == 1e-4 else higher
        r["result"] |= {name: [x[0], 0.01] for name, x in r["each"].items()}
    made["runs"] += [
        r | {"split": "test", "seed": 1}
        for r in select(made["runs"], set="qa", method="bnf", split="validation")
    ]
    assert len(points(made, "qa", "bnf", usual=False)) == 2
    found = {name: x[0] for name, x in measures(made, "qa", "bnf").items()}
    assert found == pytest.approx({"at 5": 0.085, "at 10": 0.11, "mean": 0.073})


def test_a_setting_that_loses_nothing_counts_from_the_start():
    """Reasoning gained is none lost: all of .1 is gained at 0, and so everywhere."""
    made = results(bnf={"accuracy": 0.92, "win": 0.6})
    found = {name: x[0] for name, x in measures(made, "qa", "bnf").items()}
    assert found == pytest.approx({"at 5": 0.1, "at 10": 0.1, "mean": 0.1}, abs=1e-3)


def test_many_comparisons_share_their_level_and_seeds_are_drawn():
    """2.4 standard errors are a difference to one rival, and none to one of twenty."""
    rng = np.random.default_rng(0)
    mine = 2.4 + np.concatenate([[0.0], rng.standard_normal(2000)])
    alone, many = {"a": np.zeros(2001)}, {str(k): np.zeros(2001) for k in range(20)}
    assert against(mine, alone) == (["a"], []) and against(mine, many) == ([], [])
    assert against(mine, alone, others=19) == ([], [])
    made = results(BOTH)
    for r in select(made["runs"], set="math", split="test"):  # prompts alike, seeds not
        r["each"]["accuracy"] = [0.8 + 0.05 * r["seed"]] * 8
    assert at_rates(made, "math", "bnf", "accuracy")[1:].std() > 0.01


def test_beyond_its_last_point_a_frontier_is_level():
    made = results(bnf={"accuracy": 0.88, "win": 0.6})
    found = {name: x[0] for name, x in measures(made, "qa", "bnf").items()}
    assert found["at 5"] == found["at 10"] == pytest.approx(0.1)


def test_intervals_cover_what_they_should_and_differences_are_paired():
    """Two methods that score alike but for .02: prompts vary, and so do seeds, by far more than
    that, but together."""
    made, rng = results(BOTH), np.random.default_rng(0)
    shared = {seed: rng.random(8) for seed in (1, 2)}
    for r in select(made["runs"], set="math", split="test"):
        r["each"]["accuracy"] = list(shared[r["seed"]] + 0.02 * (r["method"] == "bnf"))
    bnf, dpo = (at_rates(made, "math", m, "accuracy") for m in ("bnf", "dpo"))
    assert bnf[1:].std() > 0.05 and (bnf - dpo)[1:].std() < 1e-12
    assert against(bnf, {"dpo": dpo}) == (["dpo"], []) and against(dpo, {"bnf": bnf}) == (
        [],
        ["bnf"],
    )
    low, high = interval(bnf)
    assert low < bnf[0] < high
    wide = interval(bnf, comparisons=20)
    assert wide[0] < low and wide[1] > high  # each of many comparisons has less of the level


# ---- Verdicts ----


def verdict(made, words):
    ((_, found, numbers),) = [v for v in verdicts(made) if words in v[0]]
    return found, numbers


def wins(**of):
    return {method: {"win": x} for method, x in of.items()}


def keeps(**of):
    return {method: {"accuracy": x} for method, x in of.items()}


FAR_BEST = {"dpo_2": {"win": 0.7}, "dpo_0.1": {"win": 0.55}}
TRADED = keeps(bnf=0.88, kto=0.88) | {"dpo_0.1": {"accuracy": 0.8}, "dpo_2": {"win": 0.9}}


def test_an_error_joins_seeds_and_prompts():
    made = results(bnf={"error": 0.03})
    first, second = select(made["runs"], method="bnf", split="test", set="qa")
    first["result"]["win_rate"][0], second["result"]["win_rate"][0] = 0.5, 0.7
    mean, error = figure(made, "qa", "bnf", "best", "win_rate")
    assert mean == pytest.approx(0.6) and error == pytest.approx(math.sqrt(0.02 / 2 + 0.03**2))


def test_a_claim_is_judged_only_where_its_sets_and_methods_were_run():
    made = results()
    made["spec"]["on"] = {"qa": ["bnf", "dpo"]}
    judged = [claim.split()[0] for claim, _, _ in verdicts(made)]
    assert judged == ["aligns", "gains", "does", "shifts"]


@pytest.mark.parametrize(
    "claim, scores, expected, numbers",
    [
        ("aligns", wins(bnf=0.6, dpo=0.6), REPRODUCED, "worse than 0"),
        ("aligns", wins(bnf=0.6, dpo=0.62), NOT, "best rival dpo +0.120"),
        ("aligns", wins(bnf=0.6) | {"dpo_2": {"win": 0.7}}, NOT, "worse than 1"),
        ("reasoning lost", wins(bnf=0.65), REPRODUCED, "better than 2 of 2, worse than 0"),
        ("reasoning lost", keeps(dpo=0.82, kto=0.82), REPRODUCED, "better than 2 of 2"),
        ("reasoning lost", {}, NOT, "better than 0 of 2"),
        ("reasoning lost", keeps(dpo=0.82), NOT, "better than 1 of 2"),  # half is not most
        ("without tuning", {"dpo_2": {"win": 0.7}, "dpo_0.1": {"win": 0.55}}, NOT, "than 1 of 2"),
        ("without tuning", wins(kto=0.55, dpo=0.55), REPRODUCED, ""),
        ("unpaired", wins(bnf=0.6, kto=0.6), REPRODUCED, ""),
        ("unpaired", wins(bnf=0.5, kto=0.5), NOT, ""),  # no gain
        ("unpaired", wins(bnf=0.6, kto=0.7), NOT, ""),
        ("stable", keeps(dpo=0.4, kto=0.4), REPRODUCED, "better than 2 of 2"),
        ("stable", {}, NOT, ""),  # its rivals are as steady: there is nothing to reproduce
        ("stable", keeps(bnf=0.4), NOT, "worse than 2"),
        ("shifts", {"bnf": {"shift": (0.1, -0.5), "gini": 0.3}}, REPRODUCED, "median 1.10"),
        ("shifts", {"bnf": {"shift": (0.1, -0.5), "gini": 0.5}}, NOT, ""),
        ("shifts", {"bnf": {"shift": (0.1, -1.5), "gini": 0.3}}, NOT, ""),
        ("rbnf", {"bnf batch": {"accuracy": 0.88}}, REPRODUCED, ""),
        ("rbnf", {}, NOT, ""),
    ],
)  # fmt: skip
def test_verdicts(claim, scores, expected, numbers):
    found, said = verdict(results(BOTH, **scores), claim)
    assert found == expected and numbers in said


def test_frontiers_need_neither_rates_on_maths_nor_a_second_stage_of_every_method():
    made = results()
    assert len(verdicts(made)) == 5 and len(verdicts(results(BOTH))) == 7
    made["runs"] = [r for r in made["runs"] if (r["method"], r["split"]) != ("nll", "test")]
    assert "| nll | +0.000 ± 0.000 |" in frontiers.frontier_table(made, "qa")


def test_the_maps_questions_are_differences_with_intervals():
    made = results()
    made["spec"] = spec = json.loads(Path("tutorials/evidence/map.json").read_text())

    def scored(job):
        odds = job["method"] in ("bnf/bnf", "nll/bnf", "rbnf/bnf")
        kept = 0.85 if odds else 0.8
        return run(job["set"], job["method"], job["setting"], job["seed"], accuracy=kept)

    made["runs"] = [scored(job) for job in finals(spec, [])]
    lines = questions(made).splitlines()
    (both,) = [line for line in lines if "bnf/bnf less ratio/ratio" in line]
    assert "| +0.000 (+0.000 to +0.000) | **+0.050 (+0.050 to +0.050)** |" in both
    assert "## The map" in report(made) and "| nll/tnpo | 0.0001 |" in report(made)


def test_numbers_are_rounded_and_whole_ones_are_integers():
    assert rounded([1.0, 0.123456, math.nan, math.inf]) == [1, 0.12346, None, math.inf]


def test_ranks_and_what_the_gini_goes_with():
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [2.5, 0.0, 2.5, 1.0]
    made = results()
    for k, r in enumerate(made["runs"]):
        r["result"] |= {"gini": [0.1 * k, None], "accuracy": [0.9 - 0.01 * k, 0.01]}
    rho, count = concentration(made, "qa")
    assert rho == pytest.approx(1) and count == len(sweep(made["spec"])) / 3


def test_a_comparison_on_files_examines_both_halves_of_what_was_held_out(tmp_path):
    rows = [pair(f"What is {k} + 4?", f"good {k}", f"bad {k}") for k in range(16)]
    solutions = [{"question": "What is 3 + 4?", "answer": "3+4=7. Answer: 7"}]
    extra = {"file": written(tmp_path / "solutions.jsonl", solutions), "count": 1}
    pairs = written(tmp_path / "pairs.jsonl", rows)
    given = {"rows": pairs, "count": 8, "held_out": 8, "solutions": extra, "seeds": [0]}
    methods = {name: {"loss": name, "grid": {"lr": [1e-3]}} for name in ("bnf", "nll")}
    spec = {
        "base": "weights/tiny", "seeds": [1, 2], "methods": methods,
        "train": {"batch_size": 8, "max_steps": 12, "device": "cpu"},
        "sets": {"mine": given}, "on": {"mine": [*methods]},
    }  # fmt: skip
    made = compare(spec, tmp_path / "out", 1)
    splits = [(r["split"], r["seed"]) for r in made["runs"]]
    assert splits == [("validation", 0)] * 2 + [("test", 0)] * 2  # two runs, two results each
    for r in select(made["runs"], method="bnf"):
        base, result = r["base"], r["result"]
        assert base["preference"] == [0.5, 0] and base["shift/chosen"] == [0, 0]
        assert base["gini"][0] == 0
        assert result["preference"][0] > 0.9
        assert result["shift/chosen"][0] > result["shift/rejected"][0]
        assert -20 < result["solutions"][0] < 0 and result["solutions"] != base["solutions"]
    text = report(made)
    assert "| bnf | best, customary | lr=0.001 |" in text and "pairs told right" in text
    bnf, nll = (select(made["runs"], split="test", method=m)[0]["result"] for m in methods)
    cells = [f"{bnf[x][0] - nll[x][0]:+.3f} (" for x in ("preference", "solutions")]
    assert re.search(rf"\| nll \| \**{re.escape(cells[0])}.*\| \**{re.escape(cells[1])}", text)
    tested = select(made["runs"], split="test", method="nll")
    for broken in (tested, made["runs"]):  # a method's, and bnf's too
        for r in broken:
            r |= {"result": {}, "each": {}}
        assert "| nll | a run broke off | a run broke off |" in frontiers.file_table(made, "mine")
    given["count"] = 9
    words = "must have 9 rows to train on and then 8 pairs to hold out"
    with pytest.raises(ValueError, match=words):
        compare(spec, tmp_path / "other", 1)


def test_good_rates_have_no_holes():
    wins = {1e-5: 0.6, 1e-4: 0.5, 1e-3: 0.6, 1e-2: 0.56}
    spec = changed("methods", "bnf", grid={"lr": [*wins]})
    runs = [run("qa", "bnf", {"lr": lr}, win=win) for lr, win in wins.items()]
    made = {"spec": spec, "runs": runs}
    assert good_rates(made, "qa", "bnf") == [1e-5]
    made["runs"][2]["result"]["win_rate"][0] = 0.61
    assert good_rates(made, "qa", "bnf") == [1e-3, 1e-2]


def odd_results(name):
    """Made up for a spec of tutorials/evidence, with all that may happen.

    Methods of the first stage alone, runs that broke off, and a method that always does.
    """
    spec = json.loads(Path(f"tutorials/evidence/{name}.json").read_text())

    def odd(k, job):
        one = run(job["set"], job["method"], job["setting"], job["seed"], win=0.5 + 0.001 * k)
        broke_off = k % 7 == 3 or job["method"] == "slic"
        return one | {"result": {}, "each": {}} if broke_off else one

    runs = [odd(k, job) for k, job in enumerate(sweep(spec))]
    runs += [odd(k, job) for k, job in enumerate(finals(spec, runs))]
    tokens = dict.fromkeys(spec["on"], 10.0)
    return {"spec": spec, "runs": runs, "facts": {"response_tokens": tokens}}


def test_report_and_figures_of_results_with_runs_that_broke_off(tmp_path):
    made = odd_results("small")
    text = report(made)
    assert "| dpo lr 1e-4 |" not in text
    assert "broke off" in text and "β × tokens" in text and "the batch's mean" in text
    slic = [line for line in text.splitlines() if line.startswith("| slic")]
    assert slic and all("18 of 18" in line for line in slic)
    files = comparison(made, tmp_path)
    assert len(files) == 6 and all(file.read_text().startswith("<?xml") for file in files)


def test_frontiers_of_runs_that_broke_off():
    made = odd_results("frontiers")
    made["facts"]["base"] = {name: {"test": BASE_EACH} for name in made["spec"]["on"]}
    text = report(made)
    assert "## Frontiers, qa" in text and "## Verdicts" in text
    assert "| slic | +0.000 ± 0.000 |" in text  # without a setting it stays where the base is


def test_what_broke_off_is_worst_in_every_respect():
    made = results(bnf={"shift": (0.1, -0.5), "gini": 0.3})
    assert verdict(made, "shifts")[0] == REPRODUCED
    for r in select(made["runs"], method="bnf", split="test"):
        r["result"] = r["each"] = {}
    assert {verdict(made, words)[0] for words in ("aligns", "gains more", "shifts")} == {NOT}


def test_every_committed_spec_can_be_run():
    for file in Path("tutorials/evidence").glob("*.json"):
        if not file.stem.endswith("-results"):
            check(json.loads(file.read_text()))


def test_results_of_another_base_are_not_taken_for_these(tmp_path):
    spec = SPEC | {"on": {"qa": ["bnf"]}}
    (tmp_path / "base.json").write_text(json.dumps({"sha256": "another"}))
    with pytest.raises(ValueError, match="holds runs of another base"):
        compare(spec, tmp_path, 1)


def test_a_method_may_combine_two_token_losses_and_have_their_name():
    given = {"loss": "rbnf/tnpo", "grid": {"lr": [1e-4], "beta": [1.0]}, "fixed": {"length": "own"}}
    spec = SPEC | {"methods": {"rbnf/tnpo": given}, "on": {"qa": ["rbnf/tnpo"]}}
    check(spec)
    assert [slug(job) for job in sweep(spec)] == ["qa-rbnf+tnpo-lr0.0001-beta1.0-validation-0"]
    with pytest.raises(ValueError, match="the trainer refuses"):
        check(spec | {"methods": {"rbnf/tnpo": given | {"loss": "rbnf/dpo"}}})
