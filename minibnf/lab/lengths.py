"""Does DPO's β suit one length of answers only? BNF against DPO at several β, by length.

DPO's loss knows β times a sum over tokens, so the same β holds a long answer back more than a short
one: what counts is β|y|, β times the mean length of a response. Read from the results of a
comparison whose sets differ in length, and whose methods are bnf and DPO at a "fixed" β.
"""

import numpy as np

from minibnf.lab.frontiers import difference, measures
from minibnf.lab.plan import JUDGED
from minibnf.lab.tables import markdown

AT = ("at 5", "at 10")


def fixed_betas(results: dict, name: str) -> dict[str, float]:
    """{method: β} of the DPO methods that were run on a set."""
    spec = results["spec"]
    methods = {m: spec["methods"][m] for m in spec["on"][name]}
    return {
        m: given["fixed"]["beta"]
        for m, given in methods.items()
        if given["loss"] == "dpo" and "beta" in given.get("fixed", {})
    }


def sets_by_length(results: dict) -> list[str]:
    """The sets with bnf and a DPO of fixed β, the shortest answers first."""
    spec, length = results["spec"], results["facts"].get("response_tokens", {})
    found = [x for x in spec["on"] if spec["sets"][x].get("kind") in JUDGED and x in length]
    found = [x for x in found if "bnf" in spec["on"][x] and fixed_betas(results, x)]
    return sorted(found, key=length.get)


def advantages(results: dict, name: str, method: str) -> dict[str, np.ndarray]:
    """{"at 5", "at 10"}: the replicates of what bnf gains more than a method."""
    mine, theirs = (measures(results, name, m) for m in ("bnf", method))
    return {at: mine[at] - theirs[at] for at in AT}


def table(results: dict) -> str:
    """Markdown: bnf and every DPO on every set, by rising β|y|."""
    names = sets_by_length(results)
    count = len(AT) * sum(len(fixed_betas(results, name)) for name in names)
    rows = []
    for name in names:
        length = results["facts"]["response_tokens"][name]
        for method, beta in {"bnf": 0.0, **fixed_betas(results, name)}.items():
            gained, more = measures(results, name, method), advantages(results, name, method)
            cells = [f"{name}, {length:g} tokens", method]
            cells += [f"{beta:g}", f"{beta * length:.2g}"] if beta else ["", ""]
            cells += [f"{gained[at][0]:+.3f}" for at in AT]
            cells += [difference(more[at], count) if beta else "" for at in AT]
            rows.append((beta * length, cells))
    rows.sort(key=lambda row: row[0])
    head = ["answers", "method", "β", "β times length", "gained at 5 points lost", "at 10"]
    head += ["bnf less dpo at 5", "at 10"]
    return markdown(head, [cells for _, cells in rows])


def change(results: dict) -> str:
    """Markdown: at each β, how much larger bnf's advantage is on the shortest answers than on the
    longest."""
    short, *_, long = sets_by_length(results)
    betas = [fixed_betas(results, name) for name in (short, long)]
    both = sorted(set(betas[0]) & set(betas[1]), key=betas[0].get)
    rows = []
    for method in both:
        more, less = (advantages(results, name, method) for name in (short, long))
        cells = [difference(more[at] - less[at], len(AT) * len(both)) for at in AT]
        rows.append([f"{betas[0][method]:g}", *cells])
    head = ["β", f"bnf's advantage on {short} less that on {long} answers, at 5", "at 10"]
    return markdown(head, rows)
