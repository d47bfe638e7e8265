"""JSON, and writes that are whole or absent."""

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minibnf.files.terminal import show


SETTINGS, VOCABULARY = 2**25, 2**28  # the most bytes of a file of settings, and of a tokenizer's


def check_size(path: Path, most: int) -> None:
    """Raise FileNotFoundError, or ValueError where a file has more bytes than that."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size:,} bytes, where {most:,} are the most that is read")


def read_text(path: Path) -> str:
    """The text of a small file. Raises as check_size does, or ValueError where it is no UTF-8."""
    check_size(path, SETTINGS)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def read_json(path: Path):
    """The JSON of a file.

    Raises FileNotFoundError, or ValueError that says where the file is broken.
    """
    text = read_text(path)
    try:
        found = json.loads(text, object_pairs_hook=without_twins)
        json.dumps(found, ensure_ascii=False).encode()  # half an emoji is no text
        return found
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def check_fields(where, found: dict, must: dict[str, tuple], required=()) -> None:
    """Raise ValueError where a field is not what it must be; null is absent, unless required.

    must: {field: (what it must be, its types)}; of a number, which must be above 0, also its most.
    """
    for field, (what, types, *most) in must.items():
        value = found.get(field)
        wrong = type(value) not in types or (most and not 0 < value <= most[0])
        if wrong and (value is not None or field in required):
            what += f" above 0, at most {most[0]}" if most else ""
            raise ValueError(f"{where}: field '{field}' must be {what}, not {value!r}")


def without_twins(pairs: list[tuple]) -> dict:
    """A JSON object; ValueError where a key stands twice, since programs differ in what counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {max(keys, key=keys.count)!r} stands twice in an object")
    return found


def optional(path: Path) -> dict:
    """The JSON object of a file, or {} where there is no such file. ValueError: it is no object."""
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def seal(value) -> str:
    """sha256 of what JSON makes of a value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def write_json(path: Path, value) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        temporary.write_text(text, encoding="utf-8")
        put(temporary, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system within name the file: those of a full disk do not."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None


def flush(path: Path) -> None:
    """Wait until the disk itself holds a file, or the names in a folder: a power cut may follow."""
    if path.is_dir() and os.name == "nt":  # no folder can be opened there
        return
    opened = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:  # some file systems cannot do this to a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def put(temporary: Path, path: Path) -> None:
    """Rename what was written to its place, so that a power cut loses neither it nor its name."""
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def make(folder: Path) -> None:
    """Make a folder, and those it lies in, whose names a power cut does not lose."""
    if not folder.is_dir():
        make(folder.parent)
        folder.mkdir(exist_ok=True)
        flush(folder.parent)


@contextmanager
def replacing(directory) -> Iterator[Path]:
    """A temporary folder that takes the directory's place when the block ends without an error.

    with replacing(directory) as temporary: ... fill temporary ...
    """
    directory = Path(directory)
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    make(temporary)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            flush(path)
        if directory.exists():
            delete(directory)
        put(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def delete(path: Path) -> None:
    """Delete a file, or a folder, which is renamed first: what is half deleted is never read."""
    if path.is_symlink() or not path.is_dir():
        return path.unlink()
    aside = path.with_name(f".{path.name}.deleted.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    put(path, aside)
    shutil.rmtree(aside)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """No second process is in a block locked by the same file, which is gone after it.

    The lock dies with its process. Where there is none, as on some network disks, a line says so.
    Raises ValueError that says who holds it. A folder that is made for the file goes if it is
    empty at the end.
    """
    made = not file.parent.exists()
    make(file.parent)
    with open(file, "a+", encoding="utf-8") as held:
        try:
            import fcntl  # Windows has none

            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(held.fileno()).st_nlink:  # it was another's, and is gone
                raise BlockingIOError
        except BlockingIOError:
            held.seek(0)
            raise ValueError(f"{file.parent} is in use by another process {held.read()}") from None
        except (ImportError, OSError) as error:
            show(f"no lock on {file.parent} ({error}): start no second process there")
        try:
            file.write_text(f"({os.getpid()} on {platform.node()})", encoding="utf-8")
            yield
        finally:
            file.unlink(missing_ok=True)
            with suppress(OSError):
                if made:
                    file.parent.rmdir()


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
