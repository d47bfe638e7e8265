"""Rows of preference data: what files of them look like, knowing no model and no tokenizer."""

import gzip
import json
import zlib
from pathlib import Path


def read_rows(path):
    """(line number, object) of every row of a .jsonl or .jsonl.gz file that is not blank; ValueError names the bad line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: " + ("is no file" if path.exists() else "there is no such file"))
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        for number, line in _numbered(lines, path):
            where = f"{path}, line {number}"
            try:
                line = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not line.strip():
                    continue
                row = json.loads(line.rstrip())
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 text: {error}") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}, column {error.colno}: not valid JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets as deep
                raise ValueError(f"{where}: JSON that cannot be read: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
            yield number, row


def _numbered(lines, path):
    """enumerate(lines, 1), a broken archive named."""
    try:
        yield from enumerate(lines, 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read to its end: {error}") from None


def parse_row(row: dict, where: str) -> tuple[object, list[tuple[str, object]], tuple[bool, ...]]:
    """-> prompt, [(field, completion)], preferred; prompt and completions all strings or all lists of messages."""
    if "completion" in row or "label" in row:
        if both := {"chosen", "rejected"} & set(row):
            raise ValueError(f"{where}: field '{min(both)}' stands beside completion or label; a row is paired or it is not")
        fields, preferred = ["completion"], row.get("label")
        for field in ("prompt", "completion", "label"):
            if row.get(field) is None:
                raise ValueError(f"{where}: an unpaired row needs the field '{field}'")
        if not isinstance(preferred, bool):
            raise ValueError(f"{where}: field 'label' must be true or false, not {preferred!r}")
        preferred = (preferred,)
    else:
        fields, preferred = ["chosen", "rejected"], (True, False)
        for field in fields:
            if row.get(field) is None:
                raise ValueError(
                    f"{where}: field '{field}' is missing; a row has chosen and rejected, or prompt, completion and label"
                )
    for field in ("prompt", *fields):
        if row.get(field) is not None:
            check_text(row[field], where, field)
    prompt = row.get("prompt")
    if prompt is None:
        chosen, rejected = row["chosen"], row["rejected"]
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise ValueError(f"{where}: field 'prompt' is missing; only lists of messages can hold it implicitly")
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if shared in (0, len(chosen), len(rejected)):
            what = "share no first message" if shared == 0 else "do not differ after their shared beginning"
            raise ValueError(f"{where}: fields 'chosen' and 'rejected' {what}, so the prompt cannot be told from them")
        prompt, row = chosen[:shared], {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    for field in fields:
        if isinstance(row[field], str) != isinstance(prompt, str):
            raise ValueError(f"{where}: fields 'prompt' and '{field}' must both be text or both be lists of messages")
    return prompt, [(field, row[field]) for field in fields], preferred


def check_text(value, where: str, field: str):
    """ValueError where a field is neither text nor a list of messages."""
    if isinstance(value, str):
        return
    if not isinstance(value, list):
        raise ValueError(f"{where}: field '{field}' must be text or a list of messages, not {type(value).__name__}")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{where}: field '{field}', message {i}: needs text in 'role' and 'content'")
