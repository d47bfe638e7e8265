"""Preference data: JSON Lines -> token ids -> packed batches.

A row is paired {"prompt", "chosen", "rejected"}, unpaired {"prompt", "completion", "label"}, or paired with the prompt
implicit {"chosen": [messages], "rejected": [messages]}; one file may mix them. A batch is flat: no padding anywhere, a
prompt stored once with the responses that share it. Nothing is dropped or shortened unless the caller asked for it, and
then it is counted.
"""

import gzip
import hashlib
import json
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from minibnf.losses import Responses
from minibnf.attention import Group, to_device


class Example(NamedTuple):
    """A prompt and its responses, as token ids: a pair, or responses that stand for themselves."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    preferred: tuple[bool, ...]  # of each response
    line: int  # in its file, from 1
    pairs: tuple[tuple[int, int], ...] = ()  # (chosen, rejected), which of the responses

    @property
    def tokens(self) -> int:
        """How many tokens the model reads: nothing follows the last one of a response, so it is predicted but not read."""
        return len(self.prompt) + sum(len(response) - 1 for response in self.responses)

    @property
    def count(self) -> int:
        """How many examples a loss sees here: pairs, and responses in no pair."""
        return len(self.pairs) + len(self.responses) - len({k for pair in self.pairs for k in pair})


def pair(prompt, chosen, rejected, line: int) -> Example:
    """The example of a paired row: token ids of the prompt and of its two responses."""
    return Example(prompt, (chosen, rejected), (True, False), line, ((0, 1),))


def pairs_of(examples: list[Example]) -> Tensor:
    """(P, 2) int64: the pairs, as indices of all examples' responses one after another."""
    found, at = [], 0
    for example in examples:
        found += [(at + chosen, at + rejected) for chosen, rejected in example.pairs]
        at += len(example.responses)
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2)


# ------------------------------------------------------------------------------------------------------------ reading


def read_examples(path, tokenizer, max_length: int, overlong: str = "error") -> tuple[list[Example], Counter]:
    """Every row of a .jsonl or .jsonl.gz file, tokenised; and how many were "truncated", "skipped" or of no use.

    max_length: the most tokens of a prompt with one response (the model's context). overlong: what to do with more:
    "error", "truncate" (the response loses its end) or "skip".
    Raises ValueError with file, line and field for a row that does not fit, FileNotFoundError for no such file.
    """
    examples, counts = [], Counter()
    for number, row in tqdm(list(read_rows(path)), desc="tokenising", unit="row", disable=None, leave=False):
        where = f"{path}, line {number}"
        prompt, completions, preferred = parse_row(row, where)
        ids = [tokenise(tokenizer, prompt, c, where, field) for field, c in completions]
        prompt_ids, responses = ids[0][0], [tuple(response) for _, response in ids]
        if not prompt_ids:
            raise ValueError(f"{where}: field 'prompt' is empty, so nothing predicts the first token of a response")
        for (field, _), response in zip(completions, responses, strict=True):
            if not response:
                raise ValueError(f"{where}: field '{field}' is empty; a response needs at least one token")
        longest = len(prompt_ids) + max(map(len, responses))
        if longest > max_length:
            if overlong == "error" or (overlong == "truncate" and len(prompt_ids) >= max_length):
                alone = len(prompt_ids) >= max_length
                what = f"the prompt alone has {len(prompt_ids)}" if alone else f"prompt and response together have {longest}"
                raise ValueError(
                    f"{where}: {what} tokens, and the model reads {max_length}; shorten it, or pass --overlong skip"
                    + (" or --overlong truncate" if not alone else "")
                )
            counts["truncated" if overlong == "truncate" else "skipped"] += 1
            if overlong == "skip":
                continue
            responses = [r[: max_length - len(prompt_ids)] for r in responses]
        counts["whose chosen and rejected are the same"] += len(responses) == 2 and responses[0] == responses[1]
        pairs = ((0, 1),) if len(responses) == 2 else ()  # parse_row puts the chosen one first
        examples.append(Example(tuple(prompt_ids), tuple(responses), preferred, number, pairs))
    if not examples:
        raise ValueError(f"{path}: no rows" + (f" left: all {counts['skipped']} are too long" if counts else ""))
    return examples, +counts  # what did not occur is left out


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


def tokenise(tokenizer, prompt, completion, where: str, field: str) -> tuple[list[int], list[int]]:
    """-> the ids of prompt and response, () for an empty response."""
    try:
        with _named(where, field):
            return _tokenise(tokenizer, prompt, completion)
    except ValueError:
        encode_prompt(tokenizer, prompt, where)  # names its own field where the prompt is at fault
        raise


def _tokenise(tokenizer, prompt, completion):
    if isinstance(prompt, str):
        return tokenizer.encode_text(prompt), tokenizer.encode_text_response(completion)
    if not completion or not "".join(message["content"] for message in completion):
        return tokenizer.encode_chat(prompt, add_generation_prompt=True), []
    return tokenizer.encode_response(prompt, completion)


def encode_prompt(tokenizer, prompt, where: str, field: str = "prompt") -> list[int]:
    """A text as it stands, or messages up to where the model's answer begins; ValueError names where and field."""
    check_text(prompt, where, field)
    with _named(where, field):
        if isinstance(prompt, str):
            return tokenizer.encode_text(prompt)
        return tokenizer.encode_chat(prompt, add_generation_prompt=True)


@contextmanager
def _named(where: str, field: str):
    """A tokenizer's errors, and its warnings of what it cannot spell and would leave out: a ValueError that names the place."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            yield
        except (ValueError, RuntimeError, UserWarning) as error:  # RuntimeError: sentencepiece, of text that is no Unicode
            what = "text that is not valid Unicode" if isinstance(error, (UnicodeError, RuntimeError)) else error
            raise ValueError(f"{where}, field '{field}': {what}") from None


def digest(examples: list[Example]) -> str:
    """A fingerprint of the tokens and labels, for telling whether something cached still belongs to them."""
    what = [(e.prompt, e.responses, e.preferred, e.pairs) for e in examples]
    return hashlib.sha256(repr(what).encode()).hexdigest()


def order_of_epoch(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0..n-1 that depends on seed and epoch alone."""
    number = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7]
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(number))).tolist()


def mismatched(examples: list[Example], max_length: int, path) -> tuple[list[Example], int]:
    """For each example, its prompt with responses to another prompt; and how many found only equals.

    They come from the next example (cyclically) that has another prompt and a response that is not
    also one's own (a rephrased question may share some) and fits into max_length, the model's
    context; its other responses are left out. Where all that other prompts have is equal to one's
    own, as where every rejected answer is "No.", the next that fits is taken all the same, and
    counted. KTO estimates its reference point from these. Raises ValueError where nothing fits.
    """
    n, found, equals = len(examples), [], 0
    next_prompt = _next_different([e.prompt for e in examples])
    next_answers = _next_different([frozenset(e.responses) for e in examples])
    for i, example in enumerate(examples):
        room, own, match, new = max_length - len(example.prompt), set(example.responses), None, []
        j = next_prompt[i]
        while j < i + n and not new:
            other, jump = examples[j % n], next_prompt
            if other.prompt != example.prompt:
                jump = next_answers  # rows with the same responses would do no better
                fits = [k for k, response in enumerate(other.responses) if len(response) <= room]
                new = [k for k in fits if other.responses[k] not in own]
                if new or (fits and match is None):
                    match = other, new or fits
            j += jump[j % n] - j % n
        if match is None:
            raise ValueError(
                f"{path}, line {example.line}: kto compares with another prompt's response, "
                "and none fits here"
            )
        other, kept = match
        responses, preferred = (tuple(x[k] for k in kept) for x in (other.responses, other.preferred))
        found.append(example._replace(responses=responses, preferred=preferred, pairs=()))
        equals += not new
    return found, equals


def _next_different(values: list) -> list[int]:
    """For each i the least j > i, cyclically (so below 2n), whose value is another; 3n for none."""
    n = len(values)
    following = [3 * n] * (2 * n)
    for j in reversed(range(2 * n - 1)):  # twice round: the end goes on as the beginning does
        differs = values[(j + 1) % n] != values[j % n]
        following[j] = j + 1 if differs else following[j + 1]
    return following[:n]


# ------------------------------------------------------------------------------------------------------------ packing


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch. T tokens in all, N of them response tokens, R responses.

    tokens, positions (1, T): groups one after another, each its prompt once, then its responses less their last token,
    which predicts nothing; their positions all continue from the prompt's end.  layout: the groups' lengths (model.py).
    predictors (N,): where in T the hidden state stands that predicts each response token; targets (N,): that token.
    owner (N,), preferred (R,), pairs (P, 2): as in losses.Responses.  order (R,): which responses of the data these are,
    as (index of the example, index in it).  lines: the lines of the file they come from.
    examples: how many a loss sees, pairs and responses in no pair.
    """

    tokens: Tensor
    positions: Tensor
    layout: list[Group]
    predictors: Tensor
    targets: Tensor
    owner: Tensor
    preferred: Tensor
    pairs: Tensor
    order: list[tuple[int, int]]
    lines: list[int]
    examples: int

    def responses(self, logps: Tensor, ref_logps: Tensor | None) -> Responses:
        return Responses(logps, ref_logps, self.owner, self.preferred, self.pairs)

    def to(self, device) -> "Batch":
        return replace(self, **{k: to_device(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)})


def pack(examples: list[Example], indices: list[int], max_tokens: int) -> list[Batch]:
    """examples[i] for i in indices, packed into micro-batches of at most max_tokens tokens.

    Examples with the same prompt become one group (at most max_tokens long), so that the prompt is read once. Groups go,
    longest first, to the first micro-batch with room. Raises ValueError for an example longer than max_tokens.
    """
    groups = sorted(_groups(examples, indices, max_tokens), key=lambda g: -g[0])
    bins: list[list[list[int]]] = []
    for b, (_, members) in zip(_first_fit([size for size, _ in groups], max_tokens), groups, strict=True):
        if b == len(bins):
            bins.append([])
        bins[b].append(members)
    return [_flatten(examples, members) for members in bins]


def _first_fit(sizes: list[int], capacity: int) -> list[int]:
    """The bin that each size goes to, the first with room, all bins being empty at the start.

    The bins are the leaves of a binary tree whose nodes hold the most room of any bin below: the
    first bin with room is found from the root down, in log n steps where a scan takes n.
    """
    leaves = 1 << max(0, len(sizes) - 1).bit_length()
    room, bins = [capacity] * (2 * leaves), []  # node k has the children 2k and 2k + 1
    for size in sizes:
        k = 1
        while k < leaves:
            k = 2 * k if room[2 * k] >= size else 2 * k + 1
        bins.append(k - leaves)
        room[k] -= size
        while k > 1:
            k //= 2
            room[k] = max(room[2 * k], room[2 * k + 1])
    return bins


def _groups(examples, indices, max_tokens) -> list[tuple[int, list[int]]]:
    """(tokens, example indices) of each group of examples that share a prompt."""
    groups: list[tuple[int, list[int]]] = []
    newest: dict[tuple[int, ...], int] = {}  # prompt -> the group of it that still has room
    for i in indices:
        prompt, size = examples[i].prompt, examples[i].tokens
        if size > max_tokens:
            raise ValueError(
                f"line {examples[i].line}: the example has {size} tokens, more than a micro-batch holds; "
                f"pass --max-tokens {size} or more"
            )
        g = newest.get(prompt)
        if g is not None and groups[g][0] + size - len(prompt) <= max_tokens:
            groups[g] = (groups[g][0] + size - len(prompt), groups[g][1])
            groups[g][1].append(i)
        else:
            newest[prompt] = len(groups)
            groups.append((size, [i]))
    return groups


def _flatten(examples: list[Example], groups: list[list[int]]) -> Batch:
    tokens, positions, layout, predictors, targets, owner, preferred, pairs, order = [], [], [], [], [], [], [], [], []
    for members in groups:
        prompt, lengths = examples[members[0]].prompt, []
        last = len(tokens) + len(prompt) - 1  # the prompt's last token predicts every response's first
        tokens += prompt
        positions += range(len(prompt))
        for i in members:
            first = len(preferred)
            pairs += [(first + chosen, first + rejected) for chosen, rejected in examples[i].pairs]
            for k, response in enumerate(examples[i].responses):
                read = response[:-1]
                predictors += [last, *range(len(tokens), len(tokens) + len(read))]
                owner += [len(preferred)] * len(response)
                tokens += read
                positions += range(len(prompt), len(prompt) + len(read))
                targets += response
                lengths.append(len(read))
                preferred.append(examples[i].preferred[k])
                order.append((i, k))
        layout.append((len(prompt), lengths))
    return Batch(
        tokens=torch.tensor([tokens]),
        positions=torch.tensor([positions]),
        layout=layout,
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        owner=torch.tensor(owner),
        preferred=torch.tensor(preferred),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        order=order,
        lines=[examples[i].line for members in groups for i in members],
        examples=sum(examples[i].count for members in groups for i in members),
    )
