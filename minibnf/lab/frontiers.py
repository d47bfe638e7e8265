"""Frontiers of gained against lost, and methods against methods, with intervals by bootstrap.

A method's frontier is made of the settings that none of its others beats on validation prompts
(plan.frontier). On test prompts each of them is a point: reasoning lost, win rate gained, both
against the base, which is the point (0, 0). Between points it is a straight line, beyond the last
one level. Three numbers are read off it:

    at 5, at 10    the win rate gained where 5 and where 10 points of reasoning are lost
    mean           its mean from 0 to 10 points lost: the area under the frontier, divided by .1

A bootstrap replicate draws questions, problems and seeds with replacement, once for all methods, so
that differences are paired. Replicate 0 draws each once: it is what was measured.
"""

from functools import cache

import numpy as np

from minibnf.lab.plan import FAR, customary, frontier, select, with_setting

REPLICATES = 2000
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
        over_prompts(run["each"].get(what, [0.0] * len(base)), what)
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
        win, kept = (replicates(results, tested, what) for what in ("win_rate", "accuracy"))
        found.append((setting, -kept, win))
    return found


def measures(results: dict, name: str, method: str, usual: bool = False) -> dict[str, np.ndarray]:
    """{"at 5", "at 10", "mean": (1 + REPLICATES,)} of a method's frontier."""
    found = points(results, name, method, usual)
    origin = np.zeros(1 + REPLICATES)
    lost = np.stack([origin, *(x for _, x, _ in found)], 1)
    gained = np.stack([origin, *(y for _, _, y in found)], 1)
    order = lost.argsort(1, kind="stable")
    lost, gained = (np.take_along_axis(x, order, 1) for x in (lost, gained))
    at = np.linspace(0, FAR, 101)
    curve = np.stack([np.interp(at, x, y) for x, y in zip(lost, gained, strict=True)])
    mean = (curve[:, 1:] + curve[:, :-1]).mean(1) / 2
    return {"at 5": curve[:, 50], "at 10": curve[:, 100], "mean": mean}


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


def against(mine: np.ndarray, theirs: dict[str, np.ndarray]) -> tuple[list[str], list[str]]:
    """The methods that mine is better than, and those that are better: 0 is outside the interval
    of the difference."""
    better, worse = [], []
    for name, x in theirs.items():
        low, high = interval(mine - x, len(theirs))
        if low > 0:
            better.append(name)
        elif high < 0:
            worse.append(name)
    return better, worse
