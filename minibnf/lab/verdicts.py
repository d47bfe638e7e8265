"""Is it true? A verdict per claim, and the whole report, from the results.json of compare.py alone.

One figure is as good as another unless it lies more than 2 sqrt(e1² + e2²) below; tables.py says
what a figure and its error e are. Prompts are shared, so this is careful rather than sharp. Where a
claim says least, half or most, figures are compared as they are.
"""

import math
from collections.abc import Callable
from statistics import mean, median
from typing import NamedTuple

from minibnf.lab.plan import customary, select, with_setting
from minibnf.lab.tables import (
    NAMES,
    TOLERANCE,
    beta_and_length,
    common_rates,
    concentration,
    decades,
    figure,
    good_rates,
    lengths,
    rivals,
    row,
    show,
    table,
    tests,
)

REPRODUCED, NOT = "reproduced", "not reproduced"
CUSTOMARY = "reproduced only when rivals keep their customary hyper-parameters"


def within(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """a is not below b by more than two errors."""
    return a[0] >= b[0] - 2 * math.hypot(a[1], b[1])


def either(at_best: bool, at_customary: bool) -> str:
    return REPRODUCED if at_best else CUSTOMARY if at_customary else NOT


# ---- The rules: (results, names of sets) -> (verdict, numbers) ----


def aligns(results: dict, qa: str) -> tuple[str, str]:
    def best_rival(which: str) -> tuple[tuple[float, float], str]:
        return max((figure(results, qa, m, which, "win_rate"), m) for m in rivals(results, qa))

    mine = figure(results, qa, "bnf", "best", "win_rate")
    (top, who), (usual, usual_who) = best_rival("best"), best_rival("customary")
    numbers = (
        f"win rate {show(mine)}; best rival {who} {show(top)}, "
        f"at customary hyper-parameters {usual_who} {show(usual)}"
    )
    return either(within(mine, top), within(mine, usual)), numbers


def costs(results: dict, qa: str) -> tuple[str, str]:
    def drops(which: str) -> list[tuple[float, str]]:
        return sorted((figure(results, qa, m, which, "drop")[0], m) for m in rivals(results, qa))

    mine = figure(results, qa, "bnf", "best", "drop")
    best, usual = (median(drop for drop, _ in drops(w)) for w in ("best", "customary"))
    least, who = drops("best")[0]
    numbers = (
        f"reasoning lost {show(mine)}; rivals' median {best:.3f} (least: {who} {least:.3f}), "
        f"at customary hyper-parameters {usual:.3f}"
    )

    def far_less_than(middle: float) -> bool:
        return middle > 2 * mine[1] and mine[0] <= middle / 2

    return either(far_less_than(best), far_less_than(usual)), numbers


def unpaired(results: dict, qa: str, lone: str) -> tuple[str, str]:
    mine = figure(results, lone, "bnf", "best", "win_rate")
    paired = figure(results, qa, "bnf", "best", "win_rate")
    kto = figure(results, lone, "kto", "best", "win_rate")
    base = tuple(tests(results, lone, "bnf", "best")[0]["base"]["win_rate"])
    gains = mine[0] > base[0] + 2 * math.hypot(mine[1], base[1])
    numbers = (
        f"win rate {show(mine)} (base {base[0]:.3f}); on pairs {show(paired)}; "
        f"kto unpaired {show(kto)}"
    )
    return REPRODUCED if gains and within(mine, kto) else NOT, numbers


def kept(results: dict, maths: str, method: str, fixed: dict) -> float:
    """The share of settings with these hyper-parameters that keep the base's reasoning.

    Of learning rates that all methods tried. A run that broke off keeps nothing.
    """
    rates = common_rates(results, maths)
    runs = select(results["runs"], set=maths, method=method, split="validation")
    return mean(
        bool(r["result"]) and r["result"]["accuracy"][0] >= r["base"]["accuracy"][0] - TOLERANCE
        for r in with_setting(runs, fixed)
        if r["setting"]["lr"] in rates
    )


def stable(results: dict, maths: str) -> tuple[str, str]:
    spec, others = results["spec"], rivals(results, maths)
    own, usual_own = (kept(results, maths, "bnf", fixed) for fixed in ({}, customary(spec, "bnf")))
    theirs = {m: kept(results, maths, m, {}) for m in others}
    usual_theirs = {m: kept(results, maths, m, customary(spec, m)) for m in others}

    def shares(own: float, theirs: dict[str, float]) -> str:
        most = max(theirs, key=theirs.get)
        middle = median(theirs.values())
        return f"bnf {own:.0%}, rivals' median {middle:.0%}, most {most} {theirs[most]:.0%}"

    def steadier(own: float, theirs: dict[str, float]) -> bool:
        return own >= max(theirs.values()) and own > median(theirs.values())

    rates = common_rates(results, maths)
    numbers = (
        f"settings (rates {min(rates):g} to {max(rates):g}) that keep reasoning within "
        f"{TOLERANCE} of the base: {shares(own, theirs)}; "
        f"at customary hyper-parameters {shares(usual_own, usual_theirs)}"
    )
    return either(steadier(own, theirs), steadier(usual_own, usual_theirs)), numbers


def shifts(results: dict, qa: str) -> tuple[str, str]:
    def best(method: str, what: str) -> float:
        return figure(results, qa, method, "best", what)[0]

    methods = ["bnf", *rivals(results, qa)]
    sizes = {m: abs(best(m, "shift/chosen")) + abs(best(m, "shift/rejected")) for m in methods}
    ginis = {m: best(m, "gini") for m in methods}
    size, gini = sizes.pop("bnf"), ginis.pop("bnf")
    least, even = min(sizes, key=sizes.get), min(ginis, key=ginis.get)
    numbers = (
        f"sizes of the shifts of chosen and rejected together, nats: bnf {size:.2f}, "
        f"least rival {least} {sizes[least]:.2f}, median {median(sizes.values()):.2f}; "
        f"Gini: bnf {gini:.3f}, lowest rival {even} {ginis[even]:.3f}, "
        f"median {median(ginis.values()):.3f}"
    )
    both = size <= sizes[least] and gini <= ginis[even]
    return REPRODUCED if both else NOT, numbers


def tuning(results: dict, qa: str) -> tuple[str, str]:
    spec = results["spec"]
    width = {m: decades(good_rates(results, qa, m, customary(spec, m))) for m in spec["on"][qa]}
    others = [width[m] for m in rivals(results, qa)]
    numbers = (
        f"decades of learning rates around its best within {TOLERANCE} of it: "
        f"bnf {width['bnf']:.1f}, nll {width['nll']:.1f}, rivals at customary hyper-parameters "
        f"{median(others):.1f} (median), {max(others):.1f} (most)"
    )
    return REPRODUCED if width["bnf"] >= width["nll"] else NOT, numbers


def retrieval(results: dict, qa: str, maths: str) -> tuple[str, str]:
    """rbnf against the best of DPO's sweep: win rate on QA, reasoning on mathematical pairs."""
    texts, as_good = [], []
    for name, what in {qa: "win_rate", maths: "accuracy"}.items():
        mine, dpo, bnf = (figure(results, name, m, "best", what) for m in ("rbnf", "dpo", "bnf"))
        as_good.append(within(mine, dpo))
        texts.append(
            f"{NAMES[what]} on {name}: rbnf {show(mine)}, dpo {show(dpo)}, bnf {show(bnf)}"
        )
    return REPRODUCED if all(as_good) else NOT, "; ".join(texts)


# ---- The claims ----


class Claim(NamedTuple):
    text: str
    rule: Callable[..., tuple[str, str]]
    needs: dict[str, list[str]]  # {set: methods that it needs}; the sets are the rule's arguments


CLAIMS = [
    Claim("aligns as well as the best method on QA", aligns, {"qa": ["bnf"]}),
    Claim("costs far less reasoning: at most half of what rivals lose", costs, {"qa": ["bnf"]}),
    Claim(
        "works on unpaired data: gains, and no less than KTO",
        unpaired,
        {"qa": ["bnf"], "unpaired": ["bnf", "kto"]},
    ),
    Claim("is stable on mathematical pairs, where its rivals are not", stable, {"math": ["bnf"]}),
    Claim(
        "shifts likelihoods least, and its logit shifts are the least concentrated",
        shifts,
        {"qa": ["bnf"]},
    ),
    Claim("needs no tuning beyond what fine-tuning needs", tuning, {"qa": ["bnf", "nll"]}),
    Claim(
        "(not the paper's: rbnf matches the best of DPO's sweep)",
        retrieval,
        {"qa": ["bnf", "rbnf", "dpo"], "math": ["bnf", "rbnf", "dpo"]},
    ),
]


def can_be_judged(results: dict, claim: Claim) -> bool:
    on = results["spec"]["on"]
    return all(
        set(methods) <= set(on.get(name, [])) and rivals(results, name)
        for name, methods in claim.needs.items()
    )


def verdicts(results: dict) -> list[tuple[str, str, str]]:
    """(claim, verdict, numbers) of each claim whose sets and methods the results hold."""
    held = [claim for claim in CLAIMS if can_be_judged(results, claim)]
    return [(claim.text, *claim.rule(results, *claim.needs)) for claim in held]


def verdict_table(results: dict) -> str:
    lines = ["| BNF … | here | numbers |", "|---|---|---|"]
    return "\n".join(lines + [row(line) for line in verdicts(results)])


def report(results: dict) -> str:
    """Markdown: every table, then the verdicts."""
    parts, spec = [], results["spec"]
    for name in spec["on"]:
        parts += [f"## {name}", table(results, name)]
    small = [name for name in spec["on"] if "kind" in spec["sets"][name]]
    if not small:
        return "\n\n".join(parts)
    for name in small:
        if {"bnf", "bnf own"} <= set(spec["on"][name]):
            parts += [f"## What BNF is divided by, {name}", lengths(results, name)]
    if any("dpo lr 1e-4" in methods for methods in spec["on"].values()):
        parts += ["## DPO's β and the length of responses", beta_and_length(results)]
    parts += ["## Is a low Gini good?"]
    for name in small:
        rho, count = concentration(results, name)
        parts.append(
            f"{name}: rank correlation of Gini and reasoning lost over {count} runs: {rho:+.2f}"
        )
    return "\n\n".join([*parts, "## Verdicts", verdict_table(results)])
