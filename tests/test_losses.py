"""The losses against autograd, against the published form over a whole vocabulary, and against
arithmetic by hand."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from minibnf.losses import (
    LOSSES,
    Responses,
    bnf_loss,
    bnf_potential,
    bnf_weight,
    rbnf_potential,
    rbnf_weight,
)
from tests.strategies import EXTREME, UNCERTAIN, hypers, responses

ALL = sorted(LOSSES)
TOKENWISE = [name for name in ALL if LOSSES[name].token_local]


def drawn(data, name, **how):
    return data.draw(
        responses(paired=True if LOSSES[name].needs_pairs else None, **how)
    ), data.draw(hypers(LOSSES[name]))


# ------------------------------------------------------------------------------ gradient = autograd


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_gradient_by_hand_is_the_gradient_of_the_value(name, data):
    batch, hyper = drawn(data, name)
    logps = batch.logps.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        LOSSES[name].value(replace(batch, logps=logps), **hyper), logps
    )
    torch.testing.assert_close(
        LOSSES[name].gradient(batch, **hyper), expected, rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_the_differentiable_call_is_the_value_and_passes_gradcheck(name, data):
    batch, hyper = drawn(data, name)
    assert LOSSES[name](batch, **hyper).item() == LOSSES[name].value(batch, **hyper).item()
    # away from the kink of a gradient at p = r, where a finite difference straddles two branches
    S = batch.sums(batch.logps)
    if (
        name == "slic"
        and (
            (S[batch.pairs] @ torch.tensor([-1.0, 1.0]).double() + hyper["delta"]).abs() < 1e-2
        ).any()
    ):
        return  # nor at the hinge
    apart = torch.where(
        (batch.logps - batch.ref_logps).abs() < 1e-4, batch.logps - 1e-3, batch.logps
    ).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: 3 * LOSSES[name](replace(batch, logps=x), **hyper), (apart,), atol=1e-6
    )


# ----------------------------------------------------------------------------------- extreme values


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_finite_in_float32_wherever_log_probabilities_lie(name, data):
    values = (
        UNCERTAIN if name == "orpo" else EXTREME
    )  # odds are infinite at p = 1, and so is orpo by its definition
    batch, hyper = drawn(data, name, values=values, dtype=torch.float32)
    logps = batch.logps.clone().requires_grad_()
    value = LOSSES[name].value(replace(batch, logps=logps), **hyper)
    (by_autograd,) = torch.autograd.grad(value, logps)
    assert torch.isfinite(value) and torch.isfinite(by_autograd).all()
    assert torch.isfinite(LOSSES[name].gradient(batch, **hyper)).all()


@given(p=EXTREME, r=EXTREME)
@example(p=-1e-9, r=0.0)
@example(p=-20.0, r=-1e-9)
@example(p=-1e4, r=-9.999e3)
def test_bnf_in_float32_equals_float64_to_rounding(p, r):
    p32, r32 = torch.tensor([p]), torch.tensor([r])
    for f in (bnf_weight, bnf_potential):
        exact = f(p32.double(), r32.double())
        # one rounding of the inputs' difference and a few of the result, relative
        bound = 4e-6 * exact.abs() + 1e-37
        assert (f(p32, r32).double() - exact).abs() <= bound, (f.__name__, f(p32, r32), exact)


def test_bnf_weight_where_odds_have_limits():
    """w = min(1, o(p)/o(r)): 1 at p = r, also at p = r = 1 and at p = r -> 0; 0 under a certain
    reference; p/r for tiny r."""
    p = torch.tensor([0.0, -1e4, -1.0, -1e4, -90.0, -math.inf])
    r = torch.tensor([0.0, -1e4, 0.0, -1e4 + 1, -89.0, -1.0])
    expected = torch.tensor([1.0, 1.0, 0.0, math.exp(-1), math.exp(-1), 0.0])
    torch.testing.assert_close(bnf_weight(p, r), expected)


def plain_bnf_potential(p, r):
    """Identity 2 as it is written, in numbers."""
    return math.log(p) if p >= r else math.log(r) + (math.log1p(-r) - math.log1p(-p)) * (1 - r) / r


def plain_rbnf_potential(p, r):
    """A preferred token's: from p* = r²/(1 - r + r²) down a line of slope r in log p."""
    star = r * r / (1 - r + r * r)
    return (
        plain_bnf_potential(p, r)
        if p >= star
        else plain_bnf_potential(star, r) + r * (math.log(p) - math.log(star))
    )


@given(p=st.floats(1e-6, 0.999), r=st.floats(1e-3, 0.999))
@example(p=0.01, r=0.9)
@example(p=1e-6, r=0.5)
def test_the_potentials_have_the_values_of_their_formulas(p, r):
    logs = (
        torch.tensor([p], dtype=torch.float64).log(),
        torch.tensor([r], dtype=torch.float64).log(),
    )
    for preferred, rbnf in ((True, plain_rbnf_potential), (False, plain_bnf_potential)):
        assert bnf_potential(*logs).item() == pytest.approx(
            plain_bnf_potential(p, r), rel=1e-9, abs=1e-9
        )
        assert rbnf_potential(*logs, torch.tensor([preferred])).item() == pytest.approx(
            rbnf(p, r), rel=1e-9, abs=1e-9
        )


def test_the_potentials_limits():
    """r -> 0: Φ = log r - (1 - p/r). r = 1, p < 1: Φ = 0, or log p with retrieval. p = r: log r.
    log r > 0 counts as 0."""
    logp = torch.tensor([-1e4, -90.0, -2.0, -3.0, 0.0, -1.0, -200.0], dtype=torch.float32)
    logr = torch.tensor([-1e4 + 1, -89.0, 0.0, -3.0, 0.0, 1e-7, -100.0], dtype=torch.float32)
    tiny = math.expm1(-1)
    expected = torch.tensor([-1e4 + 1 + tiny, -89 + tiny, 0, -3, 0, 0, -101])
    torch.testing.assert_close(bnf_potential(logp, logr), expected)
    good = torch.ones(7).bool()
    torch.testing.assert_close(rbnf_potential(logp, logr, ~good), expected)
    expected[[2, 5]] = torch.tensor([-2.0, -1.0])
    torch.testing.assert_close(rbnf_potential(logp, logr, good), expected)
    assert bnf_weight(logp, logr)[5] == 0 and rbnf_weight(logp, logr, good)[5] == pytest.approx(1)


# --------------------------------------------------------------------- BNF as published, three ways


def published_bnf(logits, targets, ref_logps, sign, length):
    """-(s/|y|) Σ_tokens Σ_v q(v) log π(v), q the paper's dynamic target distribution, held
    constant. logits (N, V)."""
    log_pi = logits.log_softmax(-1)
    pi = log_pi.exp().detach()
    rows = torch.arange(len(targets))
    p = pi[rows, targets]
    q_y = (p / ref_logps.exp()).clamp(max=1)
    q = (1 - q_y)[:, None] / (1 - p)[:, None] * pi
    q[rows, targets] = q_y
    return -(sign / length * (q * log_pi).sum(-1)).sum()


@given(data=st.data())
def test_bnf_has_the_gradient_of_the_published_form_in_every_logit(data):
    N, V = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 6))
    number = st.floats(-4, 4)
    logits = torch.tensor(
        data.draw(st.lists(number, min_size=N * V, max_size=N * V)), dtype=torch.float64
    ).reshape(N, V)
    targets = torch.tensor(data.draw(st.lists(st.integers(0, V - 1), min_size=N, max_size=N)))
    ref_logps = torch.tensor(
        data.draw(st.lists(st.floats(-5, -0.02), min_size=N, max_size=N)), dtype=torch.float64
    )
    preferred = data.draw(st.booleans())
    logits.requires_grad_()
    (expected,) = torch.autograd.grad(
        published_bnf(logits, targets, ref_logps, 1 if preferred else -1, N), logits
    )
    logps = logits.log_softmax(-1)[torch.arange(N), targets]
    batch = Responses(
        logps,
        ref_logps,
        torch.zeros(N, dtype=torch.int64),
        torch.tensor([preferred]),
        torch.empty(0, 2).long(),
    )
    (ours,) = torch.autograd.grad(LOSSES["bnf"](batch), logits)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@given(p=st.floats(-30, -1e-6), r=st.floats(-30, -1e-6))
def test_feedback_is_a_tent(p, r):
    """Identity 3: |dΦ/dz_y| = w (1 - p) is p (1-r)/r below the reference and 1 - p above it."""
    p, r = torch.tensor([p], dtype=torch.float64), torch.tensor([r], dtype=torch.float64)
    feedback = bnf_weight(p, r) * -torch.expm1(p)
    tent = torch.where(p < r, (p - r).exp() * -torch.expm1(r), -torch.expm1(p))
    torch.testing.assert_close(feedback, tent, rtol=1e-9, atol=0)
    assert feedback <= -torch.expm1(r) + 1e-15  # the peak is at p = r


@given(p=EXTREME, r=EXTREME)
def test_below_the_reference_a_token_is_never_worth_more_than_a_nat(p, r):
    p, r = torch.tensor([p], dtype=torch.float64), torch.tensor([r], dtype=torch.float64)
    if p <= r:
        assert 0 <= r - bnf_potential(p, r) <= 1 + 1e-12


def released_bnf_weight(p, r):
    """The released code's gradient on the token's own logit, over 1 - p: it adds 1e-6 to two
    denominators."""
    target = (p / (r + 1e-6)).clamp(max=1)
    rest = (1 - target + 1e-6) / (1 - p + 1e-6)
    return (target - (target + rest * (1 - p)) * p) / (
        1 - p
    )  # -dz_y of -(target log p + rest Σ_v≠y π_v log π_v)


def test_what_the_released_codes_epsilons_cost():
    """At the reference the weight is 1. With epsilons it is about r/(r + 1e-6): half at 1e-6 and a
    hundredth at 1e-8."""
    r = torch.tensor([0.5, 1e-4, 1e-6, 1e-8], dtype=torch.float64)
    assert bnf_weight(r.log(), r.log()).tolist() == [1, 1, 1, 1]
    assert released_bnf_weight(r, r).tolist() == pytest.approx(
        [1 - 2e-6, 1 - 0.0099, 0.5, 0.0099], rel=1e-2
    )


def test_what_dividing_by_the_shortest_of_the_micro_batch_costs():
    """Pairs of lengths (2, 3) and (8, 9) in one micro-batch: the released code divides both by 2,
    so the second pair weighs four times what it does alone, and the loss depends on how the batch
    was split. Here it does not."""
    lengths = torch.tensor([2, 3, 8, 9])
    owner = torch.arange(4).repeat_interleave(lengths)
    x = torch.full((len(owner),), -1.0, dtype=torch.float64)
    batch = Responses(x, x, owner, torch.tensor([True, False] * 2), torch.tensor([[0, 1], [2, 3]]))
    ours = LOSSES["bnf"].gradient(batch)[owner == 2][0]
    theirs = LOSSES["bnf"].gradient(batch, length=float(lengths.min()))[owner == 2][0]
    assert (theirs / ours).item() == pytest.approx(4)


# -------------------------------------------------------------------------------- by hand, and laws


def test_bnf_by_hand():
    """One pair. Chosen: two tokens, p = 1/2, 1/4 against r = 1/4, 1/2. Rejected: three, p = r =
    1/2, p = 1/4 and r = 1/2 twice.

    o(1/4) = 1/3, o(1/2) = 1, so w = 1, 1/3 and 1, 1/3, 1/3; both are divided by the shorter length,
    2.
    Φ(1/2 | 1/4) = log 1/2;  Φ(1/4 | 1/2) = log 1/2 + (log 1/2 - log 3/4)/1 = log 1/2 - log 3/2.
    L = -1/2 (2 log 1/2 - log 3/2) + 1/2 (3 log 1/2 - 2 log 3/2) = 1/2 (log 1/2 - log 3/2) = 1/2 log
    1/3.
    """
    p = torch.tensor([1 / 2, 1 / 4, 1 / 2, 1 / 4, 1 / 4], dtype=torch.float64).log()
    r = torch.tensor([1 / 4, 1 / 2, 1 / 2, 1 / 2, 1 / 2], dtype=torch.float64).log()
    batch = Responses(
        p, r, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([True, False]), torch.tensor([[0, 1]])
    )
    assert LOSSES["bnf"](batch).item() == pytest.approx(0.5 * math.log(1 / 3), rel=1e-12)
    expected = torch.tensor([-1 / 2, -1 / 6, 1 / 2, 1 / 6, 1 / 6], dtype=torch.float64)
    torch.testing.assert_close(LOSSES["bnf"].gradient(batch), expected)


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_splitting_a_batch_and_weighing_the_parts_changes_nothing(name, data):
    """The loss is a mean over examples, so parts count by their examples; the whole batch's mean
    length goes to each."""
    (one, hyper), two = drawn(data, name), None
    two, _ = drawn(data, name)
    whole = Responses(
        torch.cat([one.logps, two.logps]),
        torch.cat([one.ref_logps, two.ref_logps]),
        torch.cat([one.owner, two.owner + len(one.preferred)]),
        torch.cat([one.preferred, two.preferred]),
        torch.cat([one.pairs, two.pairs + len(one.preferred)]),
    )
    together = LOSSES[name].gradient(whole, **hyper)
    if hyper.get("length") == "batch":
        hyper["length"] = whole.lengths().mean().item()
    n1, n2 = [len(x.preferred) if LOSSES[name].per_response else x.examples() for x in (one, two)]
    parts = [
        LOSSES[name].gradient(one, **hyper) * n1 / (n1 + n2),
        LOSSES[name].gradient(two, **hyper) * n2 / (n1 + n2),
    ]
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_the_order_of_tokens_does_not_matter(name, data):
    batch, hyper = drawn(data, name)
    perm = torch.tensor(data.draw(st.permutations(range(len(batch.logps)))))
    shuffled = replace(
        batch, logps=batch.logps[perm], ref_logps=batch.ref_logps[perm], owner=batch.owner[perm]
    )
    torch.testing.assert_close(
        LOSSES[name](shuffled, **hyper), LOSSES[name](batch, **hyper), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    "length, divisors",
    [("own", (2, 3, 1)), ("shorter", (2, 2, 1)), ("batch", (2, 2, 2)), (5.0, (5, 5, 5))],
)
def test_length_normalisers(length, divisors):
    """A pair of lengths 2 and 3, an unpaired response of length 1, all at p = r: the gradient is -s
    / (|y| E), E = 2."""
    x = torch.full((6,), -1.0, dtype=torch.float64)
    batch = Responses(
        x,
        x,
        torch.tensor([0, 0, 1, 1, 1, 2]),
        torch.tensor([True, False, True]),
        torch.tensor([[0, 1]]),
    )
    expected = torch.tensor(
        [
            -1 / 2 / d * s
            for d, s, n in zip(divisors, (1, -1, 1), (2, 3, 1), strict=True)
            for _ in range(n)
        ]
    )
    torch.testing.assert_close(LOSSES["bnf"].gradient(batch, length=length), expected.double())


@pytest.mark.parametrize("name", ["nll", "unlikelihood"])
def test_nll_ignores_a_dispreferred_response_that_still_counts_as_an_example(name):
    x = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64)
    batch = Responses(
        x, x, torch.tensor([0, 0, 1]), torch.tensor([True, False]), torch.empty(0, 2).long()
    )
    sign = 0 if name == "nll" else -1
    assert LOSSES[name](batch).item() == pytest.approx(0.5 * (1.5 + sign * 4.0))


# -------------------------------------------------------------------------- the drop-in, and errors


@given(batch=responses())
def test_bnf_loss_on_padded_input_is_the_flat_loss(batch):
    R, T = len(batch.preferred), int(batch.lengths().max()) + 2
    logps, ref = (
        torch.full((R, T), math.nan, dtype=torch.float64),
        torch.full((R, T), math.nan, dtype=torch.float64),
    )
    mask = torch.zeros(R, T, dtype=torch.bool)
    for r in range(R):
        n = int((batch.owner == r).sum())
        logps[r, 1 : n + 1], ref[r, 1 : n + 1] = (
            batch.logps[batch.owner == r],
            batch.ref_logps[batch.owner == r],
        )
        mask[r, 1 : n + 1] = True
    logps.requires_grad_()
    loss = bnf_loss(logps, ref, mask, batch.preferred, batch.pairs)
    loss.backward()
    assert loss.item() == pytest.approx(LOSSES["bnf"](batch).item())
    torch.testing.assert_close(logps.grad[mask], LOSSES["bnf"].gradient(batch))
    assert not logps.grad[~mask].any()


def one_response(**changes):
    fields = {
        "logps": torch.tensor([-1.0, -2.0]),
        "ref_logps": torch.tensor([-1.0, -1.0]),
        "owner": torch.tensor([0, 0]),
        "preferred": torch.tensor([True]),
        "pairs": torch.empty(0, 2, dtype=torch.int64),
    }
    return Responses(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logps": torch.tensor([[-1.0, -2.0]])}, "logps must be a flat"),
        ({"ref_logps": torch.tensor([-1.0])}, "ref_logps must be like logps"),
        ({"owner": torch.tensor([0, 1])}, "outside 0..0"),
        (
            {"owner": torch.tensor([1, 1]), "preferred": torch.tensor([True, False])},
            "response 0 has no tokens",
        ),
        ({"preferred": torch.tensor([1])}, "preferred must be bool"),
        ({"pairs": torch.tensor([[0, 0]])}, "a preferred response, a dispreferred"),
        ({"pairs": torch.tensor([0, 1])}, "pairs must be int64"),
        ({"logps": torch.tensor([1.0, 2.0])}, "a log-probability is at most 0"),
        ({"ref_logps": torch.tensor([0.5, -1.0])}, "ref_logps holds 0.5"),
        ({"owner": torch.tensor([0, -1])}, "owner holds a response index outside 0..0"),
        ({"pairs": torch.tensor([[0, 1]])}, "pairs holds a response index outside 0..0"),
        ({"owner": torch.tensor([0, 0], dtype=torch.int32)}, "owner must be int64"),
        ({"owner": torch.tensor([0])}, "owner must be int64"),
        ({"pairs": torch.empty(0, 3, dtype=torch.int64)}, r"pairs must be int64 \(P, 2\)"),
        ({"pairs": torch.empty(0, 2)}, r"pairs must be int64 .* not float32 \(0, 2\)"),
        ({"preferred": torch.tensor([True, False])}, "response 1 has no tokens"),
        ({"logps": torch.tensor([-1, -2])}, "logps must be a flat floating-point"),
        ({"ref_logps": torch.tensor([-1, -2])}, "ref_logps must be like logps"),
        ({"logps": torch.tensor([0.011, -2.0])}, "^logps holds 0.011"),
    ],
)
def test_responses_that_do_not_fit_say_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        one_response(**changes)


@pytest.mark.parametrize(
    "name, hyper, changes, message",
    [
        ("bnf", {"beta": 0.1}, {}, r"no hyper-parameter 'beta' \(it has: length\)"),
        ("dpo", {"length": 1}, {}, r"no hyper-parameter 'length' \(it has: beta, lam\)"),
        ("nll", {"beta": 0.1}, {}, r"no hyper-parameter 'beta' \(it has: length\)"),
        ("dpo", {"beta": True}, {}, "beta=True must be a number above 0"),
        ("dpo", {"lam": "x"}, {}, "lam='x' must be a number, 0 or more"),
        ("kto", {"kl": torch.zeros(2)}, {}, "kl=.* must be given"),
        ("kto", {"kl": torch.zeros(1), "beta": -1.0}, {}, "beta=-1.0 must be"),
        ("bnf", {"length": "own"}, {"ref_logps": None}, "needs ref_logps"),
        ("bnf", {"length": "longest"}, {}, "length='longest' must be"),
        ("bnf", {"length": 0}, {}, "length=0 must be"),
        ("dpo", {"beta": 0}, {}, "beta=0 must be a number above 0"),
        ("dpo", {"lam": -1.0}, {}, "lam=-1.0 must be"),
        ("dpo", {"lam": float("nan")}, {}, "lam=nan must be"),
        ("bnf", {}, {"ref_logps": None}, "needs ref_logps"),
        ("dpo", {}, {}, "needs every response in a pair"),
        ("dpo", {"beta": torch.tensor(-1.0)}, {}, "beta=.* must be a number above 0"),
        ("kto", {}, {}, "kl=None must be given"),
        ("kto", {"kl": -1.0}, {}, "kl=-1.0 must be given"),
    ],
)
def test_a_loss_that_cannot_be_computed_says_why(name, hyper, changes, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name](one_response(**changes), **hyper)


def test_rounding_above_0_is_no_error_and_an_empty_batch_is():
    one_response(logps=torch.tensor([5e-3, -2.0]))
    nothing = {k: torch.empty(0) for k in ("logps", "ref_logps")} | {
        "owner": torch.empty(0, dtype=torch.int64)
    }
    with pytest.raises(ValueError, match="the batch holds no response"):
        LOSSES["bnf"](one_response(**nothing, preferred=torch.empty(0, dtype=torch.bool)))


@pytest.mark.parametrize(
    "ours, theirs",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16,) * 2],
)
def test_narrow_log_probabilities_are_computed_in_float32(ours, theirs):
    """Values that both dtypes hold exactly, so that the result is that of float32 to its
    rounding."""
    batch = one_response(logps=torch.tensor([-1.5, -2.0]), ref_logps=torch.tensor([-1.0, -1.0]))
    low = one_response(logps=batch.logps.to(ours), ref_logps=batch.ref_logps.to(theirs))
    for name in ("bnf", "rbnf", "nll", "kto"):
        hyper = {"kl": 0.0} if name == "kto" else {}
        value, gradient = LOSSES[name].value(low, **hyper), LOSSES[name].gradient(low, **hyper)
        assert value.dtype == gradient.dtype == torch.float32
        assert torch.equal(value, LOSSES[name].value(batch, **hyper)) and torch.equal(
            gradient, LOSSES[name].gradient(batch, **hyper)
        )
    wide = one_response(
        logps=batch.logps.double(), ref_logps=batch.ref_logps
    )  # float64 policy, float32 reference
    assert (
        LOSSES["kto"].gradient(wide, kl=0.0).dtype
        == LOSSES["bnf"].value(wide).dtype
        == torch.float64
    )
    assert LOSSES["nll"].gradient(wide).dtype == torch.float64


def test_the_references_log_probabilities_are_never_differentiated():
    ref = torch.tensor([-1.0, -1.0], requires_grad=True)
    LOSSES["bnf"].value(
        one_response(logps=torch.tensor([-1.5, -2.0], requires_grad=True), ref_logps=ref)
    ).backward()
    assert ref.grad is None


def test_losses_that_need_no_reference_run_without_one_and_ktos_kl_may_be_a_tensor():
    x, mask, preferred = -torch.ones(2, 2), torch.ones(2, 2).bool(), torch.tensor([True, False])
    bare = Responses.from_padded(x, None, mask, preferred, torch.tensor([[0, 1]]))
    for name, loss in LOSSES.items():
        if not loss.needs_ref:
            assert loss(bare).isfinite(), name
    batch = Responses.from_padded(x, x - 1, mask, preferred)
    assert torch.equal(LOSSES["kto"](batch, kl=torch.tensor(0.5)), LOSSES["kto"](batch, kl=0.5))


def test_a_response_in_no_pair_is_not_passed_over_where_another_is_in_two():
    x = torch.full((4,), -1.0)
    batch = Responses(
        x,
        x,
        torch.arange(4),
        torch.tensor([True, False, False, True]),
        torch.tensor([[0, 1], [0, 2]]),
    )
    with pytest.raises(ValueError, match="needs every response in a pair"):
        LOSSES["dpo"](batch)


def test_labels_of_plus_and_minus_one_are_refused_not_taken_for_two_preferred_ones():
    x = torch.full((2, 2), -1.0)
    with pytest.raises(ValueError, match="preferred must be bool"):
        bnf_loss(x, x, torch.ones(2, 2).bool(), torch.tensor([1, -1]))


@pytest.mark.parametrize(
    "logps, ref, mask, preferred, message",
    [
        ((2, 3), (2, 2), (2, 3), 2, "^ref_logps"),
        ((2, 3), (2, 3), (2, 2), 2, "^logps"),
        ((6,), (6,), (6,), 6, "logps"),
        ((2, 3), (2, 3), (2, 3), 3, "preferred must be"),
    ],
)
def test_padded_shapes_that_do_not_fit(logps, ref, mask, preferred, message):
    with pytest.raises(ValueError, match=message):
        bnf_loss(
            -torch.ones(logps),
            -torch.ones(ref),
            torch.ones(mask).bool(),
            torch.ones(preferred).bool(),
        )
    if len(mask) == 2:
        with pytest.raises(ValueError, match="response 1 has no tokens"):
            bnf_loss(
                *[-torch.ones(2, 2)] * 2,
                torch.tensor([[1, 1], [0, 0]]).bool(),
                torch.ones(2).bool(),
            )


def test_losses_and_logprob_import_with_torch_alone():
    """A fresh interpreter in which everything else that this project uses is forbidden."""
    code = """
import sys
others = "numpy safetensors tqdm tokenizers sentencepiece jinja2 matplotlib transformers"
for name in others.split():
    sys.modules[name] = None
from minibnf.losses import Responses, LOSSES, bnf_loss
from minibnf.logprob import token_logps
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_the_built_wheel_works_where_only_torch_is_installed(tmp_path):
    """pip builds the wheel; unpacked without its dependencies, the drop-in imports and runs from
    there, torch beside it."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    source = Path(__file__).parent.parent
    copied = tmp_path / "source"
    copied.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "minibnf"):
        (shutil.copytree if (source / name).is_dir() else shutil.copy)(source / name, copied / name)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, copied], check=True)
    (wheel,) = tmp_path.glob("minibnf-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    code = """
import sys
others = "numpy safetensors tqdm tokenizers sentencepiece jinja2 matplotlib transformers"
for name in others.split():
    sys.modules[name] = None
import torch, minibnf
from minibnf.losses import bnf_loss
assert minibnf.__file__.startswith(sys.argv[1]), minibnf.__file__
logps = torch.full((2, 3), -1.0, requires_grad=True)
preferred, pairs = torch.tensor([True, False]), torch.tensor([[0, 1]])
loss = bnf_loss(logps, torch.full((2, 3), -1.0), torch.ones(2, 3).bool(), preferred, pairs)
loss.backward()
print(logps.grad[:, 0].tolist())
"""
    run = [sys.executable, "-W", "ignore", "-c", code, tmp_path / "site"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        run, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.strip() == "[-0.3333333432674408, 0.3333333432674408]"
