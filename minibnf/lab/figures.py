"""Every figure, from metrics and comparison JSON alone. Needs matplotlib (extra `plots`); draws without a display."""

import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from minibnf.feedback import feedback
from minibnf.run import BAD, GOOD, PLAIN, smooth

CURVES = {  # loss: (colour, line style, hyper-parameters)
    "bnf": (GOOD, "-", {}),
    "rbnf": ("#2f6fab", (0, (5, 1.5)), {}),
    "unlikelihood": (BAD, "-", {}),
    "nll": (BAD, "-", {}),
    "dpo": ("#a05aa8", "-", {"beta": 0.1}),
    "simpo": ("#c58b1b", "--", {"beta": 2.0}),
    "kto": (PLAIN, "-.", {"beta": 0.1}),
}


def feedback_curves(file: Path, r: float = 0.4) -> Path:
    """The tent of BNF beside the one-directional curves of the others, for a rejected and a chosen token of reference r."""
    p = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]
    panels = {
        "rejected": ["unlikelihood", "dpo", "simpo", "kto", "bnf"],
        "chosen": ["nll", "dpo", "simpo", "kto", "rbnf", "bnf"],
    }
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "minibnf",
             "axes.facecolor": "white", "savefig.facecolor": "white"}  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
        for axis, (kind, names) in zip(axes, panels.items(), strict=True):
            for name in names:
                colour, line, hyper = CURVES[name]
                y = feedback(name, p, r, kind == "chosen", **hyper)
                at_r = feedback(
                    name, torch.tensor([r], dtype=p.dtype), r, kind == "chosen", **hyper
                )
                label = name + "".join(f" β={v:g}" for v in hyper.values())
                axis.plot(
                    p,
                    y / at_r * (1 - r),
                    linestyle=line,
                    color=colour,
                    label=label,
                    linewidth=2.4 if name == "bnf" else 1.3,
                )
            axis.axvline(r, color="#999999", linewidth=0.8, linestyle=":")
            axis.annotate(
                "reference r",
                (r, 0.03),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                color="#666666",
            )
            axis.set_xlim(0, 1)
            axis.set_xlabel("probability p of the token under the policy")
            axis.set_title(
                f"a {kind} token (each curve scaled to 1 - r at p = r)", fontsize=10, loc="left"
            )
            axis.legend(frameon=False, fontsize=8, loc="upper right")
        axes[0].set_ylabel("push on its logit, |∂L/∂z|")
        axes[0].set_ylim(0, 1.35)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
        plt.close(figure)
    return file


# ------------------------------------------------------------------------------------------ figures of a comparison


LINES = {  # method: (colour, marker)
    "bnf": (GOOD, "o"), "rbnf": ("#2f6fab", "s"), "nll": ("#888888", "x"), "unlikelihood": (BAD, "x"), "dpo": ("#a05aa8", "^"),
    "dpo+nll": ("#d48fd6", "v"), "rdpo": ("#6b3d78", "<"), "ipo": ("#b5651d", "D"), "slic": ("#8c8c2b", "P"),
    "kto": (PLAIN, ">"), "orpo": ("#d4a017", "d"), "simpo": ("#c58b1b", "*"), "cpo": ("#e08283", "p"),
}  # fmt: skip
OTHER = ("#bbbbbb", ".")
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "minibnf", "axes.grid": True,
         "grid.alpha": 0.25, "axes.facecolor": "white", "savefig.facecolor": "white"}  # fmt: skip


def comparison(results: dict, folder: Path) -> list[Path]:
    """Every figure of a results.json, from it alone: for each set the frontier, the sensitivity to the learning rate, the
    likelihoods against the step and the weights measured on real tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with plt.rc_context(STYLE):
        for name in results["spec"]["on"]:
            for draw in (_frontier, _rates, _likelihoods, _weights):
                figure = draw(results, name)
                if figure is None:
                    continue
                files.append(folder / f"{name}-{draw.__name__[1:]}.svg")
                figure.savefig(files[-1], metadata={"Date": None})
                plt.close(figure)
    return files


def _swept(results: dict, name: str, method: str) -> list[dict]:
    return [
        r
        for r in results["runs"]
        if (r["set"], r["method"], r["split"]) == (name, method, "validation") and r["result"]
    ]


def _lines(results: dict, name: str) -> list[tuple[str, list[dict], tuple[str, str], float]]:
    """(method, its validation runs, colour and marker, width) of every method with a run that did not break off."""
    methods = ((m, _swept(results, name, m)) for m in results["spec"]["on"][name])
    return [
        (m, runs, LINES.get(m, OTHER), 2.4 if m == "bnf" else 1.2) for m, runs in methods if runs
    ]


def _axes_of(run: dict) -> tuple[str, str, str, str]:
    """What a set is about: the measure that is lost, its label, the measure that is gained, its label."""
    if "win_rate" in run["result"]:
        return "accuracy", "reasoning accuracy", "win_rate", "QA win rate against the base"
    kept = ("shift/chosen", "shift of chosen responses (nats)")
    if "solutions" in run["result"]:
        kept = ("solutions", "log-likelihood of solutions (nats a token)")
    return *kept, "preference", "share of held-out pairs told right"


def _frontier(results: dict, name: str):
    """One curve a method: of its settings those that no other of its settings beats in both respects."""
    lines = _lines(results, name)
    if not lines:
        return None
    figure, axis = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    first = lines[0][1][0]
    x, x_label, y, y_label = _axes_of(first)
    curves: list = []
    for method, runs, (colour, marker), width in lines:
        points = sorted(((r["result"][x][0], r["result"][y][0]) for r in runs), reverse=True)
        axis.plot(
            *zip(*points, strict=True), marker, color=colour, alpha=0.25, markersize=4, linestyle=""
        )
        best = [p for i, p in enumerate(points) if all(p[1] > q[1] for q in points[:i])]
        axis.plot(
            *zip(*best, strict=True),
            marker + "-",
            color=colour,
            markersize=5,
            linewidth=width,
            label=method,
        )
        curves += best
    left, bottom = (
        min(p[k] for p in [*curves, (first["base"][x][0], first["base"][y][0])]) for k in (0, 1)
    )
    axis.set(
        xlim=(left - 0.02, None), ylim=(bottom - 0.02, None)
    )  # settings worse than all these are out of sight
    axis.plot(first["base"][x][0], first["base"][y][0], "k+", markersize=12, label="base")
    axis.set(xlabel=f"{x_label}, validation prompts", ylabel=y_label)
    axis.set_title(
        f"{name}: gained against kept; faint: settings that another one beats",
        fontsize=10,
        loc="left",
    )
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _rates(results: dict, name: str):
    """What settings are chosen by, against the learning rate: at customary hyper-parameters, and at each rate's best."""
    from minibnf.lab.compare import objective

    lines = _lines(results, name)
    if not lines:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4), sharey=True, layout="constrained")
    for method, runs, (colour, marker), width in lines:
        customary = results["spec"]["methods"][method].get("customary", {})
        usual = [r for r in runs if customary.items() <= r["setting"].items()]
        for axis, some in zip(axes, (usual, runs), strict=True):
            rates = sorted({r["setting"]["lr"] for r in some})
            top = [max(objective(r) for r in some if r["setting"]["lr"] == lr) for lr in rates]
            axis.plot(
                rates, top, marker + "-", color=colour, markersize=4, linewidth=width, label=method
            )
    for axis, title in zip(
        axes, ("customary hyper-parameters", "the best hyper-parameters at each rate"), strict=True
    ):
        axis.set(xscale="log", xlabel="learning rate")
        axis.set_title(f"{name}: {title}", fontsize=10, loc="left")
    axes[0].set_ylabel("objective on validation prompts")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _likelihoods(results: dict, name: str):
    """Log-likelihood of chosen and rejected in training against the step, each method at its best setting."""
    from minibnf.lab.verdicts import tests

    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained")
    for method in results["spec"]["on"][name]:
        colour, _ = LINES.get(method, OTHER)
        for trace in [r["trace"] for r in tests(results, name, method, "best") if r.get("trace")][
            :1
        ]:
            for axis, side in zip(axes, ("chosen", "rejected"), strict=True):
                if f"logps/{side}" in trace:
                    y = [a - trace[f"logps/{side}"][0] for a in trace[f"logps/{side}"]]
                    axis.plot(
                        trace["step"],
                        smooth(y),
                        color=colour,
                        linewidth=2.4 if method == "bnf" else 1.2,
                        label=method,
                    )
    for axis, side in zip(axes, ("chosen", "rejected"), strict=True):
        axis.set(xlabel="step", ylabel="nats a response, from the first step")
        axis.set_title(
            f"{name}: log-likelihood of {side} responses, best settings", fontsize=10, loc="left"
        )
    if axes[0].lines:
        axes[0].legend(frameon=False, fontsize=7, ncols=2)
    return figure


def _weights(results: dict, name: str):
    """The weight of real tokens by autograd, against the shift of their log odds, and BNF's curve w = min(1, o(p)/o(r))."""
    from minibnf.lab.verdicts import tests

    methods = [
        m
        for m in ("bnf", "rbnf", "dpo", "kto", "simpo", "unlikelihood")
        if m in results["spec"]["on"][name]
    ]
    if not methods:
        return None
    figure, axes = plt.subplots(
        1,
        len(methods),
        figsize=(2.5 * len(methods), 3),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    theory = torch.linspace(-8, 6, 200)
    for axis, method in zip(axes[0], methods, strict=True):
        for found in [
            r["feedback"] for r in tests(results, name, method, "best") if r.get("feedback")
        ][:1]:
            for side, colour in (("chosen", GOOD), ("rejected", BAD)):
                if found[side]:
                    axis.plot(
                        *zip(*found[side], strict=True), ".", color=colour, markersize=3, label=side
                    )
        axis.plot(theory, theory.exp().clamp(max=1), "k-", linewidth=0.8, label="min(1, o(p)/o(r))")
        axis.set(xlim=(-8, 6), ylim=(-0.05, 2.05), xlabel="log o(p) - log o(r)")
        axis.set_title(f"{name}: {method}", fontsize=9, loc="left")
    axes[0][0].set_ylabel("weight of a token, 1 at the base")
    axes[0][0].legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m minibnf.lab.figures FILE.svg    draws the feedback curves")
    print(feedback_curves(Path(sys.argv[1])))
