"""The figures of pages 00 to 03 and 05, for a light background and for a dark one.

A page computes the numbers and one line of it draws them into tutorials/figures. Needs matplotlib
(extra `plots`); draws without a display, and the same bytes every time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

from minibnf.losses import LOSSES

FIGURES = Path(__file__).parent / "figures"
GOOD, BAD, BLUE, VIOLET, GREY = "#1b9e96", "#d2694f", "#4585c9", "#a05aa8", "#808080"
STYLE = {"svg.hashsalt": "minibnf", "savefig.transparent": True, "font.size": 9}
STYLE |= dict.fromkeys(["text.color", "xtick.color", "ytick.color"], GREY)
STYLE |= dict.fromkeys(["axes.edgecolor", "axes.labelcolor", "axes.titlecolor"], GREY)
STYLE |= {"axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False}
DOTTED = {"color": GREY, "linewidth": 0.8, "linestyle": ":"}


@contextmanager
def drawn(name: str, size: tuple[float, float], rows: int = 1, columns: int = 1, **how) -> Iterator:
    """What to draw on, one axis or an array of them; NAME.svg is written when the block ends."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **how)
        yield axes
        figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


def grouped_bars(axis, labels: list[str], series: dict[str, tuple[Tensor, str]]) -> None:
    """Bars side by side for each label; series: {name: (heights (n,), colour)}."""
    width = 0.8 / len(series)
    for i, (name, (heights, colour)) in enumerate(series.items()):
        at = [k + (i - (len(series) - 1) / 2) * width for k in range(len(labels))]
        axis.bar(at, heights.tolist(), width * 0.92, color=colour, label=name)
    axis.set_xticks(range(len(labels)), labels)
    axis.tick_params(axis="x", length=0)


# ---- Page 00 ----


def one_token(p: Tensor, tent: Tensor, r: float, plain: Tensor, bnf: Tensor) -> None:
    """The push against p (n,) beside two descents, plain and bnf (steps,), in nats."""
    with drawn("one-token", (8, 2.9), columns=2) as (left, right):
        left.plot(p, 1 - p, color=BAD, label="log-likelihood, 1 - p")
        left.plot(p, tent, color=GOOD, linewidth=2.2, label="BNF, the tent")
        left.axvline(r, **DOTTED)
        left.set(xlabel="probability p of a rejected token (dotted: r)", ylabel="push on its logit")
        right.plot(plain, color=BAD, label="log-likelihood")
        right.plot(bnf, color=GOOD, linewidth=2.2, label="BNF")
        right.set(xlabel="step", ylabel="log p (nats)")
        for axis in (left, right):
            axis.legend(frameon=False)


def squeezing(words: list[str], before: Tensor, after: Tensor, y: int) -> None:
    """Each word's probability before and after y was pushed down, both (V,)."""
    with drawn("squeezing", (6.4, 2.5)) as axis:
        grouped_bars(axis, words, {"before": (before, GREY), "after ten steps": (after, BAD)})
        axis.annotate("pushed down", (y, before[y]), ha="center", va="bottom", color=GREY)
        axis.set(ylabel="probability", ylim=(0, 1.05))
        axis.legend(frameon=False)


# ---- Page 01 ----


def pipelines() -> None:
    """RLHF beside DPO and BNF: what is trained, what is sampled, what must be in memory."""
    long = ["pairs", "fit a reward\nmodel R", "sample answers\nfrom the policy", "score them by R"]
    long += ["PPO step on\npolicy and\nvalue head"]
    short = [
        "pairs (BNF: or\nsingle answers)",
        "the policy reads\nthe answers",
        "one loss,\none step",
    ]
    many = "in memory: policy, reference, reward model, value head"
    few = "in memory: policy, and what the reference says of the answers, read once before"
    rows = {"RLHF": (BAD, long, many), "DPO, BNF": (GOOD, short, few)}
    with drawn("rlhf-dpo", (8, 3.3)) as axis:
        axis.set(xlim=(0, 10.15), ylim=(-0.5, 4.2))
        axis.axis("off")
        for y, (name, (colour, steps, memory)) in zip((2.9, 0.55), rows.items(), strict=True):
            axis.text(0, y, name, weight="bold", color=colour, va="center", fontsize=10)
            for i, step in enumerate(steps):
                x = 1.95 + 1.85 * i
                _box(axis, x, y, step, colour)
                if i:
                    _arrow(axis, (x - 1.13, y), (x - 0.72, y))
            axis.text(1.25, y - 0.78, memory, fontsize=8, va="center")
        _arrow(axis, (9.35, 3.37), (5.65, 3.37), "arc3,rad=0.2")
        axis.text(7.5, 3.97, "new answers for every step", ha="center", va="center", fontsize=8)
        _arrow(axis, (5.65, 1.02), (3.8, 1.02), "arc3,rad=0.2")
        axis.text(4.72, 1.43, "the next pairs", ha="center", va="center", fontsize=8)


def _box(axis, x: float, y: float, text: str, colour: str) -> None:
    shape = {"boxstyle": "round,pad=0,rounding_size=0.12", "facecolor": "none"}
    axis.add_patch(FancyBboxPatch((x - 0.7, y - 0.45), 1.4, 0.9, edgecolor=colour, **shape))
    axis.text(x, y, text, ha="center", va="center", fontsize=8)


def _arrow(axis, start: tuple, end: tuple, bend: str = "arc3") -> None:
    how = {"arrowstyle": "->", "color": GREY, "connectionstyle": bend}
    axis.annotate("", end, start, arrowprops=how)


def optima(words: list[str], ref: Tensor, optimum, betas: tuple) -> None:
    """The reference (V,) beside the optimum of the objective, optimum(β) (V,), for some β."""
    colours = (BLUE, GOOD, BAD)
    with drawn("optimum", (7.2, 2.7)) as axis:
        bars = {"reference": (ref, GREY)}
        bars |= {f"β = {b:g}": (optimum(b), c) for b, c in zip(betas, colours, strict=True)}
        grouped_bars(axis, words, bars)
        axis.set(ylabel="probability", ylim=(0, 1))
        axis.legend(frameon=False)


# ---- Page 02 ----

ZOO = {  # label: (hyper-parameters, colour, line)
    "unlikelihood": ({}, BAD, "-"),
    "dpo, β = 0.1": ({"beta": 0.1}, VIOLET, "-"),
    "dpo, β = 2": ({"beta": 2.0}, VIOLET, "--"),
    "kto, β = 0.1": ({"beta": 0.1}, "#7f8ea3", "-."),
    "simpo, β = 2": ({"beta": 2.0}, "#c58b1b", "--"),
    "slic": ({}, "#8c8c2b", ":"),
    "ipo, β = 0.1": ({"beta": 0.1}, "#b5651d", ":"),
    "bnf": ({}, GOOD, "-"),
}


def zoo(feedback, r: float) -> None:
    """minibnf.feedback's curves of a rejected token, each scaled to 1 - r at p = r."""
    log_p = torch.linspace(-12, -0.001, 600, dtype=torch.float64)
    with drawn("zoo", (7.2, 3.6)) as axis:
        for label, (hyper, colour, line) in ZOO.items():
            name = label.split(",")[0]
            at_r = feedback(name, torch.tensor([r], dtype=torch.float64), r, False, **hyper)
            push = feedback(name, log_p.exp(), r, False, **hyper) / at_r * (1 - r)
            width = 2.4 if name == "bnf" else 1.3
            axis.plot(log_p, push, line, color=colour, linewidth=width, label=label)
        axis.axvline(torch.tensor(r).log(), **DOTTED)
        axis.set(xlabel="log p of a rejected token (dotted: the reference)", ylim=(0, 1.4))
        axis.set_ylabel("push on its logit, scaled")
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


# ---- Page 03 ----


def targets(pi: Tensor, by_r: dict[float, Tensor]) -> None:
    """π, q and π - q, all (V,), of one position whose token is the first, for each r in by_r."""
    labels = ["y", *(f"v{i}" for i in range(1, len(pi)))]
    with drawn("target", (8, 2.8), columns=len(by_r), sharey=True) as axes:
        for axis, (r, q) in zip(axes, by_r.items(), strict=True):
            series = {"π": (pi, GREY), "q": (q, GOOD), "π - q, the gradient": (pi - q, BAD)}
            grouped_bars(axis, labels, series)
            axis.axhline(0, color=GREY, linewidth=0.6)
            axis.plot([-0.48, 0.48], [r, r], color=BLUE, linewidth=1.6)
            axis.text(0.53, r, "r", va="center", color=BLUE)
            where = "below" if pi[0] < r else "above"
            axis.set_title(f"r = {r:g}: the policy is {where} the reference")
        axes[-1].legend(frameon=False)


def potentials(log_p: Tensor, r: float, preferred: list[str], rejected: list[str]) -> None:
    """A token's loss ∓Φ above its weight w, over log p (n,), for the losses named."""
    log_r = torch.full_like(log_p, r).log()
    colours = {"bnf": (GOOD, 2.4), "rbnf": (BLUE, 1.4)}
    with drawn("potential", (8, 4.4), 2, 2, sharex=True, sharey="row") as axes:
        kinds = ("preferred", preferred), ("rejected", rejected)
        for column, (kind, names) in enumerate(kinds):
            upper, lower = axes[:, column]
            sign = -1 if kind == "preferred" else 1
            for name in names:
                token = log_p, log_r, torch.full(log_p.shape, kind == "preferred")
                loss = sign * LOSSES[name].potential(*token)
                w = LOSSES[name].weight(*token)
                colour, width = colours.get(name, (BAD, 1.4))
                how = {"color": colour, "linewidth": width, "label": name}
                upper.plot(log_p, loss, **how)
                lower.plot(log_p, w, **how)
            for axis in (upper, lower):
                axis.axvline(torch.tensor(r).log(), **DOTTED)
            upper.axhline(0, **DOTTED)
            upper.set_title(f"a {kind} token (dotted: the reference)")
            upper.legend(frameon=False)
            lower.set(xlabel="log p", ylim=(-0.05, 1.1))
        axes[0, 0].set_ylabel("its loss (nats)")
        axes[1, 0].set_ylabel("its weight w")


# ---- Page 05 ----

RIVALS = {"bnf": GOOD, "rbnf": BLUE, "nll": "#c58b1b", "dpo": VIOLET, "kto": "#7f8ea3"}
RIVALS |= {"slic": "#8c8c2b", "cpo": BAD, "orpo": "#b5651d"}


def what_a_rate_costs(runs: dict[str, list[dict]], base: dict) -> None:
    """Win rate against reasoning kept: a path of each method's runs, and the base's point."""
    with drawn("what-a-rate-costs", (6.4, 3.8)) as axis:
        for method, path in runs.items():
            win, kept = ([r["result"][x][0] for r in path] for x in ("win_rate", "accuracy"))
            width = 2.4 if method == "bnf" else 1.3
            how = {"color": RIVALS[method], "linewidth": width, "label": method}
            axis.plot(kept, win, "o-", markersize=4, **how)
        at = base["accuracy"][0], base["win_rate"][0]
        axis.plot(*at, "+", color=GREY, markersize=12, label="base")
        axis.set(xlabel="reasoning kept, falling to the right", ylabel="QA win rate", xlim=(1, 0))
        axis.legend(frameon=False, loc="lower left")


def frontiers(points: dict[str, list[tuple[float, float]]], end: float = 0.1) -> None:
    """Win rate gained against reasoning lost, a frontier per method; level beyond its last point.

    points: of each method by rising loss, the base (0, 0) first.
    """
    with drawn("frontiers", (6.4, 3.8)) as axis:
        for method, reached in points.items():
            lost, gained = zip(*reached, strict=True)
            width = 2.4 if method == "bnf" else 1.3
            how = {"color": RIVALS[method], "linewidth": width}
            axis.plot(lost, gained, "o-", markersize=4, label=method, **how)
            axis.plot([lost[-1], max(end, lost[-1])], [gained[-1]] * 2, **how)
        axis.axvline(end, **DOTTED)
        axis.set(xlabel="reasoning lost", ylabel="QA win rate gained", xlim=(0, end * 1.02))
        axis.legend(frameon=False, loc="lower right", ncols=2)
