"""Every figure, from metrics and comparison JSON alone. Needs matplotlib (extra `plots`); draws without a display."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GOOD, BAD, PLAIN = "#1b7f79", "#c8553d", "#4a5568"


def training_curves(rows: list[dict], file: Path, title: str) -> Path:
    """Loss, log-likelihoods of chosen and rejected, and the rewards' margin, against the step; held-out points as dots."""
    steps = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval_loss" in row]
    panels = [
        ("loss (nats)", {"loss": PLAIN}),
        ("log-likelihood (nats a response)", {"logps/chosen": GOOD, "logps/rejected": BAD}),
        ("reward: shift against the reference (nats)", {"rewards/chosen": GOOD, "rewards/rejected": BAD}),
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
                axis.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
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


def _smooth(y) -> list[float]:
    """A running mean over a tenth of the points, centred."""
    half = max(1, len(y) // 20)
    return [sum(y[max(0, i - half) : i + half + 1]) / len(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]
