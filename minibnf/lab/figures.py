"""The figures of comparisons, from their JSON alone; the curves of feedback, the map of weights.

Needs matplotlib (extra `plots`); draws without a display.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from minibnf.feedback import feedback
from minibnf.files.terminal import show
from minibnf.lab.plan import best_by_rate, customary, select, with_setting
from minibnf.losses import LOSSES
from minibnf.run import BAD, GOOD, PLAIN

STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "grid.alpha": 0.25,
    "axes.spines.top": False, "axes.spines.right": False,
    "svg.hashsalt": "minibnf", "axes.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip


@contextmanager
def drawn(file: Path, size: tuple[float, float], panels: int = 1, grid: bool = True) -> Iterator:
    """What to draw on, one axis or an array of them; the file is written when the block ends."""
    with plt.rc_context(STYLE | {"axes.grid": grid}):
        figure, axes = plt.subplots(1, panels, figsize=size, sharey=True, layout="constrained")
        yield axes
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


# ---- The curves of feedback ----

CURVES = {  # loss: (colour, line style, hyper-parameters)
    "bnf": (GOOD, "-", {}),
    "rbnf": ("#2f6fab", (0, (5, 1.5)), {}),
    "unlikelihood": (BAD, "-", {}),
    "nll": (BAD, "-", {}),
    "dpo": ("#a05aa8", "-", {"beta": 0.1}),
    "simpo": ("#c58b1b", "--", {"beta": 2.0}),
    "kto": (PLAIN, "-.", {"beta": 0.1}),
}
PANELS = {
    "rejected": ["unlikelihood", "dpo", "simpo", "kto", "bnf"],
    "chosen": ["nll", "dpo", "simpo", "kto", "rbnf", "bnf"],
}


def feedback_curves(file: Path, r: float = 0.4) -> Path:
    """The tent of BNF beside the one-directional curves of others, for a token of reference r."""
    return _two_panels(file, r, _feedback_panel, "push on its logit, |∂L/∂z|", (0, 1.35))


def _two_panels(file: Path, r: float, draw, label: str, ylim: tuple) -> Path:
    """draw(axis, kind, r) of a rejected token beside a chosen one, over its probability."""
    with drawn(file, (9, 3.4), panels=2, grid=False) as axes:
        for axis, kind in zip(axes, PANELS, strict=True):
            draw(axis, kind, r)
            axis.axvline(r, color="#999999", linewidth=0.8, linestyle=":")
            grey = {"fontsize": 8, "color": "#666666"}
            offset = {"xytext": (4, 0), "textcoords": "offset points"}
            axis.annotate("reference r", (r, 0.03), **offset, **grey)
            axis.set(xlim=(0, 1), xlabel="probability p of the token under the policy")
        axes[0].set(ylabel=label, ylim=ylim)
    return file


def _feedback_panel(axis, kind: str, r: float) -> None:
    p = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]
    at = torch.tensor([r], dtype=p.dtype)
    for name in PANELS[kind]:
        colour, line, hyper = CURVES[name]
        y, at_r = (feedback(name, x, r, kind == "chosen", **hyper) for x in (p, at))
        label = name + "".join(f" β={v:g}" for v in hyper.values())
        how = {"linestyle": line, "color": colour, "linewidth": 2.4 if name == "bnf" else 1.3}
        axis.plot(p, y / at_r * (1 - r), label=label, **how)
    axis.set(title=f"a {kind} token (each curve scaled to 1 - r at p = r)")
    axis.legend(frameon=False, fontsize=8, loc="upper right")


# ---- The map of weights ----

ALIKE = {  # panel: {a loss to draw: how its line is labelled, with those that share it}
    "rejected": {"tnpo": "tnpo β=1", "unlikelihood": "unlikelihood", "topr": "topr",
                 "bnf": "bnf, rbnf", "power": "power α=1", "nll": "nll"},
    "chosen": {"nll": "nll, topr, tnpo, unlikelihood", "rbnf": "rbnf", "bnf": "bnf",
               "power": "power α=1"},
}  # fmt: skip
FOUND = {"rejected": "all but unlikelihood let go",
         "chosen": "bnf lets go, rbnf holds on with weight r"}  # fmt: skip
DASHES = {"rbnf": (0, (5, 1.5)), "power": "-."}


def weight_map(file: Path, r: float = 0.4) -> Path:
    """w(p, r) of the token-local losses over p: what each leaves of fine-tuning's gradient."""
    return _two_panels(file, r, _weight_panel, "weight w on the gradient of log p", (-0.04, 1.55))


def _weight_panel(axis, kind: str, r: float) -> None:
    p = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]
    label = torch.full_like(p, kind == "chosen", dtype=torch.bool)
    for name, text in ALIKE[kind].items():
        hyper = {k: v for k, v in LOSSES[name].defaults.items() if k != "length"}
        w = LOSSES[name].weight(p.log(), torch.full_like(p, r).log(), label, **hyper)
        how = {"color": LINES[name][0], "linewidth": 2.4 if name == "bnf" else 1.3}
        axis.plot(p, w, label=text, linestyle=DASHES.get(name, "-"), **how)
    axis.set(title=f"{kind}: below r {FOUND[kind]}")
    where = {"loc": "lower right", "bbox_to_anchor": (1, 0.05)} if kind == "rejected" else {}
    axis.legend(frameon=False, fontsize=8, **where)


# ---- The figures of a comparison ----

LINES = {  # method: (colour, marker)
    "bnf": (GOOD, "o"), "rbnf": ("#2f6fab", "s"), "nll": ("#888888", "x"),
    "unlikelihood": (BAD, "x"), "dpo": ("#a05aa8", "^"), "dpo+nll": ("#d48fd6", "v"),
    "rdpo": ("#6b3d78", "<"), "ipo": ("#b5651d", "D"), "slic": ("#8c8c2b", "P"),
    "kto": (PLAIN, ">"), "orpo": ("#d4a017", "d"), "simpo": ("#e0457b", "*"),
    "cpo": ("#e08283", "p"), "topr": ("#7e57c2", "1"), "tnpo": ("#7cb342", "2"),
    "power": ("#222222", "3"), "apo_zero": ("#00a5cf", "h"), "lndpo": ("#8d6e63", "H"),
    "bdpo": ("#ff8a65", "4"), "bnf batch": ("#7fc8bd", "o"),
}  # fmt: skip
SERIES = 8  # of one figure at most: these first, then in the spec's order
FIRST = ("bnf", "rbnf", "nll", "dpo", "kto", "ipo", "simpo", "orpo")
BESIDE = {"frameon": False, "fontsize": 8, "loc": "center left", "bbox_to_anchor": (1, 0.5)}


def comparison(results: dict, folder: Path) -> list[Path]:
    """The frontier of each set, and its sensitivity to the learning rate.

    A set of which every run broke off has none.
    """
    files = []
    for name in results["spec"]["on"]:
        if tried := _tried(results, name):
            files += [folder / f"{name}-frontier.svg", folder / f"{name}-rates.svg"]
            _frontier(files[-2], name, tried, results["spec"])
            _rates(files[-1], name, tried, results["spec"])
    return files


def _look(spec: dict, method: str) -> dict:
    """How a method's line is drawn. One that LINES does not name is drawn as one that is absent."""
    others = [name for name in spec["methods"] if name not in LINES]
    absent = [look for name, look in LINES.items() if name not in spec["methods"]]
    colour, marker = LINES.get(method) or absent[others.index(method)]
    return dict(color=colour, marker=marker, lw=2.4 if method == "bnf" else 1.2, label=method)


def _tried(results: dict, name: str) -> dict[str, list[dict]]:
    """{method: its validation runs that did not break off}, of at most SERIES that have such."""
    found = {}
    for method in sorted(results["spec"]["on"][name], key=lambda method: method not in FIRST):
        if len(found) == SERIES:
            break
        runs = select(results["runs"], set=name, method=method, split="validation")
        if runs := [r for r in runs if r["result"]]:
            found[method] = runs
    return found


def _axes_of(run: dict) -> tuple[str, str, str, str]:
    """What a set is about: the measure that is lost, its label, the measure that is gained, its."""
    if "win_rate" in run["result"]:
        return "accuracy", "reasoning accuracy", "win_rate", "QA win rate against the base"
    kept = ("shift/chosen", "shift of chosen responses (nats)")
    if "solutions" in run["result"]:
        kept = ("solutions", "log-likelihood of solutions (nats per token)")
    return *kept, "preference", "share of held-out pairs told right"


def _frontier(file: Path, name: str, tried: dict[str, list[dict]], spec: dict) -> None:
    """One curve per method: the settings that no other of its settings beats in both respects."""
    first = next(iter(tried.values()))[0]
    x, x_label, y, y_label = _axes_of(first)
    base = first["base"][x][0], first["base"][y][0]
    shown = [base]
    with drawn(file, (7.6, 4.6)) as axis:
        for method, runs in tried.items():
            points = sorted(((r["result"][x][0], r["result"][y][0]) for r in runs), reverse=True)
            faint = {"alpha": 0.25, "linestyle": "", "label": None}
            axis.plot(*zip(*points, strict=True), markersize=4, **_look(spec, method) | faint)
            best = [p for i, p in enumerate(points) if all(p[1] > q[1] for q in points[:i])]
            axis.plot(*zip(*best, strict=True), markersize=5, **_look(spec, method))
            shown += best
        # Settings worse than all of these are out of sight.
        left, bottom = (min(numbers) - 0.02 for numbers in zip(*shown, strict=True))
        axis.set(xlim=(left, None), ylim=(bottom, None))
        axis.plot(*base, "k+", markersize=12, label="base")
        axis.set(xlabel=f"{x_label}, validation prompts", ylabel=y_label)
        axis.set(title=f"{name}: gained against kept; faint: settings that another one beats")
        if (count := len(spec["on"][name])) > SERIES:
            axis.text(1.02, 0.02, f"{SERIES} of {count}", transform=axis.transAxes, fontsize=8)
        axis.legend(**BESIDE)


def _rates(file: Path, name: str, tried: dict[str, list[dict]], spec: dict) -> None:
    """What settings are chosen by, against the learning rate.

    At customary hyper-parameters, and at each rate's best.
    """
    with drawn(file, (9.6, 4), panels=2) as axes:
        for method, runs in tried.items():
            usual = with_setting(runs, customary(spec, method))
            for axis, some in zip(axes, (usual, runs), strict=True):
                top = best_by_rate(some)
                axis.plot(list(top), list(top.values()), markersize=4, **_look(spec, method))
        axes[0].set(title=f"{name}: customary hyper-parameters")
        axes[1].set(title=f"{name}: the best hyper-parameters at each rate")
        for axis in axes:
            axis.set(xscale="log", xlabel="learning rate")
        axes[0].set_ylabel("objective on validation prompts")
        axes[1].legend(**BESIDE)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m minibnf.lab.figures DIR    draws feedback.svg and weights.svg")
    for name, draw in {"feedback": feedback_curves, "weights": weight_map}.items():
        show(draw(Path(sys.argv[1]) / f"{name}.svg"))
