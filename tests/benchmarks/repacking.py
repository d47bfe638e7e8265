"""What rounding alone does to BNF's weights: the reference against itself, packed otherwise.

    python -m tests.benchmarks.repacking [--model DIR] [--data FILE] [--rows 64]

The reference is read in the packs of the first epoch, so there policy and reference agree exactly
(on a CPU). Later epochs pack other rows together, products have other sizes, and some round
otherwise.
"""

import argparse

import torch

from minibnf.data import order_of_epoch, pack, read_examples
from minibnf.files.tokenizer import load_tokenizer
from minibnf.losses import LOSSES, bnf_weight
from minibnf.model import load
from minibnf.step import batch_logps, read_all
from tests.benchmarks import DEVICE, machine


def epoch_logps(model, examples, epoch: int, dtype) -> torch.Tensor:
    """(N,): the log-probabilities of response tokens, read in an epoch's packs (batches of 8)."""
    order = order_of_epoch(len(examples), 0, epoch)
    steps = (pack(examples, order[i : i + 8], 2048) for i in range(0, len(order), 8))

    def read(batch):
        return batch_logps(model, batch, LOSSES["bnf"], dtype)

    return torch.cat(read_all(model, examples, steps, read, f"epoch {epoch}"))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="weights/smollm2-135m-instruct")
    p.add_argument("--data", default="../shared/data/gsm8k_pairs/train.jsonl")
    p.add_argument("--rows", type=int, default=64)
    args = p.parse_args()
    print(machine())
    model = load(args.model, dtype=torch.float32).to(DEVICE)
    examples, _ = read_examples(args.data, load_tokenizer(args.model), 8192)
    for dtype in (torch.float32, torch.bfloat16):
        reference = epoch_logps(model, examples[: args.rows], 0, dtype)
        for epoch in (0, 1, 2):
            logps = epoch_logps(model, examples[: args.rows], epoch, dtype)
            w = bnf_weight(logps, reference)
            shift = (logps - reference).abs()
            print(
                f"{str(dtype).removeprefix('torch.'):9} epoch {epoch + 1}: {len(w)} tokens, "
                f"mean |log p - log r| {shift.mean():.2e} nat, w: mean {w.mean():.6f}, "
                f"least {w.min():.4f}, exactly 1 {(w == 1).double().mean():.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
