"""JSON, and writes that are whole or absent."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def read_json(path: Path):
    """The JSON of a file.

    Raises FileNotFoundError, or ValueError that says where the file is broken.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def optional(path: Path) -> dict:
    """The JSON object of a file, or {} where there is no such file. ValueError: it is no object."""
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def write_json(path: Path, value) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextmanager
def replacing(directory) -> Iterator[Path]:
    """A temporary folder that takes the directory's place when the block ends without an error.

    with replacing(directory) as temporary: ... fill temporary ...
    """
    directory = Path(directory)
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if directory.exists():
            delete(directory)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def delete(path: Path) -> None:
    """Delete a file, or a folder, which is renamed first: what is half deleted is never read."""
    if path.is_symlink() or not path.is_dir():
        return path.unlink()
    doomed = path.with_name(f".{path.name}.deleted.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(path.rename(doomed))


def inside(path: Path, folder: Path) -> bool:
    """Whether a path, or what it links to, is the folder or lies in it."""
    places = path.resolve(), path.parent.resolve() / path.name
    return any(place.is_relative_to(folder.resolve()) for place in places)


def check_output(out: Path, inputs: Iterable[Path]) -> None:
    """Raise ValueError where writing the file `out` would overwrite an input.

    Neither may out be a folder. A folder among the inputs stands for the files in it, and a
    symbolic or hard link to an input is that input.
    """
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file")
    for place in inputs:
        for file in place.iterdir() if place.is_dir() else [place]:
            if out.exists() and file.exists() and out.samefile(file):
                raise ValueError(f"--out {out} is the input {file}; name another file")
