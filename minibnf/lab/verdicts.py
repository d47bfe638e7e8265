"""Is it true? A verdict per claim, and the whole report, from the results.json of compare.py alone.

frontiers.py says what is measured and when one method is better than another; tables.py what a
figure and its error are.
"""

from statistics import median

import numpy as np

from minibnf.lab import frontiers, lengths, tables
from minibnf.lab.frontiers import Scores, against, at_rates, interval, measures, score
from minibnf.lab.plan import select
from minibnf.lab.tables import figure, markdown, rivals

REPRODUCED, NOT = "reproduced", "not reproduced"

# ---- The rules of the claims: (results, names of sets) -> (whether it holds, numbers) ----


def compared(mine: np.ndarray, theirs: Scores) -> tuple[list[str], list[str], str]:
    """The methods that mine is better than, those that are better, and both in words."""
    better, worse = against(mine, theirs)
    top = max(theirs, key=lambda name: theirs[name][0])
    text = f"bnf {score(mine)}; best rival {top} {score(theirs[top])}; "
    text += f"better than {len(better)} of {len(theirs)}, worse than {len(worse)}"
    return better, worse, text


def most(better: list[str], worse: list[str], theirs: Scores) -> bool:
    """Better than more than half, worse than none."""
    return len(better) > len(theirs) / 2 and not worse


def aligns(results: dict, qa: str) -> tuple[bool, str]:
    """At 10 points of reasoning lost no rival has gained more win rate."""
    mine = measures(results, qa, "bnf")["at 10"]
    theirs = {m: measures(results, qa, m)["at 10"] for m in rivals(results, qa)}
    _, worse, text = compared(mine, theirs)
    return not worse, f"win rate gained at 10 points lost: {text}"


def balances(results: dict, qa: str) -> tuple[bool, str]:
    mine = measures(results, qa, "bnf")["mean"]
    theirs = {m: measures(results, qa, m)["mean"] for m in rivals(results, qa)}
    better, worse, text = compared(mine, theirs)
    return most(better, worse, theirs), f"mean gain from 0 to 10 points lost: {text}"


def untuned(results: dict, qa: str) -> tuple[bool, str]:
    """The same, where rivals keep their customary hyper-parameters: the rate is all one tunes."""
    mine = measures(results, qa, "bnf")["mean"]
    theirs = {m: measures(results, qa, m, usual=True)["mean"] for m in rivals(results, qa)}
    better, worse, text = compared(mine, theirs)
    return most(better, worse, theirs), f"mean gain, rivals at customary settings: {text}"


def unpaired(results: dict, lone: str) -> tuple[bool, str]:
    mine, kto = (measures(results, lone, m)["at 10"] for m in ("bnf", "kto"))
    gains, (_, worse) = interval(mine, 2)[0] > 0, against(mine, {"kto": kto}, others=1)
    numbers = f"win rate gained at 10 points lost: bnf {score(mine)}, kto {score(kto)}"
    return gains and not worse, numbers


def stable(results: dict, maths: str) -> tuple[bool, str]:
    mine = at_rates(results, maths, "bnf", "accuracy")
    theirs = {m: at_rates(results, maths, m, "accuracy") for m in rivals(results, maths)}
    better, worse, text = compared(mine, theirs)
    rates = " and ".join(f"{x:g}" for x in results["spec"]["sets"][maths]["test_lr"])
    return most(better, worse, theirs), f"reasoning gained at {rates}, the mean: {text}"


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


def retrieval(results: dict, qa: str, maths: str) -> tuple[bool, str]:
    """rbnf, and bnf divided as rbnf is: no worse on QA, better on mathematical pairs."""
    on_qa = [measures(results, qa, m)["mean"] for m in ("rbnf", "bnf batch")]
    on_maths = [at_rates(results, maths, m, "accuracy") for m in ("rbnf", "bnf batch")]
    _, worse = against(on_qa[0], {"bnf batch": on_qa[1]}, others=1)
    better, _ = against(on_maths[0], {"bnf batch": on_maths[1]}, others=1)
    texts = [f"rbnf {score(a)}, bnf batch {score(b)}" for a, b in (on_qa, on_maths)]
    return bool(better) and not worse, f"mean gain on QA: {texts[0]}; reasoning: {texts[1]}"


# fmt: off
CLAIMS = [  # a claim, its rule, and the methods that it judges on each set
    ("aligns as well as the best method on QA", aligns, {"qa": ["bnf"]}),
    ("gains more win rate per reasoning lost than most", balances, {"qa": ["bnf"]}),
    ("does so without tuning beyond the learning rate", untuned, {"qa": ["bnf"]}),
    ("works on unpaired data: gains, and no less than KTO", unpaired, {"unpaired": ["bnf", "kto"]}),
    ("is stable on mathematical pairs, where most rivals are not", stable, {"math": ["bnf"]}),
    ("shifts likelihoods least, and its logit shifts are the least concentrated",
     shifts, {"qa": ["bnf"]}),
    ("(not the paper's: retrieval, rbnf, mends it on mathematical pairs at no cost)",
     retrieval, {"qa": ["rbnf", "bnf batch"], "math": ["rbnf", "bnf batch"]}),
]
# fmt: on


def verdicts(results: dict) -> list[tuple[str, str, str]]:
    """(claim, verdict, numbers) of each claim whose sets and methods the results hold.

    The claims on mathematical pairs need rates to be judged at.
    """
    spec, found = results["spec"], []
    for text, rule, needs in CLAIMS:
        has_methods = all(
            set(methods) <= set(spec["on"].get(name, [])) for name, methods in needs.items()
        )
        has_rates = "math" not in needs or "test_lr" in spec["sets"].get("math", {})
        if has_methods and has_rates and all(rivals(results, name) for name in needs):
            holds, numbers = rule(results, *needs)
            found.append((text, REPRODUCED if holds else NOT, numbers))
    return found


# ---- The report ----


def verdict_table(results: dict) -> str:
    """Markdown; empty where no claim can be judged."""
    found = verdicts(results)
    return markdown(["BNF …", "here", "numbers"], found) if found else ""


def on_frontiers(results: dict) -> list[str]:
    """Markdown: the map's tables, or differences on files, frontiers and their claims."""
    on = results["spec"]["on"]
    if {name for _, *pair in frontiers.QUESTIONS for name in pair} <= set(on.get("qa", [])):
        return ["## The map", frontiers.weight_table(results), frontiers.questions(results)]
    parts = []
    sets = results["spec"]["sets"]
    for name in (name for name in on if "rows" in sets[name] and "bnf" in on[name]):
        parts += [f"## bnf against the others, {name}", frontiers.file_table(results, name)]
    if judged := verdict_table(results):
        for name in (name for name in on if sets[name].get("kind") == "qa"):
            parts += [f"## Frontiers, {name}", frontiers.frontier_table(results, name)]
        parts += ["## Verdicts", judged]
    return parts


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
        parts += on_frontiers(results)
        if len(lengths.sets_by_length(results)) > 1:
            parts += ["## Length", lengths.table(results), lengths.change(results)]
    return "\n\n".join(parts)
