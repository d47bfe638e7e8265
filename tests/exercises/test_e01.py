import pytest
import torch
import torch.nn.functional as F

VOTES = [(15, 5), (19, 1), (4, 6)]


def trained(loss, x, rate, steps=1000):
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x)
        x = x - rate * gradient
    return x.detach()


def votes_loss(gap, wins, losses):
    return -(wins * F.logsigmoid(gap) + losses * F.logsigmoid(-gap)) / (wins + losses)


@pytest.mark.parametrize("wins, losses", VOTES)
def test_reward_gap(exercise, wins, losses):
    zero = torch.zeros((), dtype=torch.float64)
    found = trained(lambda gap: votes_loss(gap, wins, losses), zero, rate=4.0).item()
    predicted = exercise.reward_gap(wins, losses)
    slip = "is it the logarithm of wins over losses, not of the share of wins?"
    assert predicted == pytest.approx(found, abs=1e-6), f"training ends at {found:.4f}; {slip}"


@pytest.mark.parametrize("r", [0.5, 0.1])
@pytest.mark.parametrize("wins, losses", VOTES)
def test_predict_then_train(exercise, wins, losses, r):
    ref = torch.tensor([r, 1 - r], dtype=torch.float64).log()
    beta = 2.0

    def dpo(z):
        first, second = beta * (z.log_softmax(-1) - ref)
        return votes_loss(first - second, wins, losses)

    found = trained(dpo, ref, rate=0.5).softmax(-1)[0].item()
    predicted = exercise.after_dpo(r, wins, losses, beta)
    slips = "does the prediction start from r's odds, and is the gap divided by β?"
    assert predicted == pytest.approx(found, abs=1e-5), f"training ends at {found:.4f}; {slips}"


def test_ppo_dlogps(exercise):
    ratio = torch.tensor([1.0, 1.1, 1.5, 0.5, 1.5, 0.5, 0.9], dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 1.0, 1.0, -1.0, -1.0, 0.0], dtype=torch.float64)
    old = torch.full_like(ratio, -2.0)
    logps = (old + ratio.log()).requires_grad_()
    rho = (logps - old).exp()
    clipped = rho.clamp(0.8, 1.2)
    loss = -torch.minimum(rho * advantages, clipped * advantages).mean()
    (expected,) = torch.autograd.grad(loss, logps)
    found = exercise.ppo_dlogps(logps.detach(), old, advantages, 0.2)
    assert found.shape == expected.shape, f"one number per token, not {tuple(found.shape)}"
    slips = {
        0: "at ρ = 1 it is -A/N: is the mean over tokens there?",
        1: "inside the clip it is -ρ A/N: is ρ there? d ρ/d log p = ρ",
        2: "A > 0 and ρ above 1 + ε: the clipped term is the smaller one, and it is constant",
        3: "A > 0 and ρ below 1 - ε: the unclipped term is the smaller one, so -ρ A/N",
        4: "A < 0 and ρ above 1 + ε: the unclipped term is the smaller one, so -ρ A/N",
        5: "A < 0 and ρ below 1 - ε: the clipped term is the smaller one, and it is constant",
        6: "without an advantage there is no push",
    }
    for i, slip in slips.items():
        assert found[i].item() == pytest.approx(expected[i].item(), abs=1e-12), slip
