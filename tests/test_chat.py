"""Chat: what is shown, what is kept, and that a model's text never controls the terminal."""

import os
import pty
import select
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minibnf import chat
from minibnf.chat import Side, parse
from minibnf.files.terminal import printable
from minibnf.generate import generate

TINY = "weights/tiny"
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
CONTROLS = "\x1b\x07\x08\r\n\t\x9b\x85\u2028\u202e\u2066\u200d[2Jé"


@given(ANY_TEXT | st.text(st.sampled_from(CONTROLS), max_size=40))
def test_nothing_that_is_shown_controls_a_terminal(text):
    shown = printable(text)
    rest = shown.replace("\n", "").replace("\t", "")
    assert not {"Cc", "Zl", "Zp"} & set(map(unicodedata.category, rest))
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    if not any(unicodedata.category(c).startswith(("C", "Z")) for c in text):
        assert shown == text


def test_escapes_by_hand():
    shown = printable("a\x1b[31mb\r\n\tc\x7f\x9b \u202eevil naïve 日本 👩\u200d🔬")
    assert shown == "a\\x1b[31mb\\r\n\tc\\x7f\\x9b \\u202eevil naïve 日本 👩\u200d🔬"


def side(*flags):
    return Side(TINY, parse(["--model", TINY, "--device", "cpu", *flags]))


def test_a_thought_goes_back_to_the_model_in_a_field_of_its_own():
    """Qwen3's template would cut it out of a message, and control text in messages is refused."""
    mine = side()
    # In this vocabulary it is no markup.
    assert mine.answer("a</think>b") == {"role": "assistant", "content": "a</think>b"}
    mine.tokenizer.control = {"<think>": 1, "</think>": 2}
    thought = {"role": "assistant", "reasoning_content": "3 + 4", "content": "It is 7."}
    assert mine.answer("<think>\n3 + 4\n</think>\n\nIt is 7.") == thought
    # Where the template itself opens the thought:
    assert mine.answer("3 + 4</think>It is 7.") == thought
    assert mine.answer("It is 7.") == {"role": "assistant", "content": "It is 7."}


def test_an_answer_is_what_generate_gives_with_every_setting_and_is_kept_in_the_history():
    flags = {"temperature": 1.3, "top_p": 0.8, "top_k": 7, "seed": 5, "max_new_tokens": 100}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    mine = side("--system", "Be brief.", *words)
    for row, question in enumerate(["What is 3 + 4?", "Which city is Will's home?"]):
        said = "".join(mine.ask(question))
        asked, ends = mine.history[:-1], mine.tokenizer.end_ids
        assert mine.history[-1] == {"role": "assistant", "content": said}
        assert asked[-1] == {"role": "user", "content": question}
        ids = mine.tokenizer.encode_chat(asked, add_generation_prompt=True)
        (new,) = generate(mine.model, [ids], stop_ids=ends, first_row=row, **flags)
        assert new[-1] in ends and mine.tokenizer.decode(new[:-1], False) == said
    mine.reset()
    assert mine.history == [{"role": "system", "content": "Be brief."}]


def test_an_answer_that_is_cut_says_so_and_one_that_is_stopped_is_kept():
    mine = side("--temperature", "0", "--max-new-tokens", "3")
    said = "".join(mine.ask("Which city is Will's home?"))
    assert said.endswith(" [stopped after 3 tokens: --max-new-tokens]")
    assert "stopped" not in mine.history[-1]["content"]
    answer = mine.ask("Which city is Will's home?")
    piece = next(answer)
    answer.close()
    assert mine.history[-1] == {"role": "assistant", "content": piece}


def test_a_full_context_is_said_not_cut():
    mine = side("--temperature", "0")
    (said,) = mine.ask("word " * 2000)
    assert "/reset starts a new one" in said and mine.history == []


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--temperature", "-1", "temperature = -1.0: it must be"),
        ("--compare", "nowhere", "nowhere is no folder"),
    ],
)
def test_what_cannot_be_is_said_at_once(flag, value, message, capsys):
    assert chat.main(["--model", TINY, "--device", "cpu", flag, value]) == 1
    assert message in capsys.readouterr().err


def type_lines(monkeypatch, *lines):
    """Have input() give each line, or raise it, and then come to its end."""
    typed = iter([*lines, EOFError])

    def give(prompt):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", give)


def test_what_a_model_or_a_template_writes_cannot_act_on_the_terminal(monkeypatch, capsys):
    mine = side()
    monkeypatch.setattr(
        type(mine.tokenizer), "stream", lambda *_, **__: iter(["\x1b[2J", "red\x07"])
    )
    assert "".join(mine.ask("hello")).startswith("\\x1b[2Jred\\x07 [stopped")
    assert mine.history[-1]["content"] == "\x1b[2Jred\x07"

    def refuses(*_, **__):
        raise ValueError("the template says \x1b[2J")

    type_lines(monkeypatch, "hello")
    monkeypatch.setattr(Side, "ask", refuses)
    assert chat.main(["--model", TINY, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "the template says \\x1b[2J" in shown and "\x1b" not in shown


def test_a_slip_at_the_prompt_does_not_lose_the_conversation(monkeypatch, capsys):
    type_lines(monkeypatch, KeyboardInterrupt, "caf\udce9")
    assert chat.main(["--model", TINY, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(chat.HELP) == 2 and "surrogates not allowed" in shown


def talk(keys: list[tuple[str, bytes]], *flags) -> str:
    """All that a terminal shows of a conversation: keys are (text to wait for, keys to press)."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "minibnf", "chat", "--model", TINY, *flags]
    command += ["--device", "cpu"]
    environment = os.environ | {"COLUMNS": "60", "TERM": "dumb"}
    terminal = {"stdin": follower, "stdout": follower, "stderr": follower}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **terminal)
    os.close(follower)
    shown, seen = "", 0
    for wait, press in [*keys, ("> ", b"\x04")]:
        while wait not in shown[seen:]:
            if not select.select([leader], [], [], 120)[0]:
                process.kill()
                raise AssertionError(f"never saw {wait!r} in {shown!r}")
            shown += os.read(leader, 4096).decode()
        seen = len(shown)
        os.write(leader, press)
    assert process.wait(60) == 0
    os.close(leader)
    return shown


def test_a_conversation_at_a_terminal_with_two_models_each_under_its_name():
    typed = (b"Which city is Will's home?\n", b"/what\n", b"/reset\n")
    shown = talk([("> ", keys) for keys in typed], "--temperature", "0", "--compare", TINY)
    assert "no such command" in shown and "a new conversation" in shown
    lines = shown.splitlines()
    first, second = [place for place, line in enumerate(lines) if line == f"--- {TINY}"]
    assert "Dublin" in lines[first + 1] and lines[second + 1] == lines[first + 1]


def test_stopping_the_first_of_two_answers_leaves_the_second_its_turn(monkeypatch, capsys):
    def interrupted_once(self, message):
        yield f"{message} "
        if self is sides[0]:
            raise KeyboardInterrupt
        yield "to the end"

    sides = [side(), side()]
    monkeypatch.setattr(Side, "ask", interrupted_once)
    chat.answer_all(sides, "heard")
    name = f"--- {TINY}\n"
    assert capsys.readouterr().out == f"{name}heard  [stopped]\n\n{name}heard to the end\n\n"
