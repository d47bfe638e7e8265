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
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from minibnf.files.disk import without_twins
from minibnf.files.messages import COMPARED, text_or_messages, without_prompt

PAIRED = ("chosen", "rejected")
UNPAIRED = ("prompt", "completion", "label")
OPTIONS = ("system", "tools", "chat_template_kwargs")
DECIDED = ("messages", "add_generation_prompt", "tools")  # no chat_template_kwargs
FORMS = (
    "a row has chosen and rejected, or prompt, completion and label, each a text or messages "
    "with 'role' and 'content'"
)
BLANK = b"\xef\xbb\xbf \t\r\n"  # may stand before the first row: a byte order mark, white space
# the most bytes of a line, of blank lines in a row, and of a file that is read at once
LINE, BLANKS, ARRAY = 2**24, 2**20, 2**28
DEPTH = 100  # how deeply a row's lists and objects may be nested; later code recurses too
SHOWN, BAD = 10, 1000  # bad rows that an error lists, and after which reading stops


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
    ImportError, or ValueError for a file that cannot be read, is broken or has no rows.
    """
    path = Path(path)
    place = None
    try:
        path.stat()
        for place, value in _parquet(path) if path.suffix == ".parquet" else _json(path):
            yield place, _row(value, place)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be read: {why}") from None
    if place is None:
        raise ValueError(f"{path}: no rows")


def _json(path: Path) -> Iterator[tuple[Place, object]]:
    """The rows of a file of JSON, whose first line that is not blank tells its form.

    Those of JSON Lines are bytes, so that one broken line is one bad row. ValueError for a line of
    more than LINE bytes, blank lines of more than BLANKS, and an array of more than ARRAY.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
        begun, blank = False, 0
        for number, line in enumerate(iter(partial(stream.readline, LINE + 1), b""), 1):
            text, long = line.strip(BLANK), len(line) > LINE
            opens = text[:1] == b"{" and text[-1:] != b"}" and not long
            if not begun and (opens or text[:1] == b"["):
                data = line + stream.read(ARRAY)
                if len(data) > ARRAY:
                    most = f"JSON over several lines, or an array, may have {ARRAY:,} bytes"
                    raise ValueError(f"{path}: {most}; write one row per line instead")
                yield from _values(path, data, number)
                return
            blank = 0 if text else blank + len(line)
            if long or blank > BLANKS:
                what = f"blank lines have {blank:,}" if blank else f"a line has more than {LINE:,}"
                raise ValueError(f"{path}, line {number}: {what} bytes")
            if text:
                begun = True
                yield Place(path, "line", number), line.rstrip()


def _values(path: Path, data: bytes, number: int) -> Iterator[tuple[Place, object]]:
    """The rows of an array, one after another; or objects over any number of lines.

    number: the line that the data begins with; objects are placed by their first.
    """
    decode = json.JSONDecoder(object_pairs_hook=without_twins).raw_decode
    space, comma = re.compile(r"\s*"), re.compile(r"\s*,\s*")
    with _json_errors(path, number):
        text, row, end = data.decode("utf-8-sig").strip(), 0, 0
        if text.startswith("["):
            found, end = re.match(r"\[(?!\s*\])\s*", text), 1  # None where it is empty
            while found:
                value, end = decode(text, found.end())
                yield Place(path, "row", row := row + 1), value
                found = comma.match(text, end)
            if text[end:].strip() != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
            return
        while end < len(text):
            start = space.match(text, end).end()
            number += text.count("\n", end, start)
            value, end = decode(text, start)
            yield Place(path, "line", number), value
            number += text.count("\n", start, end)


def _parquet(path: Path) -> Iterator[tuple[Place, object]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        message = f"{path}: Parquet needs the package pyarrow: pip install 'minibnf[data]'"
        raise ImportError(message) from None
    try:
        with ParquetFile(path) as file:
            rows = chain.from_iterable(b.to_pylist() for b in file.iter_batches(batch_size=1000))
            for number, row in enumerate(rows, 1):
                yield Place(path, "row", number), row
    except (ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}") from None


@contextmanager
def _json_errors(where, first: int = 0):
    """Errors of reading JSON as ValueError that says where, the column and, of a file, the line.

    first: the line of the file that the JSON begins with.
    """
    try:
        yield
    except json.JSONDecodeError as error:
        line = f", line {first + error.lineno - 1}" if first else ""
        at = f"{where}{line}, column {error.colno}"
        raise ValueError(f"{at}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, thousands of digits, deep brackets
        raise ValueError(f"{where}: JSON that cannot be read: {error}") from None


def _row(value, place: Place) -> dict | ValueError:
    """A row, or a line that holds one, without its nulls; or a ValueError that says what it is."""
    try:
        if isinstance(value, bytes):
            with _json_errors(place):
                value = json.loads(value.decode("utf-8-sig"), object_pairs_hook=without_twins)
        if not isinstance(value, dict):
            raise ValueError(f"{place}: a row must be a JSON object, not {type(value).__name__}")
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

    A row is bad if it is a ValueError or read raises one. A ValueError lists the first ten.
    """
    results, errors, bad = [], [], 0
    for place, row in tqdm(rows, desc="reading", unit="row", disable=None, leave=False):
        try:
            if isinstance(row, ValueError):
                raise row
            results.append(read(row, place))
        except ValueError as error:
            errors, bad = [*errors, str(error)][:SHOWN], bad + 1
            if bad == BAD:
                break
    if bad == 1:
        raise ValueError(errors[0])
    if bad:
        lines = [f"  {error.removeprefix(f'{place.path}, ')}" for error in errors]
        lines += [f"  ... and {bad - SHOWN} more"] if bad > SHOWN else []
        raise ValueError("\n".join([f"{place.path}: {bad}{'+' * (bad == BAD)} bad rows", *lines]))
    return results


def read_rows(path) -> list[tuple[Place, dict]]:
    """The rows of a file, without their nulls. Raises as scan_rows and each_row do."""
    return each_row(scan_rows(path), lambda row, place: (place, row))


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
    paired = "completion" not in row and "label" not in row
    for name in PAIRED if paired else UNPAIRED:
        _required(row, name, where)
    if not paired and (both := set(PAIRED) & set(row)):
        raise ValueError(
            f"{where}: field '{min(both)}' stands beside completion and label; "
            "a row is paired or it is not"
        )
    if not paired and not isinstance(row["label"], bool):
        raise ValueError(f"{where}: field 'label' must be true or false, not {row['label']!r}")
    fields = PAIRED if paired else ("completion",)
    given = [text_or_messages(row[name], where, name) for name in fields]
    prompt = text_or_messages(row["prompt"], where, "prompt") if "prompt" in row else None
    prompt, given = without_prompt(prompt, given, where)
    for name, completion in zip(fields, given, strict=True):
        if isinstance(completion, str) != isinstance(prompt, str):
            raise ValueError(
                f"{where}: fields 'prompt' and '{name}' must both be text or both be messages"
            )
        if not isinstance(completion, str) and completion[0]["role"] in ("system", "user"):
            raise ValueError(
                f"{where}: field '{name}' begins with a message of '{completion[0]['role']}'; "
                "a response is the assistant's"
            )
    preferred, pairs = ((True, False), ((0, 1),)) if paired else ((row["label"],), ())
    completions = list(zip(fields, given, strict=True))
    record = record_of(row, where, prompt, completions, preferred, (*fields, "prompt", "label"))
    return record._replace(pairs=pairs)


def parse_prompt(row: dict, where, chat: bool) -> Record:
    """The Record of a row's prompt, which in a chat may be what a user says; see parse_row."""
    _required(row, "prompt", where)
    prompt = text_or_messages(row["prompt"], where, "prompt")
    if not prompt:
        raise ValueError(f"{where}: field 'prompt' is empty")
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return record_of(row, where, prompt, [], (), (*PAIRED, *UNPAIRED))


def record_of(row: dict, where, prompt, completions, preferred, used: Iterable[str]) -> Record:
    """The Record of a row, with what its columns in OPTIONS say.

    used: the columns that were read so far, or need no mention.
    """
    prompt = _with_system(prompt, row.get("system"), where)
    unused = tuple(name for name in row if name not in (*used, *OPTIONS))
    return Record(prompt, completions, preferred, _variables(row, where), unused)


def _required(row: dict, name: str, where):
    if name not in row:
        raise ValueError(f"{where}: field '{name}' is missing; {FORMS}")


def _with_system(prompt, system, where):
    """The prompt after a system message, unless it has one."""
    if not system:  # people write "" for none
        return prompt
    if not isinstance(system, str) or isinstance(prompt, str):
        raise ValueError(
            f"{where}: field 'system' must be text beside a prompt of messages; a prompt that is "
            "text holds its system text itself"
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
    if tools is not None and (
        not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)
    ):
        raise ValueError(f"{where}: field 'tools' must be a list of schemas (objects)")
    variables = _from_json(row, "chat_template_kwargs", where)
    variables = {} if variables is None else variables
    if not isinstance(variables, dict) or variables.keys() & DECIDED:
        raise ValueError(
            f"{where}: field 'chat_template_kwargs' must be an object, which may not hold what "
            f"the rest of the row decides: {', '.join(DECIDED)}"
        )
    return variables if tools is None else {"tools": tools, **variables}


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
        return present(json.loads(value, object_pairs_hook=without_twins), where)


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
            found.append(
                "rows that repeat the prompt in the responses, so that the model reads it twice: "
                f"{len(self.repeated)}; the first: {self.repeated[0]}"
            )
        return found
