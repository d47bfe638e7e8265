import pytest
import torch

from minibnf.responses import Responses

HYPER = dict(lr=0.03, betas=(0.9, 0.95), epsilon=1e-3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_step_is_torchs(exercise, weight_decay):
    torch.manual_seed(0)
    p = torch.randn(5, dtype=torch.float64)
    theirs = p.clone().requires_grad_()
    same = {"lr": HYPER["lr"], "betas": HYPER["betas"], "eps": HYPER["epsilon"]}
    optimizer = torch.optim.AdamW([theirs], weight_decay=weight_decay, **same)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    slips = {
        1: "at step 1: are m and v divided by 1 - beta, and is epsilon added outside the root?",
        2: "right at step 1 only: is the correction 1 - beta ** step, of uncorrected m and v?",
    }
    for step in range(1, 6):
        theirs.grad = torch.randn(5, dtype=torch.float64) * 10 ** -float(step)
        before = [x.clone() for x in (p, m, v)]
        new = exercise.adamw_step(p, theirs.grad, m, v, step, weight_decay=weight_decay, **HYPER)
        assert all(map(torch.equal, (p, m, v), before)), "what was passed in was changed in place"
        p, m, v = new
        optimizer.step()
        slip = slips[min(step, 2)]
        if weight_decay:
            slip += " Does p, and not its gradient, shrink by 1 - lr * weight_decay?"
        assert torch.allclose(p, theirs.detach(), rtol=1e-10, atol=1e-12), slip


def batch(shifts):
    """Pairs of a chosen response of two tokens and a rejected one of one token, whose tokens
    shifted so far against a reference of -3 each."""
    logps = torch.tensor([x for pair in shifts for x in pair], dtype=torch.float64) - 3
    count = len(shifts)
    owner = torch.tensor([0, 0, 1] * count) + 2 * torch.arange(count).repeat_interleave(3)
    pairs = torch.arange(2 * count).view(-1, 2)
    preferred = torch.tensor([True, False] * count)
    return Responses(logps, torch.full_like(logps, -3.0), owner, preferred, pairs)


def test_metrics_of_two_pairs_by_hand(exercise):
    """Chosen shifts 0.5 + 0.5 = 1 and -1 + 0 = -1, rejected -2 and 1: margins 3 and -2."""
    found = exercise.pair_metrics(batch([(0.5, 0.5, -2), (-1, 0, 1)]), beta=0.5)
    assert found["rewards/chosen"] == pytest.approx(0.0), "is a response's shift a sum over tokens?"
    assert found["rewards/rejected"] == pytest.approx(-0.25), "is beta there, and the mean?"
    assert found["rewards/margins"] == pytest.approx(0.25), "chosen minus rejected, by pair"
    assert found["rewards/accuracies"] == 0.5, "one of the two margins is above 0"


def test_before_the_first_step_all_pairs_tie(exercise):
    found = exercise.pair_metrics(batch([(0, 0, 0), (0, 0, 0)]), beta=0.1)
    assert found["rewards/accuracies"] == 0, "does a tie count as right? here it counts as wrong"
    assert found["rewards/margins"] == 0, "nothing has shifted yet"
