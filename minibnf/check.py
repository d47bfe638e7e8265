"""What a checkpoint is, whether it is whole, and what memory training it takes.

    python -m minibnf.check DIR [--max-tokens N] [--gradient-checkpointing] [--values]

DIR may also be a run's folder: then its model/ is meant. Of the weights' files the headers alone
are read (--values reads all). What is wrong is reported as train would report it.
"""

import sys
from pathlib import Path

import torch

from minibnf.files.config import Config, announce_ignored, read_config
from minibnf.files.safetensors import FLOATS, tensors_of
from minibnf.files.terminal import ArgumentParser, counted, in_one_line, positive, show
from minibnf.files.tokenizer import Tokenizer, load_tokenizer
from minibnf.model import Transformer, tensors_stored


def memory(
    c: Config, parameters: int, tokens: int, dtype: str, recompute: bool = False
) -> dict[str, float]:
    """{what: bytes} of a training step; tokens per micro-batch, dtype of the products.

    recompute: gradient checkpointing, which keeps every layer's input and one layer's insides.
    The sum is low. It leaves out Python and PyTorch (0.3 GB) and what the allocator cannot use
    again: a step of SmolLM2-135M in float32 with 1,024 tokens really took 4.16 GB (VmHWM of 8
    pairs of gsm8k_pairs), where this says 3.62.
    """
    width = {"float32": 4, "bfloat16": 2}[dtype]
    D, V, L = c.hidden_size, c.vocab_size, c.num_hidden_layers
    held = 1 if recompute else L  # the layers whose insides there are at once
    layers = held * layer_bytes(c, width) + (L * D * width if recompute else 0)
    matrices = parameters - embeddings_of(c)
    copied = matrices * held // L if dtype == "bfloat16" else 0
    return {
        "weights, float32": 4 * parameters,
        "gradients, float32": 4 * parameters,
        "AdamW's two moments, float32": 8 * parameters,
        "weights in bfloat16, a working copy": 2 * copied,
        "activations": tokens * layers,
        "logits, and gradients of embeddings": 4 * min(2**24, tokens * V) + 12 * V * D,
    }


def embeddings_of(c: Config) -> int:
    return c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)


def layer_bytes(c: Config, width: int) -> int:
    """Bytes that autograd keeps of a token in one layer; width: bytes of a number in products.

    A norm keeps what goes in, what is normed and what comes out (two of Gemma's four feed no
    product and keep two of these); the MLP keeps gate and up; attention q, k, v and twice its
    output, in float32. Left out are norms of q and k, and the scores under a soft cap.
    """
    norms = 10 if c.gemma else 6
    heads = 3 * c.num_attention_heads + 2 * c.num_key_value_heads
    return width * (norms * c.hidden_size + 2 * c.intermediate_size) + 4 * heads * c.head_dim


def report(directory, max_tokens=2048, values=False, recompute=False) -> str:
    """What main prints; announces the fields of config.json that are ignored.

    Raises ValueError, OSError or ImportError where train could not use the directory.
    """
    c, raw = read_config(directory)
    with torch.device("meta"):
        model = Transformer(c, raw)
    stored, tokenizer = tensors_stored(directory, model), load_tokenizer(directory)
    for _ in tensors_of(stored) if values else ():
        pass  # it raises where a number is not finite
    announce_ignored(directory, raw)

    files, known = {x.file for x in stored.values()}, min(tokenizer.vocab_size, c.vocab_size)
    beyond = tokenizer.vocab_size > known
    kinds = " and ".join(sorted({FLOATS[x.dtype] for x in stored.values()}))
    size = sum(file.stat().st_size for file in files) / 1e6
    parameters = sum(p.numel() for p in model.parameters())
    tied = "tied" if c.tie_word_embeddings else "not tied"
    finite = ", every number finite" if values else ""
    windows = [layer.window for layer in c.layers if layer.window is not None]
    lines = {
        "model": f"{directory}: {c.family}",
        "parameters": f"{parameters:,}, {embeddings_of(c):,} of them embeddings, {tied}",
        "stored": f"{kinds}, {size:,.1f} MB in {counted(len(files), 'file')}",
        "tensors": f"{len(stored)}, as config.json says{finite}",
        "layers": f"{c.num_hidden_layers} of width {c.hidden_size}, {c.num_attention_heads} heads "
        f"of {c.head_dim} on {c.num_key_value_heads} of keys and values, MLP {c.intermediate_size}",
        "context": f"{c.max_position_embeddings} tokens"
        + (f"; {len(windows)} layers see {windows[0]} tokens back" if windows else ""),
        "vocabulary": f"{c.vocab_size}, {known} of them in "
        + tokenizer.backend.path.name
        + (f"; data that needs one from id {c.vocab_size} on is refused" if beyond else ""),
        "chat": chat_of(tokenizer),
    }
    text = [f"{name:12}{value}" for name, value in lines.items()]
    if tokenizer.closing_warning:
        text.append(tokenizer.closing_warning)
    return "\n".join([*text, "", *memory_table(c, parameters, max_tokens, recompute)])


def chat_of(tokenizer: Tokenizer) -> str:
    chat = "a template" if tokenizer.source else "no template, so data must be text, not messages"
    ids = sorted(tokenizer.end_ids, key=lambda i: (i != tokenizer.closing_id, i))
    ends = ", ".join(f"{tokenizer.decode([i], skip_special=False)} ({i})" for i in ids)
    return f"{chat}; a turn ends at {ends}"


def memory_table(c: Config, parameters: int, max_tokens: int, recompute: bool) -> list[str]:
    wide, half = (
        memory(c, parameters, max_tokens, dtype, recompute) for dtype in ("float32", "bfloat16")
    )
    for table in (wide, half):
        table["together, at least"] = sum(table.values())
    unit, size = ("GB", 1e9) if wide["together, at least"] >= 1e9 else ("MB", 1e6)
    title = f"{unit} to train on a CPU at --max-tokens {max_tokens}"
    lines = [f"  {name:46}{wide[name] / size:8.2f}{half[name] / size:10.2f}" for name in wide]
    return [f"{title:48}{'float32':>8}{'bfloat16':>10}", *lines]


@in_one_line
def main(argv: list[str] | None = None) -> None:
    p = ArgumentParser("minibnf check", allow_abbrev=False)
    p.description = (
        "Say what a checkpoint is, whether it is whole, and what memory training it takes."
    )
    add = p.add_argument
    # fmt: off
    add("directory", type=Path, metavar="DIR", help="a checkpoint in Hugging Face layout")
    add("--max-tokens", type=positive, default=2048, metavar="N",
        help="tokens per micro-batch, as in train; default 2048, as on a CPU")
    add("--gradient-checkpointing", action="store_true", help="as in train")
    add("--values", action="store_true", help="read every weight and check that it is finite")
    # fmt: on
    args = p.parse_args(argv)
    inner = args.directory / "model"  # of a run's folder
    folder = inner if (inner / "config.json").is_file() else args.directory
    show(report(folder, args.max_tokens, args.values, args.gradient_checkpointing))


if __name__ == "__main__":
    sys.exit(main())
