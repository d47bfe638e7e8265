"""Every figure, from metrics and comparison JSON alone. Needs matplotlib (extra `plots`); draws without a display."""

import itertools
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from minibnf.feedback import feedback

GOOD, BAD, PLAIN = "#1b7f79", "#c8553d", "#4a5568"


def training_curves(rows: list[dict], file: Path, title: str) -> Path:
    """Loss, log-likelihoods of chosen and rejected, and the rewards' margin, against the step; held-out points as dots."""
    steps = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval_loss" in row]
    panels = [
        ("loss (nats)", {"loss": PLAIN}),
        ("log-likelihood (nats a response)", {"logps/chosen": GOOD, "logps/rejected": BAD}),
        ("reward: shift against the reference, × β if any (nats)", {"rewards/chosen": GOOD, "rewards/rejected": BAD}),
    ]
    panels = [(label, lines) for label, lines in panels if any(name in row for row in steps for name in lines)]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.3}):  # fmt: skip
        figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False, layout="constrained")
        for axis, (label, lines) in zip(axes[0], panels, strict=True):
            for name, colour in lines.items():
                points = [(row["step"], row[name]) for row in steps if name in row]
                if not points:
                    continue
                x, y = zip(*points, strict=True)
                axis.plot(x, y, color=colour, alpha=0.3, linewidth=0.8, marker="." if len(x) < 3 else None)
                axis.plot(x, _smooth(y), color=colour, linewidth=1.6, label=name.split("/")[-1])
                dots = [(row["step"], row[f"eval_{name}"]) for row in held_out if f"eval_{name}" in row]
                if dots:
                    axis.plot(
                        *zip(*dots, strict=True), "o", color=colour, markersize=4, label=f"{name.split('/')[-1]}, held out"
                    )
            axis.set_xlabel("step")
            axis.set_title(label, fontsize=9, loc="left")
            axis.legend(frameon=False, fontsize=8)
        figure.suptitle(title, fontsize=10)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)
        plt.close(figure)
    return file


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
                at_r = feedback(name, torch.tensor([r], dtype=p.dtype), r, kind == "chosen", **hyper)
                label = name + "".join(f" β={v:g}" for v in hyper.values())
                axis.plot(
                    p, y / at_r * (1 - r), linestyle=line, color=colour, label=label, linewidth=2.4 if name == "bnf" else 1.3
                )
            axis.axvline(r, color="#999999", linewidth=0.8, linestyle=":")
            axis.annotate("reference r", (r, 0.03), xytext=(4, 0), textcoords="offset points", fontsize=8, color="#666666")
            axis.set_xlim(0, 1)
            axis.set_xlabel("probability p of the token under the policy")
            axis.set_title(f"a {kind} token (each curve scaled to 1 - r at p = r)", fontsize=10, loc="left")
            axis.legend(frameon=False, fontsize=8, loc="upper right")
        axes[0].set_ylabel("push on its logit, |∂L/∂z|")
        axes[0].set_ylim(0, 1.35)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
        plt.close(figure)
    return file


def _smooth(y) -> list[float]:
    """A running mean over a tenth of the points, centred."""
    half, sums = max(1, len(y) // 20), [0, *itertools.accumulate(y)]
    bounds = [(max(0, i - half), min(len(y), i + half + 1)) for i in range(len(y))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in bounds]


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m minibnf.plots FILE.svg    draws the feedback curves")
    print(feedback_curves(Path(sys.argv[1])))
