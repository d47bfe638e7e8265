"""Talk with a model in the terminal, or with two: before and after alignment.

    python -m minibnf.chat --model runs/first/model
    python -m minibnf.chat --model weights/smollm2-135m-instruct --compare runs/first/model

With --compare each question is answered by both models, one after the other, and each goes on
with its own conversation. /reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an
answer. Control characters that a model writes are spelt out (such as \\x1b): no text can move the
cursor, change colours or rewrite what stands above.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress

from minibnf.files.terminal import ArgumentParser, in_one_line, printable, show
from minibnf.files.tokenizer import load_tokenizer
from minibnf.generate import load_on, stream
from minibnf.machine import memory_advice
from minibnf.sampling import Sampling, add_sampling, settings_of

ADVICE = "a shorter conversation (/reset) or --dtype bfloat16 takes less"
HELP = "/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"


class Side:
    """One model and its conversation."""

    def __init__(self, directory: str, args: argparse.Namespace):
        self.name, self.args = directory, args
        self.tokenizer = load_tokenizer(directory)
        self.model = load_on(directory, args.device, args.dtype)
        self.reset()
        self.encode([*self.history, {"role": "user", "content": "?"}])  # a template is there

    def reset(self) -> None:
        self.history = [{"role": "system", "content": self.args.system}] if self.args.system else []

    def encode(self, messages: list[dict]) -> list[int]:
        return self.tokenizer.encode_chat(messages, add_generation_prompt=True)

    def ask(self, message: str) -> Iterator[str]:
        """The answer, printable, in pieces as they come.

        What was said is kept in the history, also when the answer is stopped.
        """
        context, how = self.model.config.max_position_embeddings, settings_of(self.args)
        asked = [*self.history, {"role": "user", "content": message}]
        ids, ends = self.encode(asked), self.tokenizer.end_ids
        if len(ids) >= context:
            full = f"the conversation has {len(ids)} tokens and the model reads {context}"
            yield f"[{full}: /reset starts a new one]"
            return
        limit = min(how["max_new_tokens"], context - len(ids))
        turn = sum(message["role"] == "assistant" for message in self.history)
        how |= {"max_new_tokens": limit, "row": turn, "stop_ids": ends}
        how["vocab_size"] = self.tokenizer.vocab_size
        drawn, said = [], ""

        def until_the_end() -> Iterator[int]:
            for token in stream(self.model, ids, **how):
                drawn.append(token)
                if token not in ends:
                    yield token

        try:
            for piece in self.tokenizer.stream(until_the_end(), skip_special=False):
                said += piece
                yield printable(piece)
        finally:
            self.history = [*asked, self.answer(said)]
        if not set(drawn) & set(ends):
            cut = limit == self.args.max_new_tokens
            reason = "--max-new-tokens" if cut else "the context is full"
            yield f" [stopped after {limit} tokens: {reason}]"

    def answer(self, said: str) -> dict:
        """The message of an answer, its thoughts in the field where templates look for them.

        Within the content, markup such as </think> would be text to the model.
        """
        thought, end, rest = said.rpartition("</think>")
        if not end or end not in self.tokenizer.control:
            return {"role": "assistant", "content": said}
        thought = thought.partition("<think>")[2] or thought
        answer = {"role": "assistant", "reasoning_content": thought.strip()}
        return answer | {"content": rest.lstrip()}


def answer_all(sides: list[Side], message: str) -> None:
    """Print each side's answer as it comes; of two, each under a line that names its model.

    Ctrl-C stops one answer: what was said is kept, and the next side has its turn.
    """
    for side in sides:
        answer = side.ask(message)
        try:
            if len(sides) > 1:
                show(f"--- {side.name}")
            for piece in answer:
                show(piece, end="")
        except KeyboardInterrupt:
            show(" [stopped]", end="")
        finally:
            answer.close()
        show("\n")


def respond(sides: list[Side], message: str) -> None:
    """Obey a command, or show the answers to a message."""
    if message == "/reset":
        for side in sides:
            side.reset()
        show("a new conversation\n")
    elif message.startswith("/"):
        show(f"no such command: {HELP}\n")
    elif message:
        with memory_advice(ADVICE):
            answer_all(sides, message)


def converse(sides: list[Side]) -> None:
    """Read messages and commands until /quit or the end of the input."""
    while True:
        try:
            message = input("> ").strip()
            message.encode()  # ValueError: it is no UTF-8
            if message == "/quit":
                return
            respond(sides, message)
        except EOFError:
            show()
            return
        except KeyboardInterrupt:
            # Perhaps a moment too late to stop an answer: no reason to lose the conversation.
            show(f"\n{HELP}")
        except (ValueError, MemoryError) as error:
            # A chat template, for one, may refuse two messages of one role in a row.
            show(f"error: {error}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = ArgumentParser("minibnf chat", epilog=HELP, allow_abbrev=False)
    p.description = "Talk with a model, or with two: before and after alignment."
    folder = "the model, in Hugging Face layout, with a chat template"
    p.add_argument("--model", required=True, metavar="DIR", help=folder)
    p.add_argument("--compare", metavar="DIR", help="a second model, which answers after the first")
    p.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    add_sampling(p.add_argument, 512, temperature=0.7, top_p=0.9)
    return p.parse_args(argv)


@in_one_line
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    Sampling(**settings_of(args))  # raises for an impossible one
    with memory_advice(ADVICE):
        sides = [Side(folder, args) for folder in (args.model, args.compare) if folder]
    with suppress(ImportError):  # arrow keys and a history of what was typed
        import readline  # noqa: F401
    show(HELP)
    converse(sides)


if __name__ == "__main__":
    sys.exit(main())
