"""Rows -> token ids -> packed batches.

Rows are rows.py's business. A batch is flat: no padding anywhere, a prompt stored once with the
responses that share it. Nothing is dropped or shortened unless the caller asked for it, and then
it is counted.
"""

import hashlib
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
        record = parse_row(row, place)
        if notes:
            notes.add(record, place, tokenizer)
        prompt, responses = token_ids(tokenizer, record, place)
        longest = len(prompt) + max(map(len, responses))
        if longest > max_length:
            if overlong == "error" or (overlong == "truncate" and len(prompt) >= max_length):
                raise ValueError(f"{place}: {_too_long(len(prompt), longest, max_length)}")
            counts["truncated" if overlong == "truncate" else "skipped"] += 1
            if overlong == "skip":
                return None
            responses = tuple(r[: max_length - len(prompt)] for r in responses)
        same = len(responses) == 2 and responses[0] == responses[1]
        counts["whose chosen and rejected are the same"] += same
        return Example(prompt, responses, record.preferred, place.number, record.pairs, place.unit)

    examples = [e for e in each_row(scan_rows(path), example) if e]
    if not examples:
        raise ValueError(f"{path}: no rows left: all {counts['skipped']} are too long")
    return examples, +counts  # what did not occur is left out


def _too_long(prompt: int, longest: int, max_length: int) -> str:
    if prompt >= max_length:
        what, more = f"the prompt alone has {prompt}", ""
    else:
        what, more = f"prompt and response together have {longest}", " or --overlong truncate"
    return (
        f"{what} tokens, and the model reads {max_length}; "
        f"shorten it, or pass --overlong skip{more}"
    )


def token_ids(tokenizer, record: Record, place) -> tuple[tuple[int, ...], tuple]:
    """The ids of a prompt and of each response to it; ValueError where one has no token."""
    ids = [
        tokenise(tokenizer, record.prompt, completion, place, field, record.variables)
        for field, completion in record.completions
    ]
    if not ids[0][0]:
        raise ValueError(
            f"{place}: field 'prompt' is empty, so nothing predicts the first token of a response"
        )
    for (field, _), (_, response) in zip(record.completions, ids, strict=True):
        if not response:
            raise ValueError(
                f"{place}: field '{field}' is empty; a response needs at least one token"
            )
    return tuple(ids[0][0]), tuple(tuple(response) for _, response in ids)


def tokenise(
    tokenizer, prompt, completion, where, field: str, variables: dict
) -> tuple[list[int], list[int]]:
    """The ids of prompt and response, [] for an empty response. variables: of the template."""
    try:
        with _named(where, field):
            return _tokenise(tokenizer, prompt, completion, variables)
    except ValueError:
        encode_prompt(tokenizer, prompt, where, variables)  # names its own field, if at fault
        raise


def _tokenise(tokenizer, prompt, completion, variables: dict) -> tuple[list[int], list[int]]:
    if isinstance(prompt, str):
        return tokenizer.encode_text(prompt), tokenizer.encode_text_response(completion)
    _check_calls(tokenizer, [*prompt, *completion])
    if not any(m.get("content") or m.get("tool_calls") for m in completion):
        return tokenizer.encode_chat(prompt, add_generation_prompt=True, **variables), []
    return tokenizer.encode_response(prompt, completion, **variables)


def encode_prompt(tokenizer, prompt, where, variables: dict) -> list[int]:
    """The ids of a text as it stands, or of messages up to where the model's answer begins.

    A ValueError names where and the field.
    """
    with _named(where, "prompt"):
        if isinstance(prompt, str):
            return tokenizer.encode_text(prompt)
        _check_calls(tokenizer, prompt)
        return tokenizer.encode_chat(prompt, add_generation_prompt=True, **variables)


def _check_calls(tokenizer, messages: list[dict]):
    """ValueError for a message that only calls a tool, where the template knows no calls."""
    for message in messages:
        lost = message.get("tool_calls") and not message.get("content")
        if lost and "tool_calls" not in (tokenizer.source or ""):
            raise ValueError(
                f"a message of '{message['role']}' has no text beside its 'tool_calls', "
                "which this model's chat template does not read"
            )


@contextmanager
def _named(where: str, field: str):
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


def order_of_epoch(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0..n-1 that depends on seed and epoch alone."""
    number = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7]
    generator = torch.Generator().manual_seed(int.from_bytes(number))
    return torch.randperm(n, generator=generator).tolist()


def mismatched(examples: list[Example], max_length: int, path) -> tuple[list[Example], int]:
    """For each example, its prompt with responses to another prompt; how many are no other ones.

    They come from the next example (cyclically) that has another prompt and a response that is not
    also one's own (a rephrased question may share some) and fits into max_length, the model's
    context; its other responses are left out. Where all that other prompts have is equal to one's
    own, as where every rejected answer is "No.", the next that fits is taken all the same, and
    counted. KTO estimates its reference point from these. Raises ValueError where nothing fits.
    """
    found, equals = [], 0
    answers = {response for e in examples for response in e.responses}
    next_prompt = _next_different([e.prompt for e in examples])
    next_answers = _next_different([frozenset(e.responses) for e in examples])
    for i, example in enumerate(examples):
        room = max_length - len(example.prompt)
        other, kept, equal = _mismatch(examples, i, room, answers, next_prompt, next_answers)
        if other is None:
            lacks = f"and none fits into the {max_length} tokens that the model reads"
            if next_prompt[i] >= i + len(examples):
                lacks = "and all rows here have one prompt"
            raise ValueError(
                f"{path}, {example.place}: kto compares with a response to another prompt, {lacks}"
            )
        responses = tuple(other.responses[k] for k in kept)
        preferred = tuple(other.preferred[k] for k in kept)
        found.append(example._replace(responses=responses, preferred=preferred, pairs=()))
        equals += equal
    return found, equals


def _mismatch(
    examples, i: int, room: int, answers: set, next_prompt: list[int], next_answers: list[int]
) -> tuple[Example | None, list[int], bool]:
    """The example whose responses i gets, which of them, and whether they equal i's own ones.

    answers: the responses of all examples; the lists: see _next_different.
    """
    n, own, best = len(examples), set(examples[i].responses), (None, [], False)
    j = next_prompt[i]
    while j < i + n:
        other, following = examples[j % n], next_prompt
        if other.prompt != examples[i].prompt:
            following = next_answers  # rows with the same responses would do no better
            fits = [k for k, response in enumerate(other.responses) if len(response) <= room]
            new = [k for k in fits if other.responses[k] not in own]
            if new:
                return other, new, False
            if fits and best[0] is None:
                best = other, fits, True
                if own == answers:  # nobody has another response
                    return best
        j += following[j % n] - j % n
    return best


def _next_different(values: list) -> list[int]:
    """For each i the least j > i, cyclically (so below 2n), whose value is another; 3n for none."""
    n = len(values)
    following = [3 * n] * (2 * n)
    for j in reversed(range(2 * n - 1)):  # twice round: the end goes on as the beginning does
        differs = values[(j + 1) % n] != values[j % n]
        following[j] = j + 1 if differs else following[j + 1]
    return following[:n]


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
    order (R,): which responses these are, as (index of the example, index in it).
    starts: {token in N: (response, pair)}: where each row begins, and at last where all end.
    lines: the lines of the file that the rows come from.
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
    order: list[tuple[int, int]]
    starts: dict[int, tuple[int, int]]
    lines: list[int]
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
    groups = sorted(_groups(examples, indices, max_tokens), key=lambda g: -g[0])
    bins: list[list[list[int]]] = []
    for b, (_, members) in zip(
        _first_fit([size for size, _ in groups], max_tokens), groups, strict=True
    ):
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
                f"{examples[i].place}: the example has {size} tokens, more than a micro-batch "
                f"holds; pass --max-tokens {size} or more"
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
    tokens, positions, layout, predictors, targets = [], [], [], [], []
    owner, preferred, pairs, order, starts = [], [], [], [], {}
    for members in groups:
        prompt, lengths = examples[members[0]].prompt, []
        # the prompt's last token predicts the first one of every response
        last = len(tokens) + len(prompt) - 1
        tokens += prompt
        positions += range(len(prompt))
        for i in members:
            first = len(preferred)
            starts[len(targets)] = first, len(pairs)
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
    starts[len(targets)] = len(preferred), len(pairs)
    return Batch(
        tokens=torch.tensor([tokens]),
        positions=torch.tensor([positions]),
        layout=layout,
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        owner=torch.tensor(owner),
        preferred=torch.tensor(preferred),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        lengths=torch.tensor([len(examples[i].responses[k]) for i, k in order]),
        order=order,
        starts=starts,
        lines=[examples[i].line for members in groups for i in members],
        examples=sum(examples[i].count for members in groups for i in members),
    )
