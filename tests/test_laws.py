"""What each loss says, as laws named by what they say; float64. And the arithmetic of each, once,
by hand."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minibnf import arguments
from minibnf.losses import LOSSES, bnf_loss, bnf_weight, rbnf_weight
from minibnf.responses import Responses
from tests.strategies import EXTREME, QUARTER, UNCERTAIN, batches, responses

close = dict(rtol=1e-9, atol=1e-12)


def pair(chosen, rejected, ref_chosen=None, ref_rejected=None):
    """One pair from lists of log-probabilities, float64."""
    logps = torch.tensor([*chosen, *rejected], dtype=torch.float64)
    ref = torch.tensor([*(ref_chosen or chosen), *(ref_rejected or rejected)], dtype=torch.float64)
    owner = torch.tensor([0] * len(chosen) + [1] * len(rejected))
    return Responses(logps, ref, owner, torch.tensor([True, False]), torch.tensor([[0, 1]]))


def moved(batch, by):
    """Every response's log-likelihood moved by by[r] (R,), evenly over its tokens."""
    return replace(batch, logps=batch.logps + (by / batch.lengths())[batch.owner])


PAIR = dict(ref_chosen=[-1.0, -1.0], ref_rejected=[-3.0])
# S_w = -3, S_l = -1, a_w = -1.5, a_l = -1; shifts -1 and +2, Δ = -3; Δ̄ = -0.5 - 2 = -2.5
BY_HAND = {
    "dpo": ({"beta": 1 / 3}, math.log(1 + math.e)),
    "rdpo": ({"beta": 1 / 3, "alpha": 2.0}, math.log(1 + math.exp(-1))),  # -1 + 2 (2 - 1) = 1
    "ipo": ({"beta": 0.5}, 3.5**2),
    "slic": ({"delta": 1.0, "lam": 0.5}, 1 + 3 - 1 + 1.5),
    "simpo": ({"beta": 2.0, "gamma": 1.0}, math.log(1 + math.exp(2))),  # 2 (-0.5) - 1 = -2
    "cpo": ({"beta": 0.5, "lam": 2.0}, math.log(1 + math.e) + 3.0),
    "kto": (
        {"beta": 1.0, "lam_d": 2.0, "lam_u": 1.0, "kl": 1.0},
        (2 / (1 + math.exp(-2)) + 1 / (1 + math.exp(-1))) / 2,
    ),
    "nll": ({}, 1.5),
    "unlikelihood": ({}, 1.5 - 1.0),
    "orpo": ({"lam": 1.0}, 1.5 + math.log(1 + math.expm1(1.5) / math.expm1(1))),  # 1/o = e^-a - 1
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    hyper, expected = BY_HAND[name]
    found = LOSSES[name](pair([-1.0, -2.0], [-1.0], **PAIR), **hyper)
    assert found.item() == pytest.approx(expected, rel=1e-12)


# --------------------------------------------------------------------------------------------- laws


@given(batch=responses(paired=True), shift=st.floats(-0.5, 0))
@pytest.mark.parametrize("name", ["dpo", "rdpo"])
def test_dpo_depends_on_the_margin_only(name, batch, shift):
    """Moving both responses of every pair by the same log-likelihood changes nothing: only the
    margin counts."""
    both = torch.full_like(batch.lengths(), shift)
    torch.testing.assert_close(
        LOSSES[name](moved(batch, both), beta=2.0), LOSSES[name](batch, beta=2.0), **close
    )


@given(batch=responses(paired=True), beta=st.sampled_from([0.1, 2.0]))
def test_rdpo_is_dpo_at_alpha_0_and_for_equal_lengths(batch, beta):
    equal = pair([-1.0, -2.0], [-0.5, -3.0], [-2.0, -1.0], [-1.0, -1.0])
    for x, alpha in ((batch, 0.0), (equal, 9.0)):
        found, expected = LOSSES["rdpo"](x, beta=beta, alpha=alpha), LOSSES["dpo"](x, beta=beta)
        torch.testing.assert_close(found, expected, **close)


@given(batch=responses(paired=True), beta=st.sampled_from([0.1, 0.5, 2]), nudge=st.floats(-0.2, 1))
def test_ipo_is_least_at_its_target_and_pulls_back_beyond_it(batch, beta, nudge):
    """The reference put so that every averaged margin is 1/(2β): loss and gradient vanish; off it
    the loss is the square, and beyond it the chosen response is pushed down."""
    is_chosen = batch.preferred[batch.owner]

    def with_margin(x):
        return replace(batch, ref_logps=batch.logps - is_chosen.double() * x)

    at_target = with_margin(1 / (2 * beta))
    assert LOSSES["ipo"](at_target, beta=beta).item() == pytest.approx(0, abs=1e-20)
    assert LOSSES["ipo"].gradient(at_target, beta=beta).abs().max() < 1e-9
    off = with_margin(1 / (2 * beta) + nudge)
    assert LOSSES["ipo"](off, beta=beta).item() == pytest.approx(nudge**2, abs=1e-9)
    if abs(nudge) > 1e-6:
        chosen = LOSSES["ipo"].gradient(off, beta=beta)[is_chosen]
        assert (chosen.sign() == math.copysign(1, nudge)).all()


@given(batch=responses(paired=True, max_length=3), times=st.integers(2, 4))
@pytest.mark.parametrize("name", ["simpo", "ipo", "orpo"])
def test_losses_of_means_are_unchanged_when_every_token_is_repeated(name, batch, times):
    again = {k: getattr(batch, k).repeat_interleave(times) for k in ("logps", "ref_logps", "owner")}
    torch.testing.assert_close(LOSSES[name](replace(batch, **again)), LOSSES[name](batch), **close)


@given(batch=responses(), kl=st.floats(0, 3), d=st.floats(0, 4))
def test_kto_pushes_equally_both_ways_at_its_reference_point_and_less_on_either_side(batch, kl, d):
    """At R = z0 each response is pushed by β λ/4; at R = z0 + d and z0 - d by the same, smaller
    amount."""

    def pushes(offset):
        shift = ((kl + offset) / batch.lengths())[batch.owner]
        down, up = shift.clamp(max=0), shift.clamp(min=0)
        at = replace(batch, logps=batch.logps + down, ref_logps=batch.logps - up)
        g = LOSSES["kto"].gradient(at, beta=0.5, kl=kl) * len(batch.preferred)
        assert torch.equal(g < 0, batch.preferred[batch.owner])  # up if preferred, down if not
        return g.abs()

    torch.testing.assert_close(pushes(0.0), torch.full_like(batch.logps, 0.5 / 4), **close)
    torch.testing.assert_close(pushes(d), pushes(-d), **close)
    assert (pushes(d) <= 0.5 / 4 + 1e-12).all()


def test_ktos_weights_are_exact_in_float64():
    """λ_d = 0.1 is no float32 number: rounding it to one on the way would cost 1e-9."""
    one = pair([-1.0], [-1.0])
    expected = torch.tensor([-0.1 / 4 / 2, 0.3 / 4 / 2], dtype=torch.float64)
    g = LOSSES["kto"].gradient(one, beta=1.0, lam_d=0.1, lam_u=0.3, kl=0.0)
    torch.testing.assert_close(g, expected, rtol=1e-14, atol=0)


@given(a=st.floats(-5, -0.05), lam=st.sampled_from([0.1, 1.0]))
def test_orpos_two_terms_balance_where_the_algebra_says(a, lam):
    """At a_w = a_l = a the odds ratio is 1 and σ(-ρ) = 1/2: the ratio pulls the rejected one down
    by λ/(2 (1 - e^a)), and the chosen one up by the same, on top of the NLL's 1: a sum of pushes of
    -1 however sure the model is."""
    g = LOSSES["orpo"].gradient(pair([a], [a]), lam=lam)
    half = lam / (2 * (1 - math.exp(a)))
    torch.testing.assert_close(g, torch.tensor([-1 - half, half], dtype=torch.float64), **close)


@given(batch=responses(paired=True), extra=st.floats(0.01, 5))
def test_slic_is_flat_beyond_its_margin(batch, extra):
    """Once S_w - S_l >= δ only the likelihood term is left: with λ = 0 the loss and every gradient
    are 0."""
    S = batch.sums(batch.logps)
    delta = float((S[batch.pairs[:, 0]] - S[batch.pairs[:, 1]]).min()) - extra
    if delta >= 0:
        assert LOSSES["slic"](batch, delta=delta, lam=0.0) == 0
        assert not LOSSES["slic"].gradient(batch, delta=delta, lam=0.0).any()
    within = LOSSES["slic"].gradient(batch, delta=1e6, lam=0.0) * len(batch.pairs)
    assert torch.equal(within, torch.where(batch.preferred[batch.owner], -1.0, 1.0).double())


def test_slic_at_its_margin_exactly_takes_the_flat_side():
    assert not LOSSES["slic"].gradient(pair([-1.0], [-3.0]), delta=2.0, lam=0.0).any()


@given(batch=responses(paired=True))
def test_cpo_is_dpo_with_a_uniform_reference_and_likelihood(batch):
    uniform = replace(batch, ref_logps=torch.zeros_like(batch.logps))
    a_w = (batch.sums(batch.logps) / batch.lengths())[batch.pairs[:, 0]].mean()
    expected = LOSSES["dpo"](uniform, beta=0.3) - 0.7 * a_w
    torch.testing.assert_close(LOSSES["cpo"](batch, beta=0.3, lam=0.7), expected, **close)


@given(batch=responses())
def test_bnf_at_the_reference_is_unlikelihood_and_never_pushes_harder(batch):
    at_reference = replace(batch, ref_logps=batch.logps)
    unlikelihood = LOSSES["unlikelihood"].gradient(batch)
    peak, bnf = (LOSSES["bnf"].gradient(x, length="own") for x in (at_reference, batch))
    torch.testing.assert_close(peak, unlikelihood, **close)
    assert (bnf.abs() <= unlikelihood.abs() + 1e-15).all()


@given(p=EXTREME, r=EXTREME)
def test_rbnf_retrieves_preferred_tokens_and_treats_the_others_as_bnf_does(p, r):
    p, r = torch.tensor([p], dtype=torch.float64), torch.tensor([r], dtype=torch.float64)
    w = bnf_weight(p, r)
    assert torch.equal(rbnf_weight(p, r, torch.tensor([False])), w)
    assert torch.equal(rbnf_weight(p, r, torch.tensor([True])), torch.maximum(w, r.exp()))


@given(batch=responses())
@pytest.mark.parametrize("name", ["nll", "unlikelihood"])
def test_fine_tuning_and_its_opposite(name, batch):
    """Sums over responses of their mean log-probability: with the sign of the label, or the
    preferred ones alone; a dispreferred one still counts as an example."""
    a = batch.sums(batch.logps) / batch.lengths()
    sign = torch.where(batch.preferred, 1.0, -1.0 if name == "unlikelihood" else 0.0)
    E = len(batch.preferred) - len(batch.pairs)
    torch.testing.assert_close(LOSSES[name](batch), -(sign * a).sum() / E, **close)


# ----------------------------------------------------------------- invariances every loss must have


def assert_same(name, batch, other, tokens, hyper):
    """The loss, and the gradient of other, whose token i is batch's token tokens[i]."""
    loss = LOSSES[name]
    torch.testing.assert_close(loss(other, **hyper), loss(batch, **hyper), **close)
    expected = loss.gradient(batch, **hyper)[tokens]
    torch.testing.assert_close(loss.gradient(other, **hyper), expected, **close)


@pytest.mark.parametrize("name", sorted(LOSSES))
@QUARTER
@given(data=st.data())
def test_permuting_tokens_and_responses_changes_nothing(name, data):
    batch, hyper = data.draw(batches(name))
    tokens, order = (  # new token or response i is old tokens[i] or order[i]
        torch.tensor(data.draw(st.permutations(range(n))))
        for n in (len(batch.logps), len(batch.preferred))
    )
    place = order.argsort()
    other = Responses(
        batch.logps[tokens],
        batch.ref_logps[tokens],
        place[batch.owner][tokens],
        batch.preferred[order],
        place[batch.pairs],
    )
    assert_same(name, batch, other, tokens, hyper)


@pytest.mark.parametrize("name", sorted(LOSSES))
@QUARTER
@given(data=st.data())
def test_padding_changes_nothing(name, data):
    """What stands where mask is False is never read, and has the gradient 0."""
    batch, hyper = data.draw(batches(name))
    lengths = batch.lengths().long().tolist()
    T = max(lengths) + data.draw(st.integers(0, 3))
    starts = [data.draw(st.integers(0, T - n)) for n in lengths]
    mask = torch.tensor(
        [[a <= t < a + n for t in range(T)] for a, n in zip(starts, lengths, strict=True)]
    )
    logps, ref = (torch.full(mask.shape, math.nan, dtype=torch.float64) for _ in range(2))
    logps[mask], ref[mask] = batch.logps, batch.ref_logps  # the strategy's tokens are in order
    logps.requires_grad_()
    padded = Responses.from_padded(logps, ref, mask, batch.preferred, batch.pairs)
    assert_same(name, batch, padded, slice(None), hyper)
    value = LOSSES[name](padded, **hyper)
    (dlogps,) = torch.autograd.grad(value, logps)
    torch.testing.assert_close(dlogps[mask], LOSSES[name].gradient(batch, **hyper), **close)
    assert not dlogps[~mask].any()
    if name == "bnf":
        drop_in = bnf_loss(logps, ref, mask, batch.preferred, batch.pairs)
        assert drop_in.item() == LOSSES["bnf"](padded).item()


# --------------------------------------------------------- float32 against the float64 oracle


@pytest.mark.parametrize("name", sorted(LOSSES))
@given(data=st.data())
def test_gradients_in_float32_are_finite_and_lose_no_more_than_autograd_of_the_value(name, data):
    """Log-probabilities from -1e4 to 0, single tokens, equal pairs, one response a batch. At 0 odds
    are infinite and so is orpo, by its definition: it is asked below 0. A sum near 1e4 is only
    known to 1e-3 in float32; both sides inherit that, so the bound is twice autograd's own error
    and a few roundings."""
    loss, values = LOSSES[name], UNCERTAIN if name == "orpo" else EXTREME
    batch, hyper = data.draw(batches(name, values=values, dtype=torch.float32))
    wide = replace(batch, logps=batch.logps.double(), ref_logps=batch.ref_logps.double())
    exact, ours = loss.gradient(wide, **hyper), loss.gradient(batch, **hyper)
    logps = batch.logps.clone().requires_grad_()
    value = loss.value(replace(batch, logps=logps), **hyper)
    (naive,) = torch.autograd.grad(value, logps)
    assert all(x.isfinite().all() for x in (value, ours, naive))
    error, naive_error = ((x.double() - exact).abs() for x in (ours, naive))
    bound = 2 * naive_error + 2e-6 * exact.abs().max() + 1e-30
    assert (error <= bound).all(), (ours, naive, exact)


# ------------------------------------------------ the weight family, and its kin of whole responses

E2 = math.exp(2)
NEW_BY_HAND = {  # Δ_w = -1, Δ_l = 2, the mean length 1.5; of topr the rejected token lies above r
    "ratio": ({}, (2 - 1 / math.e) / 1.5),  # the second chosen token: log r + p/r - 1 = 1/e - 2
    "topr": ({}, (3 - 1) / 1.5),
    "tnpo": ({"beta": 0.5}, (3 + 4 * math.log(1 + math.e)) / 1.5),
    "power": ({}, (1 - 1 / E2) / 1.5),  # chosen p - 1 = 1/e - 1, 1/e² - 1; rejected 1/e - 1
    "apo_zero": ({"beta": 0.5}, 1 / (1 + math.exp(-0.5)) + 1 / (1 + math.exp(-1))),
    "lndpo": ({"beta": 0.4}, math.log(1 + math.e)),  # Δ̄ = -2.5
    "bdpo": ({"beta": 1.0, "lam": 0.5}, math.log(1 + math.e * (1 + E2) / 2)),  # e^M = (1 + e²)/2
}


@pytest.mark.parametrize("name", NEW_BY_HAND)
def test_the_familys_losses_by_hand(name):
    hyper, expected = NEW_BY_HAND[name]
    found = LOSSES[name](pair([-1.0, -2.0], [-1.0], **PAIR), **hyper)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def of_token(name, part, p, r, preferred=False, **hyper):
    """A token loss's weight or potential at log p and log r, float64."""
    logs = (torch.tensor([x], dtype=torch.float64) for x in (p, r))
    return getattr(LOSSES[name], part)(*logs, torch.tensor([preferred]), **hyper)


@given(p=EXTREME, r=EXTREME)
def test_the_order_of_rejected_weights_below_the_reference(p, r):
    """w_bnf <= w_topr <= w_tnpo <= 2 w_topr at β = 1, and w_bnf / w_topr = (1-r)/(1-p)."""
    bnf, topr = (of_token(name, "weight", p, r) for name in ("bnf", "topr"))
    tnpo = of_token("tnpo", "weight", p, r, beta=1.0)
    if p <= r:
        up = 1 + 1e-12
        assert bnf <= topr * up and topr <= tnpo * up and tnpo <= 2 * topr * up
        torch.testing.assert_close(bnf * -math.expm1(p), topr * -math.expm1(r), rtol=1e-9, atol=0)
    assert all(of_token(n, "weight", p, r, True, **h) == 1 for n, h in PULLED.items())


PULLED = {"nll": {}, "topr": {}, "tnpo": {"beta": 1.0}, "unlikelihood": {}}


@given(r=UNCERTAIN, beta=st.floats(0.1, 3), alpha=st.floats(0.01, 3))
def test_how_far_a_rejected_potential_falls_from_the_reference_to_0(r, beta, alpha):
    def fall(name, **hyper):
        top, bottom = (of_token(name, "potential", p, r, **hyper) for p in (r, -math.inf))
        return (top - bottom).item()

    assert 0 < fall("bnf") <= 1
    assert fall("topr") == pytest.approx(1, abs=1e-11)  # log r, down to -1e4, is rounded
    assert fall("tnpo", beta=beta) == pytest.approx(2 / beta * math.log(2))
    assert fall("power", alpha=alpha) == pytest.approx(math.exp(alpha * r) / alpha, abs=1e-12)


@given(p=UNCERTAIN, alpha=st.floats(1e-12, 1e-6), label=st.booleans())
def test_power_tends_to_unlikelihood_as_alpha_goes_to_0(p, alpha, label):
    """1 - w and Φ/log p - 1 are at most α |log p|; DFT and WGA are one weight with two signs."""
    w, phi = (of_token("power", x, p, 0.0, label, alpha=alpha) for x in ("weight", "potential"))
    assert 0 <= 1 - w <= alpha * -p + 1e-15
    assert abs(phi / p - 1) <= alpha * -p + 1e-12
    assert of_token("power", "potential", p, 0.0, label, alpha=0.0) == p
    assert w == of_token("power", "weight", p, 0.0, not label, alpha=alpha)


@given(batch=responses(paired=True), beta=st.sampled_from([0.1, 1.0, 3.0]))
def test_losses_of_the_family_that_are_others_in_disguise(batch, beta):
    """apo_zero is twice kto at z0 = 0; lndpo is simpo without γ where the reference is uniform;
    bdpo is dpo at λ = 1, and takes no notice of a rejected response at λ = 0, where P_l is R_l."""
    flat = replace(batch, ref_logps=torch.zeros_like(batch.logps))
    rejected = ~batch.preferred[batch.owner]
    still = replace(batch, ref_logps=torch.where(rejected, batch.logps, batch.ref_logps))
    same = [
        (1, "apo_zero", batch, {}, 2, "kto", batch, {"kl": 0.0}),
        (1, "lndpo", flat, {}, 1, "simpo", flat, {"gamma": 0.0}),
        (1, "bdpo", batch, {"lam": 1.0}, 1, "dpo", batch, {}),
        (~rejected, "bdpo", batch, {"lam": 0.0}, ~rejected, "dpo", still, {}),
    ]
    for a, name, x, hyper, b, other, y, others in same:
        found = LOSSES[name].gradient(x, beta=beta, **hyper)
        expected = LOSSES[other].gradient(y, beta=beta, **others)
        torch.testing.assert_close(a * found, b * expected, **close)
    assert not LOSSES["bdpo"].gradient(batch, lam=0.0)[rejected].any()
    found, expected = LOSSES["apo_zero"](batch), 2 * LOSSES["kto"](batch, kl=0.0)
    torch.testing.assert_close(found, expected, **close)
    with pytest.raises(ValueError, match=r"lam=1\.5 must be a number from 0 to 1"):
        LOSSES["bdpo"](batch, lam=1.5)


TOKEN_LOCAL = [name for name, loss in LOSSES.items() if loss.token_local]


@pytest.mark.parametrize("good", TOKEN_LOCAL)
@QUARTER
@given(bad=st.sampled_from(TOKEN_LOCAL), data=st.data())
def test_two_token_losses_combine_by_label(good, bad, data):
    """LOSSES["rbnf/topr"] has rbnf's gradient on preferred tokens and topr's on rejected ones, of
    one length; its value has that gradient, and is the sum of the two parts'."""
    both = LOSSES[f"{good}/{bad}"]
    batch = data.draw(responses(values=EXTREME))
    hyper = dict(both.defaults, length=data.draw(st.sampled_from(["own", "batch", "shorter"])))
    parts = [
        LOSSES[name].gradient(batch, **{k: hyper[k] for k in LOSSES[name].defaults})
        for name in (good, bad)
    ]
    logps = batch.logps.clone().requires_grad_()
    (slope,) = torch.autograd.grad(both.value(replace(batch, logps=logps), **hyper), logps)
    expected = torch.where(batch.preferred[batch.owner], *parts)
    torch.testing.assert_close(both.gradient(batch, **hyper), expected, rtol=0, atol=0)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-15)
    assert both.token_local and both.needs_ref == (LOSSES[good].needs_ref or LOSSES[bad].needs_ref)
    assert both.defaults["length"] == LOSSES[good].defaults["length"]
    if good == bad:
        assert both.value(batch) == LOSSES[good].value(batch)


@pytest.mark.parametrize("name", ["bnf/dpo", "bnf/", "bnf/topr/nll", "/", "dft"])
def test_a_loss_that_is_none_is_refused_by_name(name, capsys):
    with pytest.raises(KeyError, match=r"there are bnf, .*; and two of bnf, .*, such as bnf/topr"):
        LOSSES[name]
    with pytest.raises(SystemExit):
        arguments.parser().parse_args(["--loss", name])
    assert f"no loss '{name}'" in capsys.readouterr().err
