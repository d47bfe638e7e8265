"""Batched greedy generation against transformers' generate, both sides alternating.

    python -m tests.benchmarks.generation [--model DIR] [--data FILE.jsonl] [--prompts 64]
        [--new-tokens 128] [--static] [--json FILE]

Both have the same prompts, dtype and threads. Prompts are the "prompt" of preference rows through
the model's chat template, as they stand where it has none. transformers gets them in one
left-padded batch, its fastest way here. Both stop a row at the end of its turn. How many outputs
are the same is printed too (in bfloat16 a near tie of two tokens may fall either way).

--static: transformers also with a static cache, for which it compiles the forward pass itself on
CUDA (torch.compile, CUDA graphs). There each side first runs once uncounted.
"""

import argparse
import gzip
import itertools
import json
import statistics
import time
from functools import partial
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
    """The first `count` prompts of a preference file, as ids ready for an answer.

    The small world's where the file is not there.
    """
    if Path(file).is_file():
        with (gzip.open if file.endswith(".gz") else open)(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line)["prompt"] for line in itertools.islice(lines, count)]
    else:
        print(f"{file} is not there: prompts of the small world instead")
        rows = [problem.prompt for problem in problems(QA + REASONING, "test", count, seed=0)]
    if tokenizer.source is None:
        return [tokenizer.encode_text(row) for row in rows]
    chats = [row if isinstance(row, list) else [{"role": "user", "content": row}] for row in rows]
    return [tokenizer.encode_chat(chat, add_generation_prompt=True) for chat in chats]


def theirs(
    model, prompts: list[list[int]], new_tokens: int, pad: int, ends: set[int], cache=None
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
        cache_implementation=cache,
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
    p.add_argument("--static", action="store_true", help="transformers with a static cache, too")
    p.add_argument("--json", help="also write every number here")
    args = p.parse_args()
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(args.model)
    prompts, ends = prompts_of(args.data, tokenizer, args.prompts), set(tokenizer.end_ids)
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    print(
        f"{len(prompts)} prompts of {shortest} to {longest} tokens, "
        f"{args.new_tokens} new tokens at most"
    )
    print(machine())
    greedy = {"max_new_tokens": args.new_tokens, "temperature": 0, "stop_ids": ends}
    padding = (args.new_tokens, tokenizer.eos_id, ends)
    found = {}
    for name in args.dtypes:
        model = load(args.model, dtype=DTYPES[name]).to(DEVICE)
        peer = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[name])
        peer = peer.eval().to(DEVICE)
        sides = {
            "minibnf": partial(generate, model, prompts, **greedy),
            "transformers": partial(theirs, peer, prompts, *padding),
        }
        found[name] = compared(name, sides, args.rounds)
        write(args.json, found)
        if args.static:  # last, for its compiler may take its time
            static = partial(theirs, peer, prompts, *padding, cache="static")
            sides = {"minibnf": sides["minibnf"], "transformers, static": static}
            found[f"{name}, static"] = compared(name, sides, args.rounds)
            write(args.json, found)


def write(file: str | None, found: dict) -> None:
    if file:
        Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compared(name: str, sides: dict, rounds: int) -> dict:
    """Run the sides in turn; print medians, the ratios by round and how many outputs agree.

    Returns {side: {"seconds": of each round, "tokens": new ones, "same": outputs as minibnf's}},
    or {"failed": why} for a peer that does not end.
    """
    found, outputs = {side: {"seconds": []} for side in sides}, {}
    for k in range(-1 if DEVICE == "cuda" else 0, rounds):  # compilers work in round -1
        for side, run in sides.items():
            if "failed" in found[side]:
                continue
            began = time.perf_counter()
            try:
                outputs[side] = run()
                wait()
            except Exception as error:
                if side == "minibnf":
                    raise
                found[side] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
                continue
            if k >= 0:
                found[side]["seconds"].append(time.perf_counter() - began)
    for side, numbers in found.items():
        if "failed" in numbers:
            print(f"{name:9} {side:20} failed: {numbers['failed']}")
            continue
        numbers["tokens"], s = sum(map(len, outputs[side])), statistics.median(numbers["seconds"])
        print(f"{name:9} {side:20} {s:7.2f} s  {numbers['tokens'] / s:7.0f} tokens/s")
        if side != "minibnf":
            ours, of = outputs["minibnf"], len(outputs["minibnf"])
            pairs = zip(found["minibnf"]["seconds"], numbers["seconds"], strict=True)
            ratios = [b / a for a, b in pairs]
            numbers["same"] = sum(a == b for a, b in zip(ours, outputs[side], strict=True))
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{name:9} ratio {spread}, {numbers['same']} of {of} outputs the same")
    return found


if __name__ == "__main__":
    main()
