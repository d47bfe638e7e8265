"""The trainer, one file: align a checkpoint on preference data.

    python -m minibnf.train --model weights/tiny --data pairs.jsonl --loss bnf --out runs/bnf
    python -m minibnf.train --model DIR --data train.jsonl --eval-data test.jsonl --loss dpo --loss-args beta=0.5 --out OUT
    python -m minibnf.train --config runs/bnf/config.json --seed 1 --out runs/bnf-seed1     # an earlier run, changed
    python -m minibnf.train --resume --out OUT                                              # go on after an interruption

OUT then holds model/ (Hugging Face layout), metrics.jsonl (one object a step, TRL's names), config.json, the reference's
log-probabilities (computed once), checkpoints/ (the newest one) and figures/.

The loss of a step is the mean over its --batch-size examples, however they are split into micro-batches of at most
--max-tokens. A run is a function of its arguments: the order of the data depends on --seed and the epoch alone, so a run
that was killed and resumed ends on a CPU with bitwise the same weights as one that was not.
"""

import argparse
import json
import math
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minibnf.data import Batch, Example, digest, mismatched, order_of_epoch, pack, read_examples
from minibnf.files.config import announce_ignored
from minibnf.files.disk import inside, read_json, replacing, write_json
from minibnf.files.rows import Notes
from minibnf.files.tokenizer import load_tokenizer
from minibnf.losses import LOSSES, Loss
from minibnf.machine import DTYPES, memory_advice, resolve_device_and_dtype
from minibnf.model import Transformer, fresh, load, save
from minibnf.run import (
    delete_run,
    holds_run,
    keep_metrics,
    load_training,
    model_card,
    refuse_foreign,
    refuse_strangers,
    save_training,
    training_curves,
)
from minibnf.step import fingerprint, kl_estimate, metrics, reference, run_batches

# ---------------------------------------------------------------------------------------------------------- arguments


# steps launched before an earlier one's numbers are read, so that a GPU never waits for that
AHEAD = {"cpu": 0, "cuda": 1}
# The default learning rates are for this hidden size; Adam's steps must shrink as layers widen.
WIDTH = 576
RATES = {"bnf": 4e-5, "rbnf": 4e-5, "nll": 4e-5, "unlikelihood": 1e-5}


def default_rate(loss: str) -> float:
    return RATES.get(loss, 2e-5)


def parse(argv: list[str] | None) -> argparse.Namespace:
    rates = ", ".join(f"{loss.name} {default_rate(loss.name):g}" for loss in LOSSES.values())
    known = {
        loss.name: "".join(f" {k}={v}" for k, v in loss.defaults.items() if k != "kl")
        for loss in LOSSES.values()
    }
    hypers = "; ".join(name + values for name, values in known.items() if values)
    p = argparse.ArgumentParser(
        "minibnf train", description="Align a checkpoint on preference data.", allow_abbrev=False
    )
    a = p.add_argument_group("what to train").add_argument
    a(
        "--model",
        metavar="DIR",
        help="checkpoint in Hugging Face layout: the start, and the reference",
    )
    a(
        "--from-scratch",
        action="store_true",
        help="random weights; DIR needs only config.json and a tokenizer",
    )
    a("--data", metavar="FILE", help="preference rows: JSON Lines, a JSON array or Parquet")
    a(
        "--eval-data",
        metavar="FILE",
        help="held-out rows, evaluated before the first step, after the last and between",
    )
    a(
        "--eval-every",
        type=int,
        default=0,
        metavar="N",
        help="also evaluate every N steps (0: only at both ends)",
    )
    a("--out", metavar="DIR", help="folder of the run")
    a(
        "--overlong",
        choices=["error", "truncate", "skip"],
        default="error",
        help="rows longer than the model's context",
    )
    a = p.add_argument_group("the loss").add_argument
    a("--loss", choices=list(LOSSES), default="bnf", help="default: bnf")
    a(
        "--loss-args",
        nargs="*",
        default=[],
        metavar="NAME=X",
        help=f"hyper-parameters of the loss, by default {hypers}",
    )
    a = p.add_argument_group("how long and how fast").add_argument
    a("--epochs", type=int, metavar="N", help="passes over the data (default: 1)")
    a(
        "--max-steps",
        type=int,
        metavar="N",
        help="stop after N steps instead, repeating the data if need be",
    )
    a(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="examples (pairs, unpaired responses) a step; default 32",
    )
    a("--lr", type=float, help=f"peak learning rate; default {WIDTH}/hidden_size times the loss's own, which was found "
      f"by trying on SmolLM2-135M (hidden_size {WIDTH}) and the small world: {rates}")  # fmt: skip
    a(
        "--warmup",
        type=float,
        default=0.1,
        metavar="X",
        help="share of the steps over which it rises; default 0.1",
    )
    a(
        "--decay",
        type=float,
        default=0.9,
        metavar="X",
        help="share of the steps over which it falls to 0; default 0.9",
    )
    a(
        "--optimizer",
        choices=["adamw", "muon"],
        default="adamw",
        help="muon: for matrices, with adamw for the rest",
    )
    a("--weight-decay", type=float, default=0.0, metavar="X",
      help="decoupled, of the layers' matrices (not of norms, biases and embeddings); default 0")  # fmt: skip
    a("--grad-clip", type=float, default=1.0, metavar="X", help="largest gradient norm; default 1")
    a(
        "--seed",
        type=int,
        default=0,
        help="of the order of the data (and of fresh weights); default 0",
    )
    a = p.add_argument_group("the machine").add_argument
    a("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA when present")
    a("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="to compute in; weights stay float32. auto: "
      "bfloat16 where the device has matrix units for it and the model over 20 M parameters")  # fmt: skip
    a("--max-tokens", type=int, metavar="N", help="tokens a micro-batch: bounds memory, changes no result; default 2048 "
      "on a CPU, 16384 on CUDA, and at least the longest example")  # fmt: skip
    a("--gradient-checkpointing", action="store_true", help="keep each layer's input alone for the backward pass and run the "
      "layer again: less memory, a third more work, the same result")  # fmt: skip
    a(
        "--save-every",
        type=int,
        default=200,
        metavar="N",
        help="steps between checkpoints; default 200",
    )
    a(
        "--save-dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of OUT/model; default float32",
    )
    a = p.add_argument_group("a folder that holds a run").add_argument
    a("--resume", action="store_true", help="go on from its newest checkpoint")
    a("--overwrite", action="store_true", help="delete what that run wrote and start anew")
    a(
        "--config",
        metavar="FILE",
        help="take arguments from the config.json of an earlier run; flags override it",
    )

    args = p.parse_args(argv)
    config = args.config
    if args.resume and args.out and not config and (Path(args.out) / "config.json").is_file():
        config = Path(args.out) / "config.json"
    if config:
        earlier = read_json(Path(config))
        earlier = earlier.get("arguments") if isinstance(earlier, dict) else None
        if not isinstance(earlier, dict) or set(earlier) - set(vars(args)):
            raise ValueError(f"{config}: not the config.json that a run of this version wrote")
        for one, other in (
            ("epochs", "max_steps"),
            ("max_steps", "epochs"),
        ):  # a flag overrides its alternative too
            if getattr(args, one) is not None:
                earlier[other] = None
        p.set_defaults(**earlier)
        args = p.parse_args(argv)
    if args.resume and args.out and not config:
        if not (args.model and args.data):
            raise ValueError(f"{args.out} holds no run to go on with")
        print(f"{args.out} holds no run to go on with: starting one")
    for name in ("model", "data", "out"):
        if getattr(args, name) is None:
            p.error(f"--{name} is required")
    if args.resume and args.overwrite:
        p.error("--resume and --overwrite exclude each other")
    if args.epochs is not None and args.max_steps is not None:
        p.error("--epochs and --max-steps exclude each other")
    for name in (
        "epochs",
        "max_steps",
        "batch_size",
        "lr",
        "max_tokens",
        "save_every",
        "grad_clip",
    ):
        if (x := getattr(args, name)) is not None and not 0 < x < math.inf:
            p.error(f"--{name.replace('_', '-')} must be a number above 0, not {x}")
    if not (
        0 <= args.warmup <= 1
        and 0 <= args.decay <= 1
        and args.weight_decay >= 0
        and args.eval_every >= 0
    ):
        p.error(
            "--warmup and --decay must lie in 0..1, --weight-decay and --eval-every be 0 or more"
        )
    if args.eval_every and not args.eval_data:
        p.error("--eval-every needs --eval-data")
    return args


def loss_hyper(loss: Loss, texts: list[str]) -> dict:
    """["beta=0.5", "length=own"] -> the loss's hyper-parameters (kto's kl as 0 for now: every step computes it)."""
    given = {"kl": 0.0} if "kl" in loss.defaults else {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name == "kl":
            raise ValueError(
                f"--loss-args {text}: write NAME=VALUE, e.g. beta=0.1"
                + " (kl is computed)" * (name == "kl")
            )
        if name in given:
            raise ValueError(f"--loss-args {text}: {name} is given twice")
        try:
            given[name] = float(value)
        except ValueError:
            given[name] = value
    return loss.hyper(given)


# --------------------------------------------------------------------------------------------------------------- steps


def optimizers(model: Transformer, args, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW; with muon, Muon for the matrices of the layers (its step scaled to AdamW's size) and
    AdamW for the rest. Only the matrices of the layers decay: norms, biases and embeddings have a
    size that means something.
    """
    matrices, rest = [], []
    for name, p in model.named_parameters():
        is_matrix = p.dim() == 2 and name.startswith("model.layers.")
        (matrices if is_matrix else rest).append(p)
    decay = {"params": matrices, "lr": lr, "weight_decay": args.weight_decay}
    groups = [{"params": rest, "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        groups.append(decay)
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    if args.optimizer == "adamw":
        return [adamw]
    return [adamw, torch.optim.Muon([decay], adjust_lr_fn="match_rms_adamw")]


def learning_rate(step: int, total: int, lr: float, args) -> float:
    """At step 0..total-1: rises linearly over the warm-up, stays, falls linearly to 0 over the decay."""
    rise = (step + 1) / max(1.0, args.warmup * total)
    fall = (total - step) / max(1.0, args.decay * total)
    return lr * min(1.0, rise, fall)


# ----------------------------------------------------------------------------------------------------------- the run


@dataclass
class Run:
    """What was resolved from the arguments and the files they name; nothing has been written yet."""

    args: argparse.Namespace
    out: Path
    loss: Loss
    hyper: dict
    tokenizer: object
    model: Transformer
    device: torch.device
    dtype: torch.dtype
    max_tokens: int
    sets: dict[
        str, list[Example]
    ]  # "train", where asked for "eval"; for kto also what is mismatched, "train-kl", "eval-kl"
    steps_per_epoch: int
    steps: int
    facts: dict  # what config.json and the first lines printed say of all this


RESUME_NEEDS = (  # what decides a run's numbers and so may not change in mid-run
    "loss loss_args model_sha256 data_sha256 steps batch_size lr warmup decay optimizer weight_decay grad_clip seed dtype"
).split()


def setup(args: argparse.Namespace) -> Run | None:
    """Check every input. None if OUT holds this run finished; ValueError or OSError for what the user must mend."""
    out, loss = Path(args.out), LOSSES[args.loss]
    hyper = loss_hyper(loss, args.loss_args)
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
    tokenizer = load_tokenizer(args.model)
    earlier = read_json(out / "config.json") if args.resume and begun else {}
    if "now" in earlier.get("facts", {}):  # a template may have put the first run's date into rows
        tokenizer.now = datetime.fromisoformat(earlier["facts"]["now"])
    model = (
        fresh(args.model, args.seed) if args.from_scratch else load(args.model, dtype=torch.float32)
    )
    announce_ignored(args.model, model.raw)
    model.recompute = args.gradient_checkpointing
    parameters = sum(p.numel() for p in model.parameters())
    device, dtype = resolve_device_and_dtype(args.device, args.dtype, parameters)
    sets, changed, context = {}, "", model.config.max_position_embeddings
    notes = Notes()
    for split, file in (("train", args.data), ("eval", args.eval_data)):
        if file is None:
            continue
        sets[split], counts = read_examples(file, tokenizer, context, args.overlong, notes)
        changed += "".join(f", {n} {split} rows {what}" for what, n in counts.items())
        lone = [e.place for e in sets[split] if e.count > len(e.pairs)]
        if loss.needs_pairs and lone:
            shown = ", ".join(lone[:10]) + f" and {len(lone) - 10} more" * (len(lone) > 10)
            raise ValueError(
                f"{file}: loss '{loss.name}' needs pairs, and these rows are none: {shown}; --loss bnf needs none"
            )
        if "kl" in hyper:
            sets[f"{split}-kl"], equals = mismatched(sets[split], context, file)
            if equals:
                changed += (
                    f", {equals} {split} rows for which other prompts have only equal responses"
                )
    examples, lr = sets["train"], args.lr or default_rate(loss.name) * WIDTH / model.config.hidden_size
    longest = max(e.tokens for part in sets.values() for e in part)
    max_tokens = args.max_tokens or max(2048 if device.type == "cpu" else 16384, longest)
    if longest > max_tokens:
        raise ValueError(
            f"--max-tokens {max_tokens} is less than the {longest} tokens of the longest example"
        )
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    pairs = sum(len(e.pairs) for e in examples)
    facts = {
        "device": str(device), "dtype": str(dtype).removeprefix("torch."), "parameters": parameters, "lr": lr,
        "loss_args": hyper, "pairs": pairs, "unpaired": sum(e.count for e in examples) - pairs,
        "model_sha256": fingerprint(model),
        "data_sha256": {name: digest(e) for name, e in sets.items()},
        "tokens_per_epoch": sum(e.tokens for e in examples), "changed": changed.removeprefix(", "),
        "notes": notes.lines(),
        "batch": min(args.batch_size, len(examples)), "now": tokenizer.now.isoformat(),
        "steps": args.max_steps or (args.epochs or 1) * steps_per_epoch, "max_tokens": max_tokens,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    if args.resume and begun:
        before, now = earlier["arguments"] | earlier["facts"], vars(args) | facts
        for key in RESUME_NEEDS:
            if before[key] != now[key]:
                raise ValueError(
                    f"{out}: cannot resume, {key} was {before[key]} and is {now[key]} now"
                )
        if (out / "model").exists():
            return None
    return Run(args, out, loss, hyper, tokenizer, model.to(device), device, dtype, max_tokens, sets,
               steps_per_epoch, facts["steps"], facts)  # fmt: skip


def first_packs(run: Run, name: str) -> Iterator[list[Batch]]:
    """A set as training first meets it: step by step of the first epoch, or all held-out rows at once."""
    rows, size = len(run.sets[name]), run.args.batch_size
    if name.startswith("eval"):
        yield pack(run.sets[name], list(range(rows)), run.max_tokens)
        return
    order = order_of_epoch(rows, run.args.seed, 0)
    for at in range(0, rows, size):
        yield pack(run.sets[name], order[at : at + size], run.max_tokens)


def announce(run: Run) -> None:
    f, args = run.facts, run.args
    hyper = "".join(f" {k}={v}" for k, v in run.hyper.items() if k != "kl")
    print(
        f"model    {args.model}: {f['parameters'] / 1e6:.1f} M parameters"
        + (", fresh" if args.from_scratch else "")
    )
    print(
        f"data     {args.data}: {f['pairs']} pairs, {f['unpaired']} unpaired, {f['tokens_per_epoch']:,} tokens an epoch"
    )
    if f["changed"]:
        print(f"         {f['changed']}")
    notes = [run.tokenizer.closing_warning] * bool(run.tokenizer.closing_warning)
    for note in [*notes, *f["notes"]]:
        print(f"         {note}")
    print(f"loss     {run.loss.name}{hyper}, lr {f['lr']:.3g}, {args.optimizer}")
    print(
        f"machine  {run.device}, {f['dtype']}, {f['threads']} threads, {run.max_tokens} tokens a micro-batch at most"
    )
    print(
        f"steps    {run.steps} of {f['batch']} examples: {run.steps / run.steps_per_epoch:.3g} epochs",
        flush=True,
    )


def train(run: Run) -> None:
    """Run to the end. FloatingPointError at a number that is not finite; KeyboardInterrupt when interrupted, and saved."""
    args, out, model, loss, hyper, sets = (
        run.args,
        run.out,
        run.model,
        run.loss,
        run.hyper,
        run.sets,
    )
    on_gpu, beta = run.device.type == "cuda", hyper.get("beta", 1.0)
    if args.overwrite and holds_run(out):
        delete_run(out)
    out.mkdir(parents=True, exist_ok=True)
    arguments = {k: v for k, v in vars(args).items() if k not in ("resume", "overwrite", "config")}
    write_json(out / "config.json", {"arguments": arguments, "facts": run.facts})
    announce(run)
    refs: dict = dict.fromkeys(sets)
    if loss.needs_ref:
        for name, examples in sets.items():
            file = out / f"reference-{name}.safetensors"
            f = run.facts
            packing = f"{args.seed} {args.batch_size} {run.max_tokens}"
            key = f"{f['model_sha256']} {f['data_sha256'][name]} {run.dtype} {packing}"
            refs[name] = reference(model, examples, first_packs(run, name), file, key, loss, run.dtype)
    optims = optimizers(model, args, run.facts["lr"])
    step, tokens = load_training(out, model, optims) if args.resume else (0, 0)
    keep_metrics(out / "metrics.jsonl", step)
    if step:
        print(f"resumed  after step {step}", flush=True)

    def log(row: dict):
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    held_out = {name: next(first_packs(run, name)) for name in sets if name.startswith("eval")}

    def forward(
        batches: list[Batch], others: list[Batch], split: str, backward: bool
    ) -> tuple[Tensor, Tensor]:
        """run_batches, for kto with the reference point that its mismatched batches give."""
        now = hyper
        if others:
            now = hyper | {
                "kl": kl_estimate(model, refs[f"{split}-kl"], others, loss, run.dtype, run.device)
            }
        return run_batches(
            model, batches, loss, now, refs[split], run.dtype, run.device, backward=backward
        )

    def evaluate():
        batches = held_out["eval"]
        value, sums = forward(batches, held_out.get("eval-kl", []), "eval", backward=False)
        found = {"loss": value.item()} | metrics(batches, sums.cpu(), beta)
        log({"step": step} | {f"eval_{k}": v for k, v in found.items()})

    def mark():
        """Now; on CUDA, when the device will have come so far."""
        return (
            torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
            if on_gpu
            else time.perf_counter()
        )

    launched: list[tuple] = []  # steps whose numbers have not been read

    def settle(ahead: int = 0) -> None:
        """Read and log the numbers of the steps launched, but for the newest `ahead`."""
        while len(launched) > ahead:
            row, batches, numbers, began, ended = launched.pop(0)
            if on_gpu:
                ended.synchronize()
            seconds = began.elapsed_time(ended) / 1e3 if on_gpu else ended - began
            value, norm = numbers[:2].tolist()
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise FloatingPointError(
                    not_finite(run, row["step"], batches, f"loss {value}, gradient norm {norm}")
                )
            counts = {
                "examples": sum(b.examples for b in batches),
                "tokens": sum(b.tokens.numel() for b in batches),
            }
            rates = {f"{what}_per_s": n / seconds for what, n in counts.items()}
            sums = numbers[2:].view(-1, sum(len(b.order) for b in batches))
            log(row | {"loss": value, "grad_norm": norm} | metrics(batches, sums, beta) | rates)
            bar.set_postfix(
                {"loss": f"{value:.4f}", "tokens/s": f"{rates['tokens_per_s']:.0f}"}, refresh=False
            )
            bar.update()

    interrupted: list[int] = []

    def on_signal(number, _):
        if interrupted:  # asked twice: at once
            raise KeyboardInterrupt
        interrupted.append(number)

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=run.steps, initial=step, desc=loss.name, unit="step", disable=None)
    epoch, order = -1, []
    try:
        if args.eval_data and step == 0:
            evaluate()
        stop = bool(interrupted)
        while step < run.steps and not stop:
            began = mark()
            if epoch != step // run.steps_per_epoch:
                epoch = step // run.steps_per_epoch
                order = order_of_epoch(len(sets["train"]), args.seed, epoch)
            at = step % run.steps_per_epoch * args.batch_size
            rows = order[at : at + args.batch_size]
            batches = pack(sets["train"], rows, run.max_tokens)
            others = pack(sets["train-kl"], rows, run.max_tokens) if "train-kl" in sets else []
            value, sums = forward(batches, others, "train", backward=True)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            rate = learning_rate(step, run.steps, run.facts["lr"], args)
            for optim in optims:
                for group in optim.param_groups:
                    group["lr"] = rate
                optim.step()
                optim.zero_grad(set_to_none=True)
            step, tokens = step + 1, tokens + sum(b.tokens.numel() for b in batches)
            row = {
                "step": step,
                "epoch": step / run.steps_per_epoch,
                "learning_rate": rate,
                "num_tokens": tokens,
            }
            numbers = torch.cat([torch.stack([value, norm]), sums.flatten()]).to(
                "cpu", non_blocking=True
            )
            launched.append((row, batches, numbers, began, mark()))
            settle(AHEAD[run.device.type])
            stop = bool(interrupted)
            if args.eval_data and (
                step == run.steps or (args.eval_every and step % args.eval_every == 0)
            ):
                settle()
                evaluate()
            if step % args.save_every == 0 or step == run.steps or stop:
                settle()
                if not all(p.isfinite().all() for p in model.parameters()):
                    raise FloatingPointError(
                        not_finite(run, step, batches, "the weights after it are not finite")
                    )
                save_training(out, step, tokens, model, optims)
        if step < run.steps:
            bar.close()
            print(f"interrupted after step {step} of {run.steps}" + ", and saved" * bool(step))
            raise KeyboardInterrupt
    finally:
        bar.close()
        for s, handler in before.items():
            signal.signal(s, handler)
    finish(run)


def not_finite(run: Run, step: int, batches: list[Batch], what: str) -> str:
    lines, unit = (
        ", ".join(map(str, sorted(line for b in batches for line in b.lines))),
        run.sets["train"][0].unit,
    )
    return f"""stopped at step {step}: {what}; nothing of it was saved.
Its batch: {unit}s {lines} of {run.args.data}.
Look at those rows, or start anew (--overwrite) with a lower --lr. What went before: {run.out / "metrics.jsonl"}"""


def finish(run: Run) -> None:
    """Write OUT/model and the figure, and say where everything lies."""
    args, out = run.args, run.out
    rows = [
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    held_out = [row for row in rows if "eval_loss" in row]
    table = {
        k: (held_out[0][k], held_out[-1][k])
        for k in (held_out[0] if held_out else ())
        if k != "step"
    }
    shown = table or {
        f"train {k}": (rows[0][k], rows[-1][k])
        for k in rows[0]
        if k in rows[-1] and (k == "loss" or "/" in k)
    }
    with replacing(out / "model") as temporary:
        save(run.model, temporary, DTYPES[args.save_dtype])
        run.tokenizer.save(temporary)
        (temporary / "README.md").write_text(
            model_card(args, run.facts, run.hyper, table), encoding="utf-8"
        )
    try:
        figure = out / "figures" / "training.png"
        training_curves(rows, figure, f"{args.loss} on {Path(args.data).name}")
    except ImportError:
        figure = "none: pip install 'minibnf[plots]' draws one"
    for name, (first, last) in shown.items():
        print(f"{name:26} {first:10.4f} -> {last:.4f}")
    print(f"model    {out / 'model'}\nmetrics  {out / 'metrics.jsonl'}\nfigure   {figure}")


def less_memory(args: argparse.Namespace, max_tokens: int | None) -> str:
    """What to do where memory does not suffice."""
    advice = f"lower --max-tokens (now {max_tokens or 'its default'})"
    return advice + " or pass --gradient-checkpointing" * (not args.gradient_checkpointing)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        with memory_advice(less_memory(args, args.max_tokens)):
            run = setup(args)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted before anything was written", file=sys.stderr)
        return 130
    if run is None:
        print(f"{args.out} holds this run, finished: its model lies in {Path(args.out) / 'model'}")
        return 0
    try:
        with memory_advice(less_memory(args, run.max_tokens)):
            train(run)
        return 0
    except (OSError, FloatingPointError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"To go on:\n  {shlex.quote(sys.executable)} -m minibnf.train --resume --out {shlex.quote(args.out)}"
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
