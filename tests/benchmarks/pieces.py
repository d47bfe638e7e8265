"""The trainer's pieces, each against what else does its work: medians and ratios, both sides alternating in one process.

python -m tests.benchmarks.pieces [--rounds 5] [--json FILE]

losses       a step of BNF against one of NLL on the same tokens, all of them preferred
vocabulary   token_logps, forward and backward, against the plain expression and torch's linear_cross_entropy; its memory at
             V = 131,072, N = 8,192, D = 576, and its time there against the plain expression's (large), which takes 15 GB;
             its growth with tokens and with the vocabulary
start        from the command to the first step's metrics
data         reading, tokenising, packing and mismatching 100,000 pairs
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
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


class Given:
    """A reference that is there already: the same number for every token."""

    def of(self, batch):
        return torch.full((len(batch.targets),), -2.0, device=DEVICE)


def losses(model_dir: str, rounds: int) -> dict:
    model, generator = (
        load(model_dir, dtype=torch.float32).to(DEVICE),
        torch.Generator().manual_seed(0),
    )
    ids = lambda n: tuple(
        torch.randint(model.config.vocab_size, (n,), generator=generator).tolist()
    )
    examples = [Example(ids(90), (ids(130),), (True,), i) for i in range(8)]
    batches = pack(examples, list(range(8)), 2048)

    def step(name):
        run_batches(model, batches, LOSSES[name], LOSSES[name].hyper({}), Given() if LOSSES[name].needs_ref else None,
                    torch.float32, DEVICE, backward=True)  # fmt: skip
        model.zero_grad(set_to_none=True)

    return show(
        "losses",
        alternate({name: lambda n=name: step(n) for name in ("nll", "bnf")}, rounds),
        "nll",
    )


def problem(N: int, V: int, D: int = 576):
    hidden, unembed = (torch.randn(n, D, device=DEVICE).mul_(0.1).requires_grad_() for n in (N, V))
    return hidden, unembed, torch.randint(V, (N,), device=DEVICE)


def plain(hidden, unembed, targets):
    return (hidden @ unembed.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def ligers():
    """Liger's fused linear and cross-entropy as a function like token_logps, or why it does not run here."""
    if DEVICE == "cpu":
        return "its kernels are for a GPU"
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Fused,
        )
    except ImportError as error:
        return str(error)
    return lambda hidden, unembed, targets: (
        -Fused.apply(hidden, unembed, targets, None, None, -100, 0.0, 0.0, "sum")[0]
    )


def torchs(hidden, unembed, targets):
    return -F.linear_cross_entropy(hidden, unembed, targets, reduction="none")


def both_ways(function, given):
    function(*given).sum().backward()
    given[0].grad = given[1].grad = None


def vocabulary(rounds: int) -> dict:
    functions = {"token_logps": token_logps, "plain": plain}
    if hasattr(F, "linear_cross_entropy"):
        functions["linear_cross_entropy"] = torchs
    if callable(liger := ligers()):
        functions["Liger's, sum alone"] = liger
    else:
        print(f"vocabulary  Liger's is not run: {liger}")
    given = problem(2048, 49152)
    found = show(
        "vocabulary",
        alternate({n: lambda f=f: both_ways(f, given) for n, f in functions.items()}, rounds),
        "token_logps",
    )
    for N, V in ((1024, 49152), (2048, 49152), (4096, 49152), (2048, 24576), (2048, 98304)):
        given = problem(N, V)
        (seconds,) = alternate({"": lambda g=given: both_ways(token_logps, g)}, 1).values()
        print(f"growth      N {N:6,}  V {V:7,}  {seconds / (N * V) * 1e9:6.2f} ns a logit")
        found[f"ns a logit, N {N}, V {V}"] = seconds / (N * V) * 1e9
    given = problem(8192, 131072)
    large = {n: lambda f=functions[n]: both_ways(f, given) for n in ("token_logps", "plain")}
    found |= show("large", alternate(large, 1), "token_logps")
    command = [sys.executable, "-m", "tests.benchmarks.pieces", "--memory"]
    used, allowed = map(
        float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )
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
            process = subprocess.Popen(
                [sys.executable, "-m", "minibnf.train", *flags], stdout=subprocess.DEVNULL
            )
            while process.poll() is None and not (
                (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size
            ):
                time.sleep(0.02)
            found[f"start {model}"] = time.perf_counter() - began
            if process.wait() != 0:
                raise SystemExit(f"the trainer failed on {model}")
            print(
                f"start       {model:36} {found[f'start {model}']:9.1f} s to the first step's metrics",
                flush=True,
            )
    return found


def data() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        with open(file, "w", encoding="utf-8") as lines:
            for i in range(100_000):
                said = lambda role, text: [{"role": role, "content": text}]
                row = {"prompt": said("user", f"What is {i} plus {i}?"), "chosen": said("assistant", f"It is {2 * i}."),
                       "rejected": said("assistant", f"It is {2 * i + 1}.")}  # fmt: skip
                lines.write(json.dumps(row) + "\n")
        began = time.perf_counter()
        examples, _ = read_examples(file, load_tokenizer("weights/tiny"), 512)
        read = time.perf_counter() - began
        order = order_of_epoch(len(examples), 0, 0)
        for i in range(0, len(order), 32):
            pack(examples, order[i : i + 32], 2048)
        packed = time.perf_counter() - began - read
    print(
        f"data        100,000 pairs: {read:.1f} s to read and tokenise, {packed:.1f} s to pack in steps of 32",
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
        f"data        {at_once:.1f} s to pack them all at once, as an evaluation does; {mismatch:.1f} s to mismatch them for"
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
