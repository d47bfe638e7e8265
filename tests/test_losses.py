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
from hypothesis import assume, example, given
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
from tests.strategies import EXTREME, QUARTER, batches, one_response

ALL = sorted(LOSSES)
PAIR = dict(preferred=torch.tensor([True, False]), pairs=torch.tensor([[0, 1]]))


def wide(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# ------------------------------------------------------------------------------ gradient = autograd


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_gradient_by_hand_is_the_gradient_of_the_value(name, data):
    loss, (batch, hyper) = LOSSES[name], data.draw(batches(name))
    logps = batch.logps.clone().requires_grad_()
    value = loss.value(replace(batch, logps=logps), **hyper)
    (expected,) = torch.autograd.grad(value, logps)
    torch.testing.assert_close(loss.gradient(batch, **hyper), expected, rtol=1e-9, atol=1e-15)
    assert loss(batch, **hyper).item() == value.item()


@pytest.mark.parametrize("name", ALL)
@QUARTER
@given(data=st.data())
def test_the_differentiable_call_passes_gradcheck(name, data):
    """Away from kinks, where a finite difference straddles two branches: p = r, slic's hinge."""
    batch, hyper = data.draw(batches(name))
    if name == "slic":
        S = batch.sums(batch.logps)[batch.pairs]
        assume(((hyper["delta"] - S[:, 0] + S[:, 1]).abs() > 1e-2).all())
    near = (batch.logps - batch.ref_logps).abs() < 1e-4
    apart = torch.where(near, batch.logps - 1e-3, batch.logps).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: 3 * LOSSES[name](replace(batch, logps=x), **hyper), (apart,), atol=1e-6
    )


# ----------------------------------------------------------------------------------- extreme values


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
    if p >= star:
        return plain_bnf_potential(p, r)
    return plain_bnf_potential(star, r) + r * (math.log(p) - math.log(star))


@given(p=st.floats(1e-6, 0.999), r=st.floats(1e-3, 0.999))
@example(p=0.01, r=0.9)
@example(p=1e-6, r=0.5)
def test_the_potentials_have_the_values_of_their_formulas(p, r):
    logs, good = (wide(p).log(), wide(r).log()), torch.tensor([True])
    bnf, rbnf = plain_bnf_potential(p, r), plain_rbnf_potential(p, r)
    found = [f.item() for f in (bnf_potential(*logs), rbnf_potential(*logs, ~good))]
    assert found == pytest.approx([bnf] * 2, rel=1e-9, abs=1e-9)
    assert rbnf_potential(*logs, good).item() == pytest.approx(rbnf, rel=1e-9, abs=1e-9)


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

    def draw(n, values):
        return data.draw(st.lists(values, min_size=n, max_size=n))

    logits = wide(*draw(N * V, st.floats(-4, 4))).reshape(N, V).requires_grad_()
    targets = torch.tensor(draw(N, st.integers(0, V - 1)))
    ref_logps, preferred = wide(*draw(N, st.floats(-5, -0.02))), data.draw(st.booleans())
    published = published_bnf(logits, targets, ref_logps, 1 if preferred else -1, N)
    (expected,) = torch.autograd.grad(published, logits)
    logps = logits.log_softmax(-1)[torch.arange(N), targets]
    owner = torch.zeros(N, dtype=torch.int64)
    batch = one_response(
        logps=logps, ref_logps=ref_logps, owner=owner, preferred=torch.tensor([preferred])
    )
    (ours,) = torch.autograd.grad(LOSSES["bnf"](batch), logits)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@given(p=st.floats(-30, -1e-6), r=st.floats(-30, -1e-6))
def test_feedback_is_a_tent(p, r):
    """Identity 3: |dΦ/dz_y| = w (1 - p) is p (1-r)/r below the reference and 1 - p above it."""
    p, r = wide(p), wide(r)
    feedback = bnf_weight(p, r) * -torch.expm1(p)
    tent = torch.where(p < r, (p - r).exp() * -torch.expm1(r), -torch.expm1(p))
    torch.testing.assert_close(feedback, tent, rtol=1e-9, atol=0)
    assert feedback <= -torch.expm1(r) + 1e-15  # the peak is at p = r


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
    p = wide(1 / 2, 1 / 4, 1 / 2, 1 / 4, 1 / 4).log()
    r = wide(1 / 4, 1 / 2, 1 / 2, 1 / 2, 1 / 2).log()
    batch = Responses(p, r, torch.tensor([0, 0, 1, 1, 1]), **PAIR)
    assert LOSSES["bnf"](batch).item() == pytest.approx(0.5 * math.log(1 / 3), rel=1e-12)
    expected = wide(-1 / 2, -1 / 6, 1 / 2, 1 / 6, 1 / 6)
    torch.testing.assert_close(LOSSES["bnf"].gradient(batch), expected)


@pytest.mark.parametrize("name", ALL)
@QUARTER
@given(data=st.data())
def test_splitting_a_batch_and_weighing_the_parts_changes_nothing(name, data):
    """The loss is a mean over examples, so parts count by their examples; the whole batch's mean
    length goes to each."""
    loss = LOSSES[name]
    (one, hyper), (two, _) = data.draw(batches(name)), data.draw(batches(name))
    R = len(one.preferred)
    whole = Responses(
        torch.cat([one.logps, two.logps]),
        torch.cat([one.ref_logps, two.ref_logps]),
        torch.cat([one.owner, two.owner + R]),
        torch.cat([one.preferred, two.preferred]),
        torch.cat([one.pairs, two.pairs + R]),
    )
    together = loss.gradient(whole, **hyper)
    if hyper.get("length") == "batch":
        hyper["length"] = whole.lengths().mean().item()
    n1, n2 = (len(x.preferred) if loss.per_response else x.examples() for x in (one, two))
    parts = [loss.gradient(x, **hyper) * n / (n1 + n2) for x, n in ((one, n1), (two, n2))]
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "length, divisors",
    [("own", (2, 3, 1)), ("shorter", (2, 2, 1)), ("batch", (2, 2, 2)), (5.0, (5, 5, 5))],
)
def test_length_normalisers(length, divisors):
    """A pair of lengths 2 and 3, an unpaired response of length 1, all at p = r: the gradient is -s
    / (|y| E), E = 2."""
    x, owner = torch.full((6,), -1.0, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 2])
    batch = Responses(x, x, owner, torch.tensor([True, False, True]), torch.tensor([[0, 1]]))
    expected = wide(-1, 1, -1)[owner] / 2 / wide(*divisors)[owner]
    torch.testing.assert_close(LOSSES["bnf"].gradient(batch, length=length), expected)


# -------------------------------------------------------------------------- the drop-in, and errors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logps": wide([-1.0, -2.0])}, r"logps must be flat, float \(1,\), not float \(1, 2\)"),
        ({"logps": torch.tensor([-1, -2])}, r"logps must be flat, float \(2,\), not int64"),
        ({"logps": wide(0.011, -2.0)}, "^logps holds 0.011: a log-probability is at most 0"),
        ({"ref_logps": wide(-1.0)}, "ref_logps must be flat, float"),
        ({"ref_logps": wide(0.5, -1.0)}, "ref_logps holds 0.5"),
        ({"owner": torch.tensor([0, 0], dtype=torch.int32)}, "owner must be flat, int64"),
        ({"owner": torch.tensor([0, 1])}, "owner names response 1, but there are only 1"),
        ({"owner": torch.tensor([1, 1]), **PAIR}, "response 0 has no tokens"),
        ({"preferred": torch.tensor([1])}, r"preferred must be flat, bool \(1,\)"),
        ({"pairs": torch.tensor([[0, 0]])}, "a preferred, a dispreferred"),
        ({"pairs": torch.empty(0, 3, dtype=torch.int64)}, r"pairs must be flat, int64 \(0, 2\)"),
    ],
)
def test_responses_that_do_not_fit_say_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        one_response(**changes)


@pytest.mark.parametrize(
    "name, hyper, changes, message",
    [
        ("bnf", {"beta": 0.1}, {}, r"no hyper-parameter 'beta' \(it has: length\)"),
        ("kto", {"kl": 0.0, "beta": -1.0}, {}, "beta=-1.0 must be a number above 0"),
        ("bnf", {"length": "longest"}, {}, "length='longest' must be"),
        ("bnf", {"length": 0}, {}, "length=0 must be"),
        ("dpo", {"beta": 0}, PAIR, "beta=0 must be a number above 0"),
        ("dpo", {"lam": "x"}, PAIR, "lam='x' must be a number, 0 or more"),
        ("dpo", {"lam": -1e-9}, PAIR, "lam=-1e-09 must be"),
        ("dpo", {"lam": math.nan}, PAIR, "lam=nan must be"),
        ("dpo", {"lam": math.inf}, PAIR, "lam=inf must be"),
        ("dpo", {"beta": torch.tensor(-1.0)}, PAIR, "beta=.* must be a number above 0"),
        ("bnf", {}, {"ref_logps": None}, "needs ref_logps"),
        ("dpo", {}, {}, "needs every response in a pair"),
        ("kto", {}, {}, "kl=None must be given"),
        ("kto", {"kl": -1.0}, {}, "kl=-1.0 must be given"),
    ],
)
def test_a_loss_that_cannot_be_computed_says_why(name, hyper, changes, message):
    owner = torch.tensor([0, 1] if changes is PAIR else [0, 0])
    with pytest.raises(ValueError, match=message):
        LOSSES[name](one_response(owner=owner, **changes), **hyper)


@pytest.mark.parametrize("ours", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("theirs", [torch.bfloat16, torch.float32])
def test_narrow_log_probabilities_are_computed_in_float32_and_gradients_come_in_kind(ours, theirs):
    """Values that all dtypes hold exactly, so that the result is that of float32 to its rounding.
    The reference's are never differentiated; 5e-3 above 0 is rounding and no error."""
    wider = torch.promote_types(ours, torch.float32)
    exact = {"logps": torch.tensor([-1.5, 2**-8]), "ref_logps": torch.tensor([-1.0, -1.0])}
    batch = one_response(**{name: x.to(wider) for name, x in exact.items()})
    leaf = exact["logps"].to(ours).requires_grad_()
    low = one_response(logps=leaf, ref_logps=exact["ref_logps"].to(theirs).requires_grad_())
    for name in ("bnf", "rbnf", "nll", "kto"):
        loss, hyper = LOSSES[name], {"kl": 0.0} if name == "kto" else {}
        value, expected = loss(low, **hyper), loss.gradient(batch, **hyper)
        assert torch.equal(value, loss(batch, **hyper)) and value.dtype == wider
        assert torch.equal(loss.gradient(low, **hyper), expected) and expected.dtype == wider
        (dlogps,) = torch.autograd.grad(value, leaf)
        assert torch.equal(dlogps, expected.to(ours))
        loss.value(low, **hyper).backward()
        assert low.ref_logps.grad is None


def test_losses_that_need_no_reference_run_without_one_and_ktos_kl_may_be_a_tensor():
    x, mask, preferred = -torch.ones(2, 2), torch.ones(2, 2).bool(), torch.tensor([True, False])
    bare = Responses.from_padded(x, None, mask, preferred, torch.tensor([[0, 1]]))
    for name, loss in LOSSES.items():
        if not loss.needs_ref:
            assert loss(bare).isfinite(), name
    batch = Responses.from_padded(x, x - 1, mask, preferred)
    assert torch.equal(LOSSES["kto"](batch, kl=torch.tensor(0.5)), LOSSES["kto"](batch, kl=0.5))


def test_a_response_in_no_pair_is_not_passed_over_where_another_is_in_two():
    x, preferred = torch.full((4,), -1.0), torch.tensor([True, False, False, True])
    batch = Responses(x, x, torch.arange(4), preferred, torch.tensor([[0, 1], [0, 2]]))
    with pytest.raises(ValueError, match="needs every response in a pair"):
        LOSSES["dpo"](batch)


@pytest.mark.parametrize(
    "logps, ref, preferred, message",
    [
        ((2, 3), (2, 2), torch.ones(2).bool(), r"ref_logps must be \(2, 3\) as mask is"),
        ((2, 2), (2, 3), torch.ones(2).bool(), r"^logps must be \(2, 3\) as mask is, not \(2, 2\)"),
        ((6,), (6,), torch.ones(2).bool(), "logps must be"),
        ((2, 3), (2, 3), torch.ones(3).bool(), "preferred must be"),
        ((2, 3), (2, 3), torch.tensor([1, -1]), "preferred must be flat, bool"),
        ((2, 3), (2, 3), torch.ones(2).bool(), "response 1 has no tokens"),
    ],
)
def test_padded_input_that_does_not_fit(logps, ref, preferred, message):
    """Labels of +1 and -1 are refused, too, and not taken for two preferred ones."""
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]]).bool()
    with pytest.raises(ValueError, match=message):
        bnf_loss(-torch.ones(logps), -torch.ones(ref), mask, preferred)


def test_the_built_wheel_works_where_only_torch_is_installed(tmp_path):
    """pip builds the wheel and installs it into an empty folder: `minibnf --help` runs, and the
    losses and token_logps do with everything forbidden that this project uses besides torch."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    source, copied = Path(__file__).parent.parent, tmp_path / "source"
    shutil.copytree(source / "minibnf", copied / "minibnf")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(source / name, copied)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, copied], check=True)
    (wheel,) = tmp_path.glob("minibnf-*.whl")
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True)
    code = """
import sys
others = "numpy safetensors tqdm tokenizers sentencepiece jinja2 matplotlib transformers"
for name in others.split():
    sys.modules[name] = None
import torch, minibnf
from minibnf.losses import LOSSES, Responses, bnf_loss
from minibnf.logprob import token_logps
assert minibnf.__file__.startswith(sys.argv[1]), minibnf.__file__
logps = torch.full((2, 3), -1.0, requires_grad=True)
preferred, pairs = torch.tensor([True, False]), torch.tensor([[0, 1]])
loss = bnf_loss(logps, torch.full((2, 3), -1.0), torch.ones(2, 3).bool(), preferred, pairs)
loss.backward()
print(logps.grad[:, 0].tolist())
"""
    run = [sys.executable, "-W", "ignore", "-c", code, installed]
    how = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(installed)}}
    how |= {"capture_output": True, "text": True, "check": True}
    assert (
        "align a checkpoint" in subprocess.run([installed / "bin/minibnf", "--help"], **how).stdout
    )
    done = subprocess.run(run, **how)
    assert done.stdout.strip() == "[-0.3333333432674408, 0.3333333432674408]"
