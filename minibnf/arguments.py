"""The trainer's command line: what can be asked, and what cannot be asked together."""

import argparse
import math
import sys
from pathlib import Path

from minibnf.files.disk import optional, seal
from minibnf.files.terminal import ArgumentParser, as_words, show
from minibnf.losses import LOSSES, Loss
from minibnf.machine import add_machine

# The default learning rates are for this hidden size; Adam's steps must shrink as layers widen.
WIDTH = 576
RATES = {"bnf": 4e-5, "rbnf": 4e-5, "nll": 4e-5, "unlikelihood": 1e-5}


def default_rate(loss: str) -> float:
    """The default learning rate of a loss at WIDTH; of two in one, the lower of theirs."""
    return min(RATES.get(part, 2e-5) for part in loss.split("/"))


def loss_name(text: str) -> str:
    """The text, if it names a loss."""
    try:
        return LOSSES[text].name
    except KeyError as e:
        raise argparse.ArgumentTypeError(e.args[0]) from None


def parser() -> ArgumentParser:
    rates = ", ".join(f"{name} {default_rate(name):g}" for name in LOSSES)
    known = {n: [f"{k}={v}" for k, v in x.defaults.items() if k != "kl"] for n, x in LOSSES.items()}
    hypers = "; ".join(f"{name} {' '.join(values)}" for name, values in known.items())
    p = ArgumentParser("minibnf train", allow_abbrev=False)
    p.description = "Align a checkpoint on preference data."
    # fmt: off
    a = p.add_argument_group("what to train").add_argument
    a("--model", metavar="DIR", help="checkpoint in Hugging Face layout: start and reference")
    a("--from-scratch", action="store_true", help="start with random weights; DIR needs none")
    a("--data", metavar="FILE", help="preference rows: JSON Lines, a JSON array or Parquet")
    a("--eval-data", metavar="FILE", help="held-out rows, measured before and after training")
    a("--eval-every", type=int, default=0, metavar="N", help="measure them every N steps too")
    a("--out", metavar="DIR", help="folder that the run writes into")
    a("--overlong", choices=["error", "truncate", "skip"], default="error",
      help="what to do with rows longer than the model's context; default error")
    a = p.add_argument_group("the loss").add_argument
    a("--loss", type=loss_name, default="bnf",
      help=f"{', '.join(LOSSES)}; or two token-local ones, such as bnf/topr: the first for "
           "preferred responses, the second for rejected ones; default bnf")
    a("--loss-args", nargs="*", default=[], metavar="NAME=X",
      help=f"hyper-parameters of the loss; defaults: {hypers}")
    group = p.add_argument_group("how long and how fast")
    a = group.add_mutually_exclusive_group().add_argument
    a("--epochs", type=int, metavar="N", help="passes over the data; default 1")
    a("--max-steps", type=int, metavar="N", help="stop after N steps instead")
    a = group.add_argument
    a("--batch-size", type=int, default=32, metavar="N", help="examples per step; default 32")
    a("--lr", type=float,
      help=f"peak learning rate; default: the loss's own times {WIDTH}/hidden_size, a place to "
           f"start from: {rates}")
    a("--warmup", type=float, default=0.1, metavar="X",
      help="share of the steps over which the learning rate rises; default 0.1")
    a("--decay", type=float, default=0.9, metavar="X",
      help="share of the steps over which it falls; default 0.9")
    a("--optimizer", choices=["adamw", "muon"], default="adamw",
      help="muon: for the layers' matrices, adamw for the rest; default adamw")
    a("--weight-decay", type=float, default=0.0, metavar="X", help="on matrices only; default 0")
    a("--grad-clip", type=float, default=1.0, metavar="X", help="largest gradient norm; default 1")
    a("--seed", type=int, default=0, help="for the data's order and for random weights; default 0")
    a = p.add_argument_group("the machine").add_argument
    add_machine(a)
    a("--compile", choices=["auto", "off"], default="auto",
      help="auto: compile the layers on CUDA, where that works; results differ only by rounding")
    a("--max-tokens", type=int, metavar="N",
      help="tokens per micro-batch: bounds memory, changes results only by rounding; default 2048 "
           "on a CPU, 16384 on CUDA, and at least the longest example")
    a("--gradient-checkpointing", action="store_true",
      help="compute each layer twice instead of keeping it: less memory, a third more work")
    a("--save-every", type=int, default=200, metavar="N", help="save every N steps; default 200")
    a("--save-dtype", choices=["float32", "bfloat16"], default="float32", help="of OUT/model")
    group = p.add_argument_group("an --out that already holds a run")
    a = group.add_mutually_exclusive_group().add_argument
    a("--resume", action="store_true", help="go on from its newest checkpoint")
    a("--overwrite", action="store_true",
      help="delete that run, with everything in its model/ and checkpoints/, and start anew")
    group.add_argument("--config", metavar="FILE",
      help="take arguments from the config.json of an earlier run; flags override it")
    # fmt: on
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = parser()
    args = p.parse_args(argv)
    file = args.config or (args.resume and args.out and f"{args.out}/config.json")
    earlier = config_of(Path(file), sealed=not args.config) if file else None
    if earlier and set(earlier["arguments"]) <= set(vars(args)):
        drop = ("epochs", "max_steps") if args.epochs or args.max_steps else ()
        given = {k: v for k, v in earlier["arguments"].items() if k not in drop}
        args = p.parse_args([*as_words(given), *(sys.argv[1:] if argv is None else argv)])
    elif earlier or args.config:
        raise ValueError(f"{file}: not the config.json that a run of this version wrote")
    if args.resume and not earlier and args.model is None:
        p.error(f"--resume: --out {args.out} holds no run to go on with")
    check_arguments(p, args)
    if args.resume and not earlier:
        show(f"{args.out} holds no run to go on with: starting one")
    return args


def config_of(file: Path, sealed: bool = False) -> dict | None:
    """The config.json that a run wrote; None where there is none, or it is something else's.

    sealed: raise ValueError where it is not as the run wrote it.
    """
    try:
        found = optional(file)
    except ValueError:
        return None
    if not all(isinstance(found.get(part), dict) for part in ("arguments", "facts")):
        return None
    if sealed and found.pop("sha256", None) != seal(found):
        raise ValueError(f"{file}: edited, damaged or of another version; --overwrite starts anew")
    return found


def check_arguments(p: ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error where an argument is missing, impossible or of no use."""
    for name in ("model", "data", "out"):
        if getattr(args, name) is None:
            p.error(f"--{name} is required")
    positive = "epochs max_steps batch_size lr max_tokens save_every grad_clip"
    for name in positive.split():
        x = getattr(args, name)
        if x is not None and not 0 < x < math.inf:
            p.error(f"--{name.replace('_', '-')} must be a number above 0, not {x}")
    if not (0 <= args.warmup <= 1 and 0 <= args.decay <= 1):
        p.error("--warmup and --decay must lie between 0 and 1")
    if args.weight_decay < 0 or args.eval_every < 0:
        p.error("--weight-decay and --eval-every must be 0 or more")
    if args.eval_every and not args.eval_data:
        p.error("--eval-every needs --eval-data")


def loss_hyper(loss: Loss, texts: list[str]) -> dict:
    """["beta=0.5", "length=own"] -> the loss's hyper-parameters.

    kto's kl is 0 for now: every step computes it. Raises ValueError for what does not fit.
    """
    given = {"kl": 0.0} if "kl" in loss.defaults else {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name in given:
            raise ValueError(f"--loss-args {text}: write NAME=X, e.g. beta=0.1, each name once")
        try:
            given[name] = value if value.isalpha() else float(value)
        except ValueError:
            raise ValueError(f"--loss-args {text}: {value!r} is not a number") from None
    return loss.hyper(given)


def less_memory(args: argparse.Namespace) -> str:
    """What to do where memory does not suffice."""
    advice = f"lower --max-tokens (now {args.max_tokens or 'its default'})"
    return advice if args.gradient_checkpointing else f"{advice} or pass --gradient-checkpointing"
