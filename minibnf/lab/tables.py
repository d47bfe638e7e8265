"""Tables of a comparison, drawn from the results.json of compare.py alone.

A figure of a method on a set is its mean over the seeds. Its error joins the spread over seeds with
the error over prompts: e² = (standard deviation over seeds)² / seeds + (mean standard error over
prompts)².

BNF's rivals are the losses built on log-likelihood ratios or margins; nll and unlikelihood are the
controls.
"""

import math
from itertools import groupby
from statistics import correlation, mean, stdev

from minibnf.lab import plan

CONTROLS = ("nll", "unlikelihood")
OURS = ("bnf", "rbnf", "bnf batch")
# A setting is good if it is no further below the method's best.
TOLERANCE = 0.05
NAMES = {
    "win_rate": "win rate", "accuracy": "reasoning", "degenerate": "degenerate",
    "preference": "pairs told right", "solutions": "solutions, nats per token",
    "shift/chosen": "shift, chosen", "shift/rejected": "shift, rejected", "gini": "Gini",
}  # fmt: skip
# What a run that broke off gets.
WORST = {
    "solutions": -math.inf, "gini": 1.0, "degenerate": 1.0,
    "shift/chosen": math.inf, "shift/rejected": math.inf,
}  # fmt: skip

# ---- Figures ----


def rivals(results: dict, name: str) -> list[str]:
    """The methods BNF is judged against; one that the spec calls "extra" is none."""
    extra = [m for m, given in results["spec"]["methods"].items() if given.get("extra")]
    return [m for m in results["spec"]["on"][name] if m not in (*OURS, *CONTROLS, *extra)]


def chosen(results: dict, name: str, method: str) -> dict[str, dict]:
    """{"best": setting, "customary": setting}."""
    return plan.chosen_settings(results["spec"], results["runs"], name, method)


def figure(results: dict, name: str, method: str, which: str, what: str) -> tuple[float, float]:
    """What a method's "best" or "customary" setting scored on the test prompts of a set."""
    setting = chosen(results, name, method)[which]
    runs = plan.select(results["runs"], set=name, method=method, split="test", setting=setting)
    return over_seeds(runs, what)


def at(results: dict, method: str, name: str, what: str, lr: float) -> tuple[float, float]:
    """What a method scored on the test prompts of a set at a learning rate."""
    runs = plan.select(results["runs"], set=name, method=method, split="test")
    return over_seeds(plan.with_setting(runs, {"lr": lr}), what)


def over_seeds(runs: list[dict], what: str) -> tuple[float, float]:
    """(mean over seeds, its error). A run that broke off gets the worst value."""
    worst = (WORST.get(what, 0.0), 0.0)
    means, errors = zip(*(r["result"].get(what, worst) for r in runs), strict=True)
    over_prompts = mean(error or 0.0 for error in errors)
    several = len(means) > 1 and all(map(math.isfinite, means))
    variance = stdev(means) ** 2 / len(means) if several else 0.0
    return mean(means), math.sqrt(variance + over_prompts**2)


def show(x: tuple[float, float], digits: int = 3) -> str:
    return f"{x[0]:.{digits}f}" + (f" ± {x[1]:.{digits}f}" if x[1] else "")


def setting_text(setting: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in setting.items())


# ---- The table of a set ----


def markdown(head: list[str], rows: list[list[str]]) -> str:
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *others])


def table(results: dict, name: str) -> str:
    """Markdown: every method's best and customary setting on test prompts, the best first."""
    runs = plan.select(results["runs"], set=name)
    base = next((r for r in runs if r["split"] == "test"), runs[0])["base"]
    columns = [c for c in NAMES if c in base]
    ranked = []  # (rank, cells)
    for method in results["spec"]["on"][name]:
        tried = plan.select(runs, method=method, split="validation")
        lost = f"{sum(map(plan.collapsed, tried))} of {len(tried)}"
        settings = chosen(results, name, method)
        if settings["best"] == settings["customary"]:
            settings = {"best, customary": settings["best"]}
        for label, setting in settings.items():
            tested = plan.select(runs, method=method, split="test", setting=setting)
            if not tested:
                continue  # a method of the first stage alone
            figures = {c: over_seeds(tested, c) for c in columns}
            cells = [show(x, 2 if c.startswith("shift") else 3) for c, x in figures.items()]
            cells = [method, label, setting_text(setting), *cells, lost]
            ranked.append((mean(map(plan.objective, tested)), cells))
    ranked.sort(key=lambda one: -one[0])
    head = ["method", "setting", "", *(NAMES[c] for c in columns), "settings collapsed"]
    own = " | ".join(f"{base[c][0]:.3f}" for c in columns)
    lines = markdown(head, [cells for _, cells in ranked]).splitlines()
    return "\n".join([*lines[:2], f"| base | | | {own} | |", *lines[2:]])


def rate_table(results: dict, name: str) -> str:
    """Markdown: every method at the rates that a set names, "test_lr", on test prompts."""
    spec, base = results["spec"], plan.select(results["runs"], set=name, split="test")[0]["base"]
    columns, rows = [c for c in NAMES if c in base], []
    for method in spec["on"][name]:
        for lr in spec["sets"][name]["test_lr"]:
            figures = {c: at(results, method, name, c, lr) for c in columns}
            shown = [show(x, 2 if c.startswith("shift") else 3) for c, x in figures.items()]
            rows.append([method, f"{lr:g}", *shown])
    own = ["base", "", *(f"{base[c][0]:.3f}" for c in columns)]
    return markdown(["method", "rate", *(NAMES[c] for c in columns)], [own, *rows])


# ---- Learning rates ----


def good_rates(results: dict, name: str, method: str) -> list[float]:
    """The good learning rates around the best one, without a gap.

    Good: the validation objective is within TOLERANCE of the method's best.
    """
    runs = plan.select(results["runs"], set=name, method=method, split="validation", seed=0)
    top = plan.best_by_rate(runs)
    best = max(top, key=top.get)
    for _, neighbours in groupby(top, key=lambda lr: top[lr] >= top[best] - TOLERANCE):
        rates = list(neighbours)
        if best in rates:
            return rates


# ---- Other questions ----

DIVISORS = {
    "bnf": "the pair's shorter length",
    "bnf own": "its own",
    "bnf batch": "the batch's mean",
}


def lengths(results: dict, name: str) -> str:
    """Markdown: what BNF's length normaliser changes."""
    head = ["BNF divided by", "best learning rate", "good learning rates", "win rate", "reasoning"]
    rows = []
    for method, what in DIVISORS.items():
        if method in results["spec"]["on"][name]:
            rates = good_rates(results, name, method)
            best = chosen(results, name, method)["best"]["lr"]
            win = show(figure(results, name, method, "best", "win_rate"))
            kept = show(figure(results, name, method, "best", "accuracy"))
            rows.append([what, f"{best:g}", f"{rates[0]:g} to {rates[-1]:g}", win, kept])
    return markdown(head, rows)


def beta_and_length(results: dict) -> str:
    """Markdown: DPO at one learning rate over beta, on sets of short and of long responses.

    On validation prompts, with seed 0.
    """
    head, rows = ["set", "tokens per response", "β", "β × tokens", "win rate", "reasoning"], []
    for name in results["spec"]["on"]:
        tokens = results["facts"]["response_tokens"][name]
        for run in plan.select(results["runs"], set=name, method="dpo lr 1e-4"):
            beta, found = run["setting"]["beta"], run["result"]
            win, kept = (show(found[x]) if found else "broke off" for x in ("win_rate", "accuracy"))
            numbers = [f"{tokens:.1f}", f"{beta:g}", f"{beta * tokens:.2g}"]
            rows.append([name, *numbers, win, kept])
    return markdown(head, rows)


def concentration(results: dict, name: str) -> tuple[float, int]:
    """Is a low Gini good? Spearman's rank correlation of Gini and reasoning lost.

    And over how many validation runs of the set.
    """
    runs = [r for r in plan.select(results["runs"], set=name, split="validation") if r["result"]]
    lost = [r["base"]["accuracy"][0] - r["result"]["accuracy"][0] for r in runs]
    ginis = [r["result"]["gini"][0] for r in runs]
    vary = len(set(ginis)) > 1 and len(set(lost)) > 1
    return correlation(ranks(ginis), ranks(lost)) if vary else math.nan, len(runs)


def ranks(x: list[float]) -> list[float]:
    """Equal values share their mean rank."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) - 1) / 2 for a in x]
