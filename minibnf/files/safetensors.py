"""Tensors in safetensors files: reading their headers, reading them, writing them.

Nothing is pickled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minibnf.files.disk import read_json, write_json

# By safetensors' names.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHARD_BYTES = 5 * 10**9


class Stored(NamedTuple):
    """Where a tensor lies, and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: F32, BF16, ...


def headers(directory: Path) -> dict[str, Stored]:
    """{name: Stored} of every tensor in a checkpoint's files, none of which is read.

    Raises FileNotFoundError, or ValueError for a damaged file or a tensor in two files.
    """
    found = {}
    for file in _weight_files(directory):
        with opened(file) as tensors:
            for name in tensors.keys():
                if name in found:
                    raise ValueError(f"{file}: tensor '{name}' stands in more than one file")
                header = tensors.get_slice(name)
                found[name] = Stored(file, tuple(header.get_shape()), header.get_dtype())
    return found


def tensors_of(stored: dict[str, Stored]) -> Iterator[tuple[str, torch.Tensor]]:
    """The name and tensor of each, file by file."""
    for file in sorted({x.file for x in stored.values()}):
        with opened(file) as tensors:
            for name in (name for name, x in stored.items() if x.file == file):
                yield name, tensors.get_tensor(name)


@contextmanager
def opened(file: Path):
    """What safe_open gives; its own exception becomes a ValueError that names the file."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from None


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        single = directory / "model.safetensors"
        if not single.is_file():
            raise FileNotFoundError(
                f"{directory}: no model.safetensors (nor model.safetensors.index.json) lies there"
            )
        return [single]
    found = read_json(index)
    if not isinstance(found, dict) or not isinstance(found.get("weight_map"), dict):
        raise ValueError(
            f"{index}: field 'weight_map' is missing; it names the file of each tensor"
        )
    files = sorted(set(found["weight_map"].values()))
    for name in files:
        if Path(name).name != name or not (directory / name).is_file():
            raise FileNotFoundError(
                f"{index}: names the file '{name}', which does not lie beside it"
            )
    return [directory / name for name in files]


def write_tensors(path: Path, tensors: dict, metadata: dict | None = None) -> None:
    """Write a safetensors file, whole or not at all.

    Whoever the umask allows may read it, which is not so of the library's own files.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        save_file(tensors, temporary, metadata=metadata or {"format": "pt"})
    except SafetensorError as error:  # no OSError, though a full disk is what it mostly means
        raise OSError(f"{path} cannot be written: {error}") from None
    temporary.chmod(mode)
    temporary.replace(path)


def write_sharded(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write model.safetensors into a directory; past SHARD_BYTES, several files and an index."""
    shards, size, weight_map = [{}], 0, {}
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_tensors(directory / "model.safetensors", tensors)
        return
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    index = {"metadata": total, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
