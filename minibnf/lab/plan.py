"""What a comparison runs, and by what its settings are chosen. compare.py says what a spec holds.

A job is one run of the trainer: {"set", "method", "setting", "seed", "split"}, where "split" names
the prompts on which it is examined. A run is a job with its "result", {name: [mean, error]}, {} if
it broke off, and the "base"'s.
"""

import math
from itertools import product

JUDGED = ("qa", "long")  # by frontiers: these kinds of sets
FAR = 0.1  # of reasoning lost: how far frontiers are compared


def combinations(method: dict) -> list[dict]:
    """Every combination of the method's grid: [{"lr": 1e-4, "beta": 0.1}, ...].

    A grid that is a list already holds the settings themselves.
    """
    grid = method["grid"]
    if isinstance(grid, list):
        return grid
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def settings(spec: dict, name: str, method: str) -> list[dict]:
    """What is run of a method on a set; on one that names its rates, customary settings there."""
    given = spec["sets"][name]
    if rates := given.get("lr", given.get("test_lr")):
        return [{"lr": lr} | customary(spec, method) for lr in rates]
    return combinations(spec["methods"][method])


def sweep(spec: dict) -> list[dict]:
    """The jobs of the first stage; a set with "test_lr" and without "lr" has none."""
    return [
        {"set": name, "method": method, "setting": setting, "seed": 0, "split": "validation"}
        for name, methods in spec["on"].items()
        if "lr" in spec["sets"][name] or "test_lr" not in spec["sets"][name]
        for method in methods
        for setting in settings(spec, name, method)
    ]


def finals(spec: dict, runs: list[dict]) -> list[dict]:
    """The jobs of the second stage, out of the first one's results."""
    return [
        {"set": name, "method": method, "setting": setting, "seed": seed, "split": "test"}
        for name, methods in spec["on"].items()
        for method in methods
        for setting in final_settings(spec, runs, name, method)
        for seed in spec["sets"][name].get("seeds", spec["seeds"])
    ]


def final_settings(spec: dict, runs: list[dict], name: str, method: str) -> list[dict]:
    """The settings of a method that are run on test prompts, chosen by the validation runs.

    On a set with "test_lr" those at these rates and the customary hyper-parameters. Else the best
    and the customary setting and, on QA, what the frontiers of all settings and of the customary
    ones are made of. A method whose "extra" is "sweep" has no second stage.
    """
    if spec["methods"][method].get("extra") == "sweep":
        return []
    if rates := spec["sets"][name].get("test_lr"):
        return [x for x in settings(spec, name, method) if x["lr"] in rates]
    tried = select(runs, set=name, method=method, split="validation", seed=0)
    usual = with_setting(tried, customary(spec, method))
    kept = [*chosen_settings(spec, runs, name, method).values()]
    if spec["sets"][name].get("kind") in JUDGED:
        kept += frontier(tried) + frontier(usual)
    return [r["setting"] for r in tried if r["setting"] in kept]


def frontier(runs: list[dict]) -> list[dict]:
    """The settings of validation runs on QA that none of them beats, by rising loss of reasoning.

    One beats another that keeps no more reasoning and wins no more. The last one is the first that
    loses more than FAR, since nothing beyond is judged.
    """
    points = [(lost(r), -r["result"]["win_rate"][0], k) for k, r in enumerate(runs) if r["result"]]
    best, kept = math.inf, []
    for loss, negative, k in sorted(points):
        if negative < best:
            best = negative
            kept.append(runs[k]["setting"])
            if loss > FAR:
                break
    return kept


def lost(run: dict) -> float:
    """The reasoning accuracy that a run lost against the base."""
    return run["base"]["accuracy"][0] - run["result"]["accuracy"][0]


def select(runs: list[dict], **fields) -> list[dict]:
    """The runs with these fields, such as set="qa", method="bnf"."""
    return [r for r in runs if all(r[name] == value for name, value in fields.items())]


def with_setting(runs: list[dict], fixed: dict) -> list[dict]:
    """The runs whose setting has these hyper-parameters, whatever else it has."""
    return [r for r in runs if fixed.items() <= r["setting"].items()]


def customary(spec: dict, method: str) -> dict:
    """The hyper-parameters that a method usually has; {} if it has none to choose."""
    return spec["methods"][method].get("customary", {})


def chosen_settings(spec: dict, runs: list[dict], name: str, method: str) -> dict[str, dict]:
    """{"best": setting, "customary": setting} of a method on a set, by the validation runs."""
    tried = select(runs, set=name, method=method, split="validation", seed=0)
    usual = with_setting(tried, customary(spec, method))
    return {
        "best": max(tried, key=objective)["setting"],
        "customary": max(usual, key=objective)["setting"],
    }


def objective(run: dict) -> float:
    """What settings are chosen by, the higher the better.

    On QA a point of reasoning lost costs a point of win rate. On mathematical pairs reasoning
    itself counts. On files it is the share of held-out pairs told right. A run that broke off is
    worse than all others.
    """
    found = {name: mean for name, (mean, _) in run["result"].items()}
    if not found:
        return -1.0
    if "preference" in found:
        return found["preference"]
    if run["kind"] == "math":
        return found["accuracy"]
    return found["win_rate"] - max(0.0, lost(run))


def best_by_rate(runs: list[dict]) -> dict[float, float]:
    """{learning rate: the best objective of its runs}, by rising rate."""
    rates = sorted({run["setting"]["lr"] for run in runs})
    return {lr: max(map(objective, with_setting(runs, {"lr": lr}))) for lr in rates}


def collapsed(run: dict) -> bool:
    """The definition of collapse: a run has collapsed if one of these holds.

    It met a number that is not finite. Or the model lost half of the base's reasoning. Or a quarter
    more of its answers than of the base's are degenerate (outside the grammar of answers). On files
    nothing is generated, so only the first is measured.
    """
    found, base = run["result"], run["base"]
    if not found:
        return True
    if "accuracy" not in found:
        return False
    return (
        found["accuracy"][0] < base["accuracy"][0] / 2
        or found["degenerate"][0] > base["degenerate"][0] + 0.25
    )
