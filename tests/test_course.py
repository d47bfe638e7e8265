"""The mathematics of pages 00 to 03, as properties: where probability goes, RLHF's optimum and DPO,
when DPO's push grows, the price of BNF. float64."""

import math

import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from minibnf.feedback import feedback
from minibnf.losses import LOSSES
from minibnf.responses import Responses

BETAS = st.floats(0.1, 5)


def vectors(n):
    """n numbers, float64, as logits or rewards."""
    return st.lists(st.floats(-4, 4), min_size=n, max_size=n).map(
        lambda x: torch.tensor(x, dtype=torch.float64)
    )


# ------------------------------------------------------------------------- page 00: the squeezing


@given(z=vectors(6), y=st.integers(0, 5), step=st.floats(0.01, 1))
def test_pushing_a_word_down_feeds_the_likeliest_of_the_others(z, y, step):
    """z - step d log p/dz: of two other words the likelier one gains ground, and the likeliest of
    all others gains probability."""
    before = z.softmax(-1)
    after = (z - step * (F.one_hot(torch.tensor(y), 6) - before)).softmax(-1)
    others = [v for v in before.argsort().tolist() if v != y]
    growth = (after / before)[others]  # from the least likely to the likeliest
    assert (growth.diff() >= -1e-12).all()
    assert growth[-1] >= 1 - 1e-12 and after[y] <= before[y]


# ---------------------------------------------------------------- page 01: RLHF's optimum, and DPO


def objective(pi, R, ref, beta):
    """J(π) = E_π[R] - β KL(π || π_ref)."""
    return (pi * R).sum() - beta * (pi * (pi / ref).log()).sum()


def optimum(R, ref, beta):
    return (ref.log() + R / beta).softmax(-1)


@given(R=vectors(5), ref=vectors(5), other=vectors(5), beta=BETAS)
def test_no_policy_has_a_larger_objective_than_the_optimum(R, ref, other, beta):
    """J(π) = β log Z - β KL(π || π*) for every π."""
    ref, other = ref.softmax(-1), other.softmax(-1)
    best = optimum(R, ref, beta)
    largest = beta * (ref.log() + R / beta).logsumexp(-1)  # β log Z
    kl = (other * (other / best).log()).sum()
    found = objective(other, R, ref, beta)
    torch.testing.assert_close(found, largest - beta * kl, rtol=1e-9, atol=1e-9)
    assert found <= objective(best, R, ref, beta) + 1e-9
    torch.testing.assert_close(objective(best, R, ref, beta), largest, rtol=1e-9, atol=1e-9)


def single_tokens(pi, ref, pairs):
    """A batch of pairs of answers of one token, as every loss takes it."""
    responses = pairs.flatten()
    n = len(responses)
    preferred = torch.tensor([True, False]).repeat(len(pairs))
    logps, ref_logps = pi.log()[responses], ref.log()[responses]
    return Responses(logps, ref_logps, torch.arange(n), preferred, torch.arange(n).view(-1, 2))


@given(R=vectors(5), ref=vectors(5), beta=BETAS, shift=st.floats(-5, 5))
def test_dpo_of_the_optimum_is_bradley_terry_of_its_reward(R, ref, beta, shift):
    """The partition function cancels: the library's dpo at π* is -log σ(R_w - R_l), and neither
    knows a constant added to all rewards."""
    ref = ref.softmax(-1)
    pairs = torch.tensor([[0, 1], [2, 0], [3, 4], [1, 3]])
    w, l = pairs.T  # noqa: E741
    wanted = -F.logsigmoid(R[w] - R[l]).mean()
    for rewards in (R, R + shift):
        batch = single_tokens(optimum(rewards, ref, beta), ref, pairs)
        found = LOSSES["dpo"](batch, beta=beta)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@given(R=vectors(4), counts=st.lists(st.integers(0, 20), min_size=16, max_size=16))
def test_bradley_terrys_gradient_is_wins_predicted_less_wins_counted(R, counts):
    """Of its sum over votes: so where it is 0, each answer wins as often as predicted."""
    wins = torch.tensor(counts, dtype=torch.float64).view(4, 4).fill_diagonal_(0)
    leaf = R.clone().requires_grad_()
    (-(wins * F.logsigmoid(leaf[:, None] - leaf)).sum()).backward()
    predicted = ((wins + wins.T) * torch.sigmoid(R[:, None] - R)).sum(1)
    torch.testing.assert_close(leaf.grad, predicted - wins.sum(1), rtol=1e-9, atol=1e-9)


@given(margin=st.floats(-50, 100), beta=BETAS)
def test_of_a_pair_with_one_vote_dpo_has_no_optimum(margin, beta):
    """At every margin Δ its loss still falls as Δ grows."""
    logps = torch.tensor([-120.0 + margin, -120.0], dtype=torch.float64)
    batch = Responses(
        logps,
        torch.full_like(logps, -120.0),
        torch.tensor([0, 1]),
        torch.tensor([True, False]),
        torch.tensor([[0, 1]]),
    )
    chosen, rejected = LOSSES["dpo"].gradient(batch, beta=beta).tolist()
    assert chosen < 0 < rejected


# ------------------------------------------------------------------ page 02: when DPO's push grows


@given(r=st.floats(0.01, 0.99), share=st.floats(0.01, 1), beta=BETAS)
def test_dpos_push_on_a_falling_token_grows_while_its_odds_exceed_a_bound(r, share, beta):
    """While o(p) > β σ(βΔ), Δ = log(r/p): at the start, p = r, if o(r) > β/2."""
    p = r * share
    bound = beta * torch.sigmoid(torch.tensor(-beta * math.log(share))).item()
    assume(abs(p / (1 - p) / bound - 1) > 1e-3)
    ends = torch.tensor([p, p * (1 - 1e-6)], dtype=torch.float64)
    here, lower = feedback("dpo", ends, r, preferred=False, beta=beta).tolist()
    assert (lower > here) == (p / (1 - p) > bound)


# -------------------------------------------------------------------- page 03: the price of BNF


def weight(name, p, r, preferred):
    logs = (torch.tensor([x], dtype=torch.float64).log() for x in (p, r))
    return LOSSES[name].weight(*logs, torch.tensor([preferred]))


def climb(name, p, r, steps, rate=0.5):
    """p of a preferred token after page 00's steps on five logits."""
    rest = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64) * (1 - p)
    z = torch.cat([torch.tensor([p], dtype=torch.float64), rest]).log()
    one_hot = F.one_hot(torch.tensor(0), 5)
    for _ in range(steps):
        pi = z.softmax(-1)
        z = z + rate * weight(name, pi[0].item(), r, True) * (one_hot - pi)
    return z.softmax(-1)[0].item()


def test_a_preferred_token_far_below_the_reference_stays_there():
    """p = .001 at r = .4: after 200 steps fine-tuning has it at .99 and so has rbnf; under BNF it
    is where it was."""
    assert climb("nll", 0.001, 0.4, 200) > 0.99
    assert climb("rbnf", 0.001, 0.4, 200) > 0.99
    assert 0.001 < climb("bnf", 0.001, 0.4, 200) < 0.0013


SHARES = st.floats(1e-6, 0.999)


@given(r=st.floats(0.01, 0.99), share=SHARES, less=st.floats(0.01, 0.99))
def test_the_further_a_preferred_token_is_below_the_reference_the_less_bnf_pulls(r, share, less):
    """Less than p/r times what fine-tuning pulls; rbnf holds on with at least r times that."""
    p = r * share
    bnf, lower = (weight("bnf", x, r, True).item() for x in (p, p * less))
    assert lower < bnf <= share * (1 + 1e-9)
    assert weight("rbnf", p, r, True).item() >= r * (1 - 1e-9)
    assert weight("nll", p, r, True).item() == 1


@given(r=st.floats(0.05, 0.95), share=st.floats(0.01, 0.98), preferred=st.booleans())
def test_where_bnfs_feedback_is_negative(r, share, preferred):
    """Moving along the push weakens it for a preferred token above r and a rejected one below r,
    and strengthens it in the other two cases."""
    on = 0.01 * (1 if preferred else -1)
    for above, p in ((False, r * share), (True, 1 - (1 - r) * share)):
        edge = (1 - r) if above else r
        ends = torch.tensor([p, p + on * edge * min(share, 1 - share)], dtype=torch.float64)
        here, moved = feedback("bnf", ends, r, preferred=preferred).tolist()
        assert (moved < here) == (above == preferred)
