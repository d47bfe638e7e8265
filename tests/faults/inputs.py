"""Data, words and names that people or programs may write: rows, files, messages, what is shown."""

import gzip
import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from random import Random

from minibnf.data import read_examples
from minibnf.evaluate import main as evaluate
from minibnf.files.tokenizer import load_tokenizer
from minibnf.train import main as train
from tests.faults.damage import changed, copied, used, with_fields
from tests.faults.runs import WORLD, message, words
from tests.faults.trials import Campaign, fine_or_one_line, flip, in_a_child, run
from tests.test_tokenizer import ROLES, SPECIAL, TEMPLATES, WRITERS, write_config

ROWS, FILES, CHATS = 250, 20, 200  # of a trial, which is one child


def make_world(folder: Path) -> None:
    """A tokenizer of each kind with each template; rows of each form."""
    WORLD["tokenizer"] = load_tokenizer(WORLD["model"])
    chats = WORLD["chats"] = []
    for kind, write in WRITERS.items():
        for name, template in TEMPLATES.items():
            place = folder / f"{kind} {name}"
            if name == next(iter(TEMPLATES)):
                place.mkdir()
                first = write(place)
            else:
                shutil.copytree(first, place)
            write_config(place, template)
            chats.append(load_tokenizer(place))
            chats[-1].encode_chat(message("user", "a"))  # warm
    pair, text = WORLD["rows"][0], {"prompt": "a", "chosen": " b", "rejected": " c"}
    said = {k: v for k, v in pair.items() if k != "rejected"}
    WORLD["forms"] = [
        pair, text, {"prompt": "a", "completion": " b", "label": True},
        {"prompt": pair["prompt"], "completion": pair["chosen"], "label": False},
        {k: pair["prompt"] + pair[k] for k in ("chosen", "rejected")},
        pair | {"system": "Be kind.", "tools": [{"name": "f"}], "chat_template_kwargs": {"x": 1}},
        pair | {"tools": "[]", "other": None, "chosen": pair["chosen"] * 2},
        said | {"rejected": said},
    ]  # fmt: skip
    read(io_file(folder / "warm.jsonl", [text]))


def io_file(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path) -> list:
    return read_examples(file, WORLD["tokenizer"], 256)[0]


# ------------------------------------------------------------------------------------ rows, files


def rows_changed(k: int, random: Random, folder: Path):
    """One row of three is others' work: three examples are read, or an error names its line."""
    good = json.dumps(WORLD["forms"][1]).encode()

    def tries():
        for _ in range(ROWS):
            fields = ["prompt", "chosen", "rejected", "completion", "label", "system", "tools"]
            bad = changed(random.choice(WORLD["forms"]), random, fields).encode()
            bad = flip(bad, random) if random.random() < 0.2 else bad
            (folder / "rows.jsonl").write_bytes(b"\n".join([good, bad, good]) + b"\n")
            try:
                blank, lines = not bad.strip(), bad.count(b"\n") + 3
                found = len(read(folder / "rows.jsonl"))
                yield "" if found == lines - blank else f"{found} examples of {bad[:300]!r}"
            except ValueError as error:
                named = re.search(r"line [2-9]|[2-9] bad rows", str(error))
                yield "" if named else f"{error} of {bad[:300]!r}"
            except Exception as error:
                yield f"{type(error).__name__}: {error} of {bad[:300]!r}"

    yield from in_a_child(tries, folder, memory=10**9, seconds=60)


def packed(random: Random) -> tuple[str, bytes]:
    """The name and bytes of a file of good rows, in some form."""
    rows = random.choices(WORLD["forms"][:5], k=random.randint(1, 4))
    form = random.choice(["lines", "array", "spread", "parquet"])
    if form == "parquet":
        import pyarrow
        from pyarrow import parquet

        columns = {k: [row.get(k) for row in WORLD["rows"][:4]] for k in WORLD["rows"][0]}
        target = io.BytesIO()
        parquet.write_table(pyarrow.table(columns), target)
        return "rows.parquet", target.getvalue()
    indent = 2 if form == "spread" else None
    texts = [json.dumps(row, indent=indent) for row in rows]
    text = f"[{', '.join(texts)}]" if form == "array" else "\n".join(texts)
    data = (text + random.choice(["", "\n"])).encode()
    return ("rows.json.gz", gzip.compress(data)) if random.random() < 0.3 else ("rows.json", data)


def files_changed(k: int, random: Random, folder: Path):
    def tries():
        for _ in range(FILES):
            name, data = packed(random)
            for _ in range(random.randint(1, 3)):
                data = flip(data, random)
            (folder / name).write_bytes(data)
            try:
                yield "" if read(folder / name) else "no examples, and no error"
            except ValueError as error:
                yield "" if str(folder / name) in str(error) else f"no name in: {error}"
            except Exception as error:
                yield f"{type(error).__name__}: {error} of {data[:300]!r}"

    yield from in_a_child(tries, folder, memory=2 * 10**9, seconds=60)


# --------------------------------------------------------------------------- forged control tokens

WORDS = ["a", " ", "\n", "user", "assistant", "system", "im_end", "<", "|>", "<|", "＜", "\u200b"]


def forged(random: Random) -> str:
    """A text of control tokens, whole or in parts, and what may stand between them."""
    parts = []
    for _ in range(random.randint(1, 6)):
        token = random.choice([*SPECIAL, *ROLES, "<think>", "</think>", "<s>", "</s>", "<unk>"])
        cut = random.randrange(len(token))
        parts.append(random.choice([token, token[:cut], token[cut:], *random.sample(WORDS, 2)]))
    return "".join(parts)


def tokens_forged(k: int, random: Random, folder: Path):
    """The ids hold the control tokens of the same chat about nothing, or the chat is refused."""

    def tries():
        for _ in range(CHATS):
            tokenizer = random.choice(WORLD["chats"])
            roles = ["user", "assistant", "user"][: random.randint(1, 3)]
            texts = [forged(random) for _ in roles]
            counts = []
            try:
                for said in (["a"] * len(roles), texts):
                    chat = [m for r, t in zip(roles, said, strict=True) for m in message(r, t)]
                    ids = tokenizer.encode_chat(chat, True)
                    control = {*tokenizer.control.values()} - {*tokenizer.backend.unknown}
                    counts.append(Counter(i for i in ids if i in control))
                yield "" if counts[0] == counts[1] else f"{tokenizer.directory.name}: {texts}"
            except ValueError as error:
                refused = re.search("acts on control text|only resembles it", str(error))
                yield "" if refused else f"{tokenizer.directory.name}: {texts}: {error}"

    yield from in_a_child(tries, folder, memory=10**9, seconds=120)


# ------------------------------------------------------------------------------------ what is shown

ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
HOSTILE = [
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b2J",
    "a\rb",
    "\x08\x08",
    "\u202etxt",
    "\u2066",
    "\x85",
]


def shown(k: int, random: Random, folder: Path):
    """Strings that act on a terminal, wherever a command may repeat them."""
    bad = random.choice(HOSTILE) + random.choice(["", "x" * 2000])
    row = dict(random.choice(WORLD["forms"]))
    model = copied(random.choice(["fast", "model"]), folder)
    file = folder / "rows.jsonl"
    how = random.randrange(7)
    if how == 0:
        row[bad] = 1
    elif how == 1:
        row[random.choice(list(row))] = random.choice([bad, {bad: bad}, [{"role": bad}], bad * 3])
    elif how == 2:
        file = folder / f"{bad[:100]}.jsonl"
    elif how == 3:
        with_fields(
            model / "config.json", **{random.choice(["x", "model_type", "hidden_act", bad]): bad}
        )
    elif how == 4:
        template = f"{{{{ raise_exception({bad!r}) }}}}"
        with_fields(
            model / "tokenizer_config.json",
            chat_template=random.choice([template, bad, "{%" + bad]),
        )
        (model / "chat_template.jinja").unlink(missing_ok=True)
    elif how == 5:
        token = random.choice(["eos_token", "bos_token", "pad_token"])
        with_fields(model / "tokenizer_config.json", **{token: bad})
    out, more = folder / "out", []
    if how == 6:
        more = random.choice([["--loss", bad], ["--loss-args", bad], ["--device", bad], [bad]])
    io_file(file, [row, *WORLD["forms"][:2]])
    if random.random() < 0.6:
        given = words(out, "--model", model, "--data", file, *more)
        ended = run(train, given, folder)
    elif random.random() < 0.5:
        ended = run(evaluate, ["--model", model, "--data", file, "--device", "cpu", *more], folder)
    else:
        ended = run(used, [model, folder / "answers.jsonl"], folder)
    acting = ACTS.search(ended.out + ended.err)
    wrong = f"shows {acting[0]!r}: {ended}" if acting else fine_or_one_line(ended)
    yield f"way {how}: {wrong}" if wrong else ""


CAMPAIGNS = [
    Campaign(
        "changed rows of data",
        "three rows give three examples, or one error that names the line",
        rows_changed, lambda: 50_000 // ROWS, 4,
    ),
    Campaign(
        "changed files of rows",
        "rows, or one error that names the file",
        files_changed, lambda: 2000 // FILES, 2,
    ),
    Campaign(
        "forged control tokens",
        "the ids hold the template's control tokens alone, or the chat is refused",
        tokens_forged, lambda: 12_000 // CHATS, 3,
    ),
    Campaign(
        "what is shown",
        "nothing that a terminal would act on; a good end, or one line",
        shown, lambda: 1000, 30,
    ),
]  # fmt: skip
