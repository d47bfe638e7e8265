"""Every block of tutorials/NN_*.md runs, in order, from the repository's root, and prints what the
page says.

`make tutorials` runs this file, `make tutorials-update` writes the printed lines (`#> ...`) anew. A
page's blocks share one namespace, as in a Python prompt into which they are copied.
"""

import ast
import codeop
import re
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import module_from_spec
from pathlib import Path

import pytest
import torch
from pytest_examples import find_examples

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tutorials"
PAGES = sorted(FOLDER.glob("[0-9][0-9]_*.md"))
FIGURES = FOLDER / "figures"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)

FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
IMAGE = re.compile(r"!\[([^]]*)\]\(([^)]+)\)")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)[^)]*\)")


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def git_status() -> str:
    """Empty where the tree is no clone."""
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


@pytest.fixture
def prompt(monkeypatch):
    """A Python prompt at the repository's root: one module for all blocks of a page; afterwards
    everything is as before."""
    modules, dtype = [], torch.get_default_dtype()

    def one_module(spec):
        new = module_from_spec(spec)
        if spec.name != "__main__":
            return new
        modules.append(new)
        vars(modules[0]).update({k: v for k, v in vars(new).items() if k.startswith("__")})
        return modules[0]

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr("importlib.util.module_from_spec", one_module)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


@contextmanager
def same_figures(updating: bool):
    """Figures come out byte for byte where matplotlib is the version that drew the committed ones
    (the files say which); another version may place text otherwise, so what it draws is put
    back."""
    before = {file: file.read_bytes() for file in FIGURES.glob("*.svg")}
    yield
    ours = f"Matplotlib v{version('matplotlib')},".encode()
    for file, data in before.items():
        if not updating and ours not in data:
            file.write_bytes(data)


def outputs(source: str) -> int:
    """How many prints a block shows: lines that begin with #>, and bare strings (no docstrings),
    which stand for long ones."""
    strings = docstrings = 0
    for node in ast.walk(ast.parse(source)):
        strings += isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            docstrings += ast.get_docstring(node) is not None
    return len(re.findall(r"^ *#> ?", source, re.M)) + strings - docstrings


@each_page
def test_the_blocks_print_what_the_page_says(page, eval_example, prompt):
    """And nothing else, and leave the working tree as it was."""
    examples, blocks = list(find_examples(page)), eval_example.tmp_path
    updating = eval_example.update_examples
    assert examples, "no python block"
    printed: list = []

    def include(file, frame, args):
        """What any of the page's blocks prints, functions of earlier blocks too; the library's own
        prints are not shown."""
        if ours := Path(frame.filename).parent == blocks:
            printed.append(args)
        return ours

    eval_example.include_print = include
    run = eval_example.run_print_update if updating else eval_example.run_print_check
    before = git_status()
    with same_figures(updating):
        for example in examples:
            printed.clear()
            run(example, rewrite_assertions=False)
            shown, made = outputs(example.source), len(printed)
            assert shown == made, f"{example}: {made} prints, {shown} outputs"
    assert updating or git_status() == before, "running the page changed the working tree"


@each_page
def test_the_blocks_can_be_pasted_into_a_prompt(page):
    """Python 3.11's prompt ends an indented block at an empty line, and nowhere else: so an empty
    line after each function, loop and so on, and none inside."""
    for example in find_examples(page):
        held: list[str] = []
        for number, line in enumerate([*example.source.splitlines(), ""], example.start_line + 1):
            held.append(line)
            try:
                if codeop.compile_command("\n".join(held), symbol="single") is not None:
                    held = []
            except SyntaxError as error:
                where = f"{page.name}, line {number}"
                pytest.fail(f"{where}: a prompt stops here: {error}", pytrace=False)
        assert not any(held), f"{page.name}: the block from line {example.start_line} does not end"


@pytest.mark.parametrize("page", [*PAGES, FOLDER / "README.md"], ids=lambda page: page.stem)
def test_images_and_links(page):
    text = prose(page)
    images = IMAGE.findall(text)
    images += re.findall(r'<img(?=[^>]*alt="([^"]*)")[^>]*src="([^"]*)"', text)
    assert len(images) == len(re.findall(r"!\[|<img", text)), "an image without alt text or file"
    for alt, file in images:
        assert len(alt) >= 40, f"{file}: alt text states the finding"
        assert (page.parent / file).is_file(), file
    for link in filter(None, LINK.findall(text)):
        assert (page.parent / link).exists(), link
    if page in PAGES:
        number = page.name[:2]
        assert f"(exercises/e{number}.py)" in text, "no exercises"
        assert (ROOT / f"tests/exercises/test_e{number}.py").is_file()


def test_the_list_of_pages_names_those_that_exist():
    listed = re.findall(r"\]\((\d\d_\w+\.md)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert listed == [page.name for page in PAGES]
