"""What may be shown in a terminal, errors in one line, and numbers that count something."""

import argparse
import sys
import unicodedata
from collections.abc import Callable
from functools import wraps

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


# What a user, a file or a machine can cause. Everything else is a bug and keeps its traceback.
CAUSED = (ValueError, OSError, ImportError, MemoryError, FloatingPointError)


def in_one_line(main: Callable) -> Callable[..., int]:
    """Makes main a command: its exit status is 0, or 1 and one line on standard error.

    130 after Ctrl-C; the KeyboardInterrupt may say how to go on.
    """

    @wraps(main)
    def command(argv: list[str] | None = None) -> int:
        try:
            main(argv)
        except CAUSED as error:
            print(printable(f"error: {error}"), file=sys.stderr)
            return 1
        except KeyboardInterrupt as stop:
            print(": ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
            return 130
        return 0

    return command


def positive(text: str) -> int:
    """The type of a command-line argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {value}")
    return value


class ArgumentParser(argparse.ArgumentParser):
    """One whose usage errors are one line: argparse would print all options above it."""

    def error(self, message: str):
        self.exit(2, printable(f"error: {message} ({self.prog} --help lists the options)\n"))


def counted(n: int | str, noun: str) -> str:
    """1, "epoch" -> "1 epoch"; 3, "epoch" -> "3 epochs"."""
    return f"{n} {noun}" if str(n) == "1" else f"{n} {noun}s"
