"""JSON, and writes that are whole or absent."""

import json
import os
import shutil
from collections.abc import Iterable
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


class replacing:
    """A temporary folder that takes the directory's place when the block ends without an error.

    with replacing(directory) as temporary: ... fill temporary ...
    """

    def __init__(self, directory):
        self.directory = Path(directory)

    def __enter__(self) -> Path:
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.directory.with_name(f".{self.directory.name}.{os.getpid()}.tmp")
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()
        return self.temporary

    def __exit__(self, kind, *_):
        if kind is None:
            old = self.temporary.with_suffix(".old")
            if self.directory.exists():
                self.directory.rename(old)
            self.temporary.rename(self.directory)
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.temporary, ignore_errors=True)


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
