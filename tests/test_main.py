"""`minibnf COMMAND`: hands over, and says what there is."""

import pytest

from minibnf.__main__ import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"minibnf {command}" in capsys.readouterr().out.replace(
        "minibnf.", "minibnf "
    )


def test_without_a_command_or_with_a_wrong_one_it_lists_them(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {command} " in shown for command in COMMANDS)
    assert main([]) == 2 and "usage: minibnf COMMAND" in capsys.readouterr().err
    assert main(["trian"]) == 2 and "'trian' is no command" in capsys.readouterr().err


def test_the_version_and_an_interruption_while_starting(monkeypatch, capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("minibnf 0.")
    monkeypatch.setattr(
        "minibnf.__main__.import_module", lambda name: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert main(["chat"]) == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_commands_exit_status_is_handed_back(capsys):
    assert main(["check", "nowhere"]) == 1 and "nowhere" in capsys.readouterr().err
