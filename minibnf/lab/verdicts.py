"""Is it true? A verdict per claim, and the whole report, from the results.json of compare.py alone.

QA is judged by frontiers (frontiers.py says what they are and how intervals come about),
mathematical pairs by the reasoning kept at the learning rates that the set names. A method is
better than another where 0 lies outside the interval of their difference; within a claim the
intervals share their level, 5 %, among all comparisons (Bonferroni).

The customary hyper-parameter of a loss that sums over tokens is the published β times the published
length, divided by the mean length here: the spec gives the product, "beta|y|".
"""

from statistics import mean, median

import numpy as np

from minibnf.lab import tables
from minibnf.lab.frontiers import against, at_rates, interval, measures
from minibnf.lab.tables import figure, markdown, rivals

REPRODUCED, NOT = "reproduced", "not reproduced"
Scores = dict[str, np.ndarray]  # {method: its replicates, the first what was measured}


def score(x: np.ndarray) -> str:
    """What was measured ± the standard deviation of its replicates."""
    return f"{x[0]:+.3f} ± {x[1:].std():.3f}"


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


# ---- The rules of the claims: (results, names of sets) -> (whether it holds, numbers) ----


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
    gains, (_, worse) = interval(mine)[0] > 0, against(mine, {"kto": kto})
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
        f"shifts of chosen and rejected together, nats: bnf {size:.2f}, "
        f"least rival {least} {sizes[least]:.2f}, median {median(sizes.values()):.2f}; "
        f"Gini: bnf {gini:.3f}, lowest rival {even} {ginis[even]:.3f}"
    )
    return size <= sizes[least] and gini <= ginis[even], numbers


def retrieval(results: dict, qa: str, maths: str) -> tuple[bool, str]:
    """rbnf, and bnf divided as rbnf is: no worse on QA, better on mathematical pairs."""
    on_qa = [measures(results, qa, m)["mean"] for m in ("rbnf", "bnf batch")]
    on_maths = [at_rates(results, maths, m, "accuracy") for m in ("rbnf", "bnf batch")]
    _, worse = against(on_qa[0], {"bnf batch": on_qa[1]})
    better, _ = against(on_maths[0], {"bnf batch": on_maths[1]})
    texts = [f"rbnf {score(a)}, bnf {score(b)}" for a, b in (on_qa, on_maths)]
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
            low, high = interval(a - b, count)
            shown = f"{(a - b)[0]:+.3f} ({low:+.3f} to {high:+.3f})"
            cells.append(shown if low <= 0 <= high else f"**{shown}**")
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


# ---- The report ----


def verdicts(results: dict) -> list[tuple[str, str, str]]:
    """(claim, verdict, numbers) of each claim whose sets and methods the results hold."""
    on, found = results["spec"]["on"], []
    for text, rule, needs in CLAIMS:
        has_methods = all(set(methods) <= set(on.get(name, [])) for name, methods in needs.items())
        if has_methods and all(rivals(results, name) for name in needs):
            holds, numbers = rule(results, *needs)
            found.append((text, REPRODUCED if holds else NOT, numbers))
    return found


def verdict_table(results: dict) -> str:
    return markdown(["BNF …", "here", "numbers"], verdicts(results))


def report(results: dict) -> str:
    """Markdown: every table, then the verdicts."""
    parts, spec = [], results["spec"]
    for name in spec["on"]:
        parts += [f"## {name}", tables.table(results, name)]
    if {name for _, *pair in QUESTIONS for name in pair} <= set(spec["on"].get("qa", [])):
        parts += ["## The map", weight_table(results), questions(results)]
    if found := verdicts(results):
        for name in (name for name in spec["on"] if spec["sets"][name].get("kind") == "qa"):
            parts += [f"## Frontiers, {name}", frontier_table(results, name)]
        parts += ["## Verdicts", markdown(["BNF …", "here", "numbers"], found)]
    return "\n\n".join(parts)


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
