"""Pairs per second and peak memory: minibnf's trainer against TRL's DPOTrainer.

    python -m tests.benchmarks.training [--data gsm8k_pairs helpful] [--dtypes float32 bfloat16]
        [--pairs 8] [--steps N] [--rounds 3] [--json FILE]

Each measurement is a process of its own, on CUDA where there is a device: the trainer as a user
runs it, a few steps of `--pairs` pairs. The first step is not counted, nor is the reference pass.
TRL gets its reference log-probabilities precomputed, the fused AdamW, and the best of several
numbers of pairs per forward (with gradient accumulation, so that a step has the same pairs), on
CUDA with Liger's layer kernels too, where these are installed. In bfloat16 its weights and
optimiser are bfloat16, while minibnf's weights stay float32. The sides alternate; medians and
ratios of the rounds are printed.

minibnf is also held against the machine's own matrix speed. Needed operations of a step, with a
multiplication and an addition counted as two:
    6 x parameters in the layers' matrices x tokens read       (forward 2, backward 4)
    6 x V x D x response tokens                                (the vocabulary, one sweep)
    12 x layers x heads x head width x pairs of tokens one of which sees the other
The matrix speed is that of 4096³ products, on a CPU by the faster of PyTorch's two libraries,
measured in each of minibnf's processes.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from minibnf.data import pack, read_examples
from minibnf.files.config import read_config
from minibnf.files.rows import read_rows
from minibnf.files.tokenizer import load_tokenizer
from minibnf.lab.smallworld import main as smallworld
from minibnf.machine import DTYPES
from minibnf.model import Transformer
from minibnf.train import main as train
from tests.benchmarks import DEVICE, machine, now, peak_bytes, seconds, wait

STEPS = {"cpu": 3, "cuda": 20}[DEVICE]  # by default
# Of a micro-batch: the trainer's default, and less.
TOKENS = {"cpu": (2048, 768), "cuda": (16384, 4096)}[DEVICE]


def needed_operations(model, batches) -> int:
    c = model.config
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() == 2 and name.startswith("model.layers.")
    )
    total = 0
    for batch in batches:
        seen = sum(
            p * (p + 1) // 2 + sum(n * p + n * (n + 1) // 2 for n in ns) for p, ns in batch.layout
        )
        total += 6 * matrices * batch.tokens.numel() + 6 * model.unembed.numel() * len(
            batch.targets
        )
        total += 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seen
    return total


def matrix_speed(dtype: torch.dtype) -> float:
    """Operations per second: the best of three 4096³ products by each library for this type."""
    x = torch.randn(4096, 4096, dtype=dtype, device=DEVICE)
    products = [partial(torch.matmul, x, x)]
    if dtype == torch.float32 and DEVICE == "cpu":
        mkldnn = torch.ops.mkldnn._linear_pointwise
        products.append(partial(mkldnn, x, x, None, "none", [], ""))
    best, repeats = float("inf"), {"cpu": 1, "cuda": 20}[DEVICE]
    for product in products * 3:
        wait()
        began = time.perf_counter()
        for _ in range(repeats):
            product()
        wait()
        best = min(best, (time.perf_counter() - began) / repeats)
    return 2 * 4096**3 / best


def ours(job: dict, folder: Path) -> dict:
    """job["save"] False: neither checkpoint nor model is written, so that little disk will do."""
    flags = {
        "model": job["model"], "data": job["file"], "loss": job["loss"], "out": folder / "run",
        "batch-size": job["pairs"], "max-steps": job["steps"], "dtype": job["dtype"],
        "max-tokens": job["max_tokens"], "lr": 1e-6, "device": DEVICE,
    }  # fmt: skip
    with ExitStack() as stack:
        for what in () if job.get("save", True) else ("save_training", "finish"):
            stack.enter_context(patch(f"minibnf.train.{what}", lambda *_: None))
        if train([str(x) for name, value in flags.items() for x in (f"--{name}", value)]) != 0:
            raise SystemExit("the trainer did not end well")
    peak = peak_bytes()
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [job["pairs"] / json.loads(line)["examples_per_s"] for line in lines[1:]]
    config, raw = read_config(job["model"])
    with torch.device("meta"):
        model = Transformer(config, raw)
    examples, _ = read_examples(
        job["file"], load_tokenizer(job["model"]), config.max_position_embeddings
    )
    batches = pack(examples, list(range(len(examples))), 2**20)
    operations = needed_operations(model, batches) / len(examples)  # for one pair
    found, speed = summary(job, steps, peak), matrix_speed(DTYPES[job["dtype"]])
    share = operations * found["pairs_per_s"] / speed
    return found | {"share": share, "machine": speed, "operations": operations}


def summary(job: dict, steps: list[float], peak: int) -> dict:
    """Of what was measured; steps: the seconds of each step but the first."""
    return {
        "pairs_per_s": job["pairs"] * len(steps) / sum(steps),
        "step_s": [round(s, 4) for s in steps],
        "peak_gb": peak / 1e9,
    }


def theirs(job: dict, folder: Path) -> dict:
    import datasets
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            ends.append(now())

    args = DPOConfig(
        output_dir=str(folder / "trl"), use_cpu=DEVICE == "cpu", bf16=False, report_to="none",
        save_strategy="no", gradient_checkpointing=job["checkpointing"], disable_tqdm=True,
        max_length=None, precompute_ref_log_probs=True, max_steps=job["steps"], learning_rate=1e-6,
        per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=job["pairs"] // job["batch"],
        optim="adamw_torch_fused", logging_strategy="no",
        use_liger_kernel=job.get("liger", False),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=DTYPES[job["dtype"]])
    rows = datasets.Dataset.from_list([row for _, row in read_rows(job["file"])])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    how = {"train_dataset": rows, "processing_class": tokenizer, "callbacks": [Clock()]}
    DPOTrainer(model, args=args, **how).train()
    steps = seconds(ends)
    return summary(job, steps, peak_bytes())


def measure(job: dict, timeout: float | None = None) -> dict:
    """In a process of its own, so that memory is its own too.

    {"failed": why} where it does not end, or not within timeout (s).
    """
    command = [sys.executable, "-m", "tests.benchmarks.training", "--worker", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {timeout:.0f} s: the time was up", "stopped": True}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": " / ".join(said[-2:]) or f"exit {done.returncode}"}
    return json.loads(lines[-1].removeprefix("RESULT "))


def liger_runs() -> bool:
    """Its kernels need a GPU and triton."""
    return DEVICE == "cuda" and all(map(importlib.util.find_spec, ("liger_kernel", "triton")))


def first_rows(data: str, count: int, folder: Path) -> Path:
    """The first rows of a preference file, or as many of the small world where it is not there."""
    file = folder / f"{Path(data).parent.name}.jsonl"
    if Path(data).is_file():
        rows = [row for _, row in read_rows(data)][:count]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        print(f"{data} is not there: pairs of the small world instead")
        flags = ["--model", "weights/tiny", "--kind", "math", "--count", str(count)]
        smallworld(["pairs", *flags, "--out", str(file)])
    return file


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="weights/smollm2-135m-instruct")
    p.add_argument(
        "--data",
        nargs="*",
        default=["gsm8k_pairs", "helpful"],
        help="names in ../shared/data, or files",
    )
    p.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=list(DTYPES))
    p.add_argument("--pairs", type=int, default=8, help="a step")
    p.add_argument("--steps", type=int, default=STEPS, help="the first is not counted")
    batches = [1, 2, 4, 8] if DEVICE == "cuda" else [1, 2, 4]
    p.add_argument("--trl-batch", type=int, nargs="*", default=batches,
                   help="pairs a forward to try for TRL")  # fmt: skip
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", help="also write every number here")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        job = json.loads(args.worker)
        side = ours if job["side"] == "minibnf" else theirs
        with tempfile.TemporaryDirectory() as folder:
            print("RESULT " + json.dumps(side(job, Path(folder))), flush=True)
        os._exit(0)  # some of the peer's threads outlive its work
    print(machine())
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for data in args.data:
            path = data if Path(data).is_file() else f"../shared/data/{data}/train.jsonl"
            file = first_rows(path, args.pairs * args.steps, Path(folder))
            for dtype in args.dtypes:
                found += one_table(args, data, str(file), dtype)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def fastest_of_trl(common: dict, batches: list[int]) -> tuple[str, dict]:
    """(name, job) of the best number of pairs per forward; prints what was tried.

    Checkpointing only ever costs time, but where memory is short it makes the largest batch fit.
    """
    kernels = (False, True) if liger_runs() else (False,)
    ways = [(batch, False, liger) for liger in kernels for batch in batches]
    ways.append((max(batches), True, False))
    rates, jobs = {}, {}
    for batch, checkpointing, liger in ways:
        job = common | {
            "side": "trl", "batch": batch, "checkpointing": checkpointing, "liger": liger
        }  # fmt: skip
        name = f"TRL{' + Liger' * liger} dpo, {batch} a forward{', checkpointing' * checkpointing}"
        result = measure(job)
        if "failed" in result:
            print(f"tried    {name:40} failed: {result['failed']}")
            continue
        rates[name], jobs[name] = result["pairs_per_s"], job
        print(f"tried    {name:40} {rates[name]:.3f} pairs/s, {result['peak_gb']:.1f} GB")
    best = max(rates, key=rates.get)
    return best, jobs[best]


def one_table(args, data: str, file: str, dtype: str) -> list[dict]:
    common = {"model": args.model, "file": file, "pairs": args.pairs, "dtype": dtype}
    common["steps"] = args.steps
    jobs = {
        f"minibnf {loss}, {tokens} tokens": common
        | {"side": "minibnf", "loss": loss, "max_tokens": tokens}
        for loss, tokens in (("bnf", TOKENS[0]), ("bnf", TOKENS[1]), ("dpo", TOKENS[0]))
    }
    peer, job = fastest_of_trl(common, args.trl_batch)
    jobs[peer] = job
    results = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, job in jobs.items():
            results[name].append(measure(job))
            if "failed" in results[name][-1]:
                raise SystemExit(f"{name}: {results[name][-1]['failed']}")
    print(f"\n{data}, {dtype}, {args.pairs} pairs a step, medians of {args.rounds} rounds")
    print("| side | pairs/s | against TRL, by round | peak GB | share of the matrix speed |")
    print("|---|---|---|---|---|")
    for name, rounds in results.items():
        print(line_of(name, rounds, None if name == peer else results[peer]), flush=True)
    print()
    return [{"data": data, "dtype": dtype, "side": name, "rounds": results[name]} for name in jobs]


def line_of(name: str, rounds: list[dict], peer: list[dict] | None) -> str:
    """A side's line of the table; peer: the other side's rounds, None for the peer itself."""

    def median(key: str) -> float:
        return statistics.median(r[key] for r in rounds)

    ratio, share = "1", ""
    if peer:
        ratios = [a["pairs_per_s"] / b["pairs_per_s"] for a, b in zip(rounds, peer, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        share = f"{median('share'):.0%} of {median('machine') / 1e9:.0f} GFLOP/s"
    rate, peak = median("pairs_per_s"), median("peak_gb")
    return f"| {name} | {rate:.3f} | {ratio} | {peak:.2f} | {share} |"


if __name__ == "__main__":
    main()
