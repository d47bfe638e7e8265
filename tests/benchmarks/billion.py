"""A model of 1.07 billion parameters trained in 20 GB: memory and speed, beside check's estimate.

    python -m tests.benchmarks.billion [--steps 3] [--dtype bfloat16] [--pairs 8]

Random weights in Llama-3.2-1B's layers (16 of width 2048), with the tokenizer and the vocabulary of
the model in --like. The trainer runs as a user runs it, for a few steps: float32 weights, gradients
and AdamW, --gradient-checkpointing. Checkpoint and model are saved at the end, 17 GB in a temporary
folder (TMPDIR says where).
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from minibnf.check import memory
from minibnf.files.config import parse_config
from minibnf.train import main as train
from tests.benchmarks import DEVICE, machine, peak_bytes
from tests.benchmarks.training import first_rows

LAYERS = dict(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--like",
        default="weights/smollm2-135m-instruct",
        help="whose tokenizer and vocabulary it has",
    )
    p.add_argument("--data", default="../shared/data/gsm8k_pairs/train.jsonl")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    p.add_argument("--pairs", type=int, default=8, help="a step")
    p.add_argument("--steps", type=int, default=3)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(
            args.like, folder / "model", ignore=shutil.ignore_patterns("*.safetensors*")
        )
        raw = json.loads((folder / "model" / "config.json").read_text()) | LAYERS | {"head_dim": 64}
        (folder / "model" / "config.json").write_text(json.dumps(raw))
        data = first_rows(args.data, args.pairs * args.steps, folder)
        flags = [
            "--model", folder / "model", "--from-scratch", "--data", data, "--out", folder / "run",
            "--dtype", args.dtype, "--batch-size", args.pairs, "--max-steps", args.steps,
            "--gradient-checkpointing",
        ]  # fmt: skip
        if train([str(flag) for flag in flags]) != 0:
            raise SystemExit("the trainer did not end well")
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        facts = json.loads((folder / "run" / "config.json").read_text())["facts"]
    print(machine())
    print(
        f"{facts['parameters'] / 1e9:.2f} billion parameters, {args.dtype}, "
        f"micro-batches of {facts['max_tokens']} tokens"
    )
    for row in rows:
        print(f"step {row['step']}  loss {row['loss']:+.3f}  {row['tokens_per_s']:.0f} tokens/s")
    print(f"peak     {peak_bytes() / 1e9:.1f} GB")
    if DEVICE == "cpu":  # what check estimates
        config = parse_config(raw, "config.json")
        size, tokens = facts["parameters"], facts["max_tokens"]
        estimate = sum(memory(config, size, tokens, args.dtype, recompute=True).values())
        print(f"check    at least {estimate / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
