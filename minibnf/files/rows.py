"""Files of rows, and what a row says, without any model or tokenizer.

    for place, row in scan_rows("pairs.jsonl"):     # one function per format yields these
        parse_row(row, place)                       # -> Record(prompt, completions, preferred, ...)

Files: JSON Lines, a JSON array, JSON objects printed over several lines, each also as .gz; Parquet.
A file may be a pipe: it is read once, from its beginning to its end.

A row is one of
    {"prompt": P, "chosen": C, "rejected": C}       paired
    {"prompt": P, "completion": C, "label": bool}   unpaired
    {"chosen": C, "rejected": C}                    paired, the prompt implicit
P and C are texts or messages (see messages.py). Three more columns have a meaning beside messages:
"system" (a text) becomes the first message. "tools" (a list of schemas) and "chat_template_kwargs"
(an object) are variables of the chat template; either may also be a text that holds JSON. null
means absent, at any depth, since Arrow writes null for a key that only other rows have.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from minibnf.files.messages import COMPARED, text_or_messages, without_prompt

OPTIONS = ("system", "tools", "chat_template_kwargs")
UNPAIRED = ("prompt", "completion", "label")
BLANK = b"\xef\xbb\xbf \t\r\n"  # may stand before the first row: a byte order mark, white space
DEPTH = 100  # how deeply a row's lists and objects may be nested; later code recurses too
SHOWN = 10  # bad rows that an error lists


class Place(NamedTuple):
    """Where a row stands. Errors begin with its text."""

    path: Path
    unit: str  # "line", or "row" in an array and in Parquet
    number: int  # from 1

    def __str__(self):
        return f"{self.path}, {self.unit} {self.number}"


# --------------------------------------------------------------------------------------- files


def scan_rows(path) -> Iterator[tuple[Place, dict | ValueError]]:
    """The rows of a file, one after another, without their nulls.

    In place of a row that is no JSON object comes a ValueError that says why. Raises
    FileNotFoundError, ImportError, or ValueError for a file that is broken or has no rows.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file of rows")
    if path.name.removesuffix(".gz").endswith((".csv", ".tsv")):
        raise ValueError(
            f"{path}: tables of text (CSV, TSV) are not read; write JSON Lines, as pandas does: "
            f"read_csv(FILE).to_json(OUT, orient='records', lines=True)"
        )
    place = None
    try:
        for place, row in _parquet(path) if path.suffix == ".parquet" else _json(path):
            yield place, _object(row, place)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read to its end: {error}") from None
    if place is None:
        raise ValueError(f"{path}: no rows")


def _json(path: Path) -> Iterator[tuple[Place, object]]:
    """The rows of a file of JSON, whose first line that is not blank tells its form."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
        first = []
        for line in stream:
            first.append(line)
            if line.strip(BLANK):
                break
        opening = b"".join(first).strip(BLANK)
        if opening.startswith(b"["):
            yield from _array(path, b"".join([*first, *stream]))
        elif opening.startswith(b"{") and not opening.endswith(b"}"):
            yield from _objects(path, b"".join([*first, *stream]))
        else:
            yield from _lines(path, chain(first, stream))


def _lines(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[Place, object]]:
    """The rows of JSON Lines. A broken line becomes a ValueError, and reading goes on."""
    for number, line in enumerate(lines, 1):
        if line.strip(BLANK):
            place = Place(path, "line", number)
            try:
                with _json_errors(place):
                    row = json.loads(line.decode("utf-8-sig").strip())
            except ValueError as error:
                row = error
            yield place, row


def _array(path: Path, data: bytes) -> Iterator[tuple[Place, object]]:
    """The rows of a JSON array."""
    with _json_errors(path, whole=True):
        rows = json.loads(data.decode("utf-8-sig"))
    for number, row in enumerate(rows, 1):
        yield Place(path, "row", number), row


def _objects(path: Path, data: bytes) -> Iterator[tuple[Place, object]]:
    """The rows in JSON objects over any number of lines; a row's place is its first line."""
    with _json_errors(path, whole=True):
        text = data.decode("utf-8-sig")
    space, decode = re.compile(r"\s*"), json.JSONDecoder().raw_decode
    start, number = space.match(text).end(), 1 + text[: space.match(text).end()].count("\n")
    while start < len(text):
        place = Place(path, "line", number)
        try:
            with _json_errors(path, whole=True):
                row, end = decode(text, start)
        except ValueError as error:
            row, end = error, len(text)  # nobody knows where the next one begins
        yield place, row
        end = space.match(text, end).end()
        number += text.count("\n", start, end)
        start = end


def _parquet(path: Path) -> Iterator[tuple[Place, object]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        message = f"{path}: Parquet needs the package pyarrow: pip install 'minibnf[data]'"
        raise ImportError(message) from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(path, "row", number), row
    except (ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}") from None


@contextmanager
def _json_errors(where, whole: bool = False):
    """Errors of reading JSON as ValueError that says where, the column and, of a file, the line."""
    try:
        yield
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if whole else ""
        at = f"{where}{line}, column {error.colno}"
        raise ValueError(f"{at}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text: {error}") from None
    except (ValueError, RecursionError) as error:  # thousands of digits, deep brackets
        raise ValueError(f"{where}: JSON that cannot be read: {error}") from None


def _object(value, place: Place) -> dict | ValueError:
    """A row without its nulls, or a ValueError that says why it is no row."""
    if isinstance(value, ValueError):
        return value
    if not isinstance(value, dict):
        return ValueError(f"{place}: a row must be a JSON object, not {type(value).__name__}")
    try:
        return present(value, place)
    except ValueError as error:
        return error


def present(value, place: Place, depth: int = DEPTH):
    """The value without the keys that hold null, at any depth.

    Raises ValueError where it is nested more than `depth` deep.
    """
    if not depth:
        raise ValueError(f"{place}: JSON nested more than {DEPTH} deep")
    if isinstance(value, dict):
        return {k: present(v, place, depth - 1) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [present(item, place, depth - 1) for item in value]
    return value


def each_row(rows: Iterable[tuple[Place, dict | ValueError]], read: Callable) -> list:
    """[read(row, place), ...] of what scan_rows yields.

    A row is bad if it is a ValueError or read raises one. After the first bad row the others are
    only looked through for more; then a ValueError lists the first ten.
    """
    results, errors, path = [], [], None
    for place, row in tqdm(rows, desc="reading", unit="row", disable=None, leave=False):
        try:
            if isinstance(row, ValueError):
                raise row
            result = read(row, place)
        except ValueError as error:
            errors.append(str(error))
            path = place.path
        if not errors:
            results.append(result)
    if len(errors) == 1:
        raise ValueError(errors[0])
    if errors:
        shown = [f"\n  {error.removeprefix(f'{path}, ')}" for error in errors[:SHOWN]]
        more = f"\n  ... and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
        raise ValueError(f"{path}: {len(errors)} bad rows" + "".join(shown) + more)
    return results


def read_rows(path) -> list[tuple[Place, dict]]:
    """The rows of a file, without their nulls. Raises as scan_rows and each_row do."""

    def placed(row, place):
        return place, row

    return each_row(scan_rows(path), placed)


# ---------------------------------------------------------------------------------------- rows


class Record(NamedTuple):
    """What a row says. Prompt and completions are all texts, or all lists of messages."""

    prompt: str | list[dict]
    completions: list[tuple[str, str | list[dict]]]  # each with the name of its field
    preferred: tuple[bool, ...]
    variables: dict  # of the chat template
    unused: tuple[str, ...]  # columns that mean nothing here
    pairs: tuple[tuple[int, int], ...] = ()  # (chosen, rejected), which of the completions


def parse_row(row: dict, where) -> Record:
    """The Record of a paired or unpaired row. ValueError names where, the field and why."""
    unpaired = "completion" in row or "label" in row
    fields = ("completion",) if unpaired else ("chosen", "rejected")
    if unpaired:
        if both := {"chosen", "rejected"} & set(row):
            raise ValueError(
                f"{where}: field '{min(both)}' stands beside completion or label; "
                "a row is paired or it is not"
            )
        for name in UNPAIRED:
            if name not in row:
                raise ValueError(f"{where}: an unpaired row needs the field '{name}'")
        if not isinstance(row["label"], bool):
            raise ValueError(f"{where}: field 'label' must be true or false, not {row['label']!r}")
    for name in fields:
        if name not in row:
            forms = "a row has chosen and rejected, or prompt, completion and label"
            raise ValueError(f"{where}: field '{name}' is missing; {_wanted(row, forms)}")
    given = [text_or_messages(row[name], where, name) for name in fields]
    prompt = text_or_messages(row["prompt"], where, "prompt") if "prompt" in row else None
    prompt, given = without_prompt(prompt, given, where)
    for name, completion in zip(fields, given, strict=True):
        if isinstance(completion, str) != isinstance(prompt, str):
            raise ValueError(
                f"{where}: fields 'prompt' and '{name}' must both be text or both be messages"
            )
    preferred = (row["label"],) if unpaired else (True, False)
    completions = list(zip(fields, given, strict=True))
    record = record_of(row, where, prompt, completions, preferred, ("prompt", "label", *fields))
    return record if unpaired else record._replace(pairs=((0, 1),))


def parse_prompt(row: dict, where, chat: bool) -> Record:
    """The Record of a row's prompt, which in a chat may be what a user says; see parse_row."""
    if "prompt" not in row:
        wanted = _wanted(row, "a row has a prompt")
        raise ValueError(f"{where}: field 'prompt' is missing; {wanted}")
    prompt = text_or_messages(row["prompt"], where, "prompt")
    if not prompt:
        raise ValueError(f"{where}: field 'prompt' is empty")
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return record_of(row, where, prompt, [], (), ("prompt",))


def record_of(row: dict, where, prompt, completions, preferred, used: Iterable[str]) -> Record:
    """The Record of a row, with what its columns in OPTIONS say.

    used: the columns that were read so far.
    """
    prompt = _with_system(prompt, row.get("system"), where)
    unused = tuple(name for name in row if name not in (*used, *OPTIONS))
    return Record(prompt, completions, preferred, _variables(row, where), unused)


def _with_system(prompt, system, where):
    """The prompt after a system message, unless it has one."""
    if system is not None and not isinstance(system, str):
        raise ValueError(f"{where}: field 'system' must be text, not {type(system).__name__}")
    if not system:  # people write "" for none
        return prompt
    if isinstance(prompt, str):
        raise ValueError(
            f"{where}: field 'system' stands beside a prompt that is text, which holds its system "
            "text itself; put it there, or write the prompt as messages"
        )
    others = [m.get("content") for m in prompt if m["role"] == "system"]
    if others and others[0] != system:
        raise ValueError(
            f"{where}: field 'system' is another text than that of the system message; keep one"
        )
    return prompt if others else [{"role": "system", "content": system}, *prompt]


def _variables(row: dict, where) -> dict:
    """What the columns `tools` and `chat_template_kwargs` give to the template."""
    tools = _from_json(row, "tools", where)
    variables = _from_json(row, "chat_template_kwargs", where)
    variables = {} if variables is None else variables
    if not isinstance(variables, dict):
        raise ValueError(f"{where}: field 'chat_template_kwargs' must be an object")
    ours = {"messages", "add_generation_prompt"} | {"tools"} & set(row)
    if taken := ours & set(variables):
        raise ValueError(
            f"{where}: field 'chat_template_kwargs' may not hold '{min(taken)}', "
            "which the rest of the row decides"
        )
    if tools is None:
        return variables
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: field 'tools' must be a list of schemas (objects)")
    return {"tools": tools, **variables}


def _from_json(row: dict, name: str, where):
    """The value of a column, or the JSON in it where it is a text.

    People write such texts because Arrow cannot hold schemas of several shapes in one column.
    """
    value = row.get(name)
    if value == "":  # people write it for none
        return None
    if not isinstance(value, str):
        return value
    with _json_errors(f"{where}: field '{name}'"):
        return present(json.loads(value), where)


def _wanted(row: dict, forms: str) -> str:
    """What to write in place of a row that lacks a field."""
    if "conversations" not in row:
        return forms
    return f"'conversations' is ShareGPT's form; {forms}, whose messages have 'role' and 'content'"


# --------------------------------------------------------------------------------------- notes


@dataclass
class Notes:
    """What people should know about the rows of a run, though no row is bad."""

    unused: dict[str, None] = field(default_factory=dict)  # columns, in the order they were met
    repeated: list[Place] = field(default_factory=list)  # rows whose responses repeat the prompt

    def add(self, record: Record, place: Place, tokenizer) -> None:
        """Note what is remarkable about a row.

        tokenizer: its reads(name) says whether its chat template reads a variable, and
        mentions(key) whether it knows a key of messages.
        """
        self.unused |= dict.fromkeys(record.unused)
        text = isinstance(record.prompt, str)
        said = [] if text else [record.prompt, *(messages for _, messages in record.completions)]
        keys = {key for messages in said for message in messages for key in message}
        for key in sorted(keys.intersection(COMPARED) - {"role", "content"}):
            if not tokenizer.mentions(key):
                self.unused[f"'{key}' of messages"] = None
        for name in record.variables:
            if text or not tokenizer.reads(name):
                self.unused[name if name == "tools" else f"chat_template_kwargs.{name}"] = None
        begun = [c.startswith(record.prompt) for _, c in record.completions] if text else []
        if begun and all(begun) and record.prompt:
            self.repeated.append(place)

    def lines(self) -> list[str]:
        found = [f"columns not used: {', '.join(self.unused)}"] if self.unused else []
        if self.repeated:
            rows = "row repeats" if len(self.repeated) == 1 else "rows repeat"
            found.append(
                f"{len(self.repeated)} {rows} the prompt in the responses, so that the model reads "
                f"it twice; the first: {self.repeated[0]}"
            )
        return found
