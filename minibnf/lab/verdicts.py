"""Is it true? A verdict per claim, and the whole report, from the results.json of compare.py alone.

One figure is as good as another unless it lies more than 2 sqrt(e1² + e2²) below; tables.py says
what a figure and its error e are. Prompts are shared, so this is careful rather than sharp. Where a
claim says least, half or most, figures are compared as they are.

Results that also hold what was measured of each prompt are judged on frontiers instead.
"""

import math
from statistics import mean, median

from minibnf.lab import frontiers, lengths, tables
from minibnf.lab.plan import customary, select, with_setting
from minibnf.lab.tables import TOLERANCE, figure, markdown, rivals, show


def within(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """a is not below b by more than two errors."""
    return a[0] >= b[0] - 2 * math.hypot(a[1], b[1])


# ---- The rules of the claims: (results, names of sets) -> (whether it holds, numbers) ----


def aligns(results: dict, qa: str) -> tuple[bool, str]:
    def best_rival(which: str) -> tuple[tuple[float, float], str]:
        return max((figure(results, qa, m, which, "win_rate"), m) for m in rivals(results, qa))

    mine = figure(results, qa, "bnf", "best", "win_rate")
    (top, who), (usual, usual_who) = best_rival("best"), best_rival("customary")
    numbers = (
        f"win rate {show(mine)}; best rival {who} {show(top)}, "
        f"at customary hyper-parameters {usual_who} {show(usual)}"
    )
    return within(mine, top), numbers


def costs(results: dict, qa: str) -> tuple[bool, str]:
    base = select(results["runs"], set=qa, split="test")[0]["base"]["accuracy"][0]

    def lost(method: str, which: str) -> float:
        return base - figure(results, qa, method, which, "accuracy")[0]

    mine, error = lost("bnf", "best"), figure(results, qa, "bnf", "best", "accuracy")[1]
    best, usual = ({m: lost(m, x) for m in rivals(results, qa)} for x in ("best", "customary"))
    middle, usual_middle = median(best.values()), median(usual.values())
    least = min(best, key=best.get)
    numbers = (
        f"reasoning lost {show((mine, error))}; rivals' median {middle:.3f} "
        f"(least: {least} {best[least]:.3f}), at customary hyper-parameters {usual_middle:.3f}"
    )
    return middle > 2 * error and mine <= middle / 2, numbers


def unpaired(results: dict, qa: str, lone: str) -> tuple[bool, str]:
    mine = figure(results, lone, "bnf", "best", "win_rate")
    paired = figure(results, qa, "bnf", "best", "win_rate")
    kto = figure(results, lone, "kto", "best", "win_rate")
    base = select(results["runs"], set=lone, split="test")[0]["base"]["win_rate"]
    numbers = (
        f"win rate {show(mine)} (base {base[0]:.3f}); on pairs {show(paired)}; "
        f"kto unpaired {show(kto)}"
    )
    return not within(base, mine) and within(mine, kto), numbers


def stable(results: dict, maths: str) -> tuple[bool, str]:
    """By the share of settings, of learning rates that all tried, that keep the base's reasoning.

    A run that broke off keeps nothing.
    """
    rates, others = tables.common_rates(results, maths), rivals(results, maths)

    def keeps(run: dict) -> bool:
        lowest = run["base"]["accuracy"][0] - TOLERANCE
        return run["result"].get("accuracy", [-math.inf])[0] >= lowest

    def share(method: str, usual: bool) -> float:
        runs = select(results["runs"], set=maths, method=method, split="validation")
        runs = with_setting(runs, customary(results["spec"], method) if usual else {})
        return mean(keeps(r) for r in runs if r["setting"]["lr"] in rates)

    def steadier(usual: bool) -> tuple[bool, str]:
        own, theirs = share("bnf", usual), {m: share(m, usual) for m in others}
        most, middle = max(theirs, key=theirs.get), median(theirs.values())
        text = f"bnf {own:.0%}, rivals' median {middle:.0%}, most {most} {theirs[most]:.0%}"
        return own >= theirs[most] and own > middle, text

    holds, numbers_at_best = steadier(usual=False)
    _, numbers_at_customary = steadier(usual=True)
    numbers = (
        f"settings (rates {min(rates):g} to {max(rates):g}) that keep reasoning within "
        f"{TOLERANCE} of the base: {numbers_at_best}; "
        f"at customary hyper-parameters {numbers_at_customary}"
    )
    return holds, numbers


def shifts(results: dict, qa: str) -> tuple[bool, str]:
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
    return size <= sizes[least] and gini <= ginis[even], numbers


def tuning(results: dict, qa: str) -> tuple[bool, str]:
    def decades(method: str) -> float:
        usual = customary(results["spec"], method)
        rates = tables.good_rates(results, qa, method, usual)
        return math.log10(rates[-1] / rates[0])

    bnf, nll = decades("bnf"), decades("nll")
    others = [decades(method) for method in rivals(results, qa)]
    numbers = (
        f"decades of learning rates around its best within {TOLERANCE} of it: "
        f"bnf {bnf:.1f}, nll {nll:.1f}, rivals at customary hyper-parameters "
        f"{median(others):.1f} (median), {max(others):.1f} (most)"
    )
    return bnf >= nll, numbers


def retrieval(results: dict, qa: str, maths: str) -> tuple[bool, str]:
    """rbnf against the best of DPO's sweep: win rate on QA, reasoning on mathematical pairs."""
    texts, as_good = [], []
    for name, what in {qa: "win_rate", maths: "accuracy"}.items():
        mine, dpo, bnf = (figure(results, name, m, "best", what) for m in ("rbnf", "dpo", "bnf"))
        as_good.append(within(mine, dpo))
        shown = f"rbnf {show(mine)}, dpo {show(dpo)}, bnf {show(bnf)}"
        texts.append(f"{tables.NAMES[what]} on {name}: {shown}")
    return all(as_good), "; ".join(texts)


# fmt: off
CLAIMS = [  # a claim, its rule, and the methods that it judges on each set
    ("aligns as well as the best method on QA", aligns, {"qa": ["bnf"]}),
    ("costs far less reasoning: at most half of what rivals lose", costs, {"qa": ["bnf"]}),
    ("works on unpaired data: gains, and no less than KTO",
     unpaired, {"qa": ["bnf"], "unpaired": ["bnf", "kto"]}),
    ("is stable on mathematical pairs, where its rivals are not", stable, {"math": ["bnf"]}),
    ("shifts likelihoods least, and its logit shifts are the least concentrated",
     shifts, {"qa": ["bnf"]}),
    ("needs no tuning beyond what fine-tuning needs", tuning, {"qa": ["bnf", "nll"]}),
    ("(not the paper's: rbnf matches the best of DPO's sweep)",
     retrieval, {"qa": ["bnf", "rbnf", "dpo"], "math": ["bnf", "rbnf", "dpo"]}),
]
# fmt: on

# ---- The report ----


def verdicts(results: dict) -> list[tuple[str, str, str]]:
    """(claim, verdict, numbers) of each claim whose sets and methods the results hold."""
    return frontiers.judged(results, CLAIMS)


def verdict_table(results: dict) -> str:
    return markdown(["BNF …", "here", "numbers"], verdicts(results))


def report(results: dict) -> str:
    """Markdown: every table, then the verdicts."""
    parts, spec = [], results["spec"]
    for name in spec["on"]:
        given = tables.rate_table if "test_lr" in spec["sets"][name] else tables.table
        parts += [f"## {name}", given(results, name)]
    for name, methods in spec["on"].items():
        if {"bnf", "bnf own"} <= set(methods):
            parts += [f"## What BNF is divided by, {name}", tables.lengths(results, name)]
    if any("dpo lr 1e-4" in methods for methods in spec["on"].values()):
        parts += ["## DPO's β and the length of responses", tables.beta_and_length(results)]
    tried = [x for x in spec["on"] if select(results["runs"], set=x, split="validation")]
    if small := [name for name in tried if "kind" in spec["sets"][name]]:
        parts.append("## Is a low Gini good?")
        for name in small:
            rho, count = tables.concentration(results, name)
            said = "rank correlation of Gini and reasoning lost"
            parts.append(f"{name}: {said} over {count} runs: {rho:+.2f}")
    if "base" in results["facts"]:  # what was measured of each prompt is there
        parts += frontiers.report(results)
        if len(lengths.sets_by_length(results)) > 1:
            parts += ["## Length", lengths.table(results), lengths.change(results)]
    elif small:
        parts += ["## Verdicts", verdict_table(results)]
    return "\n\n".join(parts)
