"""What fits: full fine-tuning of published models on cards of 16, 24, 48 and 80 GB, as Markdown.

    python -m tests.benchmarks.memory

By minibnf/check.py's own formula, for a GPU: float32 weights, gradients and AdamW's moments (16
bytes per parameter), a copy of the weights in bfloat16, activations, logits. A cell is the largest
micro-batch, in tokens, up to the trainer's 16,384; "no" where fewer than 512 tokens fit. Of each
card two gigabytes are left free (CUDA itself, and a chunk of logits, of which a card may take 1 GiB
where the formula counts 64 MiB), and a twentieth (what the allocator cannot use again).
Estimates: nothing is run, so no GPU is needed. On an H200, steps of 32 pairs of gsm8k_pairs (about
10,600 tokens) took 33.4 GB with Llama-3.2-1B's shape and 8.9 with SmolLM2-135M's, where this says
39.5 and 9.6.
"""

import torch

from minibnf.check import memory
from minibnf.files.config import Config, parse_config
from minibnf.model import Transformer

CARDS = (16, 24, 48, 80)  # GB
MOST, LEAST = 16384, 512  # tokens of a micro-batch
COLUMNS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
           "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")  # fmt: skip
SHAPES = {  # from their published config.json
    "SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, 64, 49152),
    "SmolLM2-360M": ("llama", 960, 2560, 32, 15, 5, 64, 49152),
    "SmolLM2-1.7B": ("llama", 2048, 8192, 24, 32, 32, 64, 49152),
    "Llama-3.2-1B": ("llama", 2048, 8192, 16, 32, 8, 64, 128256),
    "Llama-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, 128, 128256),
    "Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936),
    "Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936),
    "Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936),
}


def raw_config(name: str) -> dict:
    """A config.json of the shape; the embeddings of all these models are tied."""
    fields = dict(zip(COLUMNS, SHAPES[name], strict=True))
    return fields | {"tie_word_embeddings": True, "max_position_embeddings": 8192}


def size_of(raw: dict) -> tuple[Config, int]:
    """(the Config, how many parameters)"""
    c = parse_config(raw, "table")
    with torch.device("meta"):
        model = Transformer(c, raw)
    return c, sum(p.numel() for p in model.parameters())


def gigabytes(c: Config, parameters: int, tokens: int, recompute: bool) -> float:
    return sum(memory(c, parameters, tokens, "bfloat16", recompute).values()) / 1e9


def tokens_that_fit(c: Config, parameters: int, card: int, recompute: bool) -> int:
    """The largest micro-batch, a multiple of 256 up to MOST; 0 where fewer than LEAST fit."""
    room = card * 0.95 - 2
    sizes = range(LEAST, MOST + 1, 256)
    return max((n for n in sizes if gigabytes(c, parameters, n, recompute) <= room), default=0)


def table() -> str:
    heads = [f"{card} GB" for card in CARDS]
    lines = [
        f"| model | parameters | `--gradient-checkpointing` | GB at {MOST:,} tokens | "
        + " | ".join(heads) + " |",
        "|---|---|---|---|" + "---|" * len(CARDS),
    ]  # fmt: skip
    for name in SHAPES:
        c, parameters = size_of(raw_config(name))
        for recompute in (False, True):
            fits = [tokens_that_fit(c, parameters, card, recompute) for card in CARDS]
            cells = [
                name,
                f"{parameters / 1e9:.2f} B",
                "yes" if recompute else "no",
                f"{gigabytes(c, parameters, MOST, recompute):.1f}",
                *(f"{n:,}" if n else "no" for n in fits),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
