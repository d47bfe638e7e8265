"""Talk with a model in the terminal, or with two side by side: before and after alignment.

    python -m minibnf.chat --model runs/first/model
    python -m minibnf.chat --model weights/smollm2-135m-instruct --compare runs/first/model

/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer. What a model writes is shown with every control
character spelt out (such as \\x1b), so that no text can move the cursor, change colours or rewrite what stands above.
"""

import argparse
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import suppress

from minibnf.files.terminal import printable
from minibnf.generate import Reader, add_sampling, check_settings, load_for_sampling, stream
from minibnf.machine import memory_advice

ADVICE = "a shorter conversation (/reset) or --dtype bfloat16 takes less"
HELP = "/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"


def cells(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(
        0
        if unicodedata.category(c) in ("Mn", "Me", "Cf")
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns. As the text grows, all but the last stay as they are."""
    lines = [""]
    for word in re.findall(r"\n|[^\S\n]+|\S+", text.expandtabs(4)):
        if word == "\n":
            lines.append("")
            continue
        if lines[-1] and cells(lines[-1] + word) > width:
            lines.append("")
            word = word.lstrip()
        for c in word:
            if lines[-1] and cells(lines[-1] + c) > width:
                lines.append("")
            lines[-1] += c
    return lines


class Side:
    """One model and its conversation."""

    def __init__(self, directory: str, args: argparse.Namespace):
        self.name, self.args = directory, args
        self.model, self.tokenizer = load_for_sampling(directory, args.device, args.dtype)
        self.reset()
        self.tokenizer.encode_chat(
            [*self.history, {"role": "user", "content": "?"}], add_generation_prompt=True
        )

    def reset(self) -> None:
        self.history = [{"role": "system", "content": self.args.system}] if self.args.system else []
        self.reader, self.turn = Reader(self.model), 0

    def ask(self, message: str) -> Iterator[str]:
        """Pieces of the answer as they come, printable; all that was said is kept, also when it is stopped."""
        a, context = self.args, self.model.config.max_position_embeddings
        asked = [*self.history, {"role": "user", "content": message}]
        ids = self.tokenizer.encode_chat(asked, add_generation_prompt=True)
        if len(ids) >= context:
            yield f"[the conversation has {len(ids)} tokens and the model reads {context}: /reset starts a new one]"
            return
        limit = min(a.max_new_tokens, context - len(ids))
        how = {
            "temperature": a.temperature, "top_p": a.top_p, "top_k": a.top_k, "seed": a.seed,
            "row": self.turn, "stop_ids": self.tokenizer.end_ids,
            "vocab_size": self.tokenizer.vocab_size,
        }  # fmt: skip
        ended, said = [], ""

        def new() -> Iterator[int]:
            for token in stream(self.reader, ids, max_new_tokens=limit, **how):
                if token in self.tokenizer.end_ids:
                    ended.append(token)
                else:
                    yield token

        try:
            for piece in self.tokenizer.stream(new(), skip_special=False):
                said += piece
                yield printable(piece)
        finally:
            self.history = [*asked, self.answer(said)]
            self.turn += 1
        if not ended:
            yield f" [stopped after {limit} tokens: " + (
                "--max-new-tokens]" if limit == a.max_new_tokens else "the context is full]"
            )

    def answer(self, said: str) -> dict:
        """The message of an answer. Templates read thoughts apart from what was said, in a field of
        their own: markup such as </think> within a message would be text to the model."""
        thought, end, rest = said.rpartition("</think>")
        if not end or end not in self.tokenizer.control:
            return {"role": "assistant", "content": said}
        thought = thought.partition("<think>")[2] or thought
        return {
            "role": "assistant", "reasoning_content": thought.strip(), "content": rest.lstrip(),
        }  # fmt: skip


def show(sides: list[Side], message: str) -> None:
    """Print the answer as it comes; of two models in two columns, each line as soon as both have it."""
    answers = [side.ask(message) for side in sides]
    try:
        if len(sides) > 1:
            columns(answers)
        else:
            for piece in answers[0]:
                print(piece, end="", flush=True)
            print()
    finally:
        for answer in answers:
            answer.close()  # so that what was said when it was stopped is kept
    print()


def columns(answers: list[Iterator[str]]) -> None:
    width = (shutil.get_terminal_size().columns - 3) // 2
    texts, going, shown = ["", ""], [True, True], 0
    while any(going):
        for k, answer in enumerate(answers):
            piece = next(answer, None) if going[k] else None
            going[k] = piece is not None
            texts[k] += piece or ""
        wrapped = [wrap(text, width) for text in texts]
        ready = min(
            (len(w) - 1 for w, go in zip(wrapped, going, strict=True) if go),
            default=max(map(len, wrapped)),
        )
        for row in range(shown, ready):
            left, right = (w[row] if row < len(w) else "" for w in wrapped)
            print(left + " " * (width - cells(left)) + " | " + right, flush=True)
        shown = max(shown, ready)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        "minibnf chat",
        description="Talk with a model, or with two side by side.",
        epilog=HELP,
        allow_abbrev=False,
    )
    p.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="checkpoint in Hugging Face layout, with a chat template",
    )
    p.add_argument("--compare", metavar="DIR", help="a second one, which answers beside it")
    p.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    add_sampling(p.add_argument, 512, temperature=0.7, top_p=0.9)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        check_settings(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed)
        with memory_advice(ADVICE):
            sides = [Side(directory, args) for directory in (args.model, args.compare) if directory]
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    with suppress(ImportError):
        import readline  # noqa: F401  arrow keys and a history of what was typed, where Python has it
    print(HELP)
    if args.compare:
        print(f"left {args.model}, right {args.compare}")
    while True:
        try:
            message = input("> ").strip()
            message.encode()
        except EOFError:
            print()
            return 0
        except (
            KeyboardInterrupt
        ):  # perhaps a moment too late to stop an answer: not a reason to lose the conversation
            print(f"\n{HELP}")
            continue
        except UnicodeError:
            print("error: what was typed is not valid UTF-8\n")
            continue
        if message == "/quit":
            return 0
        if message == "/reset":
            for side in sides:
                side.reset()
            print("a new conversation\n")
        elif message.startswith("/"):
            print(f"no such command: {HELP}\n")
        elif message:
            try:
                with memory_advice(ADVICE):
                    show(sides, message)
            except KeyboardInterrupt:
                print(" [stopped]\n")
            except (
                ValueError,
                MemoryError,
            ) as error:  # a chat template may refuse two messages of one role in a row
                print(printable(f"error: {error}\n"))


if __name__ == "__main__":
    sys.exit(main())
