"""The trainer's pieces, each against what else does its work, alternating in one process.

    python -m tests.benchmarks.pieces [--rounds 5] [--json FILE]

losses       a step of BNF against one of NLL on the same tokens, all of them preferred
vocabulary   token_logps, forward and backward, against the plain expression and torch's
             linear_cross_entropy; its growth with tokens and with the vocabulary; its memory at
             V = 131,072, N = 8,192, D = 576, and its time there against the plain expression's
             (large), which takes 15 GB
start        from the command to the first step's metrics
data         reading, tokenising, packing and mismatching 100,000 pairs

Medians and ratios are printed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from minibnf.data import Example, mismatched, order_of_epoch, pack, read_examples
from minibnf.files.tokenizer import load_tokenizer
from minibnf.lab.smallworld import main as smallworld
from minibnf.logprob import token_logps
from minibnf.losses import LOSSES
from minibnf.model import load
from minibnf.step import run_batches
from tests.benchmarks import DEVICE, machine, peak_bytes, wait


def alternate(sides: dict, rounds: int) -> dict[str, float]:
    """{side: median seconds}, after one round that is not counted."""
    seconds = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, run in sides.items():
            wait()
            began = time.perf_counter()
            run()
            wait()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(s) for name, s in seconds.items()}


def show(title: str, medians: dict[str, float], first: str) -> dict:
    for name, s in medians.items():
        print(
            f"{title:11} {name:36} {1e3 * s:9.1f} ms   {s / medians[first]:5.2f} of {first}",
            flush=True,
        )
    return {title: medians}


def losses(model_dir: str, rounds: int) -> dict:
    model = load(model_dir, dtype=torch.float32).to(DEVICE)
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> tuple[int, ...]:
        size = model.config.vocab_size
        return tuple(torch.randint(size, (n,), generator=generator).tolist())

    examples = [Example(ids(90), (ids(130),), (True,), i) for i in range(8)]
    given = [e._replace(ref_logps=(torch.full((130,), -2.0),)) for e in examples]

    def step(name: str) -> None:
        loss = LOSSES[name]
        batches = pack(given if loss.needs_ref else examples, list(range(8)), 2048)
        run_batches(model, batches, loss, loss.hyper({}), torch.float32, backward=True)
        model.zero_grad(set_to_none=True)

    sides = {name: partial(step, name) for name in ("nll", "bnf")}
    return show("losses", alternate(sides, rounds), "nll")


def problem(N: int, V: int, D: int = 576):
    hidden, unembed = (torch.randn(n, D, device=DEVICE).mul_(0.1).requires_grad_() for n in (N, V))
    return hidden, unembed, torch.randint(V, (N,), device=DEVICE)


def plain(hidden, unembed, targets):
    return (hidden @ unembed.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def ligers():
    """Liger's fused linear and cross-entropy, like token_logps; or why it does not run here."""
    if DEVICE == "cpu":
        return "its kernels are for a GPU"
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Fused,
        )
    except ImportError as error:
        return str(error)

    def fused(hidden, unembed, targets):
        return -Fused.apply(hidden, unembed, targets, None, None, -100, 0.0, 0.0, "sum")[0]

    return fused


def torchs(hidden, unembed, targets):
    return -F.linear_cross_entropy(hidden, unembed, targets, reduction="none")


def both_ways(function, given):
    function(*given).sum().backward()
    given[0].grad = given[1].grad = None


# (N, V) at which the growth of token_logps is measured
SIZES = [(1024, 49152), (2048, 49152), (4096, 49152), (2048, 24576), (2048, 98304)]


def vocabulary(rounds: int) -> dict:
    functions = {"token_logps": token_logps, "plain": plain}
    if hasattr(F, "linear_cross_entropy"):
        functions["linear_cross_entropy"] = torchs
    if callable(liger := ligers()):
        functions["Liger's, sum alone"] = liger
    else:
        print(f"vocabulary  Liger's is not run: {liger}")
    given = problem(2048, 49152)
    sides = {name: partial(both_ways, f, given) for name, f in functions.items()}
    found = show("vocabulary", alternate(sides, rounds), "token_logps")
    for N, V in SIZES:
        given = problem(N, V)
        (seconds,) = alternate({"": partial(both_ways, token_logps, given)}, 1).values()
        print(f"growth      N {N:6,}  V {V:7,}  {seconds / (N * V) * 1e9:6.2f} ns a logit")
        found[f"ns a logit, N {N}, V {V}"] = seconds / (N * V) * 1e9
    given = problem(8192, 131072)
    sides = {name: partial(both_ways, functions[name], given) for name in ("token_logps", "plain")}
    found |= show("large", alternate(sides, 1), "token_logps")
    command = [sys.executable, "-m", "tests.benchmarks.pieces", "--memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    used, allowed = map(float, done.stdout.split())
    bound = f"1.2 of inputs and outputs, and 256 MB: {allowed / 1e6:.0f}"
    print(f"memory      N 8,192, V 131,072: {used / 1e6:.0f} MB at the peak; {bound}", flush=True)
    return found | {"memory": used, "memory allowed": allowed}


def memory_of_token_logps():
    """The peak of memory (peak_bytes) that one call, forward and backward, adds; and the bound."""
    both_ways(token_logps, problem(64, 512))  # libraries are loaded by now
    before = peak_bytes()
    given = problem(8192, 131072)
    token_logps(*given).sum().backward()
    size = sum(t.nbytes for x in given[:2] for t in (x, x.grad)) + given[2].nbytes + 8192 * 4
    print(peak_bytes() - before, 1.2 * size + 256e6)


def start(model_dir: str) -> dict:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "pairs.jsonl")
        smallworld(
            ["pairs", "--model", "weights/tiny", "--kind", "math", "--count", "8", "--out", data]
        )
        for model in ("weights/tiny", model_dir):
            out = Path(folder) / Path(model).name
            flags = ["--model", model, "--data", data, "--batch-size", "8", "--out", str(out)]
            began = time.perf_counter()
            command, metrics = (
                [sys.executable, "-m", "minibnf.train", *flags],
                out / "metrics.jsonl",
            )
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
                time.sleep(0.02)
            seconds = found[f"start {model}"] = time.perf_counter() - began
            if process.wait() != 0:
                raise SystemExit(f"the trainer failed on {model}")
            shown = f"{seconds:9.1f} s to the first step's metrics"
            print(f"start       {model:36} {shown}", flush=True)
    return found


def said(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def data() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        with open(file, "w", encoding="utf-8") as lines:
            for i in range(100_000):
                row = {
                    "prompt": said("user", f"What is {i} plus {i}?"),
                    "chosen": said("assistant", f"It is {2 * i}."),
                    "rejected": said("assistant", f"It is {2 * i + 1}."),
                }
                lines.write(json.dumps(row) + "\n")
        began = time.perf_counter()
        examples, _ = read_examples(file, load_tokenizer("weights/tiny"), 512)
        read = time.perf_counter() - began
        order = order_of_epoch(len(examples), 0, 0)
        for i in range(0, len(order), 32):
            pack(examples, order[i : i + 32], 2048)
        packed = time.perf_counter() - began - read
    print(
        f"data        100,000 pairs: {read:.1f} s to read and tokenise, "
        f"{packed:.1f} s to pack in steps of 32",
        flush=True,
    )
    began = time.perf_counter()
    pack(examples, order, 2048)
    at_once = time.perf_counter() - began
    one_prompt = [
        e._replace(prompt=examples[0].prompt) if i % 10 else e for i, e in enumerate(examples)
    ]
    began = time.perf_counter()
    mismatched(one_prompt, 512, file)
    mismatch = time.perf_counter() - began
    print(
        f"data        {at_once:.1f} s to pack them all at once; "
        f"{mismatch:.1f} s to mismatch them for"
    )
    print("            kto where nine in ten have the same prompt", flush=True)
    return {"read": read, "pack": packed, "pack at once": at_once, "mismatch": mismatch}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="weights/smollm2-135m-instruct")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", help="also write every number here")
    p.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.memory:
        return memory_of_token_logps()
    print(machine())
    found = losses(args.model, args.rounds) | vocabulary(args.rounds) | start(args.model) | data()
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
