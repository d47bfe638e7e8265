"""The trainer: align a checkpoint on preference data (its flags stand in arguments.py).

    python -m minibnf.train --model weights/tiny --data pairs.jsonl --loss bnf --out runs/bnf
    python -m minibnf.train --model DIR --data FILE --loss dpo --loss-args beta=0.5 --out OUT
    python -m minibnf.train --config runs/bnf/config.json --seed 1 --out runs/seed1     # changed
    python -m minibnf.train --resume --out OUT                   # go on after an interruption

OUT then holds model/ (Hugging Face layout), metrics.jsonl (one object per step, TRL's names),
config.json, the reference's log-probabilities (computed once), checkpoints/ (the newest one) and
figures/.

The loss of a step is the mean over its --batch-size examples, however they are split into
micro-batches of at most --max-tokens. A run is a function of its arguments: the order of the data
depends on --seed and the epoch alone, so a run that was killed and resumed ends on a CPU with
bitwise the same weights as one that was not.
"""

import argparse
import json
import math
import platform
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from minibnf.arguments import WIDTH, default_rate, less_memory, loss_hyper, parse
from minibnf.data import Batch, Example, digest, mismatched, order_of_epoch, pack, read_examples
from minibnf.files.config import announce_ignored
from minibnf.files.disk import read_json, replacing, write_json
from minibnf.files.rows import Notes
from minibnf.files.terminal import in_one_line
from minibnf.files.tokenizer import Tokenizer, load_tokenizer
from minibnf.losses import LOSSES, Loss
from minibnf.machine import DTYPES, memory_advice, resolve_device_and_dtype
from minibnf.model import Transformer, fresh, load, save
from minibnf.run import (
    Log,
    check_folder,
    delete_run,
    holds_run,
    keep_metrics,
    load_training,
    model_card,
    not_finite,
    save_training,
    training_curves,
)
from minibnf.step import fingerprint, kl_estimate, metrics, reference, run_batches

# ------------------------------------------------------------------------------------------- set-up


@dataclass
class Run:
    """What was resolved from the arguments and the files they name; nothing is written yet."""

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


# what decides a run's numbers and so may not change in mid-run
RESUME_NEEDS = (
    "loss loss_args model_sha256 data_sha256 steps batch_size lr warmup decay optimizer"
    " weight_decay grad_clip seed dtype"
).split()


def setup(args: argparse.Namespace) -> Run | None:
    """Check every input. None: OUT holds this run, finished.

    Raises ValueError, OSError or ImportError for what the user must mend.
    """
    out, loss = Path(args.out), LOSSES[args.loss]
    hyper = loss_hyper(loss, args.loss_args)
    begun = check_folder(args, out)
    earlier = read_json(out / "config.json") if args.resume and begun else None
    tokenizer = load_tokenizer(args.model)
    if earlier and "now" in earlier["facts"]:
        # a template may have put the first run's date into rows
        tokenizer.now = datetime.fromisoformat(earlier["facts"]["now"])
    if args.from_scratch:
        model = fresh(args.model, args.seed)
    else:
        model = load(args.model, dtype=torch.float32)
    announce_ignored(args.model, model.raw)
    model.recompute = args.gradient_checkpointing
    parameters = sum(p.numel() for p in model.parameters())
    device, dtype = resolve_device_and_dtype(args.device, args.dtype, parameters)
    context = model.config.max_position_embeddings
    sets, notes = read_sets(args, loss, tokenizer, context)
    examples = sets["train"]
    longest = max(e.tokens for some in sets.values() for e in some)
    max_tokens = args.max_tokens or max(2048 if device.type == "cpu" else 16384, longest)
    if longest > max_tokens:
        raise ValueError(
            f"--max-tokens {max_tokens} is less than the {longest} tokens of the longest example"
        )
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    pairs = sum(len(e.pairs) for e in examples)
    facts = {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": parameters,
        "lr": args.lr or default_rate(loss.name) * WIDTH / model.config.hidden_size,
        "loss_args": hyper,
        "pairs": pairs,
        "unpaired": sum(e.count for e in examples) - pairs,
        "model_sha256": fingerprint(model),
        "data_sha256": {name: digest(e) for name, e in sets.items()},
        "tokens_per_epoch": sum(e.tokens for e in examples),
        "notes": notes,
        "batch": min(args.batch_size, len(examples)),
        "now": tokenizer.now.isoformat(),
        "steps": args.max_steps or (args.epochs or 1) * steps_per_epoch,
        "max_tokens": max_tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if earlier:
        before, present = earlier["arguments"] | earlier["facts"], vars(args) | facts
        for key in RESUME_NEEDS:
            if before[key] != present[key]:
                was, is_now = before[key], present[key]
                raise ValueError(f"{out}: cannot resume, {key} was {was} and is {is_now} now")
        if (out / "model").exists():
            return None
    return Run(
        args, out, loss, hyper, tokenizer, model.to(device), device, dtype, max_tokens, sets,
        steps_per_epoch, facts["steps"], facts,
    )  # fmt: skip


def read_sets(args, loss: Loss, tokenizer: Tokenizer, context: int) -> tuple[dict, list[str]]:
    """The examples of every set, by its name, and what a person should know of them."""
    sets, changes, notes = {}, [], Notes()
    files = {"train": args.data, "eval": args.eval_data}
    for split, file in files.items():
        if file is None:
            continue
        sets[split], counts = read_examples(file, tokenizer, context, args.overlong, notes)
        changes += [f"{n} {split} rows {what}" for what, n in counts.items()]
        lone = [e.place for e in sets[split] if e.count > len(e.pairs)]
        if loss.needs_pairs and lone:
            shown = ", ".join(lone[:10]) + f" and {len(lone) - 10} more" * (len(lone) > 10)
            raise ValueError(
                f"{file}: loss '{loss.name}' needs pairs, and these rows are none: {shown}; "
                "--loss bnf needs none"
            )
        if "kl" in loss.defaults:
            sets[f"{split}-kl"], equals = mismatched(sets[split], context, file)
            if equals:
                changes.append(
                    f"{equals} {split} rows for which other prompts have only equal responses"
                )
    return sets, [*changes, *notes.lines()]


def announce(run: Run) -> None:
    """Print what was resolved."""
    f, args = run.facts, run.args
    hyper = "".join(f" {k}={v}" for k, v in run.hyper.items() if k != "kl")
    start = ", fresh" if args.from_scratch else ""
    print(f"model    {args.model}: {f['parameters'] / 1e6:.1f} M parameters{start}")
    tokens = f"{f['tokens_per_epoch']:,} tokens per epoch"
    print(f"data     {args.data}: {f['pairs']} pairs, {f['unpaired']} unpaired, {tokens}")
    for note in filter(None, [run.tokenizer.closing_warning, *f["notes"]]):
        print(f"         {note}")
    print(f"loss     {run.loss.name}{hyper}, lr {f['lr']:.3g}, {args.optimizer}")
    most = f"at most {run.max_tokens} tokens per micro-batch"
    print(f"machine  {run.device}, {f['dtype']}, {f['threads']} threads, {most}")
    epochs = f"{run.steps / run.steps_per_epoch:.3g} epochs"
    print(f"steps    {run.steps} of {f['batch']} examples: {epochs}", flush=True)


# ------------------------------------------------------------------------------------------ the run


def train(run: Run) -> None:
    """Run to the end.

    Raises FloatingPointError at a number that is not finite, KeyboardInterrupt when interrupted
    (and saved).
    """
    args, model, epoch, order = run.args, run.model, -1, []
    begin_folder(run)
    announce(run)
    refs = references(run)
    optims = optimizers(model, args, run.facts["lr"])
    step, tokens = load_training(run.out, model, optims) if args.resume else (0, 0)
    keep_metrics(run.out / "metrics.jsonl", step)
    if step:
        print(f"resumed  after step {step}", flush=True)
    held_out = {name: next(first_packs(run, name)) for name in run.sets if name.startswith("eval")}
    with interruptions() as interrupted, Log(run, step) as log:
        if args.eval_data and step == 0:
            evaluate(run, held_out, refs, log, step)
        while step < run.steps and not interrupted:
            log.begin()
            if epoch != step // run.steps_per_epoch:
                epoch = step // run.steps_per_epoch
                order = order_of_epoch(len(run.sets["train"]), args.seed, epoch)
            at = step % run.steps_per_epoch * args.batch_size
            batches = packs(run, "train", order[at : at + args.batch_size])
            loss, sums = run_step(run, batches, refs, "train", backward=True)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            rate = learning_rate(step, run.steps, run.facts["lr"], args)
            for optim in optims:
                for group in optim.param_groups:
                    group["lr"] = rate
                optim.step()
                optim.zero_grad(set_to_none=True)
            step += 1
            tokens += sum(b.tokens.numel() for b in batches["train"])
            row = {
                "step": step, "epoch": step / run.steps_per_epoch, "learning_rate": rate,
                "num_tokens": tokens,
            }  # fmt: skip
            log.end(row, batches["train"], torch.cat([torch.stack([loss, norm]), sums.flatten()]))
            at_end = step == run.steps
            if args.eval_data and (at_end or (args.eval_every and step % args.eval_every == 0)):
                log.settle()
                evaluate(run, held_out, refs, log, step)
            if at_end or step % args.save_every == 0 or interrupted:
                log.settle()
                if not all(p.isfinite().all() for p in model.parameters()):
                    what = "the weights after it are not finite"
                    raise FloatingPointError(not_finite(run, step, batches["train"], what))
                save_training(run.out, step, tokens, model, optims)
    if step < run.steps:
        print(f"interrupted after step {step} of {run.steps}" + ", and saved" * bool(step))
        raise KeyboardInterrupt
    finish(run)


def begin_folder(run: Run) -> None:
    """config.json comes first, so that what is interrupted anywhere is a run that can go on."""
    if run.args.overwrite and holds_run(run.out):
        delete_run(run.out)
    run.out.mkdir(parents=True, exist_ok=True)
    passing = ("resume", "overwrite", "config")
    arguments = {k: v for k, v in vars(run.args).items() if k not in passing}
    write_json(run.out / "config.json", {"arguments": arguments, "facts": run.facts})


def packs(run: Run, split: str, rows: list[int]) -> dict[str, list[Batch]]:
    """The micro-batches of these rows, for kto the mismatched ones too."""
    names = [name for name in (split, f"{split}-kl") if name in run.sets]
    return {name: pack(run.sets[name], rows, run.max_tokens) for name in names}


def first_packs(run: Run, name: str) -> Iterator[list[Batch]]:
    """A set as training first meets it: the first epoch's steps, or all held-out rows at once."""
    rows, size = len(run.sets[name]), run.args.batch_size
    if name.startswith("eval"):
        yield pack(run.sets[name], list(range(rows)), run.max_tokens)
        return
    order = order_of_epoch(rows, run.args.seed, 0)
    for at in range(0, rows, size):
        yield pack(run.sets[name], order[at : at + size], run.max_tokens)


def references(run: Run) -> dict:
    """{name of a set: its Reference}, None where the loss needs none."""
    found, f = dict.fromkeys(run.sets), run.facts
    for name, examples in run.sets.items() if run.loss.needs_ref else ():
        file = run.out / f"reference-{name}.safetensors"
        packing = f"{run.args.seed} {run.args.batch_size} {run.max_tokens}"
        key = f"{f['model_sha256']} {f['data_sha256'][name]} {run.dtype} {packing}"
        steps = first_packs(run, name)
        found[name] = reference(run.model, examples, steps, file, key, run.loss, run.dtype)
    return found


def run_step(run: Run, batches: dict, refs: dict, split: str, backward: bool) -> tuple:
    """run_batches; for kto with the reference point that its mismatched batches give."""
    hyper, where = run.hyper, (run.dtype, run.device)
    if f"{split}-kl" in batches:
        others, ref = batches[f"{split}-kl"], refs[f"{split}-kl"]
        hyper = hyper | {"kl": kl_estimate(run.model, ref, others, run.loss, *where)}
    return run_batches(
        run.model, batches[split], run.loss, hyper, refs[split], *where, backward=backward
    )


def evaluate(run: Run, held_out: dict, refs: dict, log: Log, step: int) -> None:
    """One row of metrics, of all held-out rows."""
    loss, sums = run_step(run, held_out, refs, "eval", backward=False)
    found = metrics(held_out["eval"], sums.cpu(), run.hyper.get("beta", 1.0))
    found = {"loss": loss.item()} | found
    log.write({"step": step} | {f"eval_{k}": v for k, v in found.items()})


def optimizers(model: Transformer, args, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW; with muon, Muon for the layers' matrices and AdamW for the rest.

    Muon's step is scaled to AdamW's size. Only the layers' matrices decay: norms, biases and
    embeddings have a size that means something.
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
    """At step 0..total-1: rises linearly over the warm-up, stays, falls linearly to 0."""
    rise = (step + 1) / max(1.0, args.warmup * total)
    fall = (total - step) / max(1.0, args.decay * total)
    return lr * min(1.0, rise, fall)


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """A list that holds a signal once it was sent (Ctrl-C, SIGTERM); a second one stops at once."""
    sent: list[int] = []

    def on_signal(number, _):
        if sent:
            raise KeyboardInterrupt
        sent.append(number)

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield sent
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def finish(run: Run) -> None:
    """Write OUT/model and the figure, and say where everything lies."""
    args, out = run.args, run.out
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    held_out = [row for row in rows if "eval_loss" in row]
    table, shown = {}, {}
    if held_out:
        first, last = held_out[0], held_out[-1]
        table = shown = {k: (first[k], last[k]) for k in first if k != "step"}
    else:
        first, last = rows[0], rows[-1]
        told = [k for k in first if k in last and (k == "loss" or "/" in k)]
        shown = {f"train {k}": (first[k], last[k]) for k in told}
    with replacing(out / "model") as temporary:
        save(run.model, temporary, DTYPES[args.save_dtype])
        run.tokenizer.save(temporary)
        card = model_card(args, run.facts, run.hyper, table)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    try:
        figure = out / "figures" / "training.png"
        training_curves(rows, figure, f"{args.loss} on {Path(args.data).name}")
    except ImportError:
        figure = "none: pip install 'minibnf[plots]' draws one"
    for name, (before, after) in shown.items():
        print(f"{name:26} {before:10.4f} -> {after:.4f}")
    print(f"model    {out / 'model'}\nmetrics  {out / 'metrics.jsonl'}\nfigure   {figure}")


@in_one_line
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with memory_advice(less_memory(args, args.max_tokens)):
        run = setup(args)
    if run is None:
        print(f"{args.out} holds this run, finished: its model lies in {Path(args.out) / 'model'}")
        return
    try:
        with memory_advice(less_memory(args, run.max_tokens)):
            train(run)
    except KeyboardInterrupt:
        words = [sys.executable, "-m", "minibnf.train", "--resume", "--out", args.out]
        raise KeyboardInterrupt(f"to go on:\n  {shlex.join(words)}") from None


if __name__ == "__main__":
    sys.exit(main())
