import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from minibnf.losses import LOSSES
from minibnf.responses import Responses
from tests.strategies import responses

QUICKLY = (Phase.generate, Phase.shrink)


def smoothed_by_autograd(batch, beta, epsilon):
    logps = batch.logps.clone().requires_grad_()
    shift = batch.sums(logps - batch.ref_logps)
    x = beta * (shift[batch.pairs[:, 0]] - shift[batch.pairs[:, 1]])
    loss = (-(1 - epsilon) * F.logsigmoid(x) - epsilon * F.logsigmoid(-x)).mean()
    return torch.autograd.grad(loss, logps)[0]


def test_smoothed_dpo_is_what_autograd_finds(exercise):
    @settings(max_examples=50, deadline=None, derandomize=True, database=None, phases=QUICKLY)
    @given(
        batch=responses(paired=True),
        beta=st.sampled_from([0.1, 0.5, 2.0]),
        epsilon=st.sampled_from([0.0, 0.1, 0.3]),
    )
    def check(batch, beta, epsilon):
        ours = exercise.smoothed_dpo_dlogps(batch, beta, epsilon)
        assert ours.shape == batch.logps.shape, "one number per token, not per pair"
        slip = "are both terms' signs right, and the mean over pairs there?"
        expected = smoothed_by_autograd(batch, beta, epsilon)
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12), slip

    check()


def test_both_pushes_on_a_response_in_two_pairs_count(exercise):
    preferred, pairs = torch.tensor([True, False, False]), torch.tensor([[0, 1], [0, 2]])
    logps = torch.tensor([-1.0, -2.0, -0.5, -1.5], dtype=torch.float64)
    batch = Responses(logps, logps - 0.1, torch.tensor([0, 0, 1, 2]), preferred, pairs)
    ours = exercise.smoothed_dpo_dlogps(batch, 0.1, 0.0)
    slip = "response 0 is in two pairs: x[w] = ... keeps one push, index_add adds both"
    expected = LOSSES["dpo"].gradient(batch, beta=0.1)
    assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12), slip


def forward_optimum(ref, R, beta):
    """π with the largest Σ π R - β KL(ref || π): β ref/(λ - R), λ by bisection."""
    low, high = R.max(), R.max() + beta  # Σ π is infinite at the one, at most 1 at the other
    for _ in range(200):
        middle = (low + high) / 2
        if (beta * ref / (middle - R)).sum() > 1:
            low = middle
        else:
            high = middle
    return beta * ref / (high - R)


def test_forward_dpo_is_bradley_terry_of_the_reward_behind_the_optimum(exercise):
    torch.manual_seed(0)
    for beta in (0.5, 2.0):
        ref, R = torch.randn(5).double().softmax(-1), torch.randn(5).double()
        shift = (forward_optimum(ref, R, beta) / ref).log()
        w, l = torch.tensor([[0, 1], [3, 2], [4, 0], [1, 4]]).T  # noqa: E741
        found = exercise.forward_dpo(shift[w], shift[l], beta)
        expected = -F.logsigmoid(R[w] - R[l])
        assert not torch.allclose(found, -F.logsigmoid(R[l] - R[w])), "the sign: R = λ - β π_ref/π"
        plain = -F.logsigmoid(beta * (shift[w] - shift[l]))
        assert not torch.allclose(found, plain), "this is DPO of KL(π || π_ref): the other KL"
        slip = "at the optimum σ(R_w - R_l) comes back: is it e^-shift, and is β there?"
        assert torch.allclose(found, expected, rtol=1e-6), slip
