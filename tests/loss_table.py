"""The README's table of losses, printed from the code: python -m tests.loss_table (make losses)."""

from minibnf.arguments import default_rate
from minibnf.losses import LOSSES

WHAT = {
    "bnf": "bidirectional negative feedback",
    "rbnf": "BNF that retrieves a lost preferred token, this project's own",
    "nll": "supervised fine-tuning",
    "unlikelihood": "no feedback: the control that collapses",
    "dpo": "direct preference optimisation; lam > 0 adds nll",
    "rdpo": "DPO, length-regularised",
    "ipo": "squared distance to a target margin",
    "slic": "SLiC-HF, a hinge",
    "kto": "Kahneman-Tversky",
    "orpo": "nll, and a log odds ratio",
    "simpo": "DPO on mean log-probabilities, without a reference",
    "cpo": "DPO with a uniform reference, and nll",
    "ratio": "BNF with p/r in place of the odds ratio",
    "topr": "tapered off-policy REINFORCE, token by token",
    "tnpo": "negative preference optimisation, token by token",
    "power": "p^alpha: DFT on preferred tokens, WGA on rejected ones",
    "apo_zero": "anchored: each response by itself",
    "lndpo": "length-normalised DPO (Tülu 3)",
    "bdpo": "DPO with a bounded rejected term",
}
# Autograd and finite differences check every loss. Besides: whose code gives the same loss and
# gradients (make parity).
PEERS = {
    "bnf": "its published form", "dpo": "TRL, Liger", "ipo": "TRL", "kto": "TRL, Liger",
    "orpo": "TRL, Liger", "simpo": "TRL, Liger", "cpo": "TRL, Liger", "apo_zero": "TRL",
    "lndpo": "TRL", "power": "TRL's dft",
}  # fmt: skip
HEAD = [
    "`--loss`", "what it is", "reference", "pairs", "`--loss-args` and defaults",
    "default `--lr`, at width 576", "checked against",
]  # fmt: skip


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table() -> str:
    lines = [row(HEAD), "|---" * len(HEAD) + "|"]
    for name, loss in LOSSES.items():
        hyper = " ".join(
            f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in loss.defaults.items()
            if k != "kl"
        )
        needs = ["yes" if x else "no" for x in (loss.needs_ref, loss.needs_pairs)]
        judges = f"autograd, {PEERS[name]}" if name in PEERS else "autograd"
        lines.append(
            row([name, WHAT.get(name, ""), *needs, hyper, f"{default_rate(name):g}", judges])
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
