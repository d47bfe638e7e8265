"""A run, and its folder: config.json, checkpoints and resuming, metrics, model card, figure."""

import argparse
import itertools
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from minibnf.arguments import config_of
from minibnf.data import Batch, Example
from minibnf.files.disk import delete, inside, optional, replacing, write_json, write_text
from minibnf.files.safetensors import write_tensors
from minibnf.files.terminal import counted
from minibnf.files.tokenizer import Tokenizer
from minibnf.losses import Loss
from minibnf.model import Transformer
from minibnf.step import metrics


@dataclass
class Run:
    """What was resolved from the arguments and the files they name."""

    args: argparse.Namespace
    out: Path
    loss: Loss
    hyper: dict
    tokenizer: Tokenizer
    model: Transformer
    device: torch.device
    dtype: torch.dtype
    max_tokens: int
    sets: dict[str, list[Example]]  # "train", "eval"; for kto mismatched too: "train-kl", "eval-kl"
    steps_per_epoch: int
    steps: int
    facts: dict  # what config.json and the first lines printed say of all this

    @property
    def hyper_text(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self.hyper.items() if k != "kl")


# ------------------------------------------------------------------------------------- its folder

# what a run writes into its folder, and --overwrite deletes
WRITES = (
    "config.json", "model", "checkpoints/step-" + "[0-9]" * 7, "metrics.jsonl",
    "reference-*.safetensors", "figures/training.png",
)  # fmt: skip


def written(out: Path) -> list[Path]:
    """What of WRITES lies in a folder."""
    return [path for name in WRITES for path in sorted(out.glob(name))]


def check_folder(args: argparse.Namespace, out: Path) -> dict | None:
    """The config.json of the run to resume, None for a new one.

    Raises ValueError where the run would write over another's, or over what no run wrote.
    """
    inputs = {"--model": args.model, "--data": args.data, "--eval-data": args.eval_data}
    for flag, path in inputs.items():
        if path is not None and inside(Path(path), out):
            raise ValueError(f"{flag} {path} lies in --out {out}; name another folder for the run")
    earlier, held = config_of(out / "config.json"), written(out)
    if held and earlier is None:
        raise ValueError(
            f"--out {out} holds {held[0].relative_to(out)}, and no config.json of a run of "
            "minibnf; name another folder"
        )
    if earlier and not args.resume and not args.overwrite:
        raise ValueError(
            f"{out} holds a run already; --resume goes on with it, --overwrite deletes it"
        )
    return earlier if args.resume else None


def begin_folder(run: Run) -> None:
    """Delete an earlier run where told to, and write config.json.

    An earlier config.json stays until this run's takes its place, so that the folder of a run that
    is interrupted anywhere holds a run.
    """
    if run.args.overwrite:
        for path in written(run.out):
            if path.name != "config.json":
                delete(path)
    run.out.mkdir(parents=True, exist_ok=True)
    passing = ("resume", "overwrite", "config")
    arguments = {k: v for k, v in vars(run.args).items() if k not in passing}
    write_json(run.out / "config.json", {"arguments": arguments, "facts": run.facts})


def checkpoints(out: Path) -> list[Path]:
    """OUT/checkpoints/step-N, the oldest first."""
    return [path for path in written(out) if path.parent.name == "checkpoints"]


def save_training(out: Path, step: int, tokens: int, model: Transformer, optims: list) -> None:
    """OUT/checkpoints/step-N: weights, optimiser states and counts, complete or absent.

    Older ones go once it is there.
    """
    directory = out / "checkpoints" / f"step-{step:07d}"
    with replacing(directory) as temporary:
        parameters = {name: p.detach().cpu() for name, p in model.named_parameters()}
        write_tensors(temporary / "model.safetensors", parameters)
        for i, optim in enumerate(optims):
            states = optim.state_dict()["state"].items()
            tensors = {f"{k}.{name}": x for k, state in states for name, x in state.items()}
            write_tensors(temporary / f"optimizer-{i}.safetensors", tensors)
        write_json(temporary / "state.json", {"step": step, "num_tokens": tokens})
    for old in [*checkpoints(out), *directory.parent.glob(".step-*.tmp")]:
        if old != directory:
            shutil.rmtree(old)


@torch.no_grad()
def load_training(out: Path, model: Transformer, optims: list) -> tuple[int, int]:
    """Put the newest checkpoint into model and optimisers.

    Returns (steps done, tokens read), (0, 0) if there is none.
    Raises OSError that names a checkpoint that is damaged, or cannot be read.
    """
    if not checkpoints(out):
        return 0, 0
    directory = checkpoints(out)[-1]
    try:
        with safe_open(directory / "model.safetensors", framework="pt") as stored:
            for name, p in model.named_parameters():
                p.copy_(_like(p, stored, name))
        for i, optim in enumerate(optims):
            params = [p for group in optim.param_groups for p in group["params"]]
            states = {k: {} for k in range(len(params))}
            with safe_open(directory / f"optimizer-{i}.safetensors", framework="pt") as stored:
                for key in stored.keys():
                    k, name = key.split(".")
                    states[int(k)][name] = _like(params[int(k)], stored, key)
            groups = optim.state_dict()["param_groups"]
            optim.load_state_dict({"state": states, "param_groups": groups})
        state = optional(directory / "state.json")
        return state["step"], state["num_tokens"]
    except (SafetensorError, ValueError, KeyError, FileNotFoundError) as error:
        raise OSError(
            f"{directory}: a damaged checkpoint ({error}); --overwrite starts anew"
        ) from None
    except OSError as error:  # no damage: a file that may not be read, say
        raise OSError(f"{directory}: the checkpoint cannot be read: {error}") from None


def _like(p: Tensor, stored, name: str) -> Tensor:
    """A stored tensor that belongs to a parameter: it has its shape, or is a single number."""
    x = stored.get_tensor(name)
    if x.dim() and x.shape != p.shape:
        raise ValueError(f"tensor '{name}' is {tuple(x.shape)}, the model's {tuple(p.shape)}")
    return x


# ------------------------------------------------------------------------------------ its metrics

# steps launched before an earlier one's numbers are read, so that a GPU never waits for that
AHEAD = {"cpu": 0, "cuda": 1}


class Log:
    """metrics.jsonl and the progress bar.

    A step's numbers are read when the device has made them.
    """

    def __init__(self, run: Run, step: int):
        """step: the last one of the checkpoint. What a killed run logged past it is dropped."""
        self.run, self.file = run, run.out / "metrics.jsonl"
        self.launched: list[tuple] = []  # steps whose numbers have not been read
        self.read_at = 0.0  # when numbers were last read
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True) if step else []
        whole = [line for line in lines if line.endswith("\n")]  # a kill may tear the last one
        write_text(self.file, "".join(line for line in whole if json.loads(line)["step"] <= step))
        name, total = run.loss.name, run.steps
        self.bar = tqdm(total=total, initial=step, desc=name, unit="step", disable=None)
        self.close = self.bar.close

    def write(self, row: dict) -> None:
        with open(self.file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    def step(self, began: float, row: dict, batches: list[Batch], loss, norm, sums) -> None:
        """A step was launched. loss and sums: as run_batches gives them; norm: the gradient's."""
        numbers = torch.cat([torch.stack([loss, norm]), sums.flatten()])
        numbers, made = numbers.to("cpu", non_blocking=True), None
        if self.run.device.type == "cuda":
            made = torch.cuda.current_stream().record_event()
        self.launched.append((began, row, batches, numbers, made))
        self.settle(AHEAD[self.run.device.type])

    def settle(self, ahead: int = 0) -> None:
        """Read and write the numbers of the steps launched, but for the newest `ahead`."""
        while len(self.launched) > ahead:
            began, row, batches, numbers, made = self.launched.pop(0)
            if made:
                made.synchronize()
            began, self.read_at = max(began, self.read_at), time.perf_counter()
            seconds = self.read_at - began
            loss, norm = numbers[:2].tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"loss {loss}, gradient norm {norm}"
                raise FloatingPointError(not_finite(self.run, row["step"], batches, what))
            sums = numbers[2:].view(-1, sum(len(b.order) for b in batches))
            found = metrics(batches, sums, self.run.hyper.get("beta", 1.0))
            rates = {
                "examples_per_s": sum(b.examples for b in batches) / seconds,
                "tokens_per_s": sum(b.tokens.numel() for b in batches) / seconds,
            }
            self.write(row | {"loss": loss, "grad_norm": norm} | found | rates)
            shown = {"loss": f"{loss:.4f}", "tokens/s": f"{rates['tokens_per_s']:.0f}"}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()


def not_finite(run: Run, step: int, batches: list[Batch], what: str) -> str:
    examples = run.sets["train"]
    lines = sorted({examples[i].line for b in batches for i, _ in b.order})
    return f"""stopped at step {step}: {what}; nothing of it was saved.
Its batch: {examples[0].unit}s {", ".join(map(str, lines))} of {run.args.data}.
Look at those rows, or start anew (--overwrite) with a lower --lr. What went before: \
{run.out / "metrics.jsonl"}"""


# ------------------------------------------------------------------------------ what it ends with


def model_card(run: Run, title: str, table: dict) -> str:
    """README.md of a trained model. table: {metric: (before, after)}; title: of what."""
    f, args, base = run.facts, run.args, name_of(run.args.model)
    rows = "".join(f"| {k} | {old:.4f} | {new:.4f} |\n" for k, (old, new) in table.items())
    data = f"{counted(f['pairs'], 'pair')} and {counted(f['unpaired'], 'unpaired response')}"
    steps = f"{counted(f['steps'], 'step')} of {counted(f['batch'], 'example')}"
    return f"""---
base_model: {base}
tags: [minibnf, {args.loss}, preference-alignment]
---
# {base}, trained with {args.loss}

Loss: {args.loss} {run.hyper_text}. Data: {Path(args.data).name}, {data}. {steps}, seed {args.seed},
{args.optimizer}, peak learning rate {f["lr"]:.3g}, computed in {f["dtype"]}.
Made by minibnf (Bidirectional Negative Feedback: Mao et al., ICLR 2025, arXiv 2410.04834).

| {title} | before | after |
|---|---|---|
{rows}"""


def name_of(directory) -> str:
    """A model's name: org/name in a hub's cache (models--org--name/snapshots/*), or its folder."""
    *_, repository, snapshots, _ = (".", ".", *Path(directory).resolve().parts)
    if snapshots == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return Path(directory).absolute().name


GOOD, BAD, PLAIN = "#1b7f79", "#c8553d", "#4a5568"  # preferred, dispreferred, everything else
PANELS = {
    "loss (nats)": {"loss": PLAIN},
    "log-likelihood (nats per response)": {"logps/chosen": GOOD, "logps/rejected": BAD},
    "reward: shift against the reference, × β if any (nats)": {
        "rewards/chosen": GOOD, "rewards/rejected": BAD,
    },
}  # fmt: skip


def training_curves(rows: list[dict], file: Path, title: str) -> None:
    """Loss, log-likelihoods and rewards of chosen and rejected against the step.

    Faint dots are steps, and the line their running mean; full dots are held-out rows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    logged = {name for row in rows for name in row}
    panels = {label: lines for label, lines in PANELS.items() if logged.intersection(lines)}
    size = (4.2 * len(panels), 3.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for name, colour in lines.items():
            x, y = points(rows, name)
            axis.plot(x, y, ".", color=colour, alpha=0.3, markersize=3)
            axis.plot(x, smooth(y), color=colour, label=name)
            axis.plot(*points(rows, f"eval_{name}"), "o", color=colour)
        axis.set_title(label, fontsize="medium")
        axis.set_xlabel("step")
        axis.legend()
    figure.suptitle(f"{title} (large dots: held-out rows)")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def points(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    """The steps at which a metric was logged, and its values."""
    having = [row for row in rows if name in row]
    return [row["step"] for row in having], [row[name] for row in having]


def smooth(y) -> list[float]:
    """A running mean over a tenth of the points, centred."""
    half, sums = max(1, len(y) // 20), [0, *itertools.accumulate(y)]
    bounds = [(max(0, i - half), min(len(y), i + half + 1)) for i in range(len(y))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in bounds]
