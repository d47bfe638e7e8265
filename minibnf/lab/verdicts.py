"""Is it true? Tables and a verdict a claim, drawn from the results.json of minibnf/lab/compare.py alone.

A figure of a method on a set is its mean over the seeds; its error joins the spread over seeds with the error over prompts:
e² = (standard deviation over seeds)² / seeds + (mean standard error over prompts)². One figure is as good as another unless it
lies more than 2 sqrt(e1² + e2²) below: prompts are shared, so this is careful rather than sharp. Where a claim says least,
half or most, figures are compared as they are. BNF's rivals are the losses built on
log-likelihood ratios or margins; nll and unlikelihood are the controls.
"""

import json
import math
from statistics import correlation, mean, median, stdev

from minibnf.lab.compare import chosen_settings, collapsed, objective

CONTROLS = ("nll", "unlikelihood")
OURS = ("bnf", "rbnf")
TOLERANCE = 0.05  # a setting is good if it is no further below the method's best, or (mathematical pairs) below the base
NAMES = {
    "win_rate": "win rate", "accuracy": "reasoning", "degenerate": "degenerate", "preference": "pairs told right",
    "solutions": "solutions, nats a token", "shift/chosen": "shift, chosen", "shift/rejected": "shift, rejected",
    "gini": "Gini",
}  # fmt: skip


def rivals(results: dict, name: str) -> list[str]:
    """The methods BNF is judged against; a method that the spec calls "extra" answers another question."""
    extra = [m for m, given in results["spec"]["methods"].items() if given.get("extra")]
    return [m for m in results["spec"]["on"][name] if m not in (*OURS, *CONTROLS, *extra)]


def tests(results: dict, name: str, method: str, which: str) -> list[dict]:
    """The test runs of a method's "best" or "customary" setting on a set, one a seed."""
    setting = chosen_settings(results["spec"], results["runs"], name, method)[which]
    same = lambda r: (
        (r["set"], r["method"], r["split"], r["setting"]) == (name, method, "test", setting)
    )
    return [r for r in results["runs"] if same(r)]


def figure(results: dict, name: str, method: str, which: str, what: str) -> tuple[float, float]:
    """(mean over seeds, its error); what "drop" is the base's reasoning less the model's. What broke off has the worst."""
    runs, of = tests(results, name, method, which), "accuracy" if what == "drop" else what
    worst = {"solutions": -math.inf, "gini": 1.0, "degenerate": 1.0}.get(
        of, math.inf if of.startswith("shift") else 0.0
    )
    values = [r["result"].get(of, (worst, 0.0)) for r in runs]
    means = [runs[0]["base"]["accuracy"][0] - m if what == "drop" else m for m, _ in values]
    over_prompts = mean(e or 0.0 for _, e in values)
    over_seeds = (
        stdev(means) ** 2 / len(means) if len(means) > 1 and all(map(math.isfinite, means)) else 0.0
    )
    return mean(means), math.sqrt(over_seeds + over_prompts**2)


def show(x: tuple[float, float], digits: int = 3) -> str:
    return f"{x[0]:.{digits}f}" + (f" ± {x[1]:.{digits}f}" if x[1] else "")


def setting_text(setting: dict) -> str:
    return " ".join(
        f"{k}={v:g}" if isinstance(v, float | int) else f"{k}={v}" for k, v in setting.items()
    )


def table(results: dict, name: str) -> str:
    """Markdown: every method on a set, its best and its customary setting on test prompts, the best first."""
    runs = [r for r in results["runs"] if r["set"] == name]
    base = next((r for r in runs if r["split"] == "test"), runs[0])["base"]
    columns = [c for c in NAMES if c in base]
    rows = []
    for method in results["spec"]["on"][name]:
        tried = [r for r in runs if r["method"] == method and r["split"] == "validation"]
        lost = f"{sum(map(collapsed, tried))} of {len(tried)}"
        chosen = chosen_settings(results["spec"], results["runs"], name, method)
        if not tests(results, name, method, "best"):
            continue  # a method of the first stage alone
        for which in ("best", "customary") if chosen["best"] != chosen["customary"] else ("best",):
            cells = [
                show(figure(results, name, method, which, c), 2 if c.startswith("shift") else 3)
                for c in columns
            ]
            rank = mean(map(objective, tests(results, name, method, which)))
            both = "best, customary" if len(set(map(json.dumps, chosen.values()))) == 1 else which
            rows.append(
                (
                    rank,
                    f"| {method} | {both} | {setting_text(chosen[which])} | {' | '.join(cells)} | {lost} |",
                )
            )
    head = ["method", "setting", "", *(NAMES[c] for c in columns), "settings collapsed"]
    own = [f"{base[c][0]:.3f}" for c in columns]
    lines = [
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        "| base | | | " + " | ".join(own) + " | |",
    ]
    return "\n".join(lines + [row for _, row in sorted(rows, key=lambda r: -r[0])])


def good_rates(results: dict, name: str, method: str, fixed: dict | None = None) -> list[float]:
    """The learning rates, one after another, around the best at which a method's validation objective is within TOLERANCE of
    its best (fixed: over settings with these hyper-parameters alone)."""
    runs = [
        r
        for r in results["runs"]
        if (r["set"], r["method"], r["split"], r["seed"]) == (name, method, "validation", 0)
    ]
    top: dict[float, float] = {}
    for r in runs:
        if (fixed or {}).items() <= r["setting"].items():
            top[r["setting"]["lr"]] = max(objective(r), top.get(r["setting"]["lr"], -math.inf))
    rates = sorted(top)
    best = max(rates, key=top.get)
    good = [top[lr] >= top[best] - TOLERANCE for lr in rates]
    low = high = rates.index(best)
    while low and good[low - 1]:
        low -= 1
    while high + 1 < len(rates) and good[high + 1]:
        high += 1
    return rates[low : high + 1]


def common_rates(results: dict, name: str) -> set[float]:
    """The learning rates that the grids of bnf and of all its rivals on a set hold."""
    methods = results["spec"]["methods"]
    return set.intersection(
        *(set(methods[m]["grid"]["lr"]) for m in ("bnf", *rivals(results, name)))
    )


def decades(rates: list[float]) -> float:
    return math.log10(rates[-1] / rates[0])


# ----------------------------------------------------------------------------------------------------------- verdicts

REPRODUCED, NOT = "reproduced", "not reproduced"
CUSTOMARY = "reproduced only when rivals keep their customary hyper-parameters"


def within(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """a is not below b by more than two errors."""
    return a[0] >= b[0] - 2 * math.hypot(a[1], b[1])


def either(at_best: bool, at_customary: bool) -> str:
    return REPRODUCED if at_best else CUSTOMARY if at_customary else NOT


def aligns(results: dict, qa: str) -> tuple[str, str]:
    best = lambda which: max(
        (figure(results, qa, m, which, "win_rate"), m) for m in rivals(results, qa)
    )
    mine, (top, who), (usual, usual_who) = (
        figure(results, qa, "bnf", "best", "win_rate"),
        best("best"),
        best("customary"),
    )
    numbers = f"win rate {show(mine)}; best rival {who} {show(top)}, at customary hyper-parameters {usual_who} {show(usual)}"
    return either(within(mine, top), within(mine, usual)), numbers


def costs(results: dict, qa: str) -> tuple[str, str]:
    drops = {
        w: sorted((figure(results, qa, m, w, "drop")[0], m) for m in rivals(results, qa))
        for w in ("best", "customary")
    }
    mine, middle = (
        figure(results, qa, "bnf", "best", "drop"),
        {w: median(d for d, _ in drops[w]) for w in drops},
    )
    least = drops["best"][0]
    numbers = (
        f"reasoning lost {show(mine)}; rivals' median {middle['best']:.3f} (least: {least[1]} {least[0]:.3f}), at customary "
        f"hyper-parameters {middle['customary']:.3f}"
    )
    far_less = lambda which: middle[which] > 2 * mine[1] and mine[0] <= middle[which] / 2
    return either(far_less("best"), far_less("customary")), numbers


def unpaired(results: dict, qa: str, lone: str) -> tuple[str, str]:
    mine, paired = (
        figure(results, lone, "bnf", "best", "win_rate"),
        figure(results, qa, "bnf", "best", "win_rate"),
    )
    kto = figure(results, lone, "kto", "best", "win_rate")
    base = tuple(tests(results, lone, "bnf", "best")[0]["base"]["win_rate"])
    gains = mine[0] > base[0] + 2 * math.hypot(mine[1], base[1])
    numbers = f"win rate {show(mine)} (base {base[0]:.3f}); on pairs {show(paired)}; kto unpaired {show(kto)}"
    return REPRODUCED if gains and within(mine, kto) else NOT, numbers


def stable(results: dict, maths: str) -> tuple[str, str]:
    rates = common_rates(results, maths)

    def kept(method: str, customary: bool = False) -> float:
        fixed = results["spec"]["methods"][method].get("customary", {}) if customary else {}
        runs = [
            r
            for r in results["runs"]
            if (r["set"], r["method"], r["split"]) == (maths, method, "validation")
        ]
        runs = [
            r for r in runs if fixed.items() <= r["setting"].items() and r["setting"]["lr"] in rates
        ]
        return mean(
            bool(r["result"]) and r["result"]["accuracy"][0] >= r["base"]["accuracy"][0] - TOLERANCE
            for r in runs
        )

    mine, usual = kept("bnf"), kept("bnf", True)
    others, at_custom = (
        {m: kept(m) for m in rivals(results, maths)},
        {m: kept(m, True) for m in rivals(results, maths)},
    )
    share = lambda own, of: (
        f"bnf {own:.0%}, rivals' median {median(of.values()):.0%}, most {max(of, key=of.get)} {max(of.values()):.0%}"
    )
    numbers = (
        f"settings (rates {min(rates):g} to {max(rates):g}) that keep reasoning within {TOLERANCE} of the base: "
        f"{share(mine, others)}; at customary hyper-parameters {share(usual, at_custom)}"
    )
    steadier = lambda own, of: own >= max(of.values()) and own > median(of.values())
    return either(steadier(mine, others), steadier(usual, at_custom)), numbers


def shifts(results: dict, qa: str) -> tuple[str, str]:
    size = lambda m: sum(
        abs(figure(results, qa, m, "best", f"shift/{side}")[0]) for side in ("chosen", "rejected")
    )
    uneven = lambda m: figure(results, qa, m, "best", "gini")[0]
    others = rivals(results, qa)
    least, even = min(others, key=size), min(others, key=uneven)
    sizes = f"bnf {size('bnf'):.2f}, least rival {least} {size(least):.2f}, median {median(map(size, others)):.2f}"
    ginis = f"bnf {uneven('bnf'):.3f}, lowest rival {even} {uneven(even):.3f}, median {median(map(uneven, others)):.3f}"
    numbers = f"sizes of the shifts of chosen and rejected together, nats: {sizes}; Gini: {ginis}"
    return REPRODUCED if size("bnf") <= size(least) and uneven("bnf") <= uneven(
        even
    ) else NOT, numbers


def tuning(results: dict, qa: str) -> tuple[str, str]:
    methods = results["spec"]["methods"]
    width = {
        m: decades(good_rates(results, qa, m, methods[m].get("customary")))
        for m in results["spec"]["on"][qa]
    }
    others = {m: width[m] for m in rivals(results, qa)}
    numbers = (
        f"decades of learning rates around its best within {TOLERANCE} of it: bnf {width['bnf']:.1f}, nll {width['nll']:.1f}, "
        f"rivals at customary hyper-parameters {median(others.values()):.1f} (median), {max(others.values()):.1f} (most)"
    )
    return REPRODUCED if width["bnf"] >= width["nll"] else NOT, numbers


def retrieval(results: dict, qa: str, maths: str) -> tuple[str, str]:
    """rbnf against the best of DPO's sweep: win rate on QA pairs, reasoning on mathematical ones."""
    measures = ((qa, "win_rate"), (maths, "accuracy"))
    mine, dpo, bnf = (
        [figure(results, name, m, "best", what) for name, what in measures]
        for m in ("rbnf", "dpo", "bnf")
    )
    numbers = "; ".join(
        f"{NAMES[what]} on {name}: rbnf {show(a)}, dpo {show(b)}, bnf {show(c)}"
        for (name, what), a, b, c in zip(measures, mine, dpo, bnf, strict=True)
    )
    return REPRODUCED if all(map(within, mine, dpo)) else NOT, numbers


def verdicts(
    results: dict, qa: str = "qa", maths: str = "math", lone: str = "unpaired"
) -> list[tuple[str, str, str]]:
    """(claim, verdict, numbers) of the paper's six claims and of rbnf, those whose sets and methods the results hold."""
    claims = [
        ("aligns as well as the best method on QA", aligns, {qa: ["bnf"]}),
        ("costs far less reasoning: at most half of what rivals lose", costs, {qa: ["bnf"]}),
        (
            "works on unpaired data: gains, and no less than KTO",
            unpaired,
            {qa: ["bnf"], lone: ["bnf", "kto"]},
        ),
        ("is stable on mathematical pairs, where its rivals are not", stable, {maths: ["bnf"]}),
        (
            "shifts likelihoods least, and its logit shifts are the least concentrated",
            shifts,
            {qa: ["bnf"]},
        ),
        ("needs no tuning beyond what fine-tuning needs", tuning, {qa: ["bnf", "nll"]}),
        (
            "(not the paper's: rbnf matches the best of DPO's sweep)",
            retrieval,
            {q: ["bnf", "rbnf", "dpo"] for q in (qa, maths)},
        ),
    ]
    on = results["spec"]["on"]
    held = lambda needs: all(
        {*m} <= {*on.get(name, [])} and rivals(results, name) for name, m in needs.items()
    )
    return [(claim, *rule(results, *needs)) for claim, rule, needs in claims if held(needs)]


# ------------------------------------------------------------------------------------------------- other questions


def lengths(results: dict, name: str) -> str:
    """Markdown: what BNF's length normaliser changes."""
    lines = [
        "| BNF divided by | best learning rate | good learning rates | win rate | reasoning |",
        "|---|---|---|---|---|",
    ]
    for method, what in (
        ("bnf", "the pair's shorter length"),
        ("bnf own", "its own"),
        ("bnf batch", "the batch's mean"),
    ):
        if method in results["spec"]["on"][name]:
            rates, best = (
                good_rates(results, name, method),
                chosen_settings(results["spec"], results["runs"], name, method)["best"],
            )
            shown = [
                show(figure(results, name, method, "best", c)) for c in ("win_rate", "accuracy")
            ]
            lines.append(
                f"| {what} | {best['lr']:g} | {rates[0]:g} to {rates[-1]:g} | {' | '.join(shown)} |"
            )
    return "\n".join(lines)


def beta_and_length(results: dict) -> str:
    """Markdown: DPO at one learning rate over beta, on sets of short and of long responses (validation prompts, seed 0)."""
    method, lines = (
        "dpo lr 1e-4",
        [
            "| set | tokens a response | β | β × tokens | win rate | reasoning |",
            "|---|---|---|---|---|---|",
        ],
    )
    for name, on in results["spec"]["on"].items():
        tokens = results["facts"]["response_tokens"][name]
        for r in results["runs"] if method in on else []:
            if (r["set"], r["method"]) == (name, method):
                beta, found = r["setting"]["beta"], r["result"]
                shown = " | ".join(
                    show(found[c]) if found else "broke off" for c in ("win_rate", "accuracy")
                )
                lines.append(
                    f"| {name} | {tokens:.1f} | {beta:g} | {beta * tokens:.2g} | {shown} |"
                )
    return "\n".join(lines)


def concentration(results: dict, name: str) -> tuple[float, int]:
    """Is a low Gini good? Over how many validation runs of a set, Spearman's rank correlation of Gini and reasoning lost."""
    runs = [
        r for r in results["runs"] if (r["set"], r["split"]) == (name, "validation") and r["result"]
    ]
    lost = [r["base"]["accuracy"][0] - r["result"]["accuracy"][0] for r in runs]
    ginis = [r["result"]["gini"][0] for r in runs]
    vary = len(set(ginis)) > 1 and len(set(lost)) > 1
    return correlation(ranks(ginis), ranks(lost)) if vary else math.nan, len(runs)


def ranks(x: list[float]) -> list[float]:
    """Equal values share their mean rank."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) - 1) / 2 for a in x]


def verdict_table(results: dict) -> str:
    lines = ["| BNF … | here | numbers |", "|---|---|---|"]
    return "\n".join(
        lines
        + [f"| {claim} | {verdict} | {numbers} |" for claim, verdict, numbers in verdicts(results)]
    )


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
