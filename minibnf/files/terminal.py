"""What may be shown in a terminal."""

import unicodedata

# LRE LRO LRI RLE RLO RLI PDF PDI FSI: Unicode's classes of invisible direction marks
OVERRIDES = ("LR", "RL", "PD", "FS")


def printable(text: str) -> str:
    """The text with all characters spelt out that would do something to a terminal: controls but newline and tab, separators of
    lines, and what overrides the direction of writing."""
    hidden = lambda c: (
        unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs")
        or unicodedata.bidirectional(c)[:2] in OVERRIDES
    )
    return "".join(
        c.encode("unicode_escape").decode() if hidden(c) and c not in "\n\t" else c for c in text
    )
