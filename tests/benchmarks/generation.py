"""Batched greedy generation against transformers' generate: the same prompts, dtype and threads, both sides alternating.

    python -m tests.benchmarks.generation [--model DIR] [--data FILE.jsonl] [--prompts 64] [--new-tokens 128]

Prompts are the "prompt" of preference rows through the model's chat template. transformers gets them in one left-padded
batch, its fastest way here. Both stop a row at the end of its turn; how many outputs are the same is printed too (in
bfloat16 a near tie of two tokens may fall either way).
"""

import argparse
import gzip
import itertools
import json
import statistics
import time
from itertools import takewhile
from pathlib import Path

import torch

from minibnf.files.tokenizer import load_tokenizer
from minibnf.generate import generate
from minibnf.lab.language import QA, REASONING, problems
from minibnf.machine import DTYPES
from minibnf.model import load
from tests.benchmarks import DEVICE, machine, wait


def prompts_of(file: str, tokenizer, count: int) -> list[list[int]]:
    """The first `count` prompts of a preference file, as ids ready for an answer; the small world's where it is not there."""
    if Path(file).is_file():
        with (gzip.open if file.endswith(".gz") else open)(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line)["prompt"] for line in itertools.islice(lines, count)]
    else:
        print(f"{file} is not there: prompts of the small world instead")
        rows = [problem.prompt for problem in problems(QA + REASONING, "test", count, seed=0)]
    chats = [row if isinstance(row, list) else [{"role": "user", "content": row}] for row in rows]
    return [tokenizer.encode_chat(chat, add_generation_prompt=True) for chat in chats]


def theirs(
    model, prompts: list[list[int]], new_tokens: int, pad: int, ends: set[int]
) -> list[list[int]]:
    """transformers' generate -> each row's new ids, up to and including the end of its turn."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    new = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=pad,
    )
    rows = [row[longest:].tolist() for row in new]
    cut = [list(takewhile(lambda i: i not in ends, row)) for row in rows]
    return [row[: len(c) + 1] for row, c in zip(rows, cut, strict=True)]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="weights/smollm2-135m-instruct")
    p.add_argument("--data", default="../shared/data/helpful/train.jsonl")
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--new-tokens", type=int, default=128)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=list(DTYPES))
    args = p.parse_args()
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(args.model)
    prompts, ends = prompts_of(args.data, tokenizer, args.prompts), set(tokenizer.end_ids)
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    print(
        f"{len(prompts)} prompts of {shortest} to {longest} tokens, {args.new_tokens} new tokens at most"
    )
    print(machine())
    for name in args.dtypes:
        ours = load(args.model, dtype=DTYPES[name]).to(DEVICE)
        peer = (
            AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[name]).eval().to(DEVICE)
        )
        sides = {
            "minibnf": lambda ours=ours: generate(
                ours, prompts, max_new_tokens=args.new_tokens, temperature=0, stop_ids=ends
            ),
            "transformers": lambda peer=peer: theirs(
                peer, prompts, args.new_tokens, tokenizer.eos_id, ends
            ),
        }
        seconds, outputs = {side: [] for side in sides}, {}
        for _ in range(args.rounds):
            for side, run in sides.items():
                began = time.perf_counter()
                outputs[side] = run()
                wait()
                seconds[side].append(time.perf_counter() - began)
        medians = {side: statistics.median(s) for side, s in seconds.items()}
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        same = sum(a == b for a, b in zip(*outputs.values(), strict=True))
        new = sum(map(len, outputs["minibnf"]))
        for side, s in medians.items():
            print(f"{name:9} {side:13} {s:7.2f} s  {new / s:7.0f} tokens/s")
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:9} ratio {spread}, {same} of {len(prompts)} outputs the same")


if __name__ == "__main__":
    main()
