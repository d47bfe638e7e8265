"""Figures of pages 04, 06, 07, 08 and 10, as SVG: python -m tutorials.draw_flow tutorials/figures

Diagrams are pale boxes with dark text and grey lines, which can be read on white and on black. They
are written as text, so they are the same on every machine; curves are drawn by matplotlib.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path

import torch

from minibnf.data import pack, pair
from minibnf.files.tokenizer import load_tokenizer
from minibnf.run import BAD, GOOD

PROMPT, CHOSEN, REJECTED, MODEL, DATA = "#d0d7de", "#9bd3cf", "#eeb49f", "#b9cdf0", "#ece3c4"
INK, GREY = "#1f2328", "#808080"
FONT = 'font-family="system-ui, sans-serif"'


class Drawing:
    """SVG elements, in the order in which they are drawn; y grows downwards, units are pixels."""

    def __init__(self, width: int, height: int):
        self.size, self.parts = (width, height), []

    def text(self, x, y, text, size=13, colour=GREY, anchor="middle", bold=False):
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" {FONT} '
            f'text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def box(self, x, y, width, height, colour, *lines, size=13):
        """A box with its lines of text in the middle, the first of several in bold."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" '
            f'fill="{colour}" stroke="{GREY}"/>'
        )
        top = y + height / 2 - (len(lines) - 1) * 8.5 + 0.35 * size
        for i, line in enumerate(lines):
            bold = i == 0 and len(lines) > 1
            self.text(
                x + width / 2, top + 17 * i, line, size if i == 0 else size - 1.5, INK, bold=bold
            )

    def arrow(self, *points):
        """A line through the points, with a head at the last."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{GREY}" stroke-width="1.5" '
            'marker-end="url(#head)"/>'
        )

    def save(self, file: Path) -> Path:
        width, height = self.size
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{GREY}"/></marker>'
            "</defs>"
        )
        start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        start += f'width="{width}" height="{height}">'
        file.write_text("\n".join([start, head, *self.parts, "</svg>\n"]), encoding="utf-8")
        return file


def strip(file: Path) -> Path:
    """A pair padded, as two rows, and packed, as one strip with positions and targets."""
    tokenizer = load_tokenizer("weights/tiny")
    question = [{"role": "user", "content": "Where does Zoe live?"}]
    (prompt, chosen), (_, rejected) = (
        tokenizer.encode_response(question, [{"role": "assistant", "content": answer}])
        for answer in ("Oslo.", "No.")
    )
    (batch,) = pack([pair(tuple(prompt), tuple(chosen), tuple(rejected), 1)], [0], max_tokens=64)
    ((n, (a, b)),) = batch.layout
    colours = [PROMPT] * n + [CHOSEN] * a + [REJECTED] * b
    shown = [tokenizer.decode([i], False).strip() for i in batch.tokens[0].tolist()]
    short = {"<|user|>": "user", "<|end|>": "end", "<|assistant|>": "assistant"}
    name = lambda piece: short.get(piece, piece)

    wide, left = 52, 110
    column = lambda k: left + wide * k
    fits = lambda piece: 12 if len(piece) < 7 else 9.5

    def cell(k, y, piece, colour):
        d.box(column(k), y, wide - 4, 28, colour, name(piece), size=fits(name(piece)))

    d = Drawing(left + wide * len(shown) + 10, 330)
    d.text(10, 24, "padded: the prompt twice, and boxes that hold nothing", 14, anchor="start")
    for row, (words, colour) in enumerate([(chosen, CHOSEN), (rejected, REJECTED)]):
        own = [tokenizer.decode([i], False).strip() for i in words[:-1]]
        d.text(left - 10, 57 + 34 * row, ["chosen", "rejected"][row], anchor="end")
        for k in range(n + a):
            filled = k < n + len(own)
            piece = [*shown[:n], *own][k] if filled else ""
            cell(k, 38 + 34 * row, piece, (PROMPT if k < n else colour) if filled else "none")
    d.text(10, 142, "packed: one strip, nothing twice and nothing empty", 14, anchor="start")
    rows = zip(shown, batch.positions[0].tolist(), colours, strict=True)
    for k, (piece, position, colour) in enumerate(rows):
        cell(k, 156, piece, colour)
        d.text(column(k) + 24, 204, str(position), 12)
    # each target stands below the token that predicts it, those of the two responses in two rows
    targets = [tokenizer.decode([i], False).strip() for i in batch.targets.tolist()]
    for i, (piece, k) in enumerate(zip(targets, batch.predictors.tolist(), strict=True)):
        second = i >= len(chosen)
        y = 274 if second else 238
        if not second or k >= n:
            d.arrow((column(k) + 24, 210), (column(k) + 24, y - 2))
        cell(k, y, piece, REJECTED if second else CHOSEN)
    for y, label in (
        (175, "reads"),
        (204, "position"),
        (257, "next, chosen"),
        (293, "next, rejected"),
    ):
        d.text(left - 10, y, label, anchor="end")
    return d.save(file)


def step(file: Path) -> Path:
    """What flows where in one step of training."""
    d = Drawing(800, 300)
    top = [
        (10, ("rows", "JSON lines")), (160, ("tokens", "ids of a prompt", "and its responses")),
        (310, ("packed batch", "one strip,", "no padding")),
        (460, ("Transformer", "weights θ")),
        (610, ("hidden states", "(N, D), one for each", "response token")),
    ]  # fmt: skip
    for x, lines in top:
        colour = MODEL if lines[0] == "Transformer" else DATA
        d.box(x, 12, 180 if x == 610 else 122, 64, colour, *lines)
    for x in (132, 282, 432, 582):
        d.arrow((x, 44), (x + 26, 44))
    d.box(610, 122, 180, 64, MODEL, "one sweep", "over the vocabulary,", "chunk by chunk")
    d.arrow((700, 76), (700, 120))
    d.box(390, 122, 140, 64, CHOSEN, "loss", "log p, log r, labels,", "lengths, pairs")
    d.arrow((610, 140), (532, 140))
    d.text(572, 133, "log p", 11.5)
    d.arrow((530, 168), (608, 168))
    d.text(568, 184, "dL/dlog p", 11.5)
    d.box(
        140, 122, 180, 64, PROMPT, "reference", "log r of every token, read", "once, before step 1"
    )
    d.arrow((320, 154), (388, 154))
    d.box(610, 230, 180, 56, REJECTED, "gradients dL/dθ", "backward through the layers")
    d.arrow((700, 186), (700, 228))
    d.box(410, 230, 140, 56, REJECTED, "clip", "norm at most 1")
    d.arrow((610, 258), (552, 258))
    d.box(170, 230, 180, 56, REJECTED, "AdamW", "at the step's learning rate")
    d.arrow((410, 258), (352, 258))
    d.arrow((170, 258), (100, 258), (100, 99), (520, 99), (520, 78))
    d.text(92, 192, "new θ", 12, anchor="end")
    return d.save(file)


def block(file: Path) -> Path:
    """One layer of a Llama: two branches that read x and add to it."""
    d, line = Drawing(900, 200), 160
    d.box(14, line - 24, 62, 48, DATA, "x", "(S, D)")
    attention = [
        ("q, k, v", "3 products"), ("turn q, k", "by position"), ("softmax", "who sees", "whom"),
        ("o", "back to D"),
    ]  # fmt: skip
    mlp = [("gate, up", "wider"), ("gated", "SiLU(g) u"), ("down", "back to D")]
    at = 76
    for name, boxes in (
        ("attention: where positions meet", attention),
        ("mlp: each by itself", mlp),
    ):
        x = at + 38
        d.arrow((x - 20, line), (x - 20, 82), (x - 2, 82))
        d.text(x + 38 * (len(boxes) + 1), 32, name, 14)
        for k, lines in enumerate([("norm", "size 1"), *boxes]):
            d.box(x + 76 * k, 50, 66, 64, PROMPT if k == 0 else MODEL, *lines, size=11.5)
            if k:
                d.arrow((x + 76 * k - 10, 82), (x + 76 * k - 1, 82))
        end = x + 76 * (len(boxes) + 1) + 10
        d.arrow((end - 20, 82), (end, 82), (end, line - 13))
        d.arrow((at, line), (end - 13, line))
        d.parts.append(f'<circle cx="{end}" cy="{line}" r="12" fill="{CHOSEN}" stroke="{GREY}"/>')
        d.text(end, line + 5, "+", 16, INK)
        at = end + 12
    d.arrow((at, line), (at + 22, line))
    d.box(at + 24, line - 24, 62, 48, DATA, "x", "(S, D)")
    d.size = (int(at + 96), 200)
    return d.save(file)


@contextmanager
def curves(file, rows: int, columns: int, size: tuple[float, float]) -> Iterator:
    """Grey axes on no background, an array (rows, columns); written when the block ends."""
    from matplotlib import pyplot as plt

    style = {"svg.hashsalt": "minibnf", "savefig.transparent": True, "font.size": 9}
    style |= dict.fromkeys(["text.color", "xtick.color", "ytick.color"], GREY)
    style |= dict.fromkeys(["axes.edgecolor", "axes.labelcolor"], GREY)
    style |= dict.fromkeys(["axes.spines.top", "axes.spines.right"], False)
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False
        )
        yield axes
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


def logits_memory(file) -> Path:
    """The memory of logits against the number of response tokens, for SmolLM2's vocabulary."""
    n = torch.arange(0, 8193, 64)
    with curves(file, 1, 1, (6, 2.9)) as ((axis,),):
        table = 4 * n * 49152 / 2**30  # of one (N, V) tensor in float32, GiB
        axis.plot(n, 3 * table, color=BAD, label="textbook: three tables (N, V)")
        buffer = table.clamp(max=64 / 1024)
        axis.plot(n, buffer, color=GOOD, linewidth=2.2, label="token_logps: a buffer of 64 MiB")
        hidden = 4 * n * 576 / 2**30
        axis.plot(n, hidden, color=GREY, linestyle=":", label="the hidden states (N, D)")
        axis.set(xlabel="response tokens N", ylabel="GiB in float32")
        axis.legend(frameon=False)
    return Path(file)


def bad_runs(file) -> Path:
    """Held-out log-likelihoods of chosen and rejected answers in page 06's six runs."""
    names = ("sound", "rate", "swapped", "few", "one-sided", "beta")
    with curves(file, 2, 3, (8, 4)) as axes:
        for name, axis in zip(names, axes.flat, strict=True):
            lines = Path(f"tutorials/evidence/bad-runs/{name}.jsonl").read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if "eval_loss" in row]
            for side, colour in (("chosen", GOOD), ("rejected", BAD)):
                y = [row[f"eval_logps/{side}"] for row in rows]
                axis.plot([row["step"] for row in rows], y, ".-", color=colour, label=side)
            axis.set_title(name, fontsize=10)
            axis.set_ylim(min(-8, min(y) * 1.05), 0)
        axes[0, 0].legend(frameon=False)
        axes[1, 1].set_xlabel("step")
        axes[1, 0].set_ylabel("held-out log-likelihood, nats", y=1.1)
    return Path(file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    drawings = {"strip": strip, "step": step, "block": block, "logits-memory": logits_memory}
    drawings["bad-runs"] = bad_runs
    for name, draw in drawings.items():
        print(draw(Path(sys.argv[1]) / f"{name}.svg"))
