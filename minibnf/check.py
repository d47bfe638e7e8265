"""What a checkpoint is, whether it is whole, and what memory training it takes.

    python -m minibnf.check DIR [--max-tokens N] [--gradient-checkpointing] [--values]

The weights' files are read by their headers alone (--values reads all), and what is wrong is reported as train would report
it. The memory is the largest resident size of `minibnf.train --loss bnf` on a CPU with full micro-batches: what autograd
keeps is counted tensor by tensor (tests/test_check.py has PyTorch count it); two numbers, SHARE and BASE, were measured.
"""

import argparse
import sys
from pathlib import Path

import torch

from minibnf.files.config import Config, announce_ignored, read_config
from minibnf.files.safetensors import FLOATS, tensors_of
from minibnf.files.tokenizer import load_tokenizer
from minibnf.model import Transformer, tensors_stored

MAX_TOKENS = 2048  # train's default on a CPU
EXAMPLE = 512  # tokens of an example, prompt and responses; counts where attention keeps something of its square
# Measured on SmolLM2-135M-Instruct (PyTorch 2.13, Linux, glibc): peak resident size as the kernel counts it (ru_maxrss) of
# train runs of 8 pairs of 350 tokens a step, float32 at --max-tokens 640, 1024 and 2048, bfloat16 at 1024 and 2048, each
# also with --gradient-checkpointing. With these two numbers the estimate lies between 7 % under and 21 % over each of them.
BASE = 0.3e9  # bytes: Python, PyTorch and a tokenizer
SHARE = 0.3  # of what comes and goes within a step: what the allocator cannot use again at once


def memory(
    c: Config, parameters: int, tokens: int, dtype: str, example=EXAMPLE, recompute=False
) -> dict[str, float]:
    """{what: bytes} at the peak of a training step with micro-batches of so many tokens; dtype: what is computed in; recompute:
    with gradient checkpointing, every layer's input kept, but one layer's insides and working copies at a time."""
    b, V, D, L = (
        {"float32": 4, "bfloat16": 2}[dtype],
        c.vocab_size,
        c.hidden_size,
        c.num_hidden_layers,
    )
    layers = layer_bytes(c, b, example) + L * D * b if recompute else L * layer_bytes(c, b, example)
    matrices = parameters - V * D * (1 if c.tie_word_embeddings else 2)
    chunk = min(max(16, 2**24 // V), tokens)  # tokens whose logits logprob.py holds at once
    logits = chunk * V * (4 + (8 if c.final_softcap else 0))
    found = {
        "weights, float32": 4 * parameters,
        "gradients, float32": 4 * parameters,
        "AdamW's two moments, float32": 8 * parameters,
        "weights in bfloat16, a working copy": 2 * matrices // (L if recompute else 1)
        if b == 2
        else 0,
        "activations": tokens * (layers + 2 * D * b + norm_bytes(D, c, b, True)),
        "logits, and gradients of embeddings": logits + 12 * V * D + (2 * V * D if b == 2 else 0),
    }
    found["what the allocator cannot use again"] = SHARE * sum(list(found.values())[3:])
    return found | {"Python and PyTorch": BASE}


def layer_bytes(c: Config, b: int, example: int) -> float:
    """Bytes that autograd keeps of one token in one layer, products being taken in numbers of b bytes."""
    D, H, K, d = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    kept = 2 * norm_bytes(D, c, b, True) + 2 * c.intermediate_size * b  # gate and up
    if c.gemma:
        kept += 2 * norm_bytes(D, c, b, False)
    if c.qk_norm:
        kept += (H + K) * norm_bytes(d, c, b, False)
    kept += H * d * b  # the output, in another order
    if c.attention_softcap is None:
        return (
            kept + (2 * H + 2 * K) * d * 4 + 4 * H
        )  # q, k, v and the output, which attend in float32; a sum a head
    # scores by hand: tanh and softmax; keys and values repeated
    return kept + 3 * H * d * 4 + H * example * (4 + 4)


def norm_bytes(n: int, c: Config, b: int, feeds_a_product: bool) -> int:
    """Of one RMSNorm of n numbers: what goes in and what is normed, both kept in float32 where it is wider; what comes out."""
    return 4 * n + (4 if c.gemma else b) * n + (b * n if feeds_a_product else 0) + 4


def report(
    directory, max_tokens: int = MAX_TOKENS, values: bool = False, recompute: bool = False
) -> str:
    """What main prints; announces the fields of config.json that are ignored.

    Raises ValueError, OSError or ImportError where the directory is no checkpoint that train can
    use.
    """
    c, raw = read_config(directory)
    with torch.device("meta"):
        model = Transformer(c, raw)
    stored, tokenizer = tensors_stored(directory, model), load_tokenizer(directory)
    for name, tensor in tensors_of(stored) if values else ():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{stored[name].file}: tensor '{name}' holds a number that is not finite"
            )

    announce_ignored(directory, raw)
    files = {x.file for x in stored.values()}
    parameters = sum(p.numel() for p in model.parameters())
    embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    size = sum(file.stat().st_size for file in files)
    kinds = sorted({FLOATS[x.dtype] for x in stored.values()})
    windows = [layer.window for layer in c.layers if layer.window is not None]
    window = f"; {len(windows)} layers see {windows[0]} tokens back" if windows else ""
    ids = sorted(tokenizer.end_ids, key=lambda i: (i != tokenizer.closing_id, i))
    ends = ", ".join(f"{tokenizer.decode([i], skip_special=False)} ({i})" for i in ids)
    chat = "a template" if tokenizer.source else "no template, so data must be text, not messages"
    vocabulary = f"{c.vocab_size}, {tokenizer.vocab_size} of them in {tokenizer.backend.path.name}"
    if tokenizer.vocab_size > c.vocab_size:
        vocabulary = (
            f"{c.vocab_size}; {tokenizer.backend.path.name} holds {tokenizer.vocab_size} tokens, "
            f"and data that needs one from id {c.vocab_size} on is refused"
        )
    lines = {
        "model": f"{directory}: {c.family}",
        "parameters": f"{parameters:,}, {embeddings:,} of them embeddings, {'tied' if c.tie_word_embeddings else 'not tied'}",
        "stored": f"{' and '.join(kinds)}, {size / 1e6:,.1f} MB in {len(files)} file{'s' * (len(files) > 1)}",
        "tensors": f"{len(stored)}, as config.json says"
        + (", every number finite" if values else ""),
        "layers": f"{c.num_hidden_layers} of width {c.hidden_size}, {c.num_attention_heads} heads of {c.head_dim} on "
        f"{c.num_key_value_heads} of keys and values, MLP {c.intermediate_size}",
        "context": f"{c.max_position_embeddings} tokens{window}",
        "vocabulary": vocabulary,
        "chat": f"{chat}; a turn ends at {ends}",
    }
    text = "\n".join(f"{name:12}{value}" for name, value in lines.items())
    text += f"\n{tokenizer.closing_warning}" if tokenizer.closing_warning else ""
    text += f"\n\n{f'GB to train on a CPU, {max_tokens} tokens a micro-batch':48}{'float32':>8}{'bfloat16':>10}\n"
    columns = [
        memory(c, parameters, max_tokens, dtype, recompute=recompute)
        for dtype in ("float32", "bfloat16")
    ]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    rows.append(("together, about", *(sum(column.values()) for column in columns)))
    return text + "\n".join(f"  {name:46}{x / 1e9:8.2f}{y / 1e9:10.2f}" for name, x, y in rows)


def main(argv: list[str] | None = None) -> int:
    """The command line; exit status 1 and one line on standard error where the directory is no good."""
    parser = argparse.ArgumentParser(
        "minibnf check", description="What a checkpoint is, and the memory to train it."
    )
    parser.add_argument("directory", metavar="DIR", help="a checkpoint in Hugging Face layout")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, metavar="N",
                        help=f"tokens a micro-batch, as in train; default {MAX_TOKENS}")  # fmt: skip
    parser.add_argument("--gradient-checkpointing", action="store_true", help="as in train")
    parser.add_argument(
        "--values", action="store_true", help="read every weight and see that it is finite"
    )
    args = parser.parse_args(argv)
    if args.max_tokens < 1:
        parser.error(f"--max-tokens must be 1 or more, not {args.max_tokens}")
    try:
        print(
            report(Path(args.directory), args.max_tokens, args.values, args.gradient_checkpointing)
        )
    except (ValueError, OSError, ImportError) as error:
        inner = Path(args.directory) / "model"  # of a run's folder
        print(
            f"error: {error}" + f"\nDid you mean {inner}?" * (inner / "config.json").is_file(),
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
