"""token_logps and the sweep against the naive expression, in float64, with measured tolerances."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from minibnf import logprob
from minibnf.logprob import chunk_tokens, cuts, sweep, token_logps
from minibnf.losses import bnf_potential, bnf_weight


def swept(hidden, unembed, targets, ref, c, *, chunk=None, softcap=None):
    """A sweep of Σ c Φ, Φ being BNF's potential: what a token-local loss is to it."""
    chunks = cuts(None, len(targets), chunk or chunk_tokens(unembed))

    def judge(k, logps):
        i = chunks[k]
        reference = ref[i].to(logps.dtype)
        value = (c[i] * bnf_potential(logps, reference)).sum()
        return value, c[i] * bnf_weight(logps, reference)

    return sweep(hidden, unembed, targets, chunks, judge, softcap=softcap)


def naive(hidden, unembed, targets, softcap=None):
    logits = hidden @ unembed.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def problem(N, D, V, seed=0, scale=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64).mul(scale)
    unembed = torch.randn(V, D, generator=g, dtype=torch.float64)
    targets = torch.randint(V, (N,), generator=g)
    upstream = torch.randn(N, generator=g, dtype=torch.float64)
    return *(x.to(dtype).requires_grad_() for x in (hidden, unembed)), targets, upstream


def assert_same(ours, theirs, inputs, upstream=None):
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    gradients = (torch.autograd.grad(y, inputs, upstream) for y in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


some = st.integers(1, 9)
softcaps = st.sampled_from([None, 2.0])


@given(N=some, D=st.integers(1, 5), V=st.integers(1, 12), chunk=some, softcap=softcaps)
def test_token_logps_and_its_backward_are_the_naive_expression(N, D, V, chunk, softcap):
    hidden, unembed, targets, upstream = problem(N, D, V)
    ours = token_logps(hidden, unembed, targets, chunk=chunk, softcap=softcap)
    assert_same(ours, naive(hidden, unembed, targets, softcap), (hidden, unembed), upstream)


@given(N=some, V=st.integers(2, 12), chunk=some, softcap=softcaps)
def test_a_sweep_is_the_loss_of_token_logps(N, V, chunk, softcap):
    hidden, unembed, targets, c = problem(N, 4, V, seed=1)
    expected_logps = naive(hidden, unembed, targets, softcap)
    ref = naive(hidden, unembed, targets).detach() + torch.linspace(-1, 1, N, dtype=torch.float64)
    ref = ref.clamp(max=-1e-3)
    loss, logps = swept(hidden, unembed, targets, ref, c, chunk=chunk, softcap=softcap)
    assert_same(loss, (c * bnf_potential(expected_logps, ref)).sum(), (hidden, unembed))
    torch.testing.assert_close(logps, expected_logps.detach(), rtol=1e-10, atol=1e-12)
    chunks = cuts(None, N, chunk or chunk_tokens(unembed))
    # of other hidden states, lest fresh memory should still hold the right numbers
    _, without_a_loss = sweep(-hidden, unembed, targets, chunks, softcap=softcap)
    torch.testing.assert_close(without_a_loss, naive(-hidden, unembed, targets, softcap).detach())


@pytest.mark.parametrize("N, D, V", [(252, 64, 507), (123, 32, 1031), (1, 16, 49152)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_path_loses_no_more_than_the_naive_one(N, D, V, dtype):
    """Against a float64 oracle on the same rounded inputs, the error is at most the naive
    expression's, and a little."""
    hidden, unembed, targets, upstream = problem(N, D, V, scale=0.5, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in (hidden, unembed)]
    exact = naive(*wide, targets)
    exact = [exact.detach(), *torch.autograd.grad(exact, wide, upstream)]

    def errors(f):
        logps = f(hidden, unembed, targets)
        found = [logps, *torch.autograd.grad(logps, (hidden, unembed), upstream.to(logps.dtype))]
        return [(a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]

    epsilon = torch.finfo(dtype).eps
    for ours, theirs in zip(errors(token_logps), errors(naive), strict=True):
        assert ours <= 1.2 * theirs + epsilon / 2


def test_log_probabilities_near_0_keep_their_relative_accuracy():
    """A target 30 above the others: log p = -log1p(9 e^-30), where 1 - exp(logsumexp) would give 0
    in float32."""
    hidden, unembed = torch.tensor([[1.0]]), torch.tensor([[30.0]] + [[0.0]] * 9)
    logps = token_logps(hidden, unembed, torch.tensor([0]))
    assert logps.item() == pytest.approx(-9 * math.exp(-30), rel=1e-5, abs=0)


def test_rows_of_very_different_size_do_not_disturb_each_other():
    """Each row is shifted by its own largest logit: with one shift for all, e^(-1000) would vanish
    or e^1000 overflow."""
    hidden = torch.tensor([[1000.0], [-1000.0], [0.0]], requires_grad=True)
    unembed = torch.tensor([[1.0], [0.999], [1.001]], requires_grad=True)
    targets = torch.tensor([0, 1, 2])
    expected = naive(hidden.double(), unembed.double(), targets)
    logps = token_logps(hidden, unembed, targets)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-4, atol=1e-4)
    logps.sum().backward()
    assert hidden.grad.isfinite().all() and unembed.grad.isfinite().all()


@pytest.mark.parametrize("V, tokens", [(49152, 341), (2**24, 16), (1000, 16777)])
def test_a_chunks_logits_take_64_mib_and_no_fewer_than_16_tokens(V, tokens):
    N = 400_000
    chunks = cuts(None, N, chunk_tokens(torch.empty(V, 1, device="cpu")))
    sizes = [i.stop - i.start for i in chunks]
    assert len(chunks) == -(-N // tokens) and (chunks[0].start, chunks[-1].stop) == (0, N)
    assert all(a.stop == b.start for a, b in pairwise(chunks))
    assert sizes[0] <= tokens and min(sizes) > 0.9 * sizes[0] - len(chunks)


@pytest.mark.parametrize(
    "sizes, N, chunk, stops",
    [
        (None, 5, 2, [2, 4, 5]),
        (None, 3, 1, [1, 2, 3]),
        (None, 5, 9, [5]),
        ([2, 2], 4, 9, [4]),
        ([3, 3, 3, 3], 12, 6, [6, 12]),
        ([1, 5, 6], 12, 6, [6, 12]),  # a chunk of the first row alone would be small
        ([1, 9, 2], 12, 4, [1, 10, 12]),  # a row may be longer than a chunk
    ],
)
def test_where_the_tokens_are_cut(sizes, N, chunk, stops):
    assert cuts(sizes, N, chunk) == [slice(a, b) for a, b in pairwise([0, *stops])]


def test_gradients_of_the_vocabulary_add_up_in_float32():
    """256 chunks of one token: a sum in bfloat16 would stop growing on the way."""
    hidden, unembed, targets, _ = problem(256, 2, 3, dtype=torch.bfloat16)
    hidden, targets = hidden.detach().abs(), torch.zeros_like(targets)
    exact = unembed.detach().double().requires_grad_()
    naive(hidden.double(), exact, targets).sum().backward()
    token_logps(hidden, unembed, targets, chunk=1).sum().backward()
    torch.testing.assert_close(unembed.grad.double(), exact.grad, rtol=0.02, atol=0.2)


def test_blocks_of_the_vocabulary_add_up():
    """D is so large that a block holds 256 of the 600 rows."""
    hidden, unembed, targets, c = problem(5, 8200, 600, seed=3)
    expected = (c * naive(hidden, unembed, targets)).sum()
    assert_same((c * token_logps(hidden, unembed, targets)).sum(), expected, (hidden, unembed))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    V=st.integers(2, 12),
    most=st.integers(1, 60),
    chunk=st.integers(1, 60),
)
@example(sizes=[40, 3], V=5, most=7, chunk=43)  # in three pieces
@example(sizes=[20, 3], V=5, most=7, chunk=23)  # in two
def test_a_loss_that_couples_the_tokens_of_a_row_gets_its_gradient_in_the_same_sweep(
    sizes, V, most, chunk
):
    """-log σ(Σ c log p) of each row, against autograd; a row longer than `most` is read twice."""
    N = sum(sizes)
    hidden, unembed, targets, c = problem(N, 3, V, seed=2)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))

    def value_of(logps, i):
        rows = logps.new_zeros(len(sizes)).index_add(0, owner[i], c[i] * logps)
        return -torch.nn.functional.logsigmoid(rows)[owner[i].unique()].sum() / len(sizes)

    def judge(k, logps):
        with torch.enable_grad():
            logps = logps.detach().requires_grad_()
            value = value_of(logps, chunks[k])
            return value.detach(), torch.autograd.grad(value, logps)[0]

    chunks = cuts(sizes, N, chunk)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    assert chunks[0].start == 0 and chunks[-1].stop == N
    assert all(a.stop == b.start and a.stop in ends for a, b in pairwise(chunks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(logprob.ROW_LOGITS, "cpu", most * V)
        patch.setitem(logprob.CHUNK_LOGITS, "cpu", 16 * V)
        loss, logps = sweep(hidden, unembed, targets, chunks, judge)
        read = [i for chunk in chunks for i in logprob._pieces(chunk, unembed)]
        assert max(i.stop - i.start for i in read) <= max(most, 16)  # what a buffer may hold
    expected_logps = naive(hidden, unembed, targets)
    assert_same(loss, value_of(expected_logps, slice(0, N)), (hidden, unembed))
    torch.testing.assert_close(logps, expected_logps.detach(), rtol=1e-9, atol=1e-12)


def test_a_multiple_of_a_sweeps_loss_has_no_gradient():
    """It was made for the loss as it is; a wrong one must not be given in silence."""
    hidden, unembed, targets, c = problem(4, 3, 7)
    loss, _ = swept(hidden, unembed, targets, c.clamp(max=-1), c)
    with pytest.raises(RuntimeError, match="not of a multiple"):
        (2 * loss).backward()


@pytest.mark.parametrize(
    "with_gradients, frozen, products", [(False, False, 1), (True, True, 2), (True, False, 3)]
)
def test_a_sweep_makes_gradients_only_where_they_are_asked_for(with_gradients, frozen, products):
    """One product of N x V x D for the logits, one more for each of dhidden and dunembed.
    Evaluation asks for none, although the unembedding is a parameter."""
    N, D, V = 6, 4, 11
    hidden, unembed, targets, _ = problem(N, D, V)
    unembed.requires_grad_(not frozen)
    c = torch.full((N,), -1 / N, dtype=torch.float64)
    with torch.set_grad_enabled(with_gradients), FlopCounterMode(display=False) as counter:
        loss, _ = swept(hidden, unembed, targets, c, c)
        assert loss.requires_grad == with_gradients
        if with_gradients:
            loss.backward()
    assert counter.get_total_flops() == products * 2 * N * V * D


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_a_bfloat16_hidden_state_is_judged_in_float32_and_gradients_come_in_kind(master):
    """A float32 master gets a float32 gradient; the reference may have any dtype."""
    hidden, unembed, targets, _ = problem(6, 8, 11, dtype=master)
    hidden = hidden.detach().bfloat16().requires_grad_()
    ref, c = torch.full((6,), -2.0, dtype=master), torch.full((6,), -1 / 6)
    value, logps = swept(hidden, unembed, targets, ref, c)
    dhidden, dunembed = torch.autograd.grad(value, (hidden, unembed))
    assert (dhidden.dtype, dunembed.dtype) == (torch.bfloat16, master)
    for x in (value, logps, token_logps(hidden, unembed, targets)):
        assert x.dtype == torch.float32


def test_no_tensor_of_all_logits_is_ever_made():
    """The largest allocation, forward and backward, at N V = 4 M: far below the 16 MB that (N, V)
    float32 would take."""
    N, V = 2000, 2000
    hidden, unembed, targets, _ = problem(N, 8, V, dtype=torch.float32)
    c, ref = torch.full((N,), -1 / N), torch.full((N,), -3.0)
    with torch.profiler.profile(profile_memory=True) as profile:
        token_logps(hidden, unembed, targets, chunk=64).sum().backward()
        swept(hidden, unembed, targets, ref, c, chunk=64)[0].backward()
    largest = max(e.cpu_memory_usage for e in profile.events())
    assert 60 * V * 4 <= largest < N * V * 4 / 4, largest


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden": torch.zeros(3, 4, 2)}, "hidden, unembed, targets must be"),
        ({"unembed": torch.zeros(5, 3)}, r"must be .* not \(3, 4\), \(5, 3\), \(3,\)"),
        ({"unembed": torch.zeros(5, 3, 4)}, "hidden, unembed, targets must be"),
        ({"unembed": torch.zeros(4)}, "hidden, unembed, targets must be"),
        ({"targets": torch.tensor([0, 1])}, "hidden, unembed, targets must be"),
        ({"targets": torch.tensor([0, 1, 5])}, r"targets must lie in 0\.\.4.* not at 5"),
        ({"targets": torch.tensor([0, -100, 2])}, r"targets must lie in 0\.\.4.* not at -100"),
    ],
)
def test_arguments_that_do_not_fit_say_what_is_wrong(changes, message):
    arguments = {"hidden": torch.zeros(3, 4), "unembed": torch.zeros(5, 4)}
    arguments |= {"targets": torch.arange(3)} | changes
    with pytest.raises(ValueError, match=message):
        token_logps(**arguments)
    with pytest.raises(ValueError, match=message):
        sweep(**arguments, chunks=[slice(0, 3)])


def test_a_soft_cap_below_1_and_no_tokens_at_all_are_allowed():
    hidden, unembed = torch.ones(1, 2), torch.tensor([[5.0, 5.0], [0.0, 0.0]])
    capped = token_logps(hidden, unembed, torch.tensor([0]), softcap=0.5)
    torch.testing.assert_close(capped, torch.tensor([0.5, 0.0]).log_softmax(0)[:1])
    assert token_logps(hidden[:0], unembed, torch.empty(0, dtype=torch.int64)).shape == (0,)
