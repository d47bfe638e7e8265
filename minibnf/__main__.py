"""`minibnf COMMAND ...`: hands over to the module of that name, which also runs by itself."""

import sys
from importlib import import_module
from importlib.metadata import version

COMMANDS = {
    "train": "align a checkpoint on preference data",
    "generate": "completions of the prompts in a file",
    "chat": "talk with a model, or with two: before and after",
    "compare": "methods x settings x seeds: a table, verdicts, figures",
    "evaluate": "what a model makes of held-out rows, and what alignment changed",
    "check": "what a checkpoint is, and the memory to train it",
}
MODULES = {"compare": "lab.compare"}  # where a command's module has another name


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0] in COMMANDS:
        try:
            return import_module(f"minibnf.{MODULES.get(argv[0], argv[0])}").main(argv[1:])
        except KeyboardInterrupt:  # while it was still starting
            print("interrupted", file=sys.stderr)
            return 130
    if argv == ["--version"]:
        print(f"minibnf {version('minibnf')}")
        return 0
    asked = argv[:1] in (["-h"], ["--help"])
    out = sys.stdout if asked else sys.stderr
    if argv and not asked:
        print(f"error: {argv[0]!r} is no command", file=out)
    print("usage: minibnf COMMAND ...   (minibnf COMMAND --help says more)\n", file=out)
    for name, what in COMMANDS.items():
        print(f"  {name:10}{what}", file=out)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
