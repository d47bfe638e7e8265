"""The house has three floors: who may import whom, and how large a room may be."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "minibnf").rglob("*.py"))
    if path.name != "__init__.py"
}
TORCH_ALONE = ["minibnf.losses", "minibnf.rivals", "minibnf.responses", "minibnf.logprob"]


@cache
def imports(room: str) -> set[str]:
    """The rooms that a room imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(ROOMS[room].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found & set(ROOMS)


def reached(room: str) -> set[str]:
    """The rooms that a room imports, directly or not."""
    found, todo = set(), [room]
    while todo:
        new = imports(todo.pop()) - found
        found |= new
        todo += new
    return found


def lines_of_code(path: Path) -> int:
    """Without docstrings, comments and blank lines."""
    text = path.read_text(encoding="utf-8")
    lines = {k for k, line in enumerate(text.splitlines(), 1) if line.split("#")[0].strip()}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, docstring.end_lineno + 1))
    return len(lines)


def floor(room: str) -> int:
    """0: files, 1: the mission, 2: the laboratory."""
    return {"minibnf.files": 0, "minibnf.lab": 2}.get(room.rpartition(".")[0], 1)


def test_imports_go_down_and_never_in_a_circle():
    for room in ROOMS:
        assert all(floor(other) <= floor(room) for other in imports(room)), room
        assert room not in reached(room), f"{room} imports itself through {reached(room)}"


def test_the_losses_need_torch_alone():
    """Of the project they know each other and the kernels, which know nothing."""
    for room in TORCH_ALONE:
        assert imports(room) <= {*TORCH_ALONE, "minibnf.kernels"}, room
    assert not imports("minibnf.kernels")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_can_be_read_in_one_go(room):
    lines = ROOMS[room].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400
    assert max(map(len, lines)) <= 100


def test_whatever_is_shown_passes_one_function():
    """terminal.show, which spells out what a terminal would act on."""
    for room, path in ROOMS.items():
        calls = [x.func for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.Call)]
        prints = sum(isinstance(f, ast.Name) and f.id == "print" for f in calls)
        assert prints == (room == "minibnf.files.terminal"), room


def test_the_house_stays_small(capsys):
    counts = {room: lines_of_code(path) for room, path in ROOMS.items()}
    trainer = [room for room in reached("minibnf.train") | {"minibnf.train"} if floor(room) == 1]
    mission = sum(counts[room] for room in trainer if room != "minibnf.kernels")
    with capsys.disabled():
        print(f"\n{sum(counts.values())} lines of code, {mission} of them what train.py needs")
    # After the rebuild 1,736 and 4,953; since then came compiling, the weight family, defences,
    # long answers and frontiers.
    assert mission <= 1920 and sum(counts.values()) <= 5755
