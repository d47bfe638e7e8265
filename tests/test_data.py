"""Rows in, packed batches out: formats, errors with file, line and field, and equality with the
padded computation."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minibnf.data import Example, digest, mismatched, order_of_epoch
from minibnf.data import pack, pair, pairs_of, read_examples
from minibnf.logprob import token_logps
from minibnf.losses import LOSSES
from minibnf.step import batch_loss
from tests.strategies import FEW, examples
from tests.test_losses import published_bnf


class Letters:
    """A stand-in tokenizer: a character is its code point; a chat is <role>content; and ends a turn
    with id 0."""

    eos_id, vocab_size = 0, 0x110000

    def encode(self, text, continuation=False):
        return [ord(c) for c in text]

    def encode_text(self, text):
        return self.encode(text)

    def encode_text_response(self, text):
        return [*self.encode(text, continuation=True), 0] if text else []

    def encode_chat(self, messages, add_generation_prompt=False):
        text = "".join(f"<{m['role']}>{m['content']};" for m in messages)
        return self.encode(text + "<assistant>" * add_generation_prompt)

    def encode_response(self, messages, response):
        if response[0]["role"] != "assistant":
            raise ValueError("the response must begin with an assistant message")
        prompt, rest = self.encode_chat(messages, True), self.encode_chat(response)
        return prompt, [*rest[len("<assistant>") :], 0]


def said(role, content):
    return [{"role": role, "content": content}]


def paired(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def read(tmp_path, *rows, tokenizer=None, max_length=100, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_examples(file, tokenizer or Letters(), max_length, **options)


# ------------------------------------------------------------------------------------------ formats


def test_the_three_formats_in_one_file(tmp_path):
    a, b, c = said("user", "a"), said("assistant", "b"), said("assistant", "c")
    implicit = {"chosen": a + b, "rejected": a + c}
    unpaired = {"prompt": a, "completion": b, "label": False}
    found, counts = read(tmp_path, paired(a, b, c), implicit, unpaired, paired("a", "b", "c"))
    prompt = tuple(map(ord, "<user>a;<assistant>"))
    b, c = (*map(ord, "b;"), 0), (*map(ord, "c;"), 0)
    assert found[0] == pair(prompt, b, c, 1)
    assert found[1] == pair(prompt, b, c, 2)
    assert found[2] == Example(prompt, (b,), (False,), 3)
    assert found[3] == pair((97,), (98, 0), (99, 0), 4)  # text as it is, then end of sequence
    assert not counts


GOOD = paired("a", "b", "c")
USER = said("user", "a")


@pytest.mark.parametrize(
    "row, message",
    [
        (paired("a", "", "c"), "field 'chosen' is empty"),
        (paired("", "b", "c"), "field 'prompt' is empty"),
        (paired(USER, said("assistant", ""), said("assistant", "c")), "field 'chosen' is empty"),
        (paired(USER, said("user", "b"), said("user", "c")), ".*'chosen'.* assistant"),
        (paired("a" * 60, "b" * 60, "c"), "the prompt has 60 tokens and 121 with its response"),
        (paired("a" * 100, "b", "c"), "the prompt has 100 tokens .* the model reads 100"),
    ],
)
def test_a_row_that_does_not_fit_says_where_and_why(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2.? {message}"):
        read(tmp_path, GOOD, row)


def test_overlong_rows_are_cut_or_left_out_only_when_asked_and_counted(tmp_path):
    long = paired("a", "b" * 200, "c")
    found, counts = read(tmp_path, GOOD, long, overlong="truncate")
    assert [len(r) for r in found[1].responses] == [99, 2] and counts == {"truncated": 1}
    found, counts = read(tmp_path, GOOD, long, overlong="skip")
    assert [e.line for e in found] == [1] and counts == {"skipped": 1}
    with pytest.raises(ValueError, match="no rows left: all 1 are too long"):
        read(tmp_path, long, overlong="skip")
    with pytest.raises(ValueError, match="the prompt has 100 tokens"):
        read(tmp_path, paired("a" * 100, "b", "c"), overlong="truncate")


def test_pairs_whose_responses_are_the_same_are_counted(tmp_path):
    """Also where cutting made them so."""
    rows = paired("a", "b", "b"), paired("a", "b" * 200, "b" * 300)
    _, counts = read(tmp_path, *rows, overlong="truncate")
    assert counts == {"truncated": 1, "whose chosen and rejected are the same": 2}


class Lossy(Letters):
    """Warns of a character that it has no token for; of what is no Unicode it raises an error."""

    def encode(self, text, continuation=False):
        if "\x04" in text.encode().decode():
            warnings.warn("no token for it", stacklevel=2)
        return super().encode(text)


@pytest.mark.parametrize(
    "text, message",
    [("\x04", "no token for it"), ("\ud800", "text that is not valid Unicode")],
)
def test_text_that_a_tokenizer_cannot_write_is_an_error(tmp_path, text, message):
    for field in GOOD:
        with pytest.raises(ValueError, match=f"line 1, field '{field}': {message}"):
            read(tmp_path, GOOD | {field: text}, tokenizer=Lossy())


def test_mismatched_examples_by_hand():
    """Each prompt with responses to the next other prompt, cyclically; one that would not fit the
    context is passed over."""
    a, b, c = (1,), (2,), (3, 3, 3)
    found = [
        pair(a, (4,), (5, 5), 1),
        Example(a, ((6,),), (True,), 2),
        Example(b, ((7, 7, 7),), (False,), 3),
        Example(c, ((8,),), (True,), 4),
    ]
    moved, equals = mismatched(found, 5, "file")
    assert [e.prompt for e in moved] == [a, a, b, c] and not equals
    assert [e.responses for e in moved] == [((7, 7, 7),), ((7, 7, 7),), ((8,),), ((4,), (5, 5))]
    # (5, 5) no longer fits after three tokens
    assert mismatched(found, 4, "file")[0][3].responses == ((4,),)
    with pytest.raises(ValueError, match="file, line 1: kto"):
        mismatched(found[:2], 100, "file")


def plain_mismatched(examples, max_length):
    """The definition, row by row: responses, and whether they are another row's alone."""
    for i, example in enumerate(examples):
        others = [e for e in examples[i + 1 :] + examples[:i] if e.prompt != example.prompt]
        room = max_length - len(example.prompt)
        fits = [tuple(r for r in other.responses if len(r) <= room) for other in others]
        new = [tuple(r for r in some if r not in example.responses) for some in fits]
        yield next(filter(None, new + fits), None), any(new)


@given(found=examples(vocabulary=2, max_examples=12), max_length=st.integers(4, 12))
def test_mismatched_examples_are_those_of_the_definition(found, max_length):
    expected = list(plain_mismatched(found, max_length))
    responses = [taken for taken, _ in expected]
    if None in responses:
        with pytest.raises(ValueError, match="kto compares"):
            mismatched(found, max_length, "file")
    else:
        moved, equals = mismatched(found, max_length, "file")
        assert [e.responses for e in moved] == responses
        assert equals == sum(not other for _, other in expected)


def test_an_order_is_a_permutation_that_depends_on_seed_and_epoch():
    orders = [order_of_epoch(50, *which) for which in [(0, 0), (0, 1), (1, 1), (0, 0)]]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] == orders[3] != orders[1] != orders[2] != orders[0]


# ------------------------------------------------------------------------------------------ packing


@given(found=examples(), data=st.data())
def test_packing_keeps_every_response_once_and_bounds_every_micro_batch(found, data):
    max_tokens = data.draw(st.integers(max(e.tokens for e in found), 60))
    batches = pack(found, list(range(len(found))), max_tokens)
    keys = sorted(key for b in batches for key in b.order)
    assert keys == sorted((i, k) for i, e in enumerate(found) for k in range(len(e.responses)))
    assert sum(len(b.pairs) for b in batches) == sum(len(e.pairs) for e in found)
    for b in batches:
        assert b.tokens.numel() <= max_tokens
        assert b.tokens.numel() == sum(prompt + sum(responses) for prompt, responses in b.layout)
        targets = [t for i, k in b.order for t in found[i].responses[k]]
        assert b.targets.tolist() == targets
        assert b.preferred.tolist() == [found[i].preferred[k] for i, k in b.order]


def test_one_prompt_is_stored_once():
    unpaired = Example((1, 2), ((6, 7),), (True,), 2), Example((9,), ((3,),), (True,), 3)
    (b,) = pack([pair((1, 2), (3,), (4, 5), 1), *unpaired], [0, 1, 2], 100)
    # a response's last token predicts nothing and is not read
    assert b.layout == [(2, [0, 1, 1]), (1, [0])]
    assert b.tokens.tolist() == [[1, 2, 4, 6, 9]] and b.positions.tolist() == [[0, 1, 2, 2, 0]]
    assert b.predictors.tolist() == [1, 1, 2, 1, 3, 4] and b.targets.tolist() == [3, 4, 5, 6, 7, 3]


def test_three_responses_and_two_pairs_are_what_they_say():
    """A chosen response that two others were rejected for, beside three that stand for themselves;
    by hand."""
    two_pairs = Example((1,), ((2,), (3,), (4,)), (False, True, False), 1, ((1, 0), (1, 2)))
    alone = Example((1,), ((2,), (3,), (4,)), (True, False, False), 2)
    (b,) = pack([alone, two_pairs], [0, 1], 100)
    assert b.pairs.tolist() == [[4, 3], [4, 5]] and b.examples == alone.count + two_pairs.count == 5
    assert int(b.responses(torch.zeros(6), None).examples()) == b.examples
    assert pairs_of([alone, two_pairs]).tolist() == [[4, 3], [4, 5]]
    assert digest([alone]) != digest([alone._replace(pairs=((0, 1),))])


def test_an_example_longer_than_a_micro_batch_says_what_to_pass():
    with pytest.raises(ValueError, match=r"line 7: .* pass --max-tokens 5"):
        pack([Example((1, 2), ((3, 4, 5, 6),), (True,), 7)], [0], 4)


def padded_logits(model, found):
    """Logits (N, V) that predict each response token, every response with its own copy of the
    prompt, padded to one length."""
    rows = [(e.prompt, r) for e in found for r in e.responses]
    S = max(len(p) + len(r) for p, r in rows)
    tokens = torch.tensor([[*p, *r, *[0] * (S - len(p) - len(r))] for p, r in rows])
    logits = model(tokens)
    return torch.cat([logits[i, len(p) - 1 : len(p) + len(r) - 1] for i, (p, r) in enumerate(rows)])


@FEW
@given(found=examples(), data=st.data())
def test_packed_equals_padded_in_value_and_in_every_gradient(tiny, found, data):
    """float64, random micro-batch sizes: log-probabilities, and the gradient of a random function
    of them."""
    max_tokens = data.draw(st.integers(max(e.tokens for e in found), 60))
    targets = torch.tensor([t for e in found for r in e.responses for t in r])
    expected = padded_logits(tiny, found).log_softmax(-1)[torch.arange(len(targets)), targets]
    upstream = torch.sin(torch.arange(len(targets), dtype=torch.float64))
    wanted = torch.autograd.grad(expected, list(tiny.parameters()), upstream)
    start, at = {}, 0
    for i, e in enumerate(found):
        for k, r in enumerate(e.responses):
            start[i, k], at = slice(at, at + len(r)), at + len(r)
    tiny.zero_grad()
    for b in pack(found, list(range(len(found))), max_tokens):
        head = lambda x, U, b=b: token_logps(x[0, b.predictors], U, b.targets)
        logps = tiny(b.tokens, b.positions, b.layout, head=head)
        wanted_logps = torch.cat([expected[start[key]] for key in b.order])
        torch.testing.assert_close(logps, wanted_logps, rtol=1e-9, atol=1e-11)
        logps.backward(torch.cat([upstream[start[key]] for key in b.order]))
    for p, g in zip(tiny.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-9)


@FEW
@given(found=examples(), data=st.data())
def test_the_whole_models_gradient_under_bnf_is_that_of_the_published_form(tiny, found, data):
    """Every parameter, float64, 1e-9: packed one sweep, split into micro-batches, against autograd
    through the dynamic target distribution over the whole vocabulary, padded, with its
    stop-gradient and the same length normaliser."""
    max_tokens = data.draw(st.integers(max(e.tokens for e in found), 60))
    logits, at, total = padded_logits(tiny, found), 0, 0.0
    refs = {}
    for i, e in enumerate(found):
        for k, r in enumerate(e.responses):
            z = logits[at : at + len(r)]
            g = torch.Generator().manual_seed(97 * i + k)
            ref = z.detach().log_softmax(-1)[torch.arange(len(r)), torch.tensor(r)]
            ref = ref + torch.randn(len(r), generator=g, dtype=torch.float64)
            refs[i, k] = ref.clamp(max=-1e-2)  # some above, some below
            sign, length = 1 if e.preferred[k] else -1, min(map(len, e.responses))
            total = total + published_bnf(z, torch.tensor(r), refs[i, k], sign, length)
            at += len(r)
    wanted = torch.autograd.grad(total / len(found), list(tiny.parameters()))
    tiny.zero_grad()
    for b in pack(found, list(range(len(found))), max_tokens):
        b = replace(b, ref_logps=torch.cat([refs[key] for key in b.order]))
        hyper, E = {"length": "shorter"}, len(found)
        batch_loss(tiny, b, LOSSES["bnf"], hyper, E, torch.float64)[0].backward()
    scale = max(g.abs().max() for g in wanted)
    for (name, p), g in zip(tiny.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(
            p.grad, g, rtol=1e-9, atol=1e-9 * float(scale), msg=lambda m, name=name: f"{name}: {m}"
        )
