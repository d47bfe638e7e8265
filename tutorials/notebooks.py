"""The pages as Jupyter notebooks, outputs included: python -m tutorials.notebooks DIR

`make notebooks` calls it. Needs jupytext, nbclient and ipykernel. What a page says that it prints
is left out of its cells, since the outputs follow them.
"""

import re
import sys
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

HERE = Path(__file__).resolve().parent
LINK = re.compile(r"\]\((?!https?:|#|\.\./)([^)#]+)")  # relative to this folder


def moved(link: re.Match) -> str:
    """A link as it must be in DIR, a folder beside this one; pages are notebooks there."""
    if page := re.fullmatch(r"(\d\d_\w+)\.md", link[1]):
        return f"]({page[1]}.ipynb"
    return f"](../{HERE.name}/{link[1]}"


def write(page: Path, folder: Path) -> Path:
    """Run a page's blocks and write its notebook."""
    text = re.sub(r"^ *#> ?.*\n", "", page.read_text(encoding="utf-8"), flags=re.M)
    notebook = jupytext.reads(text, "md")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(moved, cell.source)
    notebook.cells.insert(0, new_code_cell("%cd -q ..\n# the blocks run at the repository's root"))
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    out = folder / f"{page.stem}.ipynb"
    jupytext.write(notebook, out)
    return out


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    # another matplotlib may place text otherwise than in the committed figures
    drawn = {file: file.read_bytes() for file in (HERE / "figures").glob("*.svg")}
    try:
        for page in sorted(HERE.glob("[0-9][0-9]_*.md")):
            print(write(page, folder), flush=True)
    finally:
        for file, data in drawn.items():
            file.write_bytes(data)
