"""What may be shown in a terminal, errors in one line, and numbers that count something."""

import argparse
import os
import re
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


def show(text: object = "", **how) -> None:
    """Print a text, printable: whatever the commands say passes here.

    Where standard output cannot be written to, one line on standard error says so, once, and the
    command goes on: what it was asked for mostly lies in files.
    """
    try:
        print(printable(str(text)), **{"flush": True} | how)
    except OSError as error:
        if sys.stdout is how.get("file", sys.stdout):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            show(f"standard output cannot be written: {error.strerror}; going on", file=sys.stderr)


ENDLESS = re.compile("(.{1000}).+")  # what is shown of a line of an error, and what is not
# What a user, a file or a machine can cause. Everything else is a bug and keeps its traceback.
CAUSED = (ValueError, OSError, ImportError, MemoryError, FloatingPointError)
REPORT = "This is a bug of minibnf. Please report it, with the lines above and the command."


def in_one_line(main: Callable) -> Callable[..., int]:
    """Makes main a command: its exit status is 0, or 1 and one line on standard error.

    A bug keeps its traceback, under which a request to report it stands.
    130 after Ctrl-C; the KeyboardInterrupt may say how to go on.
    """

    @wraps(main)
    def command(argv: list[str] | None = None) -> int:
        stdout = sys.stdout
        try:
            main(argv)
        except CAUSED as error:
            show(ENDLESS.sub(r"\1 ...", f"error: {error}"), file=sys.stderr)
            return 1
        except KeyboardInterrupt as stop:
            show(": ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
            return 130
        except Exception as error:
            error.add_note(REPORT)
            raise
        return 0 if sys.stdout is stdout else 1

    return command


def positive(text: str) -> int:
    """The type of a command-line argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {value}")
    return value


class ArgumentParser(argparse.ArgumentParser):
    """One whose usage errors are one line: argparse would print all options above it."""

    def parse_known_args(self, args=None, namespace=None):
        """Refuses words that are no UTF-8: config.json, for one, could not hold them."""
        words = sys.argv[1:] if args is None else args
        if odd := [word for word in words if word.encode(errors="ignore").decode() != word]:
            self.error(f"{odd[0]!r} is no UTF-8")
        return super().parse_known_args(words, namespace)

    def error(self, message: str):
        self.exit(2, printable(f"error: {message} ({self.prog} --help lists the options)\n"))


def as_words(arguments: dict) -> list[str]:
    """The words of a command line that say the same, so that they are checked as those are."""
    words = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            words.append(flag if value is True else f"{flag}={value}")
    return words


def counted(n: int | str, noun: str) -> str:
    """1, "epoch" -> "1 epoch"; 3, "epoch" -> "3 epochs"."""
    return f"{n} {noun}" if str(n) == "1" else f"{n} {noun}s"
