"""Checkpoints in the Hugging Face layout: config.json and one or more safetensors files. Strict in, atomic out.

Every tensor is accounted for by name and shape; a tied unembedding is stored once. Nothing is pickled.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minibnf.config import read_config, read_json
from minibnf.model import Transformer
from minibnf.tokenizer import FILES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors names them

SHARD_BYTES = 5 * 10**9


class Stored(NamedTuple):
    """Where a tensor lies, and what its file's header says of it; dtype as safetensors writes it: F32, BF16, ..."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def load(directory: str | os.PathLike, dtype: torch.dtype | None = None, device=None) -> Transformer:
    """A Transformer from a checkpoint directory; dtype by default as stored.

    Raises ValueError for a tensor that is missing, unexpected or of another shape than config.json says.
    """
    config, raw = read_config(directory)
    with torch.device("meta"):
        model = Transformer(config, raw)
    state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors_of(tensors_stored(directory, model))}
    model.load_state_dict(state, strict=True, assign=True)
    return model


def tensors_stored(directory: str | os.PathLike, model: Transformer) -> dict[str, Stored]:
    """{name: Stored} of exactly the model's parameters, from the headers of the directory's files.

    No weights are read, but for an unembedding that config.json ties and the files hold
    nevertheless. Rotary frequencies, which old files hold, are passed over: config.json decides
    them. Raises as load does.
    """
    wanted, found = {name: tuple(p.shape) for name, p in model.named_parameters()}, {}
    for file in _weight_files(Path(directory)):
        with opened(file) as tensors:
            for name in tensors.keys():
                if name.endswith(".rotary_emb.inv_freq"):
                    continue
                if name in found:
                    raise ValueError(f"{file}: tensor '{name}' stands in more than one file")
                header = tensors.get_slice(name)
                found[name] = Stored(file, tuple(header.get_shape()), header.get_dtype())
    if model.config.tie_word_embeddings and (twin := found.pop("lm_head.weight", None)) is not None:
        pair = {"lm_head.weight": twin} | {k: v for k, v in found.items() if k == "model.embed_tokens.weight"}
        if len(values := list(tensors_of(pair))) < 2 or not torch.equal(values[0][1], values[1][1]):
            raise ValueError(f"{directory}: config.json ties the embeddings, but lm_head.weight differs from embed_tokens")
    if missing := sorted(set(wanted) - set(found)):
        raise ValueError(f"{directory}: tensor '{missing[0]}' is missing ({len(missing)} of {len(wanted)} are)")
    if unexpected := sorted(set(found) - set(wanted)):
        raise ValueError(f"{directory}: tensor '{unexpected[0]}' is in the files but not in the model that config.json names")
    for name, tensor in found.items():
        if tensor.shape != wanted[name]:
            raise ValueError(f"{directory}: tensor '{name}' is {tensor.shape}, but config.json says {wanted[name]}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{directory}: tensor '{name}' is {tensor.dtype}; quantised checkpoints are not supported")
    return found


def tensors_of(stored: dict[str, Stored]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each, file by file."""
    for file in sorted({x.file for x in stored.values()}):
        with opened(file) as tensors:
            for name in (name for name, x in stored.items() if x.file == file):
                yield name, tensors.get_tensor(name)


@contextmanager
def opened(file: Path):
    """safe_open, whose own exception (no ValueError) becomes one that names the file."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from None


def fresh(directory: str | os.PathLike, seed: int, dtype: torch.dtype = torch.float32, device=None) -> Transformer:
    """A Transformer with the directory's config.json and random weights."""
    config, raw = read_config(directory)
    return Transformer(config, raw).init_weights(seed).to(device=device, dtype=dtype)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        single = directory / "model.safetensors"
        if not single.is_file():
            raise FileNotFoundError(f"{directory}: no model.safetensors (nor model.safetensors.index.json) lies there")
        return [single]
    found = read_json(index)
    if not isinstance(found, dict) or not isinstance(found.get("weight_map"), dict):
        raise ValueError(f"{index}: field 'weight_map' is missing; it names the file of each tensor")
    files = sorted(set(found["weight_map"].values()))
    for name in files:
        if Path(name).name != name or not (directory / name).is_file():
            raise FileNotFoundError(f"{index}: names the file '{name}', which does not lie beside it")
    return [directory / name for name in files]


def save(model: Transformer, directory: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors (sharded past 5 GB) into a directory; its other files stay.

    dtype: what to store, by default the parameters' own. All files are written elsewhere first and moved at the end, so
    that an interruption while writing leaves what was there.
    """
    directory = Path(directory)
    state = {name: p.detach().to(device="cpu", dtype=dtype).contiguous() for name, p in model.named_parameters()}
    stored = next(iter(state.values())).dtype
    shards, size, weight_map = [{}], 0, {}
    for name, tensor in state.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    with replacing(directory / ".saving") as temporary:
        for i, shard in enumerate(shards):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(temporary / file, shard)
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
            write_json(temporary / "model.safetensors.index.json", index)
        raw = {k: v for k, v in model.raw.items() if k != "torch_dtype"} | {"dtype": str(stored).removeprefix("torch.")}
        write_json(temporary / "config.json", raw)
    new = {file.name: file.replace(directory / file.name) for file in (directory / ".saving").iterdir()}
    (directory / ".saving").rmdir()
    for stale in set(directory.glob("model*.safetensors*")) - set(new.values()):
        stale.unlink()


def write_json(path: Path, value) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_tensors(path: Path, tensors: dict, metadata: dict | None = None) -> None:
    """A safetensors file, whole or not at all, and readable by whom the umask lets read it (the library's own is not)."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        save_file(tensors, temporary, metadata=metadata or {"format": "pt"})
    except SafetensorError as error:  # no OSError, though a full disk is what it mostly means
        raise OSError(f"{path} cannot be written: {error}") from None
    temporary.chmod(mode)
    temporary.replace(path)


def inside(path: Path, folder: Path) -> bool:
    """Does a path, or what it links to, lie in a folder, or is it the folder itself?"""
    places = path.resolve(), path.parent.resolve() / path.name
    return any(place.is_relative_to(folder.resolve()) for place in places)


def check_output(out: Path, inputs: Iterable[Path]) -> None:
    """ValueError if out, a file to write, is a folder, an input, or a file of an input's folder.

    Under whatever name: a symbolic or a hard link to an input is that input.
    """
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file")
    for place in inputs:
        for file in place.iterdir() if place.is_dir() else [place]:
            if out.exists() and file.exists() and out.samefile(file):
                raise ValueError(f"--out {out} is the input {file}; name another file")


OUT_OF_MEMORY = (  # what the text of a RuntimeError says where PyTorch has no class for it
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Does this exception mean that a device, or the machine, ran out of memory?"""
    if isinstance(error, RuntimeError):
        text = str(error).lower()
        return any(words.lower() in text for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


@contextmanager
def memory_advice(advice: str):
    """Where memory runs out within, a MemoryError of one line that says what to do about it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        said = str(error).splitlines() or [type(error).__name__]
        raise MemoryError(f"out of memory; {advice} ({said[0]})") from None


def resolve_device_and_dtype(device: str, dtype: str, parameters: int) -> tuple[torch.device, torch.dtype]:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here")
    device = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
    if dtype == "auto":
        cuda = device == "cuda"
        units = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if units and parameters > 20e6 else "float32"
    return torch.device(device), DTYPES[dtype]


def model_card(args, f: dict, hyper: dict, table: dict) -> str:
    """README.md of a trained model: train.py's arguments and facts, and its evaluations {name: (before, after)}."""
    base = name_of(args.model)
    hyper = ", ".join(f"{k} = {v}" for k, v in hyper.items() if k != "kl") or "no hyper-parameters"
    card = f"""---
base_model: {base}
tags: [minibnf, {args.loss}, preference-alignment]
---
# {base}, trained with {args.loss}

Loss: {args.loss} ({hyper}). Data: {Path(args.data).name}, {f["pairs"]} pairs and {f["unpaired"]} unpaired responses.
{f["steps"]} steps of {f["batch"]} examples, peak learning rate {f["lr"]:.3g}, {args.optimizer}, seed {args.seed},
computed in {f["dtype"]}.
Made by minibnf (Bidirectional Negative Feedback: Mao et al., ICLR 2025, arXiv 2410.04834).
"""
    if table:
        rows = "".join(f"| {k} | {first:.4f} | {last:.4f} |\n" for k, (first, last) in table.items())
        card += f"\n| held-out | before | after |\n|---|---|---|\n{rows}"
    return card


def name_of(directory) -> str:
    """A model's name: org/name in a hub's cache (models--org--name/snapshots/*), or its folder."""
    *_, repository, snapshots, _ = (".", ".", *Path(directory).resolve().parts)
    if snapshots == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return Path(directory).absolute().name


# --------------------------------------------------------------- the folder of a training run

RUN_NAMES = (  # what a run writes
    "config.json", "model", "checkpoints", "metrics.jsonl", "reference-*.safetensors",
    "figures/training.png",
)  # fmt: skip


def holds_run(out: Path) -> bool:
    """Does a folder hold a run, finished or not: a config.json that the trainer wrote?"""
    file = out / "config.json"
    try:
        found = read_json(file) if file.is_file() else None
    except ValueError:
        return False
    names = ("arguments", "facts")
    return isinstance(found, dict) and all(isinstance(found.get(name), dict) for name in names)


def refuse_foreign(out: Path) -> None:
    """ValueError if a folder that holds no run has a file or folder of a name that a run writes."""
    for name in RUN_NAMES:
        for path in out.glob(name):
            raise ValueError(
                f"--out {out} holds {path.relative_to(out)}, and no config.json of a run of minibnf; "
                "name another folder"
            )


def refuse_strangers(out: Path) -> None:
    """ValueError if a folder that a run replaces as a whole holds a file that no run wrote."""
    weights = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|optimizer-\d\.safetensors")
    others = {"config.json", "README.md", "state.json", "additional_chat_templates", *FILES}
    folders = [folder for folder in [out / "model", *checkpoints(out)] if folder.is_dir()]
    for path in (path for folder in folders for path in folder.iterdir()):
        if path.name not in others and not weights.fullmatch(path.name):
            raise ValueError(
                f"{path}: no run of minibnf wrote this, and --overwrite would delete it with its folder; "
                "move it elsewhere first"
            )


def delete_run(out: Path) -> None:
    """Delete what a run wrote in its folder, and the folders that this empties; all else stays.

    config.json stays until the next run's takes its place, and a folder is renamed before its
    files go: after an interruption the folder still holds a run, and nothing half deleted in it
    is taken for whole.
    """
    left = [*out.glob(".model.*.tmp"), *out.glob("checkpoints/.step-*.tmp")]
    for folder in left:  # by a run that was killed, or by an interrupted deletion
        shutil.rmtree(folder)
    whole = [out / "model", *checkpoints(out)]
    for folder in whole:
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.deleted.tmp")))
        else:
            folder.unlink(missing_ok=True)
    files = [out / "metrics.jsonl", *out.glob("reference-*.safetensors")]
    files.append(out / "figures" / "training.png")
    for file in files:
        file.unlink(missing_ok=True)
    emptied = [out / "checkpoints", out / "figures"]
    for folder in emptied:
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


def checkpoints(out: Path) -> list[Path]:
    """OUT/checkpoints/step-N, the oldest first."""
    found = [p for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def save_training(out: Path, step: int, tokens: int, model: Transformer, optims: list) -> None:
    """OUT/checkpoints/step-N: weights, optimiser states and counts, complete or absent; older ones go once it is there."""
    directory = out / "checkpoints" / f"step-{step:07d}"
    if directory.exists():  # nothing has changed since it was made
        return
    with replacing(directory) as temporary:
        write_tensors(temporary / "model.safetensors", {n: p.detach().cpu() for n, p in model.named_parameters()})
        for i, optim in enumerate(optims):
            state = {f"{k}.{name}": x for k, s in optim.state_dict()["state"].items() for name, x in s.items()}
            write_tensors(temporary / f"optimizer-{i}.safetensors", state)
        write_json(temporary / "state.json", {"step": step, "num_tokens": tokens})
    others = [*checkpoints(out), *directory.parent.glob(".step-*.tmp")]
    for old in others:
        if old != directory:
            shutil.rmtree(old)


@torch.no_grad()
def load_training(out: Path, model: Transformer, optims: list) -> tuple[int, int]:
    """Put the newest checkpoint into model and optimisers -> (steps done, tokens read); (0, 0) if there is none.

    Raises OSError that names a checkpoint that is damaged, or cannot be read.
    """
    found = checkpoints(out)
    if not found:
        return 0, 0
    try:
        return _load_training(found[-1], model, optims)
    except (SafetensorError, ValueError, KeyError, FileNotFoundError) as error:
        raise OSError(
            f"{found[-1]}: a damaged checkpoint ({error}); --overwrite starts anew"
        ) from None
    except OSError as error:  # no damage: a file that may not be read, say
        raise OSError(f"{found[-1]}: the checkpoint cannot be read: {error}") from None


def _load_training(directory: Path, model: Transformer, optims: list) -> tuple[int, int]:
    with safe_open(directory / "model.safetensors", framework="pt") as tensors:
        for name, p in model.named_parameters():
            stored = tensors.get_tensor(name)
            if stored.shape != p.shape:
                raise ValueError(
                    f"tensor '{name}' is {tuple(stored.shape)}, the model's {tuple(p.shape)}"
                )
            p.copy_(stored)
    for i, optim in enumerate(optims):
        state: dict = {}
        with safe_open(directory / f"optimizer-{i}.safetensors", framework="pt") as tensors:
            for key in tensors.keys():
                index, name = key.split(".")
                state.setdefault(int(index), {})[name] = tensors.get_tensor(key)
        params = [p for group in optim.param_groups for p in group["params"]]
        for index, p in enumerate(params):
            for name, x in state.get(index, {}).items():
                if x.dim() and x.shape != p.shape:
                    raise ValueError(f"optimizer-{i}: '{index}.{name}' is {tuple(x.shape)}, not {tuple(p.shape)}")
        optim.load_state_dict({"state": state, "param_groups": optim.state_dict()["param_groups"]})
    state = read_json(directory / "state.json")
    if not isinstance(state, dict):
        raise ValueError("state.json holds no JSON object")
    return state["step"], state["num_tokens"]


def keep_metrics(file: Path, step: int) -> None:
    """Drop what an interrupted run logged past its checkpoint at `step` (all of it at 0; the last line may be torn)."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines() if step else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    write_text(file, "".join(kept))


class replacing:
    """with replacing(directory) as temporary: fill temporary; on success it takes the directory's place by renaming."""

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
