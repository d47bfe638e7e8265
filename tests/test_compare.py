"""Comparisons: what is run, what is chosen, what counts as collapse; the verdicts' rules on made-up results; one real run."""

import copy
import json
import math
from pathlib import Path

import pytest

from minibnf.lab import compare as module
from minibnf.lab.compare import (
    chosen_settings,
    collapsed,
    compare,
    finals,
    main,
    objective,
    settings,
    slug,
    sweep,
)
from minibnf.lab.figures import comparison
from minibnf.lab.verdicts import (
    CUSTOMARY,
    NOT,
    REPRODUCED,
    concentration,
    figure,
    good_rates,
    ranks,
    report,
    table,
    verdicts,
    within,
)

SPEC = {
    "base": "weights/tiny", "seeds": [1, 2], "train": {"batch_size": 32}, "sets": {"qa": {"kind": "qa", "count": 64}},
    "methods": {
        "bnf": {"loss": "bnf", "grid": {"lr": [1e-4, 1e-3]}},
        "dpo": {"loss": "dpo", "grid": {"lr": [1e-4, 1e-3], "beta": [0.1, 2]}, "customary": {"beta": 0.1}},
    },
    "on": {"qa": ["bnf", "dpo"]},
}  # fmt: skip
BASE = {"win_rate": [0.5, 0.01], "accuracy": [0.9, 0.01], "degenerate": [0.1, 0.01], "shift/chosen": [0, 0],
        "shift/rejected": [0, 0], "gini": [0, None]}  # fmt: skip


def run(
    name,
    method,
    setting,
    seed=0,
    win=0.6,
    accuracy=0.9,
    degenerate=0.1,
    shift=(0.1, -1.0),
    gini=0.4,
    error=0.01,
):
    result = {
        "win_rate": [win, error], "accuracy": [accuracy, error], "degenerate": [degenerate, error],
        "shift/chosen": [shift[0], error], "shift/rejected": [shift[1], error], "gini": [gini, None],
    }  # fmt: skip
    split = "test" if seed else "validation"
    kind = "math" if name == "math" else "qa"
    return {"set": name, "method": method, "setting": setting, "seed": seed, "split": split, "kind": kind, "result": result,
            "base": BASE, "trace": {}, "feedback": {}}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what is run


def test_every_combination_is_tried_and_the_best_and_the_customary_one_are_repeated():
    assert settings(SPEC["methods"]["dpo"]) == [
        {"lr": lr, "beta": b} for lr in (1e-4, 1e-3) for b in (0.1, 2)
    ]
    jobs = sweep(SPEC)
    assert (
        len(jobs) == 6 and {job["seed"] for job in jobs} == {0} and len(set(map(slug, jobs))) == 6
    )
    wins = {("bnf", 1e-4, None): 0.6, ("bnf", 1e-3, None): 0.7, ("dpo", 1e-4, 0.1): 0.55, ("dpo", 1e-3, 0.1): 0.5,
            ("dpo", 1e-4, 2): 0.6, ("dpo", 1e-3, 2): 0.65}  # fmt: skip
    runs = [
        run(
            "qa",
            j["method"],
            j["setting"],
            win=wins[j["method"], j["setting"]["lr"], j["setting"].get("beta")],
        )
        for j in jobs
    ]
    assert chosen_settings(SPEC, runs, "qa", "bnf") == {
        "best": {"lr": 1e-3},
        "customary": {"lr": 1e-3},
    }
    dpo = {"best": {"lr": 1e-3, "beta": 2}, "customary": {"lr": 1e-4, "beta": 0.1}}
    assert chosen_settings(SPEC, runs, "qa", "dpo") == dpo
    last = finals(SPEC, runs)
    assert (
        len(last) == (1 + 2) * 2
        and {job["split"] for job in last} == {"test"}
        and {job["seed"] for job in last} == {1, 2}
    )
    extra = copy.deepcopy(SPEC)
    extra["methods"]["dpo"]["extra"] = "sweep"
    assert {job["method"] for job in finals(extra, runs)} == {"bnf"}


def test_what_a_setting_is_chosen_by():
    assert objective(run("qa", "bnf", {}, win=0.6, accuracy=0.85)) == pytest.approx(0.6 - 0.05)
    assert (
        objective(run("qa", "bnf", {}, win=0.6, accuracy=0.95)) == 0.6
    )  # gained reasoning is no win
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
    assert collapsed(run("qa", "bnf", {}, **change)) is is_so


def test_a_run_that_broke_off_has_collapsed():
    assert collapsed(run("qa", "bnf", {}) | {"result": {}})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("seeds"), "field 'seeds' is missing"),
        (lambda s: s.update(sedes=[1]), "field 'sedes' is unknown"),
        (lambda s: s["on"].update(math=["bnf"]), "'on' names 'math', which 'sets' lacks"),
        (lambda s: s["on"]["qa"].append("ipo"), "'on' names 'ipo', which 'methods' lacks"),
        (lambda s: s["methods"]["bnf"].update(loss="bfn"), "method 'bnf' needs a 'loss' of"),
        (lambda s: s.update(seeds=[]), "'seeds' is empty"),
        (
            lambda s: s["sets"]["qa"].pop("count"),
            "set of the small world 'qa': field 'count' is missing",
        ),
        (
            lambda s: s["sets"]["qa"].update(rows="x"),
            "set of files 'qa': field 'held_out' is missing",
        ),
        (
            lambda s: s["methods"]["dpo"].update(customery={}),
            "method 'dpo': field 'customery' is unknown",
        ),
        (lambda s: s["methods"]["dpo"].update(extra="sweap"), "extra: true, 'sweep'"),
        (lambda s: s["train"].update(batch_sise=8), "the trainer refuses"),
        (lambda s: s["methods"]["bnf"]["grid"].update(beta=[1]), "no hyper-parameter 'beta'"),
        (
            lambda s: s["methods"]["dpo"].update(customary={"beta": 1}),
            "its customary setting {'beta': 1} is not in its grid",
        ),
    ],
)
def test_a_spec_that_cannot_be_run_is_refused_before_anything_is(change, message, tmp_path, capsys):
    spec = copy.deepcopy(SPEC)
    change(spec)
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert main([str(tmp_path / "spec.json"), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_one_whole_comparison_interrupted_and_taken_up_again(tmp_path, capsys):
    spec = {
        "base": "weights/tiny", "seeds": [1], "train": {"batch_size": 8, "max_steps": 2}, "exam": {"samples": 1, "count": 2},
        "sets": {"qa": {"kind": "qa", "count": 16}},
        "methods": {"bnf": {"loss": "bnf", "grid": {"lr": [1e-4]}}, "dpo": {"loss": "dpo", "grid": {"lr": [1e-4]}}},
        "on": {"qa": ["bnf", "dpo"]},
    }  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    command = [str(tmp_path / "spec.json"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert (
        "| bnf | best, customary | lr=0.0001 |" in shown
        and "aligns as well as the best method" in shown
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["runs"]) == 4 and results["spec"] == spec and results["facts"]["revision"]
    last = results["runs"][-1]
    assert (
        last["split"] == "test" and last["trace"]["step"] == [1, 2] and last["feedback"]["chosen"]
    )
    assert {figure.suffix for figure in (tmp_path / "out" / "figures").iterdir()} == {".svg"}
    assert not list((tmp_path / "out" / "runs").iterdir())  # models are not kept

    lost = sorted((tmp_path / "out" / "results").iterdir())[0]
    lost.unlink()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "results").iterdir()}
    again = compare(spec, tmp_path / "out", 1)
    strip = lambda runs: [{k: v for k, v in r.items() if k != "train_seconds"} for r in runs]
    assert strip(again["runs"]) == strip(results["runs"]) and lost.exists()
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    with pytest.raises(ValueError, match="holds runs of another spec"):
        compare(spec | {"seeds": [2]}, tmp_path / "out", 1)


def test_the_weights_of_real_tokens_lie_on_bnfs_curve(tmp_path):
    """Autograd through the soft-max of a model that was changed at random, on real rows: w = min(1, o(p)/o(r))."""
    import torch

    from minibnf.files.tokenizer import load_tokenizer
    from minibnf.model import load, save

    spec = SPEC | {"sets": {"qa": {"kind": "qa", "count": 8}}}
    files = module.prepare(spec, "qa", tmp_path / "data")
    model = load("weights/tiny")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    load_tokenizer("weights/tiny").save(tmp_path / "model")
    save(model, tmp_path / "model")
    found = module.feedback_of(
        spec, {"method": "bnf", "setting": {"lr": 1e-4}}, files["test"], tmp_path / "model"
    )
    below = 0
    for x, w in found["chosen"] + found["rejected"]:
        assert w == pytest.approx(min(1.0, math.exp(x)), rel=1e-3)
        below += x < -0.1
    assert below > 20
    assert (
        len({e for file in files.values() for e in file.read_text().splitlines()}) > 500
    )  # three splits, other rows


# ------------------------------------------------------------------------------------------------------- verdicts


def results(**of):
    """Results in which each method on "qa", "unpaired" and "math" scores as given, at every setting and seed."""
    spec = copy.deepcopy(SPEC)
    spec["methods"] |= {m: {"loss": m, "grid": {"lr": [1e-4, 1e-3]}} for m in ("kto", "nll")}
    spec["sets"] |= {
        "math": {"kind": "math", "count": 64},
        "unpaired": {"kind": "qa", "count": 64, "unpaired": "both"},
    }
    spec["on"] = {name: ["bnf", "dpo", "kto", "nll"] for name in ("qa", "math", "unpaired")}
    made = {"spec": spec, "runs": []}
    for job in sweep(spec):
        given = of.get(job["method"], {}) | of.get(
            f"{job['method']}_{job['setting'].get('beta')}", {}
        )
        made["runs"].append(run(job["set"], job["method"], job["setting"], **given))
    for job in finals(spec, made["runs"]):
        given = of.get(job["method"], {}) | of.get(
            f"{job['method']}_{job['setting'].get('beta')}", {}
        )
        made["runs"].append(run(job["set"], job["method"], job["setting"], job["seed"], **given))
    return made


def verdict(made, words):
    ((_, found, numbers),) = [v for v in verdicts(made) if words in v[0]]
    return found, numbers


def test_aligning_as_well():
    assert (
        verdict(results(bnf={"win": 0.6}, dpo={"win": 0.62}), "aligns")[0] == REPRODUCED
    )  # within two errors
    assert verdict(results(bnf={"win": 0.6}, dpo={"win": 0.7}), "aligns")[0] == NOT
    only = results(bnf={"win": 0.6}, **{"dpo_2": {"win": 0.7}, "dpo_0.1": {"win": 0.55}})
    found, numbers = verdict(only, "aligns")
    assert found == CUSTOMARY and "best rival dpo 0.700" in numbers


def test_costing_less():
    lost = lambda bnf, dpo, kto: verdict(
        results(bnf={"accuracy": bnf}, dpo={"accuracy": dpo}, kto={"accuracy": kto}), "costs"
    )
    assert lost(0.88, 0.8, 0.8)[0] == REPRODUCED
    assert lost(0.84, 0.8, 0.8)[0] == NOT
    assert lost(0.88, 0.88, 0.86)[0] == NOT  # the median of 0.02 and 0.04 is 0.03
    assert lost(0.9, 0.9, 0.9)[0] == NOT  # rivals lose nothing, so there is nothing to lose less of
    only = results(
        bnf={"accuracy": 0.88},
        **{"kto": {"accuracy": 0.88}, "dpo_0.1": {"accuracy": 0.8}, "dpo_2": {"win": 0.9}},
    )
    found, numbers = verdict(only, "costs")
    assert (
        found == CUSTOMARY
        and "rivals' median 0.010 (least: dpo 0.000), at customary hyper-parameters 0.060"
        in numbers
    )


def test_unpaired_data():
    assert verdict(results(bnf={"win": 0.6}, kto={"win": 0.6}), "unpaired")[0] == REPRODUCED
    assert verdict(results(bnf={"win": 0.51}, kto={"win": 0.5}), "unpaired")[0] == NOT  # no gain
    assert verdict(results(bnf={"win": 0.6}, kto={"win": 0.7}), "unpaired")[0] == NOT


def test_stability_on_mathematical_pairs():
    assert verdict(results(dpo={"accuracy": 0.4}, kto={"accuracy": 0.4}), "stable")[0] == REPRODUCED
    assert (
        verdict(results(dpo={"accuracy": 0.86}, kto={"accuracy": 0.4}), "stable")[0] == REPRODUCED
    )  # as steady as the best
    assert (
        verdict(results(), "stable")[0] == NOT
    )  # its rivals are as steady: there is nothing to reproduce
    assert verdict(results(bnf={"accuracy": 0.4}), "stable")[0] == NOT
    only = results(kto={"accuracy": 0.84}, **{"dpo_0.1": {"accuracy": 0.84}})
    for r in only["runs"]:
        if (r["method"], r["setting"]["lr"]) == ("bnf", 1e-3):
            r["result"]["accuracy"] = [0.84, 0.01]
    assert verdict(only, "stable")[0] == REPRODUCED
    numbers = "bnf 50%, rivals' median 25%, most dpo 50%; at customary hyper-parameters bnf 50%, rivals' median 0%"
    assert numbers in verdict(only, "stable")[1]


def test_shifts_and_tuning():
    assert verdict(results(bnf={"shift": (0.1, -0.5), "gini": 0.3}), "shifts")[0] == REPRODUCED
    assert verdict(results(bnf={"shift": (0.1, -0.5), "gini": 0.5}), "shifts")[0] == NOT
    assert verdict(results(bnf={"shift": (0.1, -1.5), "gini": 0.3}), "shifts")[0] == NOT
    assert verdict(results(), "tuning")[0] == REPRODUCED
    made = results()
    for r in made["runs"]:
        if r["method"] == "bnf" and r["setting"]["lr"] == 1e-3:
            r["result"]["win_rate"] = [0.5, 0.01]
    assert good_rates(made, "qa", "bnf") == [1e-4] and verdict(made, "tuning")[0] == NOT


def test_an_error_joins_seeds_and_prompts():
    made = results(bnf={"error": 0.03})
    first, second = [
        r
        for r in made["runs"]
        if r["method"] == "bnf" and r["split"] == "test" and r["set"] == "qa"
    ]
    first["result"]["win_rate"][0], second["result"]["win_rate"][0] = 0.5, 0.7
    mean, error = figure(made, "qa", "bnf", "best", "win_rate")
    assert mean == pytest.approx(0.6) and error == pytest.approx(math.sqrt(0.02 / 2 + 0.03**2))
    assert within((0.5, 0.03), (0.6, 0.05)) and not within(
        (0.5, 0.03), (0.6, 0.03)
    )  # sqrt(.03² + .05²) > .05 > sqrt(2) .03


def test_a_claim_is_judged_only_where_its_sets_and_methods_were_run():
    made = results()
    made["spec"]["on"] = {"qa": ["bnf", "dpo"]}
    assert [claim.split()[0] for claim, _, _ in verdicts(made)] == ["aligns", "costs", "shifts"]


def test_a_table_has_the_base_first_then_the_best(tmp_path):
    made = results(bnf={"win": 0.7})
    lines = table(made, "qa").splitlines()
    assert lines[2].startswith("| base |") and lines[3].startswith("| bnf | best, customary |")
    assert "0 of 4" in "".join(line for line in lines if line.startswith("| dpo | best"))
    assert (
        len(
            {
                line.count("|")
                for line in report(made).splitlines()
                if line.startswith("|") and "BNF" not in line
            }
        )
        == 2
    )


def test_rbnf_is_judged_on_both_kinds_of_pairs():
    made = results(bnf={}, dpo={"win": 0.62})
    for name in made["spec"]["on"]:
        made["spec"]["on"][name] = [*made["spec"]["on"][name], "rbnf"]
    made["spec"]["methods"]["rbnf"] = made["spec"]["methods"]["bnf"]
    made["runs"] += [r | {"method": "rbnf"} for r in made["runs"] if r["method"] == "bnf"]
    assert verdict(made, "rbnf")[0] == REPRODUCED
    for r in made["runs"]:
        if r["method"] == "rbnf" and r["set"] == "math":
            r["result"] = r["result"] | {"accuracy": [0.8, 0.01]}
    assert verdict(made, "rbnf")[0] == NOT


def test_ranks_and_what_the_gini_goes_with():
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [2.5, 0.0, 2.5, 1.0]
    made = results()
    for k, r in enumerate(made["runs"]):
        r["result"] |= {"gini": [0.1 * k, None], "accuracy": [0.9 - 0.01 * k, 0.01]}
    rho, count = concentration(made, "qa")
    assert rho == pytest.approx(1) and count == len(sweep(made["spec"])) / 3


def test_a_comparison_on_files_examines_both_halves_of_what_was_held_out(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {k} + 4?"}]}
        | {
            side: [{"role": "assistant", "content": f"{answer} {k}"}]
            for side, answer in (("chosen", "good"), ("rejected", "bad"))
        }
        for k in range(16)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "problems.jsonl").write_text(
        json.dumps({"question": "What is 3 + 4?", "answer": "3+4=7. Answer: 7"}) + "\n"
    )
    extra = {"file": str(tmp_path / "problems.jsonl"), "count": 1}
    given = {"rows": str(tmp_path / "pairs.jsonl"), "count": 8, "held_out": 8, "solutions": extra}
    spec = {
        "base": "weights/tiny", "seeds": [0], "train": {"batch_size": 8, "max_steps": 12}, "sets": {"mine": given},
        "methods": {"bnf": {"loss": "bnf", "grid": {"lr": [1e-3]}}}, "on": {"mine": ["bnf"]},
    }  # fmt: skip
    made = compare(spec, tmp_path / "out", 1)
    assert [(r["split"], r["seed"]) for r in made["runs"]] == [
        ("validation", 0),
        ("test", 0),
    ]  # one run, two results
    for r in made["runs"]:
        assert (
            r["base"]["preference"] == [0.5, 0]
            and r["base"]["shift/chosen"] == [0, 0]
            and r["base"]["gini"][0] == 0
        )
        assert (
            r["result"]["preference"][0] > 0.9
            and r["result"]["shift/chosen"][0] > r["result"]["shift/rejected"][0]
        )
        assert (
            -20 < r["result"]["solutions"][0] < 0
            and r["result"]["solutions"] != r["base"]["solutions"]
        )
    assert "| bnf | best, customary | lr=0.001 |" in report(made) and "pairs told right" in report(
        made
    )
    given["count"] = 9
    with pytest.raises(
        ValueError, match=r"has 16 rows, fewer than the 9 and 8 that set 'mine' asks for"
    ):
        compare(spec, tmp_path / "other", 1)


def test_good_rates_have_no_holes():
    spec = SPEC | {
        "methods": {"bnf": {"loss": "bnf", "grid": {"lr": [1e-5, 1e-4, 1e-3, 1e-2]}}},
        "on": {"qa": ["bnf"]},
    }
    wins = dict(zip([1e-5, 1e-4, 1e-3, 1e-2], [0.6, 0.5, 0.6, 0.56], strict=True))
    made = {
        "spec": spec,
        "runs": [
            run("qa", "bnf", job["setting"], win=wins[job["setting"]["lr"]]) for job in sweep(spec)
        ],
    }
    assert good_rates(made, "qa", "bnf") == [1e-5]
    made["runs"][2]["result"]["win_rate"][0] = 0.61
    assert good_rates(made, "qa", "bnf") == [1e-3, 1e-2]


def odd_results():
    """Made up for the spec of tutorials/evidence/small.json, with all that may happen: methods of the first stage alone, runs that broke
    off, and a method that always does."""
    spec = json.loads(Path("tutorials/evidence/small.json").read_text())
    made = {"spec": spec, "runs": [], "facts": {"response_tokens": dict.fromkeys(spec["on"], 10.0)}}
    for stage in (lambda: sweep(spec), lambda: finals(spec, made["runs"])):
        for k, job in enumerate(stage()):
            one = run(job["set"], job["method"], job["setting"], job["seed"], win=0.5 + 0.001 * k)
            made["runs"].append(
                one | {"result": {}} if k % 7 == 3 or job["method"] == "slic" else one
            )
    return made


def test_report_and_figures_of_results_with_runs_that_broke_off(tmp_path):
    made = odd_results()
    text = report(made)
    assert (
        "| dpo lr 1e-4 |" not in text
        and "broke off" in text
        and "β × tokens" in text
        and "the batch's mean" in text
    )
    slic = [line for line in text.splitlines() if line.startswith("| slic")]
    assert slic and all("18 of 18" in line for line in slic)
    files = comparison(made, tmp_path)
    assert len(files) == 12 and all(file.read_text().startswith("<?xml") for file in files)


def test_what_broke_off_is_worst_in_every_respect():
    made = results(bnf={"shift": (0.1, -0.5), "gini": 0.3})
    assert verdict(made, "shifts")[0] == REPRODUCED
    for r in made["runs"]:
        if r["method"] == "bnf" and r["split"] == "test":
            r["result"] = {}
    assert {
        words: verdict(made, words)[0] for words in ("aligns", "costs", "shifts")
    } == dict.fromkeys(("aligns", "costs", "shifts"), NOT)


def test_every_committed_spec_can_be_run():
    for file in Path("tutorials/evidence").glob("*.json"):
        if not file.stem.endswith("-results"):
            module.check(json.loads(file.read_text()))


def test_rows_are_rows_whatever_their_text_holds(tmp_path):
    """A line separator of Unicode inside a text ends no row."""
    rows = [{"prompt": f"{k}", "chosen": "a\u2028b\x85", "rejected": "c"} for k in range(6)]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    spec = SPEC | {
        "sets": {"mine": {"rows": str(tmp_path / "rows.jsonl"), "count": 2, "held_out": 4}}
    }
    files = module.prepare(spec, "mine", tmp_path / "data")
    assert [
        json.loads(line) for file in files.values() for line in file.read_text().splitlines()
    ] == rows
    spec["sets"]["mine"]["rows"] = str(tmp_path / "unpaired.jsonl")
    unpaired = "".join(
        json.dumps({"prompt": "a", "completion": "b", "label": False}) + "\n" for _ in range(6)
    )
    (tmp_path / "unpaired.jsonl").write_text(unpaired)
    with pytest.raises(ValueError, match="the 4 rows that set 'mine' holds out must be pairs"):
        module.prepare(spec, "mine", tmp_path / "other")


def test_results_of_another_base_are_not_taken_for_these(tmp_path):
    spec = SPEC | {"on": {"qa": ["bnf"]}}
    (tmp_path / "base.json").write_text(json.dumps({"sha256": "another"}))
    with pytest.raises(ValueError, match="holds runs of another base"):
        compare(spec, tmp_path, 1)


def test_a_trace_leaves_out_steps_that_hold_one_kind_alone():
    rows = [
        {"step": k, "logps/chosen": -k} | ({"logps/rejected": -2 * k} if k != 2 else {})
        for k in range(1, 5)
    ]
    assert module.trace(rows) == {
        "step": [1, 3, 4],
        "logps/chosen": [-1, -3, -4],
        "logps/rejected": [-2, -6, -8],
    }
