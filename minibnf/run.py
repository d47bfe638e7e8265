"""A run's folder: config.json, checkpoints and resuming, metrics, the model's card, the figure."""

import argparse
import itertools
import json
import math
import re
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from minibnf.data import Batch
from minibnf.files.disk import inside, read_json, replacing, write_json, write_text
from minibnf.files.safetensors import write_tensors
from minibnf.files.tokenizer import FILES
from minibnf.model import Transformer
from minibnf.step import metrics

GOOD, BAD, PLAIN = "#1b7f79", "#c8553d", "#4a5568"  # preferred, dispreferred, everything else


def model_card(args, f: dict, hyper: dict, table: dict) -> str:
    """README.md of a trained model.

    args, f, hyper: train.py's arguments, facts and hyper-parameters; table: its evaluations,
    {name: (before, after)}.
    """
    data = f"{f['pairs']} pairs and {f['unpaired']} unpaired responses"
    how = f"peak learning rate {f['lr']:.3g}, {args.optimizer}, seed {args.seed}"
    base = name_of(args.model)
    hyper = ", ".join(f"{k} = {v}" for k, v in hyper.items() if k != "kl") or "no hyper-parameters"
    card = f"""---
base_model: {base}
tags: [minibnf, {args.loss}, preference-alignment]
---
# {base}, trained with {args.loss}

Loss: {args.loss} ({hyper}). Data: {Path(args.data).name}, {data}.
{f["steps"]} steps of {f["batch"]} examples, {how},
computed in {f["dtype"]}.
Made by minibnf (Bidirectional Negative Feedback: Mao et al., ICLR 2025, arXiv 2410.04834).
"""
    if table:
        rows = "".join(
            f"| {k} | {first:.4f} | {last:.4f} |\n" for k, (first, last) in table.items()
        )
        card += f"\n| held-out | before | after |\n|---|---|---|\n{rows}"
    return card


def name_of(directory) -> str:
    """A model's name: org/name in a hub's cache (models--org--name/snapshots/*), or its folder."""
    *_, repository, snapshots, _ = (".", ".", *Path(directory).resolve().parts)
    if snapshots == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return Path(directory).absolute().name


# --------------------------------------------------------------- the folder of a training run

RUN_NAMES = (  # what a run writes
    "config.json", "model", "checkpoints", "metrics.jsonl", "reference-*.safetensors",
    "figures/training.png",
)  # fmt: skip


def holds_run(out: Path) -> bool:
    """Does a folder hold a run, finished or not: a config.json that the trainer wrote?"""
    file = out / "config.json"
    try:
        found = read_json(file) if file.is_file() else None
    except ValueError:
        return False
    names = ("arguments", "facts")
    return isinstance(found, dict) and all(isinstance(found.get(name), dict) for name in names)


def check_folder(args: argparse.Namespace, out: Path) -> bool:
    """Whether OUT holds a run. ValueError where this one would write over what is not a run's."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    inputs = {"--model": args.model, "--data": args.data, "--eval-data": args.eval_data}
    if args.config and Path(args.config).resolve() != (out / "config.json").resolve():
        inputs["--config"] = args.config
    for flag, path in inputs.items():
        if path is not None and inside(Path(path), out):
            raise ValueError(f"{flag} {path} lies in --out {out}; name another folder for the run")
    begun = holds_run(out)
    if not begun:
        refuse_foreign(out)
    elif args.overwrite:
        refuse_strangers(out)
    elif not args.resume:
        raise ValueError(
            f"{out} holds a run already; --resume goes on with it, --overwrite deletes it"
        )
    return begun


def refuse_foreign(out: Path) -> None:
    """ValueError if a folder that holds no run has a file or folder of a name that a run writes."""
    for name in RUN_NAMES:
        for path in out.glob(name):
            raise ValueError(
                f"--out {out} holds {path.relative_to(out)}, and no config.json of a run of "
                "minibnf; name another folder"
            )


def refuse_strangers(out: Path) -> None:
    """ValueError if a folder that a run replaces as a whole holds a file that no run wrote."""
    weights = re.compile(
        r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|optimizer-\d\.safetensors"
    )
    others = {"config.json", "README.md", "state.json", "additional_chat_templates", *FILES}
    folders = [folder for folder in [out / "model", *checkpoints(out)] if folder.is_dir()]
    for path in (path for folder in folders for path in folder.iterdir()):
        if path.name not in others and not weights.fullmatch(path.name):
            raise ValueError(
                f"{path}: no run of minibnf wrote this, and --overwrite would delete it with its "
                "folder; move it elsewhere first"
            )


def delete_run(out: Path) -> None:
    """Delete what a run wrote in its folder, and the folders that this empties; all else stays.

    config.json stays until the next run's takes its place, and a folder is renamed before its
    files go: after an interruption the folder still holds a run, and nothing half deleted in it
    is taken for whole.
    """
    left = [*out.glob(".model.*.tmp"), *out.glob("checkpoints/.step-*.tmp")]
    for folder in left:  # by a run that was killed, or by an interrupted deletion
        shutil.rmtree(folder)
    whole = [out / "model", *checkpoints(out)]
    for folder in whole:
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.deleted.tmp")))
        else:
            folder.unlink(missing_ok=True)
    files = [out / "metrics.jsonl", *out.glob("reference-*.safetensors")]
    files.append(out / "figures" / "training.png")
    for file in files:
        file.unlink(missing_ok=True)
    emptied = [out / "checkpoints", out / "figures"]
    for folder in emptied:
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


def checkpoints(out: Path) -> list[Path]:
    """OUT/checkpoints/step-N, the oldest first."""
    found = [p for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def save_training(out: Path, step: int, tokens: int, model: Transformer, optims: list) -> None:
    """OUT/checkpoints/step-N: weights, optimiser states and counts, complete or absent.

    Older ones go once it is there.
    """
    directory = out / "checkpoints" / f"step-{step:07d}"
    if directory.exists():  # nothing has changed since it was made
        return
    with replacing(directory) as temporary:
        write_tensors(
            temporary / "model.safetensors",
            {n: p.detach().cpu() for n, p in model.named_parameters()},
        )
        for i, optim in enumerate(optims):
            state = {
                f"{k}.{name}": x
                for k, s in optim.state_dict()["state"].items()
                for name, x in s.items()
            }
            write_tensors(temporary / f"optimizer-{i}.safetensors", state)
        write_json(temporary / "state.json", {"step": step, "num_tokens": tokens})
    others = [*checkpoints(out), *directory.parent.glob(".step-*.tmp")]
    for old in others:
        if old != directory:
            shutil.rmtree(old)


@torch.no_grad()
def load_training(out: Path, model: Transformer, optims: list) -> tuple[int, int]:
    """Put the newest checkpoint into model and optimisers.

    Returns (steps done, tokens read), (0, 0) if there is none.
    Raises OSError that names a checkpoint that is damaged, or cannot be read.
    """
    found = checkpoints(out)
    if not found:
        return 0, 0
    try:
        return _load_training(found[-1], model, optims)
    except (SafetensorError, ValueError, KeyError, FileNotFoundError) as error:
        raise OSError(
            f"{found[-1]}: a damaged checkpoint ({error}); --overwrite starts anew"
        ) from None
    except OSError as error:  # no damage: a file that may not be read, say
        raise OSError(f"{found[-1]}: the checkpoint cannot be read: {error}") from None


def _load_training(directory: Path, model: Transformer, optims: list) -> tuple[int, int]:
    with safe_open(directory / "model.safetensors", framework="pt") as tensors:
        for name, p in model.named_parameters():
            stored = tensors.get_tensor(name)
            if stored.shape != p.shape:
                raise ValueError(
                    f"tensor '{name}' is {tuple(stored.shape)}, the model's {tuple(p.shape)}"
                )
            p.copy_(stored)
    for i, optim in enumerate(optims):
        state: dict = {}
        with safe_open(directory / f"optimizer-{i}.safetensors", framework="pt") as tensors:
            for key in tensors.keys():
                index, name = key.split(".")
                state.setdefault(int(index), {})[name] = tensors.get_tensor(key)
        params = [p for group in optim.param_groups for p in group["params"]]
        for index, p in enumerate(params):
            for name, x in state.get(index, {}).items():
                if x.dim() and x.shape != p.shape:
                    raise ValueError(
                        f"optimizer-{i}: '{index}.{name}' is {tuple(x.shape)}, not {tuple(p.shape)}"
                    )
        optim.load_state_dict({"state": state, "param_groups": optim.state_dict()["param_groups"]})
    state = read_json(directory / "state.json")
    if not isinstance(state, dict):
        raise ValueError("state.json holds no JSON object")
    return state["step"], state["num_tokens"]


def keep_metrics(file: Path, step: int) -> None:
    """Drop what an interrupted run logged past its checkpoint at `step`, all of it at 0.

    The last line may be torn.
    """
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines() if step else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    write_text(file, "".join(kept))


# steps launched before an earlier one's numbers are read, so that a GPU never waits for that
AHEAD = {"cpu": 0, "cuda": 1}


class Log:
    """metrics.jsonl and the progress bar.

    A step's numbers are read when the device has made them.
    """

    def __init__(self, run, step: int):
        self.run, self.on_gpu = run, run.device.type == "cuda"
        self.launched: list[tuple] = []  # steps whose numbers have not been read
        self.bar = tqdm(
            total=run.steps, initial=step, desc=run.loss.name, unit="step", disable=None
        )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def write(self, row: dict) -> None:
        with open(self.run.out / "metrics.jsonl", "a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    def begin(self) -> None:
        self.began = self._now()

    def end(self, row: dict, batches: list[Batch], numbers: Tensor) -> None:
        """numbers: the step's loss, its gradient's norm, and run_batches' sums, one by one."""
        numbers = numbers.to("cpu", non_blocking=True)
        self.launched.append((row, batches, numbers, self.began, self._now()))
        self.settle(AHEAD[self.run.device.type])

    def settle(self, ahead: int = 0) -> None:
        """Read and write the numbers of the steps launched, but for the newest `ahead`."""
        while len(self.launched) > ahead:
            row, batches, numbers, began, ended = self.launched.pop(0)
            if self.on_gpu:
                ended.synchronize()
            seconds = began.elapsed_time(ended) / 1e3 if self.on_gpu else ended - began
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

    def _now(self):
        """Now; on CUDA, when the device will have come so far."""
        if self.on_gpu:
            return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
        return time.perf_counter()


def not_finite(run, step: int, batches: list[Batch], what: str) -> str:
    lines = ", ".join(map(str, sorted(line for b in batches for line in b.lines)))
    return f"""stopped at step {step}: {what}; nothing of it was saved.
Its batch: {run.sets["train"][0].unit}s {lines} of {run.args.data}.
Look at those rows, or start anew (--overwrite) with a lower --lr. What went before: \
{run.out / "metrics.jsonl"}"""


# ---------------------------------------------------------------------- its figure


def training_curves(rows: list[dict], file: Path, title: str) -> Path:
    """Loss, log-likelihoods and rewards of chosen and rejected against the step.

    Held-out points are dots.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval_loss" in row]
    panels = [
        ("loss (nats)", {"loss": PLAIN}),
        ("log-likelihood (nats a response)", {"logps/chosen": GOOD, "logps/rejected": BAD}),
        (
            "reward: shift against the reference, × β if any (nats)",
            {"rewards/chosen": GOOD, "rewards/rejected": BAD},
        ),
    ]
    panels = [
        (label, lines)
        for label, lines in panels
        if any(name in row for row in steps for name in lines)
    ]
    style = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.3,
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False, layout="constrained"
        )
        for axis, (label, lines) in zip(axes[0], panels, strict=True):
            for name, colour in lines.items():
                points = [(row["step"], row[name]) for row in steps if name in row]
                if not points:
                    continue
                x, y = zip(*points, strict=True)
                axis.plot(
                    x, y, color=colour, alpha=0.3, linewidth=0.8, marker="." if len(x) < 3 else None
                )
                axis.plot(x, smooth(y), color=colour, linewidth=1.6, label=name.split("/")[-1])
                dots = [
                    (row["step"], row[f"eval_{name}"]) for row in held_out if f"eval_{name}" in row
                ]
                if dots:
                    axis.plot(
                        *zip(*dots, strict=True),
                        "o",
                        color=colour,
                        markersize=4,
                        label=f"{name.split('/')[-1]}, held out",
                    )
            axis.set_xlabel("step")
            axis.set_title(label, fontsize=9, loc="left")
            axis.legend(frameon=False, fontsize=8)
        figure.suptitle(title, fontsize=10)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)
        plt.close(figure)
    return file


def smooth(y) -> list[float]:
    """A running mean over a tenth of the points, centred."""
    half, sums = max(1, len(y) // 20), [0, *itertools.accumulate(y)]
    bounds = [(max(0, i - half), min(len(y), i + half + 1)) for i in range(len(y))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in bounds]
