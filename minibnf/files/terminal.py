"""What may be shown in a terminal."""

import unicodedata

# How the names of Unicode's classes of invisible direction marks begin: LRE LRO LRI, RLE RLO RLI,
# PDF PDI, FSI.
OVERRIDES = ("LR", "RL", "PD", "FS")


def printable(text: str) -> str:
    """The text, in which the characters that a terminal would act on are spelt out."""
    return "".join(c.encode("unicode_escape").decode() if _acts(c) else c for c in text)


def _acts(c: str) -> bool:
    """Whether a terminal would act on a character, newline and tab aside.

    That is a control, a separator of lines or paragraphs, or a change of the writing's direction.
    """
    if c in "\n\t":
        return False
    control = unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs")
    return control or unicodedata.bidirectional(c)[:2] in OVERRIDES
