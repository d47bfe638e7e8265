"""Frontiers of gained against lost, and methods against methods, with intervals by bootstrap.

A method's frontier is made of the settings that none of its others beats on validation prompts
(plan.frontier). On test prompts each of them is a point: reasoning lost, win rate gained, both
against the base, which is the point (0, 0); reasoning gained counts as none lost. Between points
the frontier is a straight line, beyond the last one it is level. Three numbers are read off it:

    at 5, at 10    the win rate gained where 5 and where 10 points of reasoning are lost
    mean           its mean from 0 to 10 points lost: the area under the frontier, divided by .1

A bootstrap replicate draws questions, problems and seeds with replacement, once for all methods, so
that differences are paired. Replicate 0 draws each once: it is what was measured. A method is
better than another where 0 lies outside the interval of their difference; within a claim the
intervals share their level, 5 %, among all comparisons (Bonferroni). A claim that nothing is worse
holds where no difference is shown, so it is as sharp as the intervals are. Of 24 comparisons an
end is a quantile of two replicates in 2,000: known to a sixth of a standard error.

The customary hyper-parameter of a loss that sums over tokens is the published β times the published
length, divided by the mean length here: the spec gives the product, "beta|y|".
"""

from functools import cache
from statistics import mean

import numpy as np

from minibnf.lab import tables
from minibnf.lab.plan import FAR, customary, frontier, select, with_setting
from minibnf.lab.tables import markdown

Scores = dict[str, np.ndarray]  # {method: its replicates, the first what was measured}
REPLICATES = 2000
ON_FILES = ("preference", "solutions")  # what is compared on a set of files
LEVEL = 0.05  # of all comparisons of a claim together: each has its share (Bonferroni)


@cache
def draws(count: int, what: str) -> np.ndarray:
    """(1 + REPLICATES, count): the share of each of `count` things in a replicate."""
    rng = np.random.default_rng([count, *what.encode()])
    drawn = rng.multinomial(count, np.full(count, 1 / count), REPLICATES)
    return np.concatenate([np.ones((1, count)), drawn]) / count


def over_prompts(each: list[float], what: str) -> np.ndarray:
    """(1 + REPLICATES,): the mean over prompts, replicate by replicate."""
    return draws(len(each), what) @ np.array(each, dtype=float)


def replicates(results: dict, runs: list[dict], what: str) -> np.ndarray:
    """(1 + REPLICATES,): by how much runs of one setting, a seed each, exceed the base.

    A run that broke off scores 0.
    """
    base = results["facts"]["base"][runs[0]["set"]][runs[0]["split"]][what]
    by_seed = [
        over_prompts(run["each"][what] if run["result"] else [0.0] * len(base), what)
        for run in sorted(runs, key=lambda run: run["seed"])
    ]
    return (draws(len(runs), "seeds") * np.stack(by_seed, 1)).sum(1) - over_prompts(base, what)


def points(results: dict, name: str, method: str, usual: bool) -> list[tuple]:
    """(setting, lost, gained) of each setting on the method's frontier, of test prompts.

    usual: of the frontier that settings of customary hyper-parameters make.
    """
    runs = select(results["runs"], set=name, method=method)
    tried = select(runs, split="validation", seed=0)
    if usual:
        tried = with_setting(tried, customary(results["spec"], method))
    found = []
    for setting in frontier(tried):
        tested = select(runs, split="test", setting=setting)
        if not tested:
            continue  # a method of the first stage alone
        win, kept = (replicates(results, tested, what) for what in ("win_rate", "accuracy"))
        found.append((setting, np.maximum(-kept, 0), win))
    return found


def measures(results: dict, name: str, method: str, usual: bool = False) -> dict[str, np.ndarray]:
    """{"at 5", "at 10", "mean": (1 + REPLICATES,)} of a method's frontier."""
    found = points(results, name, method, usual)
    origin = np.zeros(1 + REPLICATES)
    lost = np.stack([origin, *(x for _, x, _ in found)], 1)
    gained = np.stack([origin, *(y for _, _, y in found)], 1)
    order = np.lexsort((gained, lost))
    lost, gained = (np.take_along_axis(x, order, 1) for x in (lost, gained))
    at = np.linspace(0, FAR, 101)
    curve = np.stack([np.interp(at, x, y) for x, y in zip(lost, gained, strict=True)])
    area = (curve[:, 1:] + curve[:, :-1]).mean(1) / 2
    return {"at 5": curve[:, 50], "at 10": curve[:, 100], "mean": area}


def at_rates(results: dict, name: str, method: str, what: str) -> np.ndarray:
    """(1 + REPLICATES,): the mean over the set's "test_lr", at customary hyper-parameters."""
    runs = select(results["runs"], set=name, method=method, split="test")
    runs = with_setting(runs, customary(results["spec"], method))
    rates = results["spec"]["sets"][name]["test_lr"]
    return np.mean([replicates(results, with_setting(runs, {"lr": x}), what) for x in rates], 0)


def interval(x: np.ndarray, comparisons: int = 1) -> tuple[float, float]:
    """What the bootstrap says of the measured x[0], at LEVEL shared among comparisons."""
    share = LEVEL / comparisons / 2
    low, high = np.quantile(x[1:], [share, 1 - share])
    return float(low), float(high)


def against(mine: np.ndarray, theirs: Scores, others: int = 0) -> tuple[list[str], list[str]]:
    """The methods that mine is better than, and those that are better: 0 is outside the interval
    of the difference. others: comparisons that the claim makes besides these."""
    better, worse = [], []
    for name, x in theirs.items():
        low, high = interval(mine - x, len(theirs) + others)
        if low > 0:
            better.append(name)
        elif high < 0:
            worse.append(name)
    return better, worse


# ---- Tables ----


def score(x: np.ndarray) -> str:
    """What was measured ± the standard deviation of its replicates."""
    return f"{x[0]:+.3f} ± {x[1:].std():.3f}"


def difference(x: np.ndarray, comparisons: int) -> str:
    """What was measured and its interval; bold where 0 lies outside."""
    low, high = interval(x, comparisons)
    text = f"{x[0]:+.3f} ({low:+.3f} to {high:+.3f})"
    return text if low <= 0 <= high else f"**{text}**"


def frontier_table(results: dict, name: str) -> str:
    """Markdown: the three numbers of every method's frontier, and of the customary one's mean."""
    rows = []
    for method in results["spec"]["on"][name]:
        whole = measures(results, name, method)
        usual = measures(results, name, method, usual=True)["mean"]
        rows.append((whole["mean"][0], [method, *map(score, whole.values()), score(usual)]))
    rows.sort(key=lambda one: -one[0])
    head = ["method", "gained at 5 points lost", "at 10", "mean, 0 to 10", "mean, customary"]
    return markdown(head, [cells for _, cells in rows])


def file_table(results: dict, name: str) -> str:
    """Markdown: on a set of files, bnf less each other method, each at its best setting.

    A method of the first stage alone is left out. Where there is one seed, rows alone are drawn.
    """
    spec, found = results["spec"], {}
    measured = [x for x in ON_FILES if x in results["facts"]["base"][name]["test"]]
    for method in spec["on"][name]:
        best = tables.chosen(results, name, method)["best"]
        runs = select(results["runs"], set=name, method=method, split="test", setting=best)
        if runs:
            whole = all(run["result"] for run in runs)
            found[method] = [replicates(results, runs, x) for x in measured] if whole else []
    mine, rows = found.pop("bnf", []), []
    for method, theirs in found.items():
        pairs = zip(mine, theirs, strict=False)
        cells = [difference(a - b, len(measured) * len(found)) for a, b in pairs]
        rows.append([method, *(cells or ["a run broke off"] * len(measured))])
    return markdown(["bnf less", *(tables.NAMES[what] for what in measured)], rows)


# ---- The map: weights combined under one length normaliser ----

QUESTIONS = [  # a question, and the two methods that differ in it alone
    ("knowing the reference, both kinds", "ratio/ratio", "power/power"),
    ("knowing the reference, rejected tokens", "nll/ratio", "nll/power"),
    ("odds, not the ratio, both kinds", "bnf/bnf", "ratio/ratio"),
    ("odds, not the ratio, rejected tokens", "nll/bnf", "nll/ratio"),
    ("odds, not the ratio, rejected tokens, rbnf", "rbnf/bnf", "rbnf/ratio"),
    ("letting preferred tokens go, not pulling in full", "bnf/bnf", "nll/bnf"),
    ("pulling with r, not letting go", "rbnf/bnf", "bnf/bnf"),
    ("pulling with r, not in full", "rbnf/bnf", "nll/bnf"),
]
ASKED = {"QA, win rate": ("qa", "win_rate"), "QA, reasoning": ("qa", "accuracy"),
         "maths, reasoning": ("math", "accuracy")}  # fmt: skip


def questions(results: dict) -> str:
    """Markdown: what each answer to the map's questions changes, means over the sets' test_lr."""
    count = len(QUESTIONS) * len(ASKED)
    rows = []
    for text, one, other in QUESTIONS:
        cells = [text, f"{one} less {other}"]
        for name, what in ASKED.values():
            a, b = (at_rates(results, name, method, what) for method in (one, other))
            cells.append(difference(a - b, count))
        rows.append(cells)
    return markdown(["question", "methods", *ASKED], rows)


def weight_table(results: dict) -> str:
    """Markdown: every method of the map at the rates that its sets name, test prompts."""
    spec, head, columns = results["spec"], ["preferred / rejected"], []
    for title, (name, what) in ASKED.items():
        for lr in spec["sets"][name]["test_lr"]:
            head.append(f"{title}, {lr:g}")
            columns.append((name, what, lr))
    base = results["facts"]["base"]
    rows = [["base", *(f"{mean(base[name]['test'][what]):.3f}" for name, what, _ in columns)]]
    for method in spec["on"]["qa"]:
        rows.append([method, *(tables.show(tables.at(results, method, *c)) for c in columns)])
    return markdown(head, rows)
