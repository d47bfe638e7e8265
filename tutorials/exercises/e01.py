"""Exercises of page 01, why preferences: fill in the bodies, then `make exercise N=01`."""

from torch import Tensor


def reward_gap(wins: int, losses: int) -> float:
    """R_1 - R_2 where Bradley-Terry's loss is smallest, if the first of two answers won and lost so
    many votes (both above 0) against the second."""
    raise NotImplementedError


def after_dpo(r: float, wins: int, losses: int, beta: float) -> float:
    """The first answer's probability after DPO on these votes, r being the reference's; there are
    only two answers."""
    raise NotImplementedError


def ppo_dlogps(logps: Tensor, old_logps: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """(N,): dL/dlogps of L = -(1/N) Σ min(ρ A, clip(ρ, 1 - ε, 1 + ε) A), ρ = exp(logps -
    old_logps), by hand."""
    raise NotImplementedError
