"""Tensors in safetensors files: reading their headers, reading them, writing them.

Nothing is pickled.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minibnf.files.disk import optional, put, write_json, writing

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
    """The name and tensor of each, file by file; FloatingPointError for one that is not finite."""
    for file in sorted({x.file for x in stored.values()}):
        with opened(file) as tensors:
            for name in (name for name, x in stored.items() if x.file == file):
                yield name, check_finite(file, name, tensors.get_tensor(name))


@contextmanager
def opened(file: Path):
    """What safe_open gives; its own exception becomes a ValueError that names the file."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from None


def check_finite(where, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor. Raises FloatingPointError that names it where it holds NaN or infinity."""
    # A sum that is finite has finite parts, and takes a tenth of the time.
    if not (tensor.sum().isfinite() or tensor.isfinite().all()):
        raise FloatingPointError(f"{where}: tensor '{name}' holds a number that is not finite")
    return tensor


def fingerprint(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 of every tensor's name and bytes."""
    found = hashlib.sha256()
    for name, x in named:
        found.update(name.encode())
        found.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _sha256(tensors: dict[str, torch.Tensor], seal: str) -> str:
    """Of all that a file says of tensors, in whatever order, and of what they belong to."""
    return fingerprint((f"{seal} {k} {x.dtype} {x.shape}", x) for k, x in sorted(tensors.items()))


def read_sealed(path: Path, seal: str) -> dict[str, torch.Tensor]:
    """The tensors of a file that write_tensors sealed so.

    Raises OSError, or ValueError where it is not as it was written.
    """
    with open(path, "rb") as file:
        while file.read(2**24):  # what cannot be read is an error here; mapped, it ends the process
            pass
    with opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        if (file.metadata() or {}).get("sha256") != _sha256(tensors, seal):
            raise ValueError(f"{path.name} is not what was written: its hash is another")
    return tensors


def _weight_files(directory: Path) -> list[Path]:
    index, names = directory / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        weight_map = optional(index).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else [None]
        if not all(isinstance(file, str) for file in files):
            raise ValueError(f"{index}: 'weight_map' must name the file of each tensor")
        names = sorted(set(files))
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise FileNotFoundError(f"{directory}: the file of weights '{name}' does not lie there")
    return [directory / name for name in names]


def write_tensors(path: Path, tensors: dict, seal: str = "") -> None:
    """Write a safetensors file, whole or not at all.

    seal: what they belong to; the header gets a hash, which read_sealed compares. Whoever the umask
    allows may read the file, which is not so of the library's own files.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    # one entry: the library writes several in any order, and the same run must give the same bytes
    metadata = {"sha256": _sha256(tensors, seal)} if seal else {"format": "pt"}
    with writing(path):
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # though a full disk is what it mostly means
            raise OSError(error) from None
        temporary.chmod(mode)
        put(temporary, path)


def write_sharded(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write model.safetensors into a directory; past SHARD_BYTES, several files and an index."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        of = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        write_tensors(directory / f"model{of}.safetensors", shard)
        weight_map |= dict.fromkeys(shard, f"model{of}.safetensors")
    if len(shards) == 1:
        return
    total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    index = {"metadata": total, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
