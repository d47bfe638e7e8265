"""A run, and its folder: config.json, checkpoints and resuming, metrics, model card, figure."""

import argparse
import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minibnf.arguments import config_of
from minibnf.data import Batch, Example
from minibnf.files.disk import delete, inside, replacing, seal, write_json, write_text, writing
from minibnf.files.safetensors import check_finite, read_sealed, write_tensors
from minibnf.files.terminal import counted, show
from minibnf.files.tokenizer import Tokenizer
from minibnf.kernels import LARGE
from minibnf.losses import Loss
from minibnf.model import Transformer


@dataclass
class Run:
    """What was resolved from the arguments and the files they name."""

    args: argparse.Namespace
    loss: Loss
    tokenizer: Tokenizer
    model: Transformer
    dtype: torch.dtype
    sets: dict[str, list[Example]]  # "train", "eval"; for kto mismatched too: "train-kl", "eval-kl"
    facts: argparse.Namespace  # what config.json and the first lines printed say of all this

    @property
    def out(self) -> Path:
        return Path(self.args.out)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.sets["train"]) / self.args.batch_size)


def summary(run: Run, model: str, data: str) -> list[str]:
    """What was resolved, line by line; model and data: what to call them."""
    f, args = run.facts, run.args
    hyper = " ".join(f"{k}={v}" for k, v in f.loss_args.items() if k != "kl")
    epochs = counted(f"{f.steps / run.steps_per_epoch:.3g}", "epoch")
    rows = f"{counted(f.pairs, 'pair')}, {f.unpaired} unpaired"
    large = any(p.dim() == 2 and p.numel() >= LARGE for p in run.model.parameters())
    by = f" multiplied by {f.products}" if large and f.dtype == "float32" else ""
    how = f", compiled: {f.compiled}" if f.device != "cpu" else by
    machine = f"{f.device}, {f.dtype}{how}, {counted(f.threads, 'thread')}"
    notes = filter(None, [run.tokenizer.closing_warning, *f.notes])
    return [
        f"model    {model}: {f.parameters / 1e6:.1f} M parameters{', fresh' * args.from_scratch}",
        f"data     {data}: {rows}, {f.tokens_per_epoch:,} tokens per epoch",
        *(f"         {note}" for note in notes),
        f"loss     {run.loss.name} {hyper}, lr {f.lr:.3g}, {args.optimizer}",
        f"machine  {machine}, at most {f.max_tokens} tokens per micro-batch",
        f"steps    {f.steps} of {counted(f.batch, 'example')}: {epochs}",
    ]


# ------------------------------------------------------------------------------------- its folder

# what a run writes into its folder, and --overwrite deletes
WRITES = (
    "config.json", "model", "checkpoints/step-" + "[0-9]" * 7, "metrics.jsonl",
    "reference-*.safetensors", "figures/training.png",
)  # fmt: skip


def written(out: Path) -> list[Path]:
    """What of WRITES lies in a folder."""
    return [path for name in WRITES for path in sorted(out.glob(name))]


def check_folder(args: argparse.Namespace) -> dict | None:
    """The config.json of the run to resume, None for a new one.

    Raises ValueError where the run would write over another's, or over what no run wrote.
    """
    out = Path(args.out)
    inputs = {"--model": args.model, "--data": args.data, "--eval-data": args.eval_data}
    for flag, path in inputs.items():
        if path is not None and inside(Path(path), out):
            raise ValueError(f"{flag} {path} lies in --out {out}; name another folder for the run")
    earlier, held = config_of(out / "config.json", sealed=args.resume), written(out)
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
    given = {k: v for k, v in vars(run.args).items() if k not in ("resume", "overwrite", "config")}
    config = {"arguments": given, "facts": vars(run.facts)}
    write_json(run.out / "config.json", config | {"sha256": seal(config)})


def checkpoints(out: Path) -> list[Path]:
    """OUT/checkpoints/step-N, the oldest first."""
    return [path for path in written(out) if path.parent.name == "checkpoints"]


def save_training(out: Path, step: int, tokens: int, model: Transformer, optims: list) -> None:
    """OUT/checkpoints/step-N: weights, optimiser states and counts, complete or absent.

    Once it is there, it and the newest one before it are kept; later ones were damaged. Raises
    FloatingPointError for a number that is not finite.
    """
    directory = out / "checkpoints" / f"step-{step:07d}"
    with replacing(directory) as temporary:
        parts = {"model": {name: p.detach().cpu() for name, p in model.named_parameters()}}
        parts["state"] = {"step": torch.tensor(step), "num_tokens": torch.tensor(tokens)}
        for i, optim in enumerate(optims):
            states = optim.state_dict()["state"].items()
            parts[f"optimizer-{i}"] = {f"{k}.{n}": x for k, of in states for n, x in of.items()}
        for part, tensors in parts.items():
            for name, x in tensors.items():
                check_finite(f"stopped at step {step}, unsaved; lower --lr: {part}", name, x)
            write_tensors(temporary / f"{part}.safetensors", tensors, seal=directory.name)
    kept = [path for path in checkpoints(out) if path <= directory][-2:]
    for old in {*checkpoints(out), *directory.parent.glob(".step-*.tmp")} - {*kept}:
        delete(old)


def load_training(out: Path, model: Transformer, optims: list) -> tuple[int, int]:
    """Put the newest checkpoint into model and optimisers, or the one before if it is damaged.

    The damaged one is named, and deleted when the next one is saved.
    Returns (steps done, tokens read), (0, 0) if there is none.
    Raises OSError that names the last one where all are damaged or cannot be read.
    """
    for left, directory in reversed(list(enumerate(checkpoints(out)))):
        try:
            return _load_checkpoint(directory, model, optims)
        except (ValueError, KeyError, OSError) as error:
            said = f"{directory}: damaged or unreadable ({error})"
            if not left:
                raise OSError(f"{said}; --overwrite starts anew") from None
            show(f"{said}; the one before it is used")
    return 0, 0


def _load_checkpoint(directory: Path, model: Transformer, optims: list) -> tuple[int, int]:
    """Put a checkpoint into model and optimisers."""
    names = ["state", "model", *(f"optimizer-{i}" for i in range(len(optims)))]
    files = [directory / f"{name}.safetensors" for name in names]
    state, weights, *moments = [read_sealed(file, directory.name) for file in files]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if {name: x.shape for name, x in weights.items()} != shapes:
        raise ValueError("model.safetensors holds other tensors than the model has")
    model.load_state_dict(weights)
    for optim, tensors in zip(optims, moments, strict=True):
        states = {}
        for key, x in tensors.items():
            k, name = key.split(".")
            states.setdefault(int(k), {})[name] = x
        groups = optim.state_dict()["param_groups"]
        optim.load_state_dict({"state": states, "param_groups": groups})
    return int(state["step"]), int(state["num_tokens"])


# ------------------------------------------------------------------------------------ its metrics

# devices on which a step's numbers are read when the next one is launched, so as not to wait
LATE = {"cuda"}


def logged_to(file: Path, step: int) -> list[str]:
    """The lines of a metrics.jsonl up to a step. Where some are damaged or gone, a line says so."""
    kept, steps = [], set()
    for line in file.read_bytes().splitlines() if file.exists() else []:
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if row["step"] <= step:
                kept.append(line.decode() + "\n")
                steps |= {row["step"]} if "loss" in row else set()
    if (gone := step - len(steps)) > 0:
        said = f"the rows of {gone} of {counted(step, 'step')} are damaged or gone"
        show(f"{file}: {said}; the run goes on without them")
    return kept


class Log:
    """metrics.jsonl and the progress bar.

    A step's numbers are read when the device has made them.
    """

    def __init__(self, run: Run, step: int):
        """step: the last one of the checkpoint. What a killed run logged past it is dropped."""
        self.run, self.file = run, run.out / "metrics.jsonl"
        self.launched: tuple = ()  # the step whose numbers have not been read
        self.read_at = 0.0  # when numbers were last read
        write_text(self.file, "".join(logged_to(self.file, step)) if step else "")
        name, total = run.loss.name, run.facts.steps
        self.bar = tqdm(total=total, initial=step, desc=name, unit="step", disable=None)
        self.close = self.bar.close

    def write(self, row: dict) -> None:
        with writing(self.file), open(self.file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    def check(self, step: int, found: dict[str, float], where: str) -> None:
        """Raise FloatingPointError where a number of a step is not finite; where: its rows."""
        if broken := ", ".join(f"{k} {x}" for k, x in found.items() if not math.isfinite(x)):
            raise FloatingPointError(
                f"stopped at step {step}: {broken}; nothing of it was saved.\nIts rows: {where}.\n"
                "Look at those rows, or start anew (--overwrite) with a lower --lr. What went "
                f"before: {self.file}"
            )

    def step(self, began: float, row: dict, batches: list[Batch], found: dict[str, Tensor]) -> None:
        """A step was launched. found: its loss, its gradient's norm and its metrics."""
        numbers, made = torch.stack(list(found.values())).to("cpu", non_blocking=True), None
        device = self.run.model.unembed.device.type
        if device == "cuda":
            made = torch.cuda.current_stream().record_event()
        self.settle()  # the step before
        self.launched = (began, row, batches, list(found), numbers, made)
        if device not in LATE:
            self.settle()

    def settle(self) -> None:
        """Read and write the numbers of the step launched last, if they are not read yet."""
        if not self.launched:
            return
        (began, row, batches, names, numbers, made), self.launched = self.launched, ()
        if made:
            made.synchronize()
        began, self.read_at = max(began, self.read_at), time.perf_counter()
        found = dict(zip(names, numbers.tolist(), strict=True))
        examples = self.run.sets["train"]
        lines = sorted({examples[i].line for b in batches for i, _ in b.order})
        where = f"{examples[0].unit}s {', '.join(map(str, lines))} of {self.run.args.data}"
        self.check(row["step"], found, where)
        counts = {
            "examples_per_s": sum(b.examples for b in batches),
            "tokens_per_s": sum(b.tokens.numel() for b in batches),
        }
        rates = {name: count / (self.read_at - began) for name, count in counts.items()}
        self.write(row | found | rates)
        shown = {"loss": f"{found['loss']:.4f}", "tokens/s": f"{rates['tokens_per_s']:.0f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()


# ------------------------------------------------------------------------------ what it ends with


def model_card(run: Run, results: list[str]) -> str:
    """README.md of a trained model: what it was made of and how, and what became of the metrics."""
    path, loss = Path(run.args.model).resolve(), run.loss.name
    # in a hub's cache a model lies in models--org--name/snapshots/*
    on_hub = [part for part in path.parts if part.startswith("models--")]
    base = on_hub[-1].removeprefix("models--").replace("--", "/", 1) if on_hub else path.name
    lines = "\n".join([*summary(run, base, Path(run.args.data).name), *results])
    return f"""---
base_model: {base}
tags: [minibnf, {loss}, preference-alignment]
---
# {base}, trained with {loss}

Made by minibnf (Bidirectional Negative Feedback: Mao et al., ICLR 2025, arXiv 2410.04834), seed
{run.args.seed}.

```text
{lines}
```
"""


GOOD, BAD, PLAIN = "#1b7f79", "#c8553d", "#4a5568"  # preferred, dispreferred, everything else
CURVES = {
    "loss": PLAIN, "logps/chosen": GOOD, "logps/rejected": BAD,
    "rewards/chosen": GOOD, "rewards/rejected": BAD,
}  # fmt: skip


def training_curves(rows: list[dict], file: Path, title: str) -> None:
    """Loss, log-likelihoods and rewards against the step: a line, and dots for held-out rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    known = " ".join(["loss", *(metric for row in rows for metric in row)])
    panels = [panel for panel in ("loss", "logps", "rewards") if panel in known]
    size = 4.2 * len(panels), 3.2
    figure, axes = plt.subplot_mosaic([panels], figsize=size, layout="constrained")
    for name, colour in CURVES.items():
        for metric, style in {name: "-", f"eval_{name}": "o"}.items():
            if having := [row for row in rows if metric in row]:
                x, y = [row["step"] for row in having], [row[metric] for row in having]
                axes[name.partition("/")[0]].plot(x, y, style, color=colour, label=metric)
    for panel, axis in axes.items():
        axis.set(title=f"{panel} (nats)", xlabel="step")
        if axis.lines:
            axis.legend()
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
