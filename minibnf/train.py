"""The trainer: align a checkpoint on preference data (its flags stand in arguments.py).

    python -m minibnf.train --model weights/tiny --data pairs.jsonl --loss bnf --out runs/bnf
    python -m minibnf.train --model DIR --data FILE --loss dpo --loss-args beta=0.5 --out OUT
    python -m minibnf.train --config runs/bnf/config.json --seed 1 --out runs/seed1     # changed
    python -m minibnf.train --resume --out OUT                   # go on after an interruption

OUT then holds model/ (Hugging Face layout), metrics.jsonl (one object per step, TRL's names),
config.json, the reference's log-probabilities (computed once), checkpoints/ (the two newest) and
figures/. Nobody else can write there meanwhile, and what is saved survives a power cut.

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
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

import torch

from minibnf.arguments import WIDTH, default_rate, less_memory, loss_hyper, parse
from minibnf.data import digest, mismatched, order_of_epoch, pack, read_examples
from minibnf.files.config import announce_ignored
from minibnf.files.disk import flush, locked, replacing
from minibnf.files.rows import Notes
from minibnf.files.safetensors import check_finite, fingerprint
from minibnf.files.terminal import counted, in_one_line, show
from minibnf.files.tokenizer import Tokenizer, load_tokenizer
from minibnf.kernels import compile_by, fastest_library, multiply_by
from minibnf.losses import LOSSES, Loss
from minibnf.machine import DTYPES, memory_advice, resolve_device_and_dtype
from minibnf.model import Transformer, fresh, load, save
from minibnf.run import Log, Run, begin_folder, check_folder, load_training
from minibnf.run import model_card, save_training, summary, training_curves
from minibnf.step import kl_estimate, metrics, run_batches, with_reference

# ------------------------------------------------------------------------------------------- set-up

# what decides a run's numbers and so may not change in mid-run
RESUME_NEEDS = (
    "loss loss_args model_sha256 data_sha256 steps batch_size lr warmup decay optimizer"
    " weight_decay grad_clip seed dtype"
).split()


def setup(args: argparse.Namespace) -> Run | None:
    """Check every input; nothing is written yet. None: OUT holds this run, finished.

    Raises ValueError, OSError or ImportError for what the user must mend.
    """
    loss = LOSSES[args.loss]
    hyper = loss_hyper(loss, args.loss_args)
    earlier = check_folder(args)
    tokenizer = load_tokenizer(args.model)
    products = fastest_library()
    if earlier:  # a template may have put the first run's date into rows
        tokenizer.now = datetime.fromisoformat(earlier["facts"]["now"])
        products = earlier["facts"].get("products", products)
        torch.set_num_threads(earlier["facts"]["threads"])  # other ones would round otherwise
    multiply_by(products)
    model = fresh(args.model, args.seed) if args.from_scratch else load(args.model, torch.float32)
    announce_ignored(args.model, model.raw)
    model.recompute = args.gradient_checkpointing
    parameters = sum(p.numel() for p in model.parameters())
    device, dtype = resolve_device_and_dtype(args.device, args.dtype, parameters)
    sets, notes = read_sets(args, loss, tokenizer, model.config.max_position_embeddings)
    examples = sets["train"]
    longest = max(e.tokens for some in sets.values() for e in some)
    max_tokens = args.max_tokens or max(2048 if device.type == "cpu" else 16384, longest)
    if longest > max_tokens:
        raise ValueError(
            f"--max-tokens {max_tokens}: the longest example has {longest} tokens: raise it"
        )
    pairs = sum(len(e.pairs) for e in examples)
    facts = argparse.Namespace(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        products=products,
        compiled="no",
        parameters=parameters,
        lr=args.lr or default_rate(loss.name) * WIDTH / model.config.hidden_size,
        loss_args=hyper,
        pairs=pairs,
        unpaired=sum(e.count for e in examples) - pairs,
        model_sha256=fingerprint(model.named_parameters()),
        data_sha256={name: digest(e) for name, e in sets.items()},
        tokens_per_epoch=sum(e.tokens for e in examples),
        notes=notes,
        batch=min(args.batch_size, len(examples)),
        now=tokenizer.now.isoformat(),
        steps=args.max_steps or (args.epochs or 1) * math.ceil(len(examples) / args.batch_size),
        max_tokens=max_tokens,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
    )
    if earlier:
        before, present = earlier["arguments"] | earlier["facts"], vars(args) | vars(facts)
        for key in RESUME_NEEDS:
            if before.get(key) != present[key]:
                changed = f"{key} was {before.get(key)} and is {present[key]} now"
                raise ValueError(f"{args.out}: cannot resume, {changed}")
        if Path(args.out, "model").exists():
            return None
    run = Run(args, loss, tokenizer, model.to(device), dtype, sets, facts)
    if device.type == "cuda" and args.compile == "auto":
        facts.compiled = compile_layers(run)
    return run


def compile_layers(run: Run) -> str:
    """ "yes", or "no" and why: the first micro-batch, learnt from and read, is the trial."""
    nll = LOSSES["nll"]

    def trial():
        batches = pack(run.sets["train"], rows_of_step(run, 0), run.facts.max_tokens)[:1]
        for backward in (True, False):
            run_batches(run.model, batches, nll, nll.hyper({}), run.dtype, backward=backward)
        run.model.zero_grad(set_to_none=True)

    failed = compile_by("inductor", trial)
    return f"no ({failed})" if failed else "yes"


def read_sets(args, loss: Loss, tokenizer: Tokenizer, context: int) -> tuple[dict, list[str]]:
    """The examples of every set, by its name, and what a person should know of them."""
    sets, changes, notes = {}, [], Notes()
    files = {"train": args.data} | ({"eval": args.eval_data} if args.eval_data else {})
    for split, file in files.items():
        sets[split], counts = read_examples(file, tokenizer, context, args.overlong, notes)
        lone = [e.place for e in sets[split] if e.count > len(e.pairs)]
        if loss.needs_pairs and lone:
            why = f"loss '{loss.name}' needs pairs, and this row is no pair (one of {len(lone)})"
            raise ValueError(f"{file}, {lone[0]}: {why}; --loss bnf takes both kinds")
        if "kl" in loss.defaults:
            sets[f"{split}-kl"], equals = mismatched(sets[split], context, file)
            counts["for which other prompts have only equal responses"] = equals
        changes += [f"{counted(n, f'{split} row')} {what}" for what, n in counts.items() if n]
    return sets, [*changes, *notes.lines()]


# ------------------------------------------------------------------------------------------ the run


def train(run: Run) -> None:
    """Run to the end.

    Raises FloatingPointError at a number that is not finite, KeyboardInterrupt when interrupted
    (and saved).
    """
    args, model = run.args, run.model
    begin_folder(run)
    show("\n".join(summary(run, args.model, args.data)))
    size = 24 * run.facts.parameters / 1e6  # weights and two moments in float32, twice
    show(f"disk     at most {size:,.1f} MB of checkpoints, half as much again while one is saved")
    read_references(run)
    optims = optimizers(model, args, run.facts.lr)
    step, tokens = load_training(run.out, model, optims)
    if step:
        show(f"resumed  after step {step}")
    with interruptions() as interrupted, closing(Log(run, step)) as log:
        if step == 0:
            evaluate(run, log, step)
        while step < run.facts.steps and not interrupted:
            began = time.perf_counter()
            rows = rows_of_step(run, step)
            batches, loss, found = run_step(run, "train", rows, backward=True)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            rate = learning_rate(step, run.facts.steps, run.facts.lr, args)
            for optim in optims:
                for group in optim.param_groups:
                    group["lr"] = rate
                optim.step()
                optim.zero_grad(set_to_none=True)

            step += 1
            tokens += sum(b.tokens.numel() for b in batches)
            epoch = step / run.steps_per_epoch
            row = {"step": step, "epoch": epoch, "learning_rate": rate, "num_tokens": tokens}
            log.step(began, row, batches, {"loss": loss, "grad_norm": norm} | found)
            at_end = step == run.facts.steps
            if at_end or (args.eval_every and step % args.eval_every == 0):
                evaluate(run, log, step)
            if at_end or step % args.save_every == 0 or interrupted:
                log.settle()  # nothing is saved after a gradient that was not finite
                flush(log.file)
                save_training(run.out, step, tokens, model, optims)
    if step < run.facts.steps:
        show(f"interrupted after step {step} of {run.facts.steps}{', and saved' if step else ''}")
        raise KeyboardInterrupt
    finish(run)


def rows_of_step(run: Run, step: int) -> list[int]:
    """Which training examples a step has: a function of the seed and the step alone."""
    epoch, k = divmod(step, run.steps_per_epoch)
    order, size = order_of_epoch(len(run.sets["train"]), run.args.seed, epoch), run.args.batch_size
    return order[k * size : (k + 1) * size]


def read_references(run: Run) -> None:
    """Give the examples the reference's log-probabilities, where the loss needs them.

    They are read as training first meets a set: the first epoch's steps, or all held-out rows at
    once.
    """
    for name, examples in run.sets.items() if run.loss.needs_ref else ():
        steps = [list(range(len(examples)))]
        if name.startswith("train"):
            steps = [rows_of_step(run, step) for step in range(run.steps_per_epoch)]
        packed = (pack(examples, rows, run.facts.max_tokens) for rows in steps)
        file = run.out / f"reference-{name}.safetensors"
        where = run.model, examples, packed, file, run.loss, run.dtype
        run.sets[name] = with_reference(*where, training=name == "train")
        data = run.args.eval_data if name.startswith("eval") else run.args.data
        for e in run.sets[name]:
            where = f"stopped at step 0 in {e.place} of {data} (weights too large? an odd row?)"
            check_finite(where, "the model's own log-probabilities", torch.cat(e.ref_logps))


def run_step(run: Run, split: str, rows: list[int], *, backward: bool) -> tuple:
    """The micro-batches of these rows, their loss and their metrics."""
    hyper, max_tokens, kl = run.facts.loss_args, run.facts.max_tokens, f"{split}-kl"
    if kl in run.sets:  # kto's reference point comes from mismatched responses
        others = pack(run.sets[kl], rows, max_tokens)
        hyper = hyper | {"kl": kl_estimate(run.model, others, run.loss, run.dtype)}
    batches = pack(run.sets[split], rows, max_tokens)
    loss, sums = run_batches(run.model, batches, run.loss, hyper, run.dtype, backward=backward)
    return batches, loss, metrics(batches, sums, hyper.get("beta", 1.0))


def evaluate(run: Run, log: Log, step: int) -> None:
    """One row of metrics, of all held-out rows if there are any."""
    if "eval" in run.sets:
        log.settle()
        rows = list(range(len(run.sets["eval"])))
        _, loss, found = run_step(run, "eval", rows, backward=False)
        numbers = {f"eval_{name}": x.item() for name, x in ({"loss": loss} | found).items()}
        log.check(step, numbers, f"all of {run.args.eval_data}")
        log.write({"step": step} | numbers)


def optimizers(model: Transformer, args, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW; with muon, Muon for the layers' matrices and AdamW for the rest.

    Muon's step is scaled to AdamW's size. Only the layers' matrices decay: norms, biases and
    embeddings have a size that means something.
    """
    named = dict(model.named_parameters())
    matrices = {k: p for k, p in named.items() if p.dim() == 2 and k.startswith("model.layers.")}
    decaying = {"params": list(matrices.values()), "lr": lr, "weight_decay": args.weight_decay}
    others = {"params": [p for k, p in named.items() if k not in matrices], "weight_decay": 0.0}
    adamw = partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.95), fused=True)
    if args.optimizer == "muon":
        return [adamw([others]), torch.optim.Muon([decaying], adjust_lr_fn="match_rms_adamw")]
    return [adamw([others, decaying])]


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
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    held_out = [row for row in rows if "eval_loss" in row]
    some = held_out or rows or [{}]  # none: metrics.jsonl was damaged
    first, last = some[0], some[-1]
    told = [k for k in first if k in last and (k.endswith("loss") or "/" in k)]
    results = [f"{name:26} {first[name]:10.4f} -> {last[name]:.4f}" for name in told]
    if not held_out:
        results.insert(0, "of training rows, in the first step -> in the last one:")
    with replacing(out / "model") as temporary:
        save(run.model, temporary, DTYPES[args.save_dtype])
        run.tokenizer.save(temporary)
        (temporary / "README.md").write_text(model_card(run, results), encoding="utf-8")
    figure = out / "figures" / "training.png"
    try:
        training_curves(rows, figure, f"{args.loss} on {Path(args.data).name}")
    except ImportError:
        figure = "none: pip install 'minibnf[plots]' draws one"
    show("\n".join(results))
    show(f"model    {out / 'model'}\nmetrics  {out / 'metrics.jsonl'}\nfigure   {figure}")


@in_one_line
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with memory_advice(less_memory(args)), locked(Path(args.out, ".lock")):
        run = setup(args)
        if run is None:
            show(f"{args.out} holds this run, and it is finished: its model is {args.out}/model")
            return
        try:
            train(run)
        except KeyboardInterrupt:
            words = [sys.executable, "-m", "minibnf.train", "--resume", "--out", args.out]
            raise KeyboardInterrupt(f"to go on:\n  {shlex.join(words)}") from None
        finally:  # a comparison goes on in this process with other models
            compile_by(None)


if __name__ == "__main__":
    sys.exit(main())
