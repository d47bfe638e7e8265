"""What the parity tests find against transformers: held to the table of families in
tutorials/reference/verification.md, and printed as that table."""

import math
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "tutorials/reference/verification.md"
TEXT = PAGE.read_text(encoding="utf-8")
HEAD = (
    "| family | `model_type` | what is particular | models | logits | greedy tokens "
    "| saved and loaded | BNF's gradients |"
)
REAL = "SmolLM2-135M"
ROWS = {  # family: (model_type, what is particular)
    "Llama 2": ("llama", "grouped queries; biases where config.json says so"),
    "Llama 3": ("llama", "rotary frequencies stretched for a longer context"),
    "Mistral": ("mistral", "a sliding window in every layer"),
    "Qwen2, 2.5": ("qwen2", "biases on q, k and v; a window in the upper layers"),
    "Qwen3": ("qwen3", "norms of each head's query and key; a window in the upper layers"),
    "SmolLM3": ("smollm3", "layers that know no positions"),
    "Gemma-2": ("gemma2", "soft caps, four norms per layer, a window in every other layer"),
    "Gemma-3": (
        "gemma3_text",
        "windowed layers with a rotary base of their own, norms of queries and keys",
    ),
    REAL: ("llama", "its real weights"),
}
NATS = (
    "the log-likelihoods that SmolLM2-135M gives 100 passages of Python's manual, "
    "20 to 400 tokens each, agree to"
)

found: dict[str, dict] = {}  # family: models, greedy tokens and the largest of each difference
nats: list[float] = []


def at_most(x: float, floor: float) -> str:
    """The power of ten that x does not exceed, and none below the floor: what another machine's
    rounding may make of it."""
    return f"1e{math.ceil(math.log10(max(x, floor)) - 1e-9)}"


def row(family: str, models: int, tokens: int, logits, saved, gradients) -> list[str]:
    saved = at_most(saved, 1e-5) if saved else "0"
    errors = [at_most(logits, 1e-5), f"{tokens} of {tokens}", saved, at_most(gradients, 1e-5)]
    return [family, f"`{ROWS[family][0]}`", ROWS[family][1], str(models), *errors]


def promised(family: str) -> list[str]:
    """The cells of a family's row in the page."""
    _, _, rows = TEXT.partition(HEAD + "\n")
    cells = [line.strip("| ").split(" | ") for line in rows.split("\n\n")[0].splitlines()]
    (mine,) = [c for c in cells if c[0] == family] or [None]
    assert mine, f"the page's table of families has no row {family}"
    return mine


@pytest.fixture
def measured():
    """measured(family, tokens, logits, saved, gradients) of a model: kept for the table, and no
    more than the page says.

    tokens: how many were generated alike. logits, saved: the largest differences of logits, of the
    model here and of what it saved and transformers loaded. gradients: the largest, over
    parameters, of ‖difference of gradients‖/‖gradient‖."""

    def keep(family, tokens, **differences):
        nothing = {"models": 0, "tokens": 0} | dict.fromkeys(differences, 0.0)
        mine = found.setdefault(family, nothing)
        mine["models"], mine["tokens"] = mine["models"] + 1, mine["tokens"] + tokens
        limits = promised(family)
        for name, column in (("logits", 4), ("saved", 6), ("gradients", 7)):
            mine[name] = max(mine[name], differences[name])
            limit = float(limits[column])
            said = f"differ by {differences[name]:.2g}, the page says {limit:g}"
            assert differences[name] <= limit, f"{family}: {name} {said}"

    return keep


@pytest.fixture
def measured_nats():
    """measured_nats(x): keep the largest difference of texts' log-likelihoods, no larger than the
    page says."""

    def keep(x: float):
        nats.append(x)
        limit = float(re.search(re.escape(NATS) + " (1e-[0-9]+) nats", " ".join(TEXT.split()))[1])
        assert x <= limit, f"log-likelihoods differ by {x:.2g} nats, the page says {limit:g}"

    return keep


def pytest_terminal_summary(terminalreporter):
    if not found:
        return
    terminalreporter.section("the largest differences from transformers in float32, rounded up")
    terminalreporter.write_line(f"{HEAD}\n|{'---|' * 8}")
    for family, mine in found.items():
        terminalreporter.write_line("| " + " | ".join(row(family, **mine)) + " |")
    for x in nats:
        terminalreporter.write_line(f"\n{NATS} {at_most(x, 1e-3)} nats")
