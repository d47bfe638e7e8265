import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from minibnf.feedback import feedback
from minibnf.losses import LOSSES
from minibnf.responses import Responses
from tests.strategies import responses

QUICKLY = (Phase.generate, Phase.shrink)


def test_smoothed_dpo_is_what_autograd_finds(exercise):
    @settings(max_examples=50, deadline=None, derandomize=True, database=None, phases=QUICKLY)
    @given(
        batch=responses(paired=True),
        beta=st.sampled_from([0.1, 0.5, 2.0]),
        epsilon=st.sampled_from([0.0, 0.1, 0.3]),
    )
    def check(batch, beta, epsilon):
        logps = batch.logps.clone().requires_grad_()
        shift = batch.sums(logps - batch.ref_logps)
        x = beta * (shift[batch.pairs[:, 0]] - shift[batch.pairs[:, 1]])
        loss = (-(1 - epsilon) * F.logsigmoid(x) - epsilon * F.logsigmoid(-x)).mean()
        (expected,) = torch.autograd.grad(loss, logps)
        ours = exercise.smoothed_dpo_dlogps(batch, beta, epsilon)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)

    check()


def test_both_pushes_on_a_response_in_two_pairs_count(exercise):
    preferred, pairs = torch.tensor([True, False, False]), torch.tensor([[0, 1], [0, 2]])
    logps = torch.tensor([-1.0, -2.0, -0.5, -1.5], dtype=torch.float64)
    batch = Responses(logps, logps - 0.1, torch.tensor([0, 0, 1, 2]), preferred, pairs)
    ours = exercise.smoothed_dpo_dlogps(batch, 0.1, 0.0)
    torch.testing.assert_close(ours, LOSSES["dpo"].gradient(batch, beta=0.1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.01])
def test_margin_left(exercise, share, beta):
    """A rejected token that stands alone in its response, p = r e^-Δ: its dlogps there over its
    dlogps at p = r."""
    r = 0.5
    p = torch.tensor([r, r], dtype=torch.float64)
    p[1] *= torch.exp(torch.tensor(-float(exercise.margin_left(share, beta)), dtype=torch.float64))
    dlogps = feedback("dpo", p, r, False, beta=beta) / (1 - p)
    assert (dlogps[1] / dlogps[0]).item() == pytest.approx(share, rel=1e-6)
