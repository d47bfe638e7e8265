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
from minibnf.lab.frontiers import points
from minibnf.lab.plan import FAR, customary, select, with_setting
from minibnf.losses import LOSSES
from minibnf.run import BAD, GOOD, PLAIN

STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "grid.alpha": 0.25,
    "axes.spines.top": False, "axes.spines.right": False,
    "svg.hashsalt": "minibnf", "axes.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip


@contextmanager
def drawn(
    file: Path, size: tuple[float, float], panels: int = 1, grid: bool = True, sharey: bool = True
) -> Iterator:
    """What to draw on, one axis or an array of them; the file is written when the block ends."""
    with plt.rc_context(STYLE | {"axes.grid": grid}):
        figure, axes = plt.subplots(1, panels, figsize=size, sharey=sharey, layout="constrained")
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
    "bnf": (GOOD, "o"), "bnf batch": ("#7fc8bd", "o"), "rbnf": ("#2f6fab", "s"),
    "nll": ("#888888", "x"), "unlikelihood": (BAD, "x"), "dpo": ("#a05aa8", "^"),
    "dpo+nll": ("#d48fd6", "v"), "rdpo": ("#6b3d78", "<"), "ipo": ("#b5651d", "D"),
    "slic": ("#8c8c2b", "P"), "kto": (PLAIN, ">"), "orpo": ("#d4a017", "d"),
    "simpo": ("#c58b1b", "*"), "cpo": ("#e08283", "p"), "topr": ("#7e57c2", "1"),
    "tnpo": ("#7cb342", "2"), "power": ("#222222", "3"), "apo_zero": ("#00a5cf", "h"),
    "lndpo": ("#8d6e63", "H"), "bdpo": ("#ff8a65", "4"),
}  # fmt: skip
SERIES = 8  # of one figure at most: the first of the spec
BESIDE = {"frameon": False, "fontsize": 8, "loc": "center left", "bbox_to_anchor": (1, 0.5)}


def comparison(results: dict, folder: Path) -> list[Path]:
    """Of each set what was gained against what was lost, or what was kept at which rate.

    A set of which every run broke off has none.
    """
    files = []
    for name, given in results["spec"]["sets"].items():
        runs = [r for r in select(results["runs"], set=name) if r["result"]]
        methods = [m for m in results["spec"]["on"].get(name, []) if select(runs, method=m)]
        if methods:
            by_rate = "test_lr" in given
            files.append(folder / f"{name}-{'rates' if by_rate else 'frontier'}.svg")
            draw = _rates if by_rate else _frontier if given.get("kind") == "qa" else _settings
            draw(files[-1], name, results, methods[:SERIES])
    return files


def _look(spec: dict, method: str) -> dict:
    """How a method's line is drawn. One that LINES does not name gets a colour by its place."""
    others = [name for name in spec["methods"] if name not in LINES]
    colour, marker = LINES.get(method) or (f"C{others.index(method)}", "o")
    width = 2.4 if method == "bnf" else 1.2
    return {"color": colour, "marker": marker, "linewidth": width, "label": method}


def _frontier(file: Path, name: str, results: dict, methods: list[str]) -> None:
    """Every method's frontier as verdicts.py judges it, with its standard errors."""
    with drawn(file, (7.6, 4.6)) as axis:
        for method in methods:
            found = points(results, name, method, usual=False)
            x, y = ([0.0, *(p[k][0] for p in found)] for k in (1, 2))
            errors = {
                f"{axis_name}err": [0.0, *(p[k][1:].std() for p in found)]
                for axis_name, k in (("x", 1), ("y", 2))
            }
            axis.plot(x, y, markersize=5, **_look(results["spec"], method))
            axis.errorbar(
                x, y, **errors, fmt="none", color=LINES.get(method, ("C0",))[0], alpha=0.3
            )
        axis.plot(0, 0, "k+", markersize=12, label="base")
        axis.axvline(FAR, color="#999999", linewidth=0.8, linestyle=":")
        axis.set(xlabel="reasoning accuracy lost, test prompts", ylabel="QA win rate gained")
        axis.set(title=f"{name}: what a method gains for what it loses (judged up to {FAR:g} lost)")
        axis.legend(**BESIDE)


def _rates(file: Path, name: str, results: dict, methods: list[str]) -> None:
    """Reasoning and win rate against the learning rate, at customary hyper-parameters."""
    panels = {"accuracy": "reasoning accuracy", "win_rate": "QA win rate against the base"}
    with drawn(file, (9.6, 4), panels=2, sharey=False) as axes:
        for axis, (what, label) in zip(axes, panels.items(), strict=True):
            for method in methods:
                runs = select(results["runs"], set=name, method=method, split="validation")
                usual = with_setting(runs, customary(results["spec"], method))
                found = sorted(
                    (r["setting"]["lr"], r["result"][what][0]) for r in usual if r["result"]
                )
                axis.plot(*zip(*found, strict=True), markersize=4, **_look(results["spec"], method))
            base = select(results["runs"], set=name, split="validation")[0]["base"][what][0]
            axis.axhline(base, color="#999999", linewidth=0.8, linestyle=":", label="base")
            axis.set(xscale="log", xlabel="learning rate", title=f"{name}: {label}")
        axes[1].legend(**BESIDE)


def _settings(file: Path, name: str, results: dict, methods: list[str]) -> None:
    """On files: pairs told right against what is kept, one point per setting."""
    run = next(r for r in select(results["runs"], set=name) if r["result"])
    kept = ("shift/chosen", "shift of chosen responses (nats)")
    if "solutions" in run["result"]:
        kept = ("solutions", "log-likelihood of solutions (nats per token)")
    with drawn(file, (7.6, 4.6)) as axis:
        for method in methods:
            runs = select(results["runs"], set=name, method=method, split="validation")
            found = sorted(
                (r["result"][kept[0]][0], r["result"]["preference"][0]) for r in runs if r["result"]
            )
            look = _look(results["spec"], method) | {"linestyle": ""}
            axis.plot(*zip(*found, strict=True), markersize=6, **look)
        axis.plot(run["base"][kept[0]][0], 0.5, "k+", markersize=12, label="base")
        axis.set(xlabel=f"{kept[1]}, validation rows", ylabel="share of held-out pairs told right")
        axis.set(title=f"{name}: gained against kept, one point per setting")
        axis.legend(**BESIDE)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m minibnf.lab.figures DIR    draws feedback.svg and weights.svg")
    for name, draw in {"feedback": feedback_curves, "weights": weight_map}.items():
        show(draw(Path(sys.argv[1]) / f"{name}.svg"))
