"""`minibnf COMMAND ...`: hands over to the module of that name, which also runs by itself."""

import argparse
import sys
from importlib import import_module
from importlib.metadata import version

from minibnf.files.terminal import ArgumentParser, show

COMMANDS = {
    "train": "align a checkpoint on preference data",
    "generate": "answer every prompt of a file",
    "chat": "talk with a model, or with two: before and after",
    "compare": "run many methods, settings and seeds: tables, verdicts, figures",
    "evaluate": "measure a model on held-out rows, and what alignment changed",
    "check": "say what a checkpoint is, and what memory training it takes",
}
MODULES = {"compare": "lab.compare"}  # where a command's module has another name


def main(argv: list[str] | None = None) -> int:
    p = ArgumentParser("minibnf", usage="minibnf COMMAND ...   (minibnf COMMAND --help says more)")
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.description = "\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items())
    p.add_argument("--version", action="version", version=f"minibnf {version('minibnf')}")
    p.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    command = p.parse_args(argv[:1]).command
    try:
        return import_module(f"minibnf.{MODULES.get(command, command)}").main(argv[1:])
    except KeyboardInterrupt:  # while it was still starting
        show("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
