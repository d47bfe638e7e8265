"""What a comparison runs, and by what its settings are chosen. compare.py says what a spec holds.

A job is one run of the trainer: {"set", "method", "setting", "seed", "split"}, where "split" names
the prompts on which it is examined. A run is a job with its "result", {name: [mean, error]}, {} if
it broke off, and the "base"'s.
"""

from itertools import product


def settings(method: dict) -> list[dict]:
    """Every combination of the method's grid: [{"lr": 1e-4, "beta": 0.1}, ...]."""
    grid = method["grid"]
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def sweep(spec: dict) -> list[dict]:
    """The jobs of the first stage."""
    return [
        {"set": name, "method": method, "setting": setting, "seed": 0, "split": "validation"}
        for name, methods in spec["on"].items()
        for method in methods
        for setting in settings(spec["methods"][method])
    ]


def finals(spec: dict, runs: list[dict]) -> list[dict]:
    """The jobs of the second stage, out of the first one's results."""
    jobs = []
    for name, methods in spec["on"].items():
        for method in methods:
            if spec["methods"][method].get("extra") == "sweep":
                continue
            best, usual = chosen_settings(spec, runs, name, method).values()
            jobs += [
                {"set": name, "method": method, "setting": setting, "seed": seed, "split": "test"}
                for setting in ([best] if best == usual else [best, usual])
                for seed in spec["seeds"]
            ]
    return jobs


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
    return found["win_rate"] - max(0.0, run["base"]["accuracy"][0] - found["accuracy"])


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
