"""Files of a checkpoint that are damaged or hostile: what check and generate make of the folder.

A trial changes one file at random. It held if both commands end well, or one of them with one line,
within a gigabyte and twenty seconds.
"""

import gzip
import json
import shutil
from copy import deepcopy
from pathlib import Path
from random import Random

from minibnf.check import main as check
from minibnf.files import config, safetensors
from minibnf.generate import main as generate
from minibnf.model import load
from minibnf.train import main as train
from tests.faults.runs import WORLD, message, words
from tests.faults.trials import (
    Campaign,
    fine_or_one_line,
    flip,
    in_a_child,
    one_line,
    run,
    run_here,
)
from tests.test_tokenizer import CHATML, byte_level

BOUNDS = {"memory": 10**9, "seconds": 20}
TRIES = 20  # of a trial, which is one child
DEEP = "[" * 200 + "]" * 200
STRANGE = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, 10**400, 1e-300, 1e300, float("nan"),
    float("inf"), "", "false", "0", "\x1b[31m", "\ud800", "../x", "x" * 70_000, [], [None], ["a"],
    [[]], {}, {"a": {"b": []}}, {"content": 1}, {"content": "a"}, json.loads(DEEP),
]  # fmt: skip


def make_world(folder: Path) -> None:
    """Folders of the same model: with each kind of tokenizer, and in several files of weights."""
    fast, parts = folder / "fast", folder / "parts"
    shutil.copytree(WORLD["model"], fast, ignore=shutil.ignore_patterns("tokenizer*"))
    byte_level(fast, CHATML)
    (fast / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (fast / "chat_template.jinja").write_text(CHATML)
    shutil.copytree(WORLD["model"], parts)
    (parts / "model.safetensors").unlink()
    whole, safetensors.SHARD_BYTES = safetensors.SHARD_BYTES, 20_000
    weights = {name: p.detach() for name, p in load(WORLD["model"]).named_parameters()}
    safetensors.write_sharded(parts, weights)
    safetensors.SHARD_BYTES = whole
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": message("user", "Who is it?")}) + "\n")
    WORLD.update(fast=fast, parts=parts, prompts=prompts)
    for name in ("model", "fast", "parts"):
        place = folder / f"warm-{name}"
        place.mkdir()
        ended = run(used, [WORLD[name], place / "out.jsonl"], place)
        assert ended.status == 0, ended


def used(given: list) -> int:
    """The status of check, or of generate where the former is 0."""
    folder, out = given
    how = "--max-new-tokens 2 --temperature 0 --device cpu".split()
    command = ["--model", folder, "--data", str(WORLD["prompts"]), "--out", out, *how]
    return check([folder, "--values"]) or generate(command)


def each(change, random: Random, folder: Path):
    """What becomes of TRIES folders, each changed by change(random, folder) -> the model's."""

    def tries():
        for number in range(TRIES):
            place = folder / str(number)
            place.mkdir()
            model = change(random, place)
            yield fine_or_one_line(run_here(used, [model, place / "out.jsonl"], folder))
            shutil.rmtree(place)

    yield from in_a_child(tries, folder, **BOUNDS)


def copied(name: str, folder: Path) -> Path:
    return shutil.copytree(WORLD[name], folder / name)


# -------------------------------------------------------------------------------- what is changed


def places(value, found=None) -> list[tuple]:
    """(container, key) of everything within a JSON value."""
    found = [] if found is None else found
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            places(value[key], found)
    return found


def changed(value, random: Random, fields=()) -> str:
    """JSON in which one to three things are others than they were."""
    value = deepcopy(value)
    for _ in range(random.randint(1, 3)):
        container, key = random.choice(places(value) or [({}, "")])
        how = random.randrange(5)
        if how == 0 and isinstance(container, dict):
            container.pop(key, None)
        elif how == 1 and isinstance(value, dict) and fields:
            value[random.choice(fields)] = deepcopy(random.choice(STRANGE))
        elif how == 2:
            other, name = random.choice(places(value) or [([0], 0)])
            container[key] = deepcopy(other[name])
        elif key != "":
            container[key] = deepcopy(random.choice(STRANGE))
    text = json.dumps(value)
    if random.random() < 0.05:  # a key that stands twice
        text = text.replace("{", '{"a": 1, "a": 2, ', 1).replace(", }", "}")
    return text


def change_file(file: Path, random: Random, fields=()) -> None:
    data = file.read_bytes()
    if file.suffix == ".json" and random.random() < 0.8:
        file.write_text(changed(json.loads(data), random, fields))
    else:
        file.write_bytes(flip(data, random))


def tensors_changed(random: Random, folder: Path) -> Path:
    model = copied("model", folder)
    file = model / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    how = random.randrange(4)
    if how == 0:
        data = flip(data[: 8 + size], random) + rest
    elif how == 1:
        data = flip(data, random)
    elif how == 2:
        size = random.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
        data = size.to_bytes(8, "little") + header + rest
    else:
        text = changed(json.loads(header), random, ["model.norm.weight", "a", "__metadata__"])
        data = len(text.encode()).to_bytes(8, "little") + text.encode() + rest
    file.unlink()
    file.write_bytes(data)
    return model


FIELDS = sorted(set().union(config.SHAPE, config.HARMLESS, config.ONLY, *config.READS.values()))


def config_changed(random: Random, folder: Path) -> Path:
    model = copied("model", folder)
    if random.random() < 0.5:
        raw = json.loads((model / "config.json").read_text())
        raw["model_type"] = random.choice(list(config.READS))
        (model / "config.json").write_text(json.dumps(raw))
    change_file(model / "config.json", random, FIELDS)
    return model


def index_changed(random: Random, folder: Path) -> Path:
    model = copied("parts", folder)
    change_file(model / "model.safetensors.index.json", random, ["weight_map", "metadata"])
    return model


TOKENIZER_FIELDS = (
    "chat_template eos_token bos_token pad_token eos_token_id added_tokens_decoder add_bos_token"
    " additional_special_tokens tokenizer_class model added_tokens normalizer pre_tokenizer"
    " post_processor decoder truncation padding"
).split()


def tokenizer_changed(random: Random, folder: Path) -> Path:
    model = copied(random.choice(["fast", "model"]), folder)
    names = "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json"
    names += " generation_config.json chat_template.jinja"
    file = random.choice([model / name for name in names.split() if (model / name).exists()])
    change_file(file, random, TOKENIZER_FIELDS)
    return model


# ----------------------------------------------------------- small files that could cost everything


def bomb(line: bytes, before: bytes = b"") -> bytes:
    """A gzip file of about a megabyte that holds a gigabyte."""
    block = gzip.compress(line * (2**20 // len(line)), 9)
    return gzip.compress(before) + block * 1024


def sparse(file: Path, size: int = 20 * 10**9) -> None:
    file.unlink(missing_ok=True)
    with open(file, "wb") as hollow:
        hollow.truncate(size)


def with_fields(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def with_tokens(file: Path, texts: list[str]) -> None:
    """More control tokens in a tokenizer.json."""
    spec = json.loads(file.read_text())
    first = 1 + max(token["id"] for token in spec["added_tokens"])
    like = next(token for token in spec["added_tokens"] if token["special"])
    more = ({**like, "id": first + i, "content": text} for i, text in enumerate(texts))
    spec["added_tokens"] += more
    file.write_text(json.dumps(spec))


ROW = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}).encode()
MODELS = {  # what is done to a folder of a model
    "a million layers": lambda m: with_fields(m / "config.json", num_hidden_layers=10**6),
    "2 ** 31 layers": lambda m: with_fields(m / "config.json", num_hidden_layers=2**31),
    "a width of a million": lambda m: with_fields(
        m / "config.json", hidden_size=2**20, intermediate_size=2**20, vocab_size=2**20
    ),
    "a control token of 60,000 characters": lambda m: with_tokens(
        m / "tokenizer.json", ["<|" + "a" * 60_000 + "|>"]
    ),
    "20,000 control tokens of 60 characters": lambda m: with_tokens(
        m / "tokenizer.json", [f"<|{i:056}|>" for i in range(20_000)]
    ),
    "a tokenizer.model of 2 GB": lambda m: (
        (m / "tokenizer.json").unlink(), sparse(m / "tokenizer.model", 2 * 10**9)
    ),
} | {
    f"20 GB of nothing as {name}": (lambda m, name=name: sparse(m / name))
    for name in (
        "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "special_tokens_map.json", "chat_template.jinja", "model.safetensors",
        "model.safetensors.index.json",
    )
}  # fmt: skip
DATA = {  # the bytes of a file of rows
    "lines.jsonl.gz": lambda: bomb(b"a"),
    "blank.jsonl.gz": lambda: bomb(b"\n"),
    "spaces.jsonl.gz": lambda: bomb(b" ", ROW + b"\n"),
    "row.jsonl.gz": lambda: bomb(b"a", b'{"prompt": "'),
    "numbers.jsonl.gz": lambda: bomb(b"0\n"),
    "array.json.gz": lambda: bomb(b"{},", b"["),
    "deep.json.gz": lambda: bomb(b"["),
    "text.json.gz": lambda: bomb(b"a", b'["'),
    "20 GB.jsonl": None,
    "20 GB.json": None,
    "20 GB.parquet": None,
    "20 GB.jsonl.gz": None,
}
COSTLY = [*MODELS, *DATA]


def costs_everything(k: int, random: Random, folder: Path):
    name = COSTLY[k]
    if name in MODELS:
        model = copied("fast", folder)
        MODELS[name](model)
        ended = run(used, [model, folder / "out.jsonl"], folder, **BOUNDS)
    else:
        file = folder / name
        if DATA[name] is None:
            sparse(file)
        else:
            file.write_bytes(DATA[name]())
        ended = run(train, words(folder / "run", "--data", file), folder, **BOUNDS)
    wrong = one_line(ended)
    yield f"{name}: {wrong}" if wrong else ""


HOLDS = "check and generate end well, or with one line, within 1 GB and 20 s"
CHANGES = {
    "safetensors files": tensors_changed,
    "config.json": config_changed,
    "model.safetensors.index.json": index_changed,
    "files of tokenizers": tokenizer_changed,
}
CAMPAIGNS = [
    *(
        Campaign(
            f"changed {name}", HOLDS,
            lambda k, random, folder, change=change: each(change, random, folder),
            lambda: 5000 // TRIES, 3,
        )
        for name, change in CHANGES.items()
    ),
    Campaign(
        "small files that could cost everything",
        "one line, within 1 GB and 20 s",
        costs_everything, lambda: len(COSTLY), 6,
    ),
]  # fmt: skip
