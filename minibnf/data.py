"""Rows -> token ids -> packed batches.

Rows are rows.py's business. A batch is flat: no padding anywhere, a prompt stored once with the
responses that share it. Nothing is dropped or shortened unless the caller asked for it, and then
it is counted.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from minibnf.attention import Group
from minibnf.files.rows import Notes, Place, Record, each_row, parse_row, scan_rows
from minibnf.losses import Responses
from minibnf.machine import to_device


class Example(NamedTuple):
    """A prompt and its responses, as token ids: a pair, or responses that stand for themselves."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    preferred: tuple[bool, ...]  # of each response
    line: int  # in its file, from 1
    pairs: tuple[tuple[int, int], ...] = ()  # (chosen, rejected), which of the responses
    unit: str = "line"  # or "row", in an array and in Parquet
    ref_logps: tuple[Tensor, ...] = ()  # the reference's, of each response's tokens, once known

    @property
    def tokens(self) -> int:
        """How many tokens the model reads: a response's last one is predicted but not read."""
        return len(self.prompt) + sum(len(response) - 1 for response in self.responses)

    @property
    def place(self) -> str:
        return f"{self.unit} {self.line}"

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


# ---------------------------------------------------------------------------------------- reading


def read_examples(
    path, tokenizer, max_length: int, overlong: str = "error", notes: Notes | None = None
) -> tuple[list[Example], Counter]:
    """The rows of a file (see rows.py) as tokens, and counts of those that needed something.

    The counts: how many were "truncated" or "skipped", or have twice the same response.
    max_length: the most tokens of a prompt with one response (the model's context). overlong: what
    to do with more: "error", "truncate" (the response loses its end) or "skip". notes gathers what
    a person should know of the rows.
    Raises ValueError that lists the bad rows, each with its place and field; FileNotFoundError.
    """
    counts = Counter()

    def example(row: dict, place: Place) -> Example | None:
        found = example_of(parse_row(row, place), place, tokenizer, notes)
        prompt, responses = found.prompt, found.responses
        longest, room = len(prompt) + max(map(len, responses)), max_length - len(prompt)
        if longest > max_length:
            if overlong == "error" or (overlong == "truncate" and room <= 0):
                raise ValueError(
                    f"{place}: the prompt has {len(prompt)} tokens and {longest} with its response,"
                    f" and the model reads {max_length}; shorten it, or pass --overlong skip or "
                    "truncate (which shortens a response, not a prompt)"
                )
            counts["skipped" if overlong == "skip" else "truncated"] += 1
            if overlong == "skip":
                return None
        responses = tuple(response[:room] for response in responses)
        same = len(set(responses)) < len(responses)
        counts["whose chosen and rejected are the same"] += same
        return found._replace(responses=responses)

    examples = [e for e in each_row(scan_rows(path), example) if e]
    if not examples:
        raise ValueError(f"{path}: no rows left: all {counts['skipped']} are too long")
    return examples, +counts  # what did not occur is left out


def example_of(record: Record, place: Place, tokenizer, notes: Notes | None = None) -> Example:
    """A row's prompt and responses as token ids; ValueError where one has no token."""
    if notes:
        notes.add(record, place, tokenizer)
    variables = record.variables
    tokens = {"prompt": encode_prompt(tokenizer, record.prompt, place, variables)}
    for field, completion in record.completions:
        with _named(place, field):
            tokens[field] = _response_ids(tokenizer, record.prompt, completion, variables)
    empty = [field for field, ids in tokens.items() if not ids]
    if empty:
        raise ValueError(f"{place}: field '{empty[0]}' is empty; it needs at least one token")
    prompt, *responses = map(tuple, tokens.values())
    preferred, pairs = record.preferred, record.pairs
    return Example(prompt, tuple(responses), preferred, place.number, pairs, place.unit)


def encode_prompt(tokenizer, prompt, where, variables: dict) -> list[int]:
    """The ids of a text as it stands, or of messages up to where the model's answer begins.

    variables: of the template. A ValueError names where and the field.
    """
    with _named(where, "prompt"):
        if isinstance(prompt, str):
            return tokenizer.encode_text(prompt)
        _check_calls(tokenizer, prompt)
        return tokenizer.encode_chat(prompt, add_generation_prompt=True, **variables)


def _response_ids(tokenizer, prompt, completion, variables: dict) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode_text_response(completion)
    _check_calls(tokenizer, completion)
    if not any(m.get("content") or m.get("tool_calls") for m in completion):
        return []
    return tokenizer.encode_response(prompt, completion, **variables)[1]


def _check_calls(tokenizer, messages: list[dict]):
    """ValueError for a message that only calls a tool, where the template knows no calls."""
    lost = [m["role"] for m in messages if m.get("tool_calls") and not m.get("content")]
    if lost and not tokenizer.mentions("tool_calls"):
        raise ValueError(
            f"a message of '{lost[0]}' has no text beside its 'tool_calls', "
            "which this model's chat template does not read"
        )


@contextmanager
def _named(where, field: str):
    """A tokenizer's errors, and its warnings of what it would leave out, as one ValueError.

    It names the place and the field.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            yield
        except (UnicodeError, RuntimeError):  # RuntimeError: sentencepiece's word for it
            raise ValueError(f"{where}, field '{field}': text that is not valid Unicode") from None
        except (ValueError, UserWarning) as error:
            raise ValueError(f"{where}, field '{field}': {error}") from None


def digest(examples: list[Example]) -> str:
    """A fingerprint of the tokens and labels, which tells whether a cache still belongs to them."""
    what = [(e.prompt, e.responses, e.preferred, e.pairs) for e in examples]
    return hashlib.sha256(repr(what).encode()).hexdigest()


@lru_cache(maxsize=1)
def order_of_epoch(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0..n-1 that depends on seed and epoch alone."""
    number = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7]
    generator = torch.Generator().manual_seed(int.from_bytes(number))
    return torch.randperm(n, generator=generator).tolist()


LOOK = 30  # how many rows are looked through for another response, before an equal one is taken


def mismatched(examples: list[Example], max_length: int, path) -> tuple[list[Example], int]:
    """For each example, its prompt with responses to another prompt; how many are no other ones.

    They come from the next example (cyclically) that has another prompt and a response that is not
    also one's own (a rephrased question may share some) and fits into max_length, the model's
    context; its other responses are left out. Where the next LOOK that fit hold nothing but one's
    own, as where every rejected answer is "No.", the first of them is taken all the same, and
    counted. KTO estimates its reference point from these. Raises ValueError where nothing fits.
    """
    moved, equals, end, n = [], 0, 0, len(examples)
    for i, example in enumerate(examples):
        end = max(end, i + 1)  # of the rows with this prompt
        while end < i + n and examples[end % n].prompt == example.prompt:
            end += 1
        others = (examples[j % n] for j in range(end, i + n))
        first, other = (), ()
        for fitting in islice(_fitting(others, example.prompt, max_length), LOOK):
            first = first or fitting
            other = tuple(r for r in fitting if r not in example.responses)
            if other:
                break
        if not first:
            raise ValueError(
                f"{path}, {example.place}: kto compares with a response to another prompt, and no "
                f"row has one that fits into the {max_length} tokens that the model reads"
            )
        equals += not other
        responses = other or first
        unknown = (False,) * len(responses)  # labels, for which nobody asks
        moved.append(example._replace(responses=responses, preferred=unknown, pairs=()))
    return moved, equals


def _fitting(others: Iterable[Example], prompt, max_length: int) -> Iterator[tuple]:
    """Of each example with another prompt that has some, the responses that fit after this one."""
    for other in others:
        fitting = tuple(r for r in other.responses if len(prompt) + len(r) <= max_length)
        if other.prompt != prompt and fitting:
            yield fitting


# ------------------------------------------------------------------------------------------ packing


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch. T tokens in all, N of them response tokens, R responses.

    tokens, positions (1, T): groups one after another, each its prompt once, then its responses
    less their last token, which predicts nothing. Their positions all continue from the prompt's
    end.
    layout: the groups' lengths (attention.py).
    predictors (N,): where in T the hidden state stands that predicts each response token.
    targets (N,): that token.
    owner (N,), preferred (R,), pairs (P, 2): as in responses.Responses.  lengths (R,).
    ref_logps (N,): the reference's log-probabilities, None where the examples have none.
    order (R,): which responses these are, as (index of the example, index in it).
    starts: {token in N: (response, pair)}: where each row begins, and at last where all end.
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
    lengths: Tensor
    ref_logps: Tensor | None
    order: list[tuple[int, int]]
    starts: dict[int, tuple[int, int]]
    examples: int

    def responses(self, logps: Tensor, ref_logps: Tensor | None) -> Responses:
        return Responses(logps, ref_logps, self.owner, self.preferred, self.pairs)

    def to(self, device) -> "Batch":
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **{k: to_device(v, device) for k, v in tensors.items()})


def pack(examples: list[Example], indices: list[int], max_tokens: int) -> list[Batch]:
    """examples[i] for i in indices, packed into micro-batches of at most max_tokens tokens.

    Examples with the same prompt become one group (at most max_tokens long), so that the prompt is
    read once. Groups go, longest first, to the first micro-batch with room. Raises ValueError for
    an example longer than max_tokens.
    """
    groups: list[list[int]] = []
    sizes: list[int] = []  # of each group, in tokens
    newest: dict[tuple[int, ...], int] = {}  # the group of a prompt that may still have room
    for i in indices:
        example = examples[i]
        if example.tokens > max_tokens:
            raise ValueError(
                f"{example.place}: the example has {example.tokens} tokens, more than a "
                f"micro-batch holds; pass --max-tokens {example.tokens} or more"
            )
        group, more = newest.get(example.prompt), example.tokens - len(example.prompt)
        if group is not None and sizes[group] + more <= max_tokens:
            groups[group].append(i)
            sizes[group] += more
        else:
            newest[example.prompt] = len(groups)
            groups.append([i])
            sizes.append(example.tokens)
    longest_first = sorted(range(len(groups)), key=lambda group: -sizes[group])
    places = _first_fit([sizes[group] for group in longest_first], max_tokens)
    batches: dict[int, list[list[int]]] = {}
    for place, group in zip(places, longest_first, strict=True):
        batches.setdefault(place, []).append(groups[group])
    return [_flatten(examples, groups) for groups in batches.values()]


def _first_fit(sizes: list[int], capacity: int) -> list[int]:
    """For each size the first bin with room for it, bins being filled in this order.

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


def _flatten(examples: list[Example], groups: list[list[int]]) -> Batch:
    rows = list(chain.from_iterable(groups))
    packed = [examples[i] for i in rows]
    tokens, positions, layout, predictors = [], [], [], []
    for members in groups:
        prompt, reads = examples[members[0]].prompt, []
        # the prompt's last token predicts the first one of every response
        last = len(tokens) + len(prompt) - 1
        tokens += prompt
        positions += range(len(prompt))
        for i in members:
            for response in examples[i].responses:
                read = response[:-1]
                predictors += [last, *range(len(tokens), len(tokens) + len(read))]
                tokens += read
                positions += range(len(prompt), len(prompt) + len(read))
                reads.append(len(read))
        layout.append((len(prompt), reads))
    starts, N, R, P = {0: (0, 0)}, 0, 0, 0
    for example in packed:
        N += sum(map(len, example.responses))
        R += len(example.responses)
        P += len(example.pairs)
        starts[N] = R, P
    ref_logps = [logps for e in packed for logps in e.ref_logps]
    lengths = torch.tensor([len(response) for e in packed for response in e.responses])
    return Batch(
        tokens=torch.tensor([tokens]),
        positions=torch.tensor([positions]),
        layout=layout,
        predictors=torch.tensor(predictors),
        targets=torch.tensor([t for e in packed for response in e.responses for t in response]),
        owner=torch.repeat_interleave(lengths),
        preferred=torch.tensor([preferred for e in packed for preferred in e.preferred]),
        pairs=pairs_of(packed),
        lengths=lengths,
        ref_logps=torch.cat(ref_logps) if ref_logps else None,
        order=[(i, k) for i in rows for k in range(len(examples[i].responses))],
        starts=starts,
        examples=sum(e.count for e in packed),
    )
