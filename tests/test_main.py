"""`minibnf COMMAND`: hands over, and says what there is."""

import pytest

from minibnf.__main__ import COMMANDS, main


@pytest.mark.parametrize(
    "words, status, said",
    [
        *(([command, "--help"], 0, f"usage: minibnf {command} ") for command in COMMANDS),
        *((["--help"], 0, f"  {command} ") for command in COMMANDS),
        (["--version"], 0, "minibnf 0."),
        ([], 2, "error: the following arguments are required: COMMAND"),
        (["trian"], 2, "error: argument COMMAND: invalid choice: 'trian' (choose from 'train'"),
    ],
)
def test_what_it_says_by_itself(words, status, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    shown = capsys.readouterr()
    assert stop.value.code == status and said in (shown.err if status else shown.out)


def test_a_commands_exit_status_is_handed_back_and_an_interruption_told(monkeypatch, capsys):
    assert main(["check", "nowhere"]) == 1 and "nowhere" in capsys.readouterr().err
    monkeypatch.setattr(
        "minibnf.__main__.import_module", lambda name: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert main(["chat"]) == 130 and capsys.readouterr().err == "interrupted\n"
